"""Exports a checkpoint to ONNX by transformers' own exporter, and checks it under ONNX Runtime. Extra: `[onnx]`."""

import io
import logging as python_logging
import os
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .. import logging
from ..extras import optional_import
from ..files import new_folder
from ..modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from .checkpoints import load_for_scoring

TOLERANCE = 1e-4
# Pairs, tokens and regions: of the sample that is traced, and of the batches that are compared, the last by time, too.
SAMPLE = (3, 7, 5)
CHECKED = [(1, 4, 1), (2, 44, 36), (16, 20, 36)]
REPEATED = 5


@dataclass(frozen=True)
class OnnxExport:
    """
    An export that was checked.

    Attributes:
        folder (`Path`): The folder of `model.onnx`, its weights and the processor.
        num_bytes (`int`): The size of graph and weights.
        difference (`float`): The largest difference of a score from PyTorch's, over `CHECKED`.
        seconds, seconds_of_torch (`float`): The time of the last batch of `CHECKED` by either, the shortest of a few.
    """

    folder: Path
    num_bytes: int
    difference: float
    seconds: float
    seconds_of_torch: float

    def __str__(self) -> str:
        pairs, tokens, regions = CHECKED[-1]
        return (
            f"{self.folder}: {self.num_bytes / 2**20:.1f} MiB. Scores differ from PyTorch's by at most "
            f"{self.difference:.1e}. A batch of {pairs} pairs, {tokens} tokens and {regions} regions takes "
            f"{self.seconds * 1000:.0f} ms by ONNX Runtime, {self.seconds_of_torch * 1000:.0f} ms by PyTorch."
        )


def export_onnx(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> OnnxExport:
    """
    Exports the scores of a checkpoint to ONNX, with any number of pairs, tokens and regions. The inputs of the graph
    are what the processor makes, its output `scores` `(num_pairs,)`, float32.

    Args:
        model (`str` or `os.PathLike`): A checkpoint of pre-training or retrieval, with its processor.
        output (`str` or `os.PathLike`): A new folder.

    Raises:
        `ValueError`: `output` exists, the checkpoint has no trained matching head, or the graph gives other scores
            than PyTorch at a shape of `CHECKED`.
        `ImportError`: a library is missing, or transformers is too old.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        optional_import(library, "onnx")
    from transformers.exporters import base
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    if not hasattr(base, "ExportedModel"):
        raise ImportError(f"The export needs transformers 5.24 or newer, not {transformers.__version__}.")

    loaded, processor = load_for_scoring(model)
    sample: Any = _batch(loaded, *SAMPLE)
    pairs, regions = torch.export.Dim("pairs", min=1), torch.export.Dim("regions", min=1)
    tokens = torch.export.Dim("tokens", min=2, max=loaded.config.max_position_embeddings)
    axes = {name: {0: pairs, 1: regions if name.startswith("region") else tokens} for name in sample}
    python_logging.getLogger("torch.onnx").setLevel("ERROR")  # which warns of every operator that it has twice
    with new_folder(output) as folder, logging.without_warnings_of_transformers():
        with redirect_stdout(io.StringIO()):  # its steps
            exported = OnnxExporter().export(loaded, sample, OnnxConfig(dynamic_shapes=axes))
        exported.save_pretrained(folder)
        processor.save_pretrained(folder)
        checked = _check(loaded, folder)
    return OnnxExport(Path(output), *checked)


def _check(model: UnicoderVLForImageTextRetrieval, folder: Path) -> tuple[int, float, float, float]:
    """Compares the graph with the model. Raises ValueError where they differ by more than `TOLERANCE`."""
    runtime = optional_import("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    differences = []
    for shape in CHECKED:
        batch = _batch(model, *shape)
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        ours, seconds_of_torch = _timed(lambda batch=batch: model(**batch).scores.numpy())
        found, seconds = _timed(lambda arrays=arrays: session.run(["scores"], arrays)[0])
        if found.shape != ours.shape or not (difference := float(np.abs(found - ours).max())) <= TOLERANCE:
            raise ValueError(f"The graph gives {found} for a batch of {shape}, PyTorch {ours}: it is not kept.")
        differences.append(difference)
    num_bytes = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    return num_bytes, max(differences), seconds, seconds_of_torch


@torch.inference_mode()
def _timed(compute: Any) -> tuple[np.ndarray, float]:
    """Gives a result, and the shortest time that it took."""
    times = []
    for _ in range(REPEATED):
        started = time.perf_counter()
        result = compute()
        times.append(time.perf_counter() - started)
    return result, min(times)


def _batch(model: UnicoderVLForImageTextRetrieval, pairs: int, tokens: int, regions: int) -> dict[str, torch.Tensor]:
    """Makes a batch of random inputs, with padding where there is room for it."""
    generator, config = torch.Generator().manual_seed(0), model.config
    tokens = min(tokens, config.max_position_embeddings)

    def mask(length: int) -> torch.Tensor:
        counts = torch.randint(1, length + 1, (pairs, 1), generator=generator)
        counts[0] = length
        return (torch.arange(length) < counts).long()

    return {
        "input_ids": torch.randint(config.vocab_size, (pairs, tokens), generator=generator),
        "token_type_ids": torch.zeros(pairs, tokens, dtype=torch.long),
        "attention_mask": mask(tokens),
        "region_features": torch.randn(pairs, regions, config.region_feature_dim, generator=generator),
        "region_locations": torch.rand(pairs, regions, config.region_location_dim, generator=generator),
        "region_attention_mask": mask(regions),
    }

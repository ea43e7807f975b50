"""A look into any folder of weights: a model of ours, a sister that could be imported, or something else."""

import json
from collections import Counter
from os import PathLike
from typing import Any

from ..configuration_unicoder_vl import UnicoderVLConfig
from ..processing_unicoder_vl import UnicoderVLProcessor
from .importing import REPORT, account_for, make_report, summary
from .reading import Source, find_source

FACTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings",
    "region_embedding", "region_feature_dim", "num_region_classes", "projection_dim",
)  # fmt: skip


def inspect_checkpoint(name: str | PathLike[str], revision: str | None = None) -> str:
    """
    Describes a checkpoint in words: what it is, its sizes, heads and regions, and what an import would make of it.

    Args:
        name (`str` or `os.PathLike`): A folder, a file of weights, or a repository of the Hub.
        revision (`str`, *optional*): Branch, tag or commit of the repository.

    Raises:
        `ValueError`: there are no weights, or a file is damaged.
    """
    source = find_source(name, revision)
    if source.config.get("model_type") == UnicoderVLConfig.model_type:
        return _describe_ours(source)
    try:
        return f"{summary(make_report(account_for(source)))}\nunicoder-vl import-checkpoint {name} FOLDER"
    except ValueError as error:
        return f"{error}\n{_parts(source)}"


def _describe_ours(source: Source) -> str:
    config = UnicoderVLConfig.from_pretrained(source.folder)
    lines = [f"{source.name}: Unicoder-VL, saved by {', '.join(config.architectures or ['an unknown class'])}"]
    lines += [f"  {field}: {value}" for field in FACTS if (value := getattr(config, field)) is not None]
    if (source.folder / "processor_config.json").exists():
        processor = UnicoderVLProcessor.from_pretrained(source.folder)
        provenance: dict[str, Any] = processor.feature_extractor.region_provenance or {}
        known = {
            field: value
            for field, value in provenance.items()
            if value not in (None, [], {}) and field != "class_names"
        }
        lines.append(f"  tokens: {len(processor.tokenizer):,}")
        lines += [f"  regions, {field}: {value}" for field, value in known.items()]
    report = source.folder / REPORT
    if report.exists():
        lines.append(f"imported, {summary(json.loads(report.read_text(encoding='utf-8')))}")
    return "\n".join([*lines, _parts(source)])


def _parts(source: Source) -> str:
    """Counts the numbers in each part of a checkpoint, named by the beginning of its keys."""
    sizes: Counter[str] = Counter()
    for key, tensor in source.tensors().items():
        sizes[".".join(key.split(".")[:-1][:2])] += tensor.numel()
    return "\n".join(f"  {part}.*: {size:,}" for part, size in sizes.items())

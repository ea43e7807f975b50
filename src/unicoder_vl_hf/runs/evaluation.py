"""The beginning of every evaluation on captions: loading a checkpoint, and captions joined with their regions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.captions import check_tokens, join, read_captions
from ..files import write_json
from ..modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from ..processes import resolve_precision
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..regions.store import RegionStore
from ..scoring.checkpoints import load_for_store
from ..shares import Share
from .arguments import option
from .batches import Collator, compute_logits


def precision_option() -> Any:
    """Makes the field of an evaluation's precision, see [`evaluation_dtype`]."""
    return option("no", "Precision of the computation: auto, no (float32), bf16 or fp16.")


def evenly(total: int, most: int) -> range:
    """Gives at most `most` of the numbers below `total`, at even steps from the first."""
    return range(0, total, max(1, total // most))[:most]


@dataclass(kw_only=True)
class EvaluationArguments:
    """Names a checkpoint, and the captions and regions that it is evaluated on."""

    model: str = option(..., "Checkpoint with its processor: a folder or a repository of the Hub.")
    captions: str = option(..., "Caption file in any layout that read_captions reads.")
    regions: str = option(..., "RegionStore of the images.")
    split: str | None = option("test", "Split of the captions to evaluate on.")
    caption_ids: str | None = option(
        None, "Other ids for the captions' images: stem, coco, a .csv, or CAPTIONS:COLUMN."
    )
    mixed_precision: str = precision_option()

    def open_data(self) -> tuple[RegionStore, datasets.Dataset]:
        """
        Opens the regions, and reads the captions of the split.

        Raises:
            `ValueError`: a caption has no regions, or a file has a fault.
        """
        store = RegionStore(self.regions)
        captions, _ = join(
            read_captions(self.captions, split=self.split, ids=self.caption_ids), store, skip_option=None
        )
        return store, captions

    def load_scoring(
        self, store: RegionStore, captions: datasets.Dataset
    ) -> tuple[UnicoderVLForImageTextRetrieval, UnicoderVLProcessor]:
        """
        Loads a model that scores pairs of these captions and regions, with its processor.

        Raises:
            `ValueError`: the checkpoint scores no pairs or does not fit the regions, or a caption has no token.
        """
        model, processor = load_for_store(self.model, store)
        check_tokens(captions, processor.tokenizer, self.captions)
        return model, processor


@dataclass(kw_only=True)
class TaskEvaluationArguments:
    """Names a checkpoint of a task and the regions of its images, and says how texts about them are measured."""

    model: str = option(..., "Checkpoint of the task with its processor: a folder or a repository of the Hub.")
    regions: str = option(..., "RegionStore of the images.")
    image_ids: str | None = option(None, "Other ids for the images: stem, coco, a .csv, or CAPTIONS:COLUMN.")
    mixed_precision: str = precision_option()
    max_length: int = option(44, "Most tokens of a text; longer ones are cut.")
    batch_size: int = option(64, "Texts at a time, in each process.")
    output: str | None = option(None, "JSON file that the metrics are written to.")

    def joined(self, rows: datasets.Dataset, store: RegionStore, texts: str) -> datasets.Dataset:
        """Checks that every image of rows has regions. Raises ValueError, with its `texts`, where one has none."""
        return join(rows, store, skip_option=None, texts=texts, renamed_by="--image_ids")[0]

    def length_for(self, model: PreTrainedModel) -> int:
        """Gives the most tokens of a text that a model takes here."""
        return min(self.max_length, model.config.max_position_embeddings)

    def logits(self, model: PreTrainedModel, collator: Collator, rows: datasets.Dataset, name: str) -> np.ndarray:
        """Computes the logits of rows in the precision of the evaluation, see [`compute_logits`]."""
        with evaluation_precision(self.mixed_precision, model):
            return compute_logits(model, collator, rows, name=name, batch_size=self.batch_size)


@dataclass(kw_only=True)
class PictureArguments:
    """Says what an evaluation draws."""

    pictures: str | None = option(None, "Folder for pictures of some rows, with --photos.")
    photos: str | None = option(None, "Photos of the images, as `unicoder-vl extract` takes them.")
    photo_ids: str = option("stem", "Source of the photos' ids, as --ids of `unicoder-vl extract`.")
    num_pictures: int = option(8, "Rows that are drawn, evenly over all that are measured together.")

    def __post_init__(self):
        if (self.pictures is None) != (self.photos is None):
            raise ValueError("Give both --pictures and --photos, or neither.")


@dataclass(kw_only=True)
class KeptScoresArguments:
    """Says where an evaluation keeps its scores, and which share of them it computes."""

    scores_dir: str | None = option(None, "Folder that keeps the scores, to go on after a kill.")
    share: str | None = option(
        None, "Share I/N of the scores, from 0/N on, that is computed alone into --scores_dir, as a task of an array."
    )
    gather: int | None = option(
        None, "Number N of the shares whose scores are put together and evaluated; those that are missing are named."
    )

    def share_of_scores(self) -> Share | None:
        """
        Reads the share; None where all that is left is scored.

        Raises:
            `ValueError`: it is none, or there is no folder in which shares meet.
        """
        share = Share.of_options(self.share, self.gather)
        if share is not None and self.scores_dir is None:
            raise ValueError(f"--{share}: shares meet in a folder; give --scores_dir.")
        return share


def write_metrics(args: Any, metrics: dict[str, Any]) -> None:
    """Writes metrics, with the arguments of the evaluation, to the file that these name as `output`, if any."""
    if args.output is not None:
        write_json(Path(args.output), metrics | asdict(args))


def evaluation_dtype(mixed_precision: str, model: PreTrainedModel) -> torch.dtype | None:
    """
    Gives the dtype in which a model is evaluated, None for its own.

    Args:
        mixed_precision (`str`): `"auto"`, `"no"`, `"bf16"` or `"fp16"`, see [`resolve_precision`].
        model ([`PreTrainedModel`]): The model, on its device.
    """
    precision = resolve_precision(mixed_precision, model.device.type, model.config.hidden_size)
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@contextmanager
def evaluation_precision(mixed_precision: str, model: PreTrainedModel) -> Iterator[None]:
    """Runs a block in a precision, for models that compute under autocast. Arguments are of [`evaluation_dtype`]."""
    dtype = evaluation_dtype(mixed_precision, model)
    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        yield

"""What detectors of several families compute alike."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from ...records_unicoder_vl import RegionRecord

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prepared(NamedTuple):
    """A photo as a detector takes it: `size` is its width and height, `content` its height and width in `pixels`."""

    pixels: Tensor
    size: tuple[int, int]
    content: tuple[int, int]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of mixed precision, `"no"`, `"bf16"` or `"fp16"`."""
    return nullcontext() if precision == "no" else torch.autocast(device.type, DTYPES[precision])


def in_groups_of_shape(images: Sequence[Tensor], compute: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
    """
    The results of `compute(indices)`, called for images of equal shape together, in the order of `images`.

    Never padded: with padding, what a photo gives would depend on those beside it, since a network whose convolutions
    have biases sees the padding.
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    results: list[Any] = [None] * len(images)
    for indices in groups.values():
        for index, result in zip(indices, compute(indices), strict=True):
            results[index] = result
    return results


def box_tensor(image_id: str, boxes: np.ndarray, device: torch.device) -> Tensor:
    """Given boxes, `(n, 4)` float32, on the device. Raises ValueError, naming the image, on another shape."""
    corners = torch.tensor(np.ascontiguousarray(boxes), dtype=torch.float32, device=device)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"Image {image_id!r}: boxes have shape {tuple(corners.shape)}, expected (n, 4).")
    return corners


def make_record(
    image_id: str,
    size: tuple[int, int],
    boxes: Tensor,
    features: Tensor,
    object_ids: Tensor | None = None,
    object_scores: Tensor | None = None,
) -> RegionRecord:
    """A record from tensors of any device; boxes are clipped to the photo, whose `size` is width and height."""
    width, height = size
    return RegionRecord(
        image_id,
        image_width=width,
        image_height=height,
        boxes=boxes.float().cpu().numpy().clip(0, (width, height, width, height)),
        features=features.float().cpu().numpy(),
        object_ids=None if object_ids is None else object_ids.cpu().numpy(),
        object_scores=None if object_scores is None else object_scores.float().cpu().numpy(),
    )


def select(scores: Tensor, score_threshold: float, min_regions: int, max_regions: int) -> Tensor:
    """Indices of the regions to keep, best first: those above the threshold, but at least and at most so many."""
    order = scores.argsort(descending=True, stable=True)
    count = int((scores > score_threshold).sum())
    return order[: min(max(count, min_regions), max_regions)]


def check_counts(min_regions: int, max_regions: int) -> None:
    """Raises ValueError where no number of regions could satisfy both."""
    if not 1 <= min_regions <= max_regions:
        raise ValueError(f"min_regions is {min_regions} and max_regions {max_regions}, expected 1 <= min <= max.")


@contextmanager
def fetching(family: str, name: str) -> Iterator[None]:
    """
    Says of a model that the block cannot load where it was looked for, and what to do without the Hub.

    Raises:
        OSError: In place of that of the block.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0].partition(" Use `repo_type`")[0].rstrip(".")
        if Path(name).is_dir():
            raise OSError(f"{family}:{name} cannot be loaded from this folder: {reason}.") from error
        try:
            huggingface_hub.utils.validate_repo_id(name)
        except huggingface_hub.errors.HFValidationError:
            raise OSError(
                f"{family}:{name} cannot be had: there is no folder {Path(name).absolute()}, and no repository of the "
                "Hub has such a name."
            ) from error
        raise OSError(
            f"{family}:{name} cannot be had: there is no folder {Path(name).absolute()}, the cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE} lacks it, and the Hub did not give it ({reason}). Where the Hub "
            f"can be reached, `hf download {name} --local-dir FOLDER`; bring the folder here, and give --detector "
            f"{family}:FOLDER."
        ) from error


def check_loaded(name: str, info: dict[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Raises ValueError where `from_pretrained` left weights random, but for modules that are not read."""
    missing = [key for key in info["missing_keys"] if not any(module in key for module in unused)]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}: it is another model.")


def model_revision(name: str, config: PretrainedConfig) -> str | None:
    """The commit of a model of the Hub, or the content of a folder's weights; None where neither is known."""
    weights = Path(name) / "model.safetensors"
    return file_revision(weights) if weights.is_file() else vars(config).get("_commit_hash")


def file_revision(path: str | PathLike) -> str:
    """The content of a file of weights in a few characters, for the provenance."""
    with Path(path).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

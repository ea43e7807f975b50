"""Computing that detectors of several families share."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from ...name_lists import did_you_mean, hub_options
from ...records_unicoder_vl import RegionRecord

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prepared(NamedTuple):
    """
    A photo in the form that a detector takes: `size` is its width and height, `content` its height and width in
    `pixels`.
    """

    pixels: Tensor
    size: tuple[int, int]
    content: tuple[int, int]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Gives the context of mixed precision, `"no"`, `"bf16"` or `"fp16"`."""
    return nullcontext() if precision == "no" else torch.autocast(device.type, DTYPES[precision])


def in_groups_of_shape(
    compute: Callable[..., Sequence[Any]], photos: Sequence[Prepared], *columns: Sequence[Any] | None
) -> list[Any]:
    """
    Calls `compute(photos, *columns)` for the photos whose pixels have equal shapes together, with their parts of the
    columns, and gives the results in the order of the photos.

    Photos are never padded: a network whose convolutions have biases sees the padding, so that the result of a photo
    would depend on the photos beside it.
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, photo in enumerate(photos):
        groups.setdefault(photo.pixels.shape, []).append(index)
    results: list[Any] = [None] * len(photos)
    for indices in groups.values():
        parts = [None if column is None else [column[index] for index in indices] for column in (photos, *columns)]
        for index, result in zip(indices, compute(*parts), strict=True):
            results[index] = result
    return results


def box_tensor(image_id: str, boxes: np.ndarray, device: torch.device) -> Tensor:
    """Puts given boxes, `(n, 4)` float32, on the device. Raises ValueError, naming the image, on another shape."""
    corners = torch.tensor(np.ascontiguousarray(boxes), dtype=torch.float32, device=device)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"Image {image_id!r}: boxes have shape {tuple(corners.shape)}, expected (n, 4).")
    return corners


def make_record(
    image_id: str, size: tuple[int, int], boxes: Tensor, features: Tensor, **labels: Tensor | np.ndarray | None
) -> RegionRecord:
    """
    Makes a record from tensors on any device, with `labels` as further fields. Boxes are clipped to the photo, whose
    `size` is width and height.
    """
    width, height = size
    return RegionRecord(
        image_id,
        image_width=width,
        image_height=height,
        boxes=boxes.float().cpu().numpy().clip(0, (width, height, width, height)),
        features=features.float().cpu().numpy(),
        **{name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in labels.items()},
    )


def select(scores: Tensor, score_threshold: float, min_regions: int, max_regions: int) -> Tensor:
    """
    Gives the indices of the regions to keep, best first: those that score above the threshold, but at least
    `min_regions` and at most `max_regions`.
    """
    order = scores.argsort(descending=True, stable=True)
    count = int((scores > score_threshold).sum())
    return order[: min(max(count, min_regions), max_regions)]


def check_counts(min_regions: int, max_regions: int) -> None:
    """Raises ValueError where no number of regions could satisfy both limits."""
    if not 1 <= min_regions <= max_regions:
        raise ValueError(f"min_regions is {min_regions} and max_regions {max_regions}, expected 1 <= min <= max.")


@contextmanager
def fetching(family: str, name: str, *others: str) -> Iterator[dict[str, Any]]:
    """
    Gives the block `hub_options` of a model to load. Raises a clear OSError where the block cannot load it: it says
    where the model was looked for, and what to do without the Hub; and asks whether a folder here, or one of the other
    names of the family, was meant.

    Raises:
        OSError: The block raised OSError; this one replaces it.
        ValueError: The block raised ValueError, such as that of transformers for a model of another kind, or
            SafetensorError for a damaged file, which name no model; or the name is that of a folder that is not there.
    """
    options: dict[str, Any] = {}
    try:
        options = hub_options(name)
        yield options
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{family}:{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    except OSError as error:
        reason = str(error).splitlines()[0].partition(" Use `repo_type`")[0].rstrip(".")
        if Path(name).is_dir():
            raise OSError(f"{family}:{name} cannot be loaded from this folder: {reason}.") from error
        hub = "cannot be reached" if options else f"did not give it ({reason})"
        raise OSError(
            f"{family}:{name} cannot be loaded: there is no folder {Path(name).absolute()}, the cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE} lacks it, and the Hub {hub}. Where the Hub can be reached, "
            f"`hf download {name} --local-dir FOLDER`; bring the folder here, and give --detector {family}:FOLDER."
            f"{did_you_mean(name, (*others, *(each.name for each in Path().iterdir())))}"
        ) from error


def check_loaded(name: str, info: dict[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Raises ValueError where `from_pretrained` left weights random, except those of modules in `unused`."""
    missing = [key for key in info["missing_keys"] if not any(module in key for module in unused)]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}: it is another model.")


def model_revision(name: str, config: PretrainedConfig) -> str | None:
    """Gives the commit of a model of the Hub, or a hash of a folder's weights; None where neither is known."""
    weights = Path(name) / "model.safetensors"
    return file_revision(weights) if weights.is_file() else vars(config).get("_commit_hash")


def file_revision(path: str | PathLike) -> str:
    """Gives the hash of a file of weights in a few characters, for the provenance."""
    with Path(path).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

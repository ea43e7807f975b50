"""
Detectors, which find regions in photos: one small interface, and one module a family.

A detector is named `family:name`, where the name is a folder, a Hub repository or, for torchvision, a model; or
`module:Class`, a class of anybody's that has the interface. Nothing outside this room imports torchvision.
"""

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ... import logging
from ...extras import optional_import
from ...name_lists import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from ...records_unicoder_vl import RegionRecord

# Each module has `load(name, *, device, precision, **its own options) -> Detector`, and is imported when needed.
FAMILIES = {
    "visual-genome": "visual_genome",
    "torchvision": "torchvision_models",
    "transformers": "transformers_models",
    "grid": "grid",
}


class Detector(Protocol):
    """
    A function from photos to records. Reading processes call `prepare`, the process that owns the device calls the
    detector.
    """

    provenance: dict[str, Any]
    """
    Keyword arguments of `RegionStoreWriter`: detector, detector_revision, box_type, thresholds, class_names, …
    `load_detector` adds detector_options.
    """

    prepare: "Callable[[Image], Any]"
    """Turns an RGB photo into CPU tensors that are small to send between processes; picklable, without the model."""

    def __call__(
        self, prepared: Sequence[Any], image_ids: Sequence[str], boxes: "Sequence[np.ndarray] | None" = None
    ) -> "list[RegionRecord]":
        """
        Gives the records of some photos, in their order, boxes in pixels of the photo. The record of a photo does not
        depend on the other photos.

        Args:
            prepared (sequence): Results of `prepare`, for photos of any sizes.
            image_ids (sequence of `str`): Ids of the photos.
            boxes (sequence of `np.ndarray` of shape `(n, 4)`, *optional*): Given boxes in pixels, x1 y1 x2 y2: features
                are pooled in these, and nothing is detected. A detector that cannot do so raises ValueError.
        """
        ...


def split_name(name: str) -> tuple[str, str]:
    """
    Splits a detector's name into family and model, or module and class. Raises ValueError where there is no such
    family, and no such module.
    """
    family, _, model = name.partition(":")
    if not model or (family not in FAMILIES and not _is_module(family)):
        meant = "" if family in FAMILIES else did_you_mean(family, FAMILIES)
        raise ValueError(
            f"The detector is {name!r}, expected FAMILY:NAME, where FAMILY is one of {list(FAMILIES)}, or MODULE:CLASS "
            f"with a module that Python can import (PYTHONPATH names its folder).{meant}"
        )
    return family, model


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a package above it is missing, or the name is none of a module
        return False


def load_detector(
    name: str, *, device: "torch.device | str | None" = None, precision: str = "auto", **options: Any
) -> Detector:
    """
    Loads a detector by name.

    Args:
        name (`str`): `family:name`, such as `"torchvision:fasterrcnn_resnet50_fpn_v2"`, `"visual-genome:DIR"`,
            `"transformers:facebook/detr-resnet-50"` or `"grid:facebook/dinov2-base"`; or `"module:Class"`, a class with
            the interface of [`Detector`], which is called with `device`, `precision` and the options.
        device (`torch.device` or `str`, *optional*): Device to compute on; None takes a GPU if there is one.
        precision (`str`, defaults to `"auto"`): `"no"`, `"bf16"` or `"fp16"`; `"auto"` takes the one that the device is
            fast in.
        options: Options of the family, such as `max_regions=36` or `grid_size=14`.

    Raises:
        ValueError: There is no such family, class or option; the message lists the known ones.
        ImportError: A library is missing; the message names the extra that brings it.
    """
    import torch

    from ...processes import resolve_precision

    family, model = split_name(name)
    if family in FAMILIES:
        for library in ("PIL", "torchvision"):
            optional_import(library, "detection")
        load: Any = partial(importlib.import_module(f".{FAMILIES[family]}", __name__).load, model)
    elif (load := vars(importlib.import_module(family)).get(model)) is None:
        raise ValueError(f"The detector is {name!r}, but the module {family} has no {model}.")
    parameters = inspect.signature(load).parameters
    known = sorted(set(parameters) - {"device", "precision"})
    unknown = sorted({"device", "precision", *options} - set(parameters))
    if unknown and inspect.Parameter.VAR_KEYWORD not in (parameter.kind for parameter in parameters.values()):
        if family not in FAMILIES and {"device", "precision"} & set(unknown):
            raise ValueError(
                f"{name} is no detector: it takes no {' and no '.join(unknown)}, see docs/own_detector.md."
            )
        raise ValueError(f"{family} detectors have no option {', '.join(unknown)}; their options are {known}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    with logging.without_warnings_of_transformers():  # of weights that a detector has no use for
        try:
            detector = load(device=device, precision=resolve_precision(precision, device.type), **options)
        except TypeError as error:
            raise ValueError(f"{name} cannot be loaded with the options {options}: {error}.") from error
    if family not in FAMILIES:
        if lacking := {"provenance", "prepare", "__call__"} - set(dir(detector)):
            raise ValueError(
                f"{name} is no detector: it lacks {' and '.join(sorted(lacking))}, see docs/own_detector.md."
            )
        detector.provenance["detector"] = name  # by which a checkpoint finds it again
    detector.provenance["detector_options"] = json.loads(json.dumps(options, default=os.fspath))
    return detector

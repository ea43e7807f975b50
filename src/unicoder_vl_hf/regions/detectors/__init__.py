"""
From photos to regions: one small interface, and one module a family of detectors.

A detector is named `family:name`, where the name is a folder, a Hub repository or, for torchvision, a model. Nothing
outside this room imports torchvision.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...feature_extraction_unicoder_vl import RegionRecord


class Detector(Protocol):
    """Photos → records. Reading processes call `prepare`, the process that owns the device calls the detector."""

    provenance: dict[str, Any]
    """Keyword arguments of `RegionStoreWriter`: detector, detector_revision, box_type, thresholds, class_names, …"""

    def prepare(self, image: "Image") -> Any:
        """One RGB photo as CPU tensors, small enough to send between processes; picklable, no device, no model."""
        ...

    def __call__(
        self, prepared: Sequence[Any], image_ids: Sequence[str], boxes: Sequence[np.ndarray] | None = None
    ) -> "list[RegionRecord]":
        """
        The records of some photos, in their order, boxes in pixels of the photo.

        Args:
            prepared (sequence): What `prepare` gave, of photos of any sizes.
            image_ids (sequence of `str`): Their ids.
            boxes (sequence of `np.ndarray` of shape `(n, 4)`, *optional*): Given boxes in pixels, x1 y1 x2 y2: features
                are pooled there, and nothing is detected. A detector that cannot raises ValueError.
        """
        ...

"""
Extracts the colours of photos, as a script of two_processes.py. Its arguments are those of `extract`; `computed`, whose
`<computed>-<rank>` gets the ids of what a process computes; and `delay`, the seconds that a photo takes.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn

from unicoder_vl_hf.regions.detectors.grid import GridDetector, Prepare
from unicoder_vl_hf.regions.extraction import extract


class ColourDetector(GridDetector):
    """Mean red, green and blue of the photo and of its quarters, 0 to 1; tells `computed` of each photo it sees."""

    def __init__(self, computed: Path | None = None, delay: float = 0):
        super().__init__(
            nn.Identity(),
            Prepare(64, (0.0,) * 3, (1.0,) * 3),
            device=torch.device("cpu"),
            grid_size=2,
            detector="colours",
        )
        self.computed = computed
        self.delay = delay

    def __call__(self, prepared, image_ids, boxes=None):
        time.sleep(self.delay * len(image_ids))
        records = super().__call__(prepared, image_ids, boxes)
        if self.computed is not None:
            with self.computed.open("a") as file:
                file.writelines(f"{image_id}\n" for image_id in image_ids)
        return records


def main(call: dict) -> None:
    rank = os.environ.get("RANK", 0)
    detector = ColourDetector(Path(f"{call.pop('computed')}-{rank}"), call.pop("delay", 0))
    extract(detector=detector, **call)

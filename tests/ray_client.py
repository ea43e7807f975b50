"""
Extracts photos on Ray by a convolution, as a script of two_processes.py. Its arguments are those of `extract`, and
`environment`.
"""

import os
import time
from pathlib import Path

import torch

from unicoder_vl_hf.regions.detectors.grid import GridDetector, Prepare
from unicoder_vl_hf.regions.extraction import extract


class Telling(Prepare):
    """Prepares photos, and tells `decoders` of the process that does so."""

    decoders: Path | None = None

    def __call__(self, image):
        if self.decoders is not None:
            (self.decoders / str(os.getpid())).touch()
        return super().__call__(image)


class Convolution(GridDetector):
    """
    Features of a convolution with fixed weights. Tells `log`, a folder, of each process that decodes, and of each that
    detects with the photos that it sees. A photo takes `delay` seconds, and fails from `fails_from` on, by its name.
    """

    def __init__(self, *, device, precision, log: str | None = None, delay: float = 0, fails_from: str = "~"):
        encoder = torch.nn.Conv2d(3, 8, 3, stride=2)
        with torch.no_grad():
            for number, parameter in enumerate(encoder.parameters()):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + number).reshape(parameter.shape))
        prepare = Telling(64, (0.5,) * 3, (0.5,) * 3)
        super().__init__(encoder, prepare, device=device, precision=precision, grid_size=2)
        self.log = None if log is None else Path(log)
        self.delay = delay
        self.fails_from = fails_from
        if log is not None:
            prepare.decoders = Path(log, "decoders")
            for kind in ("decoders", "detectors"):
                Path(log, kind).mkdir(parents=True, exist_ok=True)

    def __call__(self, prepared, image_ids, boxes=None):
        if self.log is not None:
            with (self.log / "detectors" / str(os.getpid())).open("a") as file:
                file.writelines(f"{image_id}\n" for image_id in image_ids)
        time.sleep(self.delay * len(image_ids))
        if max(image_ids) >= self.fails_from:
            raise RuntimeError("out of memory")
        return super().__call__(prepared, image_ids, boxes)


def main(call: dict) -> None:
    os.environ |= call.pop("environment")
    extract(**call)

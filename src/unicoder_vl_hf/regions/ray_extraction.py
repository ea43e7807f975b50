"""
Extraction on Ray: detectors, each an actor on a GPU where there is one, extract shares of the photos, which tasks on
any CPU of the cluster decode for them. Ray Data hands the shares out, and once more where a process was killed.

A share is of the same photos in each run, and is written as the local extraction writes a part.
"""

import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from logging import ERROR, getLogger
from typing import Any

import ray
import ray.data
import torch

from .. import logging
from ..shares import Share
from .detectors import Detector, load_detector
from .finding import ReadPhoto, default_batch_size
from .parts import Work, detected, share_name

# Each detector has this many tasks decode photos ahead of it, and each task decodes this many. The largest photos take
# some 10 MB each when they are prepared.
TASKS_AHEAD, PHOTOS_A_TASK = 8, 4


def extract_on_ray(
    work: Work,
    left: Sequence[int],
    share_size: int,
    detector: str | Detector,
    options: dict[str, Any],
    device: torch.device | str | None = None,
    detectors: int | None = None,
) -> None:
    """
    Extracts photos on the cluster that `RAY_ADDRESS` names, or on this machine, with a progress bar.

    Args:
        work (`Work`): All photos of the job, and how they are extracted. Each process must see its folder.
        left (sequence of `int`): The photos that are left to extract.
        share_size (`int`): Number of photos in a share, which are those that follow one another.
        detector (`str` or `Detector`): The name of a detector, or a detector that can be sent to other processes.
        options (`dict`): Arguments of `load_detector`, except the device.
        device (`torch.device` or `str`, *optional*): Device to compute on; None takes a GPU if the cluster has some.
        detectors (`int`, *optional*): Number of detectors. None takes one for each GPU, and without GPUs one for every
            two CPUs.

    Raises:
        ValueError: `share_size` or `detectors` is not positive.
        Exception: A detector fails at photos in a row, or a part cannot be written.
    """
    if share_size < 1 or (detectors is not None and detectors < 1):
        raise ValueError(f"share_size is {share_size} and detectors {detectors}, expected at least 1 of each.")
    count, wanted, rows = -(-len(work.source.ids) // share_size), set(left), []
    for share in (Share(number, count) for number in range(count)):
        if indices := [index for index in share.rows(len(work.source.ids)) if index in wanted]:
            rows.append({"name": share_name(share), "work": pickle.dumps(work.only(indices))})
    if not rows:
        return
    with _ray(), logging.tqdm(desc=f"Extracting {work.store.name}", unit="photo", total=len(left)) as bar:
        actors, num_gpus = _pool(detectors, device)
        extractor: Any = _Extractor  # Ray calls it, and then what that makes
        extracted = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            extractor,
            fn_constructor_args=(detector, options, device),
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(rows))),
            num_cpus=0,  # else detectors might leave none for the tasks that they wait for
            num_gpus=num_gpus,
        )
        for row in extracted.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            bar.update(row["photos"])


@contextmanager
def _ray() -> Iterator[None]:
    """Connects to Ray, quietly; what is started for that on this machine ends with the block."""
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of a risk that Ray Data takes care of
        here: Any = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
        ray.init(logging_level=ERROR, log_to_driver=False, **here)
    getLogger("ray.data").setLevel(ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _pool(detectors: int | None, device: torch.device | str | None) -> tuple[int, float]:
    """Gives the number of detectors, and the GPUs that each of them takes, perhaps a part of one."""
    resources = ray.cluster_resources()
    gpus = 0 if device is not None and torch.device(device).type == "cpu" else int(resources.get("GPU", 0))
    count = detectors or gpus or max(1, int(resources.get("CPU", 1)) // 2)
    return count, (int(1e4 / -(-count // gpus)) / 1e4 if gpus else 0)


class _Extractor:
    """An actor that holds a detector and extracts one share after another."""

    def __init__(self, detector: str | Detector, options: dict[str, Any], device: torch.device | str | None):
        if device is None:
            device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.detector = load_detector(detector, device=device, **options) if isinstance(detector, str) else detector
        self.batch_size = default_batch_size(device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        name, work, failure = row["name"], pickle.loads(row["work"]), b""
        try:
            # A process that was killed at this share may have left some of it.
            photos = _decoded(work, work.left_of(name, range(len(work.source.ids))))
            batch_size = work.batch_size or self.batch_size
            results = detected(self.detector, photos, batch_size, work.patience, work.failed)
            work.write(name, results, lambda: False)
        except Exception as error:
            failure = pickle.dumps(error)
        return {"photos": len(work.source.ids), "error": failure}


def _decoded(work: Work, indices: Sequence[int]) -> Iterator[ReadPhoto]:
    """Yields photos in their order, of which tasks decode some in advance."""
    shared, starts = ray.put(work), range(0, len(indices), PHOTOS_A_TASK)
    tasks = (_decode.remote(shared, indices[start : start + PHOTOS_A_TASK]) for start in starts)
    waiting = deque(islice(tasks, TASKS_AHEAD))
    while waiting:
        yield from ray.get(waiting.popleft())
        waiting.extend(islice(tasks, 1))


@ray.remote(num_cpus=1)
def _decode(work: Work, indices: Sequence[int]) -> list[ReadPhoto]:
    return [work.read(index) for index in indices]

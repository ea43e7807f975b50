"""Scores captions with images by the matching head (paper, Image-Text Retrieval), exactly, at any scale.

Captions and images are sorted by length over the whole job and cut into blocks of pairs, which are independent of each
other: any order, any number of processes and any interruption give the same scores. `packed` scores the pairs of a
block, `blocks` keeps them on disk. Left out: choosing pairs, which `score_pairs` takes from outside.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, reduce
from tqdm.auto import tqdm

from .. import logging
from ..files import json_digest
from ..processes import start_processes
from ..processing_unicoder_vl import RegionInput as Image, UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord, check_several
from ..regions.detectors import Detector
from ..regions.finding import RegionFinder
from ..regions.store import RegionStore, manifest_checksum
from ..shares import Share
from .blocks import BlockFolder, job_of
from .calibration import Calibration, Matching
from .checkpoints import PairModel, former_scoring_digest, load_for_store, scoring_digest, scoring_settings
from .packed import PairEncoder, Rows, fingerprint, pair_flops

# Measured on a CPU: 8 % slower at 1024, 3 % at 1536, no faster at 3072. On a GPU it is a guess.
MAX_TOKENS = {"cpu": 2048}
MAX_TOKENS_ELSEWHERE = 16384
# The plan of a job is measured on two forward passes. It is shown where these are at most 4 % of the job's work.
PLAN_FROM_PASSES = 50


@dataclass
class ScoringPlan:
    """
    The size of a scoring job, and the time that it will take.

    Args:
        num_captions, num_images, num_pairs (`int`): The size of the whole job.
        num_done (`int`): Pairs that an earlier run left in the folder.
        flops (`float`): Floating point operations of the pairs that remain.
        flops_per_second (`float`): The measured speed of one process.
        num_processes (`int`): The processes that share the pairs.
        where (`str`): Dtype and device, in words.
    """

    num_captions: int
    num_images: int
    num_pairs: int
    num_done: int
    flops: float
    flops_per_second: float
    num_processes: int
    where: str

    @property
    def seconds(self) -> float:
        """The seconds that the rest of the job takes."""
        return self.flops / self.flops_per_second / self.num_processes

    def __str__(self) -> str:
        done = f", {self.num_done:,} of them done before" if self.num_done else ""
        processes = f" on each of {self.num_processes} processes" if self.num_processes > 1 else ""
        return (
            f"Scoring {_count(self.num_captions, 'caption')} x {_count(self.num_images, 'image')}: "
            f"{_count(self.num_pairs, 'pair')}{done}, "
            f"{tqdm.format_sizeof(self.flops)}FLOP in {self.where}. At the measured "
            f"{tqdm.format_sizeof(self.flops_per_second)}FLOP/s{processes}: about {duration(self.seconds)}."
        )


def duration(seconds: float) -> str:
    """Writes a duration in words, in seconds below two minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class ImageTextScorer:
    """
    Scores captions with images. Under `accelerate launch` or `torchrun` every process calls the same methods with the
    same arguments, computes its share, and gets all scores.

    Args:
        model ([`UnicoderVLForImageTextRetrieval`] or [`UnicoderVLForPreTraining`]):
            The model, either kind of which has the matching head. It stays on its device, and is in evaluation mode
            while it scores.
        processor ([`UnicoderVLProcessor`]):
            The processor of the model.
        store (`Mapping[str, RegionRecord]`, *optional*):
            The store in which image ids are looked up. Defaults to the processor's.
        dtype (`torch.dtype`, *optional*):
            Dtype of the encoder, such as `torch.bfloat16`; pooler and matching head always run in float32. Defaults to
            the model's own.
        max_tokens (`int`, *optional*):
            Most text tokens and regions of one forward pass. Defaults to 2048 on a CPU and 16384 elsewhere.
        block_pairs (`int`, *optional*, defaults to 1024):
            Pairs that are computed, and with `output_dir` written, at once: a kill loses as many.
        verbose (`bool`, *optional*, defaults to `True`):
            Whether a progress bar is shown, and before a long job its plan.
        share ([`Share`], *optional*):
            The share of each job that is computed here, into an `output_dir`; or the one that gathers there what shares
            computed. By default each job is whole.

    Raises:
        `ValueError`: `block_pairs` or `max_tokens` is below 1, or the tokenizer does not fit the model.

    Example:

    ```python
    >>> scorer = ImageTextScorer.from_pretrained("checkpoint", "flickr30k-regions")
    >>> scores = scorer.score(["Two dogs in the snow.", "A child climbs."], ["1000268201", "1001773457"])
    >>> scorer.rank("Two dogs in the snow.", ["1000268201", "1001773457"], top_k=1)
    [('1001773457', 3.1415)]
    ```
    """

    def __init__(
        self,
        model: PairModel,
        processor: UnicoderVLProcessor,
        store: Mapping[str, RegionRecord] | None = None,
        *,
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
        block_pairs: int = 1024,
        verbose: bool = True,
        share: Share | None = None,
    ):
        if block_pairs < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"block_pairs={block_pairs}, max_tokens={max_tokens}; expected at least 1 of each.")
        processor.check_model(model)
        self.model = model
        self.processor = processor
        self._store = store
        self.dtype = dtype
        self.max_tokens = max_tokens or MAX_TOKENS.get(model.device.type, MAX_TOKENS_ELSEWHERE)
        self.block_pairs = block_pairs
        self.verbose = verbose
        self.share = share
        self._made: tuple[Any, PairEncoder] | None = None  # the last encoder, and what it follows from
        self._calibrated: tuple[dict[str, Any], Any, Calibration] | None = None  # the last, of what and which weights
        self._is_frozen = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        store: Mapping[str, RegionRecord] | str | os.PathLike[str] | None = None,
        *,
        detector: str | Detector | None = None,
        detector_options: Mapping[str, Any] | None = None,
        cache: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
        block_pairs: int = 1024,
        verbose: bool = True,
    ) -> Self:
        """
        Loads a checkpoint with its processor, to score with, and warns if it was trained on regions of another kind.

        Args:
            name_or_path (`str` or `os.PathLike`): A folder or a repository of the Hub, of
                [`UnicoderVLForImageTextRetrieval`] or [`UnicoderVLForPreTraining`].
            store (`Mapping[str, RegionRecord]`, `str` or `os.PathLike`, *optional*): The regions of every
                image: a [`RegionStore`], its folder, or any mapping of records.
            detector (`str` or [`Detector`], *optional*): The detector that finds the regions of photos. Defaults to
                that of the regions that the model was trained on. It is loaded when the first photo comes.
            detector_options (`dict`, *optional*): Options of a detector by name.
            cache (`str` or `os.PathLike`, *optional*): The folder of a store that keeps the regions of photos, so that
                none is detected in twice; see [`RegionFinder`].
            device (`torch.device` or `str`, *optional*): The device that computes; None takes a GPU if there is one.
            dtype, max_tokens, block_pairs, verbose: See the class.

        Raises:
            `ValueError`: there is no such checkpoint, it is another model, or has no trained matching head or fewer
                rows of word embeddings than its tokenizer has tokens.
            `OSError`: there is no such store.
        """
        if store is not None and not isinstance(store, Mapping):
            store = RegionStore(store)
        model, processor = load_for_store(name_or_path, store, device)
        trained_on, options = processor.feature_extractor.region_provenance, detector_options or {}
        find = RegionFinder(detector, trained_on=trained_on, device=model.device, cache=cache, **options)
        processor.set_detector(find)
        return cls(
            model, processor, store, dtype=dtype, max_tokens=max_tokens, block_pairs=block_pairs, verbose=verbose
        )

    @property
    def store(self) -> Mapping[str, RegionRecord] | None:
        """The store in which image ids are looked up; that of the processor, where the scorer was given none."""
        return self.processor.default_store if self._store is None else self._store

    @store.setter
    def store(self, store: Mapping[str, RegionRecord] | None) -> None:
        """Takes another store, or with None that of the processor."""
        self._store = store

    def score(
        self,
        captions: Sequence[str],
        images: Sequence[Image],
        max_length: int = 44,
        output_dir: str | os.PathLike | None = None,
    ) -> np.ndarray:
        """
        Scores every caption with every image.

        Args:
            captions (sequence of `str`): C captions.
            images (sequence of `str`, `RegionRecord`, `os.PathLike` or `PIL.Image.Image`): M images. A `str` is an
                image id where the store holds it, else the file of a photo; an `os.PathLike` is the file of a record if
                it ends in `.npz`, else of a photo. Regions of photos are found by the processor's detector.
            max_length (`int`, *optional*, defaults to 44): Most tokens of a caption; longer ones are cut.
            output_dir (`str` or `os.PathLike`, *optional*): The folder that blocks are written to as they finish, and
                `scores.npy` at the end. The same call goes on where a killed one stopped, with any number of
                processes, all of which must see the folder.

        Returns:
            `np.ndarray` of shape `(C, M)`, float32; higher = better match. With `output_dir` a memory map.

        Raises:
            `ValueError`: an empty list or a caption without a token, one caption or image that is in no list, a
            `max_length` below 3, a caption longer than the model's positions, a score that is not finite, a name that
            is both an image id and a file, a photo whose regions cannot be found, or an `output_dir` of another job,
            naming what differs, or of none where the scorer has a share.
            `FinishedShare`, `MissingShares`: the scorer's share is computed; or some that it gathers are not.
            `KeyError`: a name that is neither an image id of the store nor a file.
        """
        items = _Items(self.processor, self.store, captions, images, max_length)
        return self._run(_Grid(items, self.block_pairs), output_dir)

    def score_pairs(
        self,
        captions: Sequence[str],
        images: Sequence[Image],
        caption_index: Sequence[int] | np.ndarray,
        image_index: Sequence[int] | np.ndarray,
        max_length: int = 44,
        output_dir: str | os.PathLike | None = None,
    ) -> np.ndarray:
        """
        Scores chosen pairs.

        Args:
            caption_index, image_index (integers of shape `(P,)`): Pair p is `captions[caption_index[p]]` with
                `images[image_index[p]]`.
            captions, images, max_length, output_dir: See `score`.

        Returns:
            `np.ndarray` of shape `(P,)`, float32; higher = better match.

        Raises:
            `ValueError`: the indices are no integers of one shape or out of range, or as `score`.
            `KeyError`: an image id that the store lacks.
        """
        items = _Items(self.processor, self.store, captions, images, max_length)
        return self._run(_Pairs(items, self.block_pairs, caption_index, image_index), output_dir)

    def rank(self, caption: str, images: Sequence[Image], top_k: int = 10) -> list[tuple[str, float]]:
        """Finds the images that match a caption best: ids with scores, the best first (of equal ones the earlier)."""
        _check_top_k(top_k)
        images = self.processor.find_regions(images, self.store)
        scores = self.score([caption], images)[0]
        ids = [image if isinstance(image, str) else image.image_id for image in images]
        return _best(ids, scores, top_k)

    def rank_captions(self, image: Image, captions: Sequence[str], top_k: int = 10) -> list[tuple[str, float]]:
        """Finds the captions that match an image best, with scores, the best first (of equal ones the earlier)."""
        _check_top_k(top_k)
        return _best(captions, self.score(captions, [image])[:, 0], top_k)

    def __getstate__(self) -> dict[str, Any]:
        # What was read meanwhile is no part of it, so that `dataset.map` knows it again.
        # And an encoder's weights are in oneDNN's layout, which cannot be copied.
        return vars(self) | {"_made": None, "_calibrated": None}

    @property
    def calibration(self) -> Calibration:
        """
        The meaning of the scores, as `unicoder-vl calibrate` saved it with the checkpoint.

        Raises:
            `ValueError`: it was never measured, or with other weights.
        """
        known, name = self.model.config.calibration, self.model.name_or_path or "the model"
        if known is None:
            raise ValueError(f"{name} is not calibrated: `unicoder-vl calibrate {name} CAPTIONS REGIONS`.")
        state = None if self._is_frozen else fingerprint(self.model)
        # A digest of all weights takes a while.
        if self._calibrated is None or self._calibrated[0] is not known or self._calibrated[1] != state:
            calibration = Calibration(**known)
            if calibration.weights_sha256 not in (None, scoring_digest(self.model)):
                raise ValueError(f"{name} was calibrated with other weights: `unicoder-vl calibrate` it again.")
            self._calibrated = known, state, calibration
        return self._calibrated[2]

    def match(self, captions: Sequence[str], images: Sequence[Image], max_length: int = 44) -> Matching:
        """
        Says whether captions match images, with the precision and recall that were measured on validation pairs.
        Arguments are those of `score`, and so are the errors, with that of `calibration`.
        """
        calibration = self.calibration
        scores = self.score(captions, images, max_length)
        return Matching(scores >= calibration.threshold, calibration.probabilities(scores), scores, calibration)

    def plan(self, captions: Sequence[str], images: Sequence[Image], max_length: int = 44) -> ScoringPlan:
        """Says how large a call of `score` is, and how long it would take, measured on a few pairs."""
        items = _Items(self.processor, self.store, captions, images, max_length)
        blocks = _Grid(items, self.block_pairs)
        with evaluating(self.model):
            return self._plan(blocks, self._encoder(), set(), start_processes().num_processes)

    def freeze(self) -> Self:
        """Takes the weights for final: no later call looks whether one has changed, which costs a hash of all."""
        with evaluating(self.model):
            self._encoder()
        self._is_frozen = True
        return self

    def _encoder(self) -> PairEncoder:
        """Makes an encoder, or takes the last one, if it would be the same."""
        if self._is_frozen and self._made is not None:
            return self._made[1]
        state = fingerprint(self.model)
        key = (state, self.dtype, self.max_tokens)
        if state is None or self._made is None or self._made[0] != key:
            self._made = key, PairEncoder(self.model, self.dtype, self.max_tokens)
        return self._made[1]

    def _run(self, blocks: "_Blocks", output_dir: str | os.PathLike | None) -> np.ndarray:
        state = start_processes()
        target: BlockFolder | _Memory
        if output_dir is None:
            if self.share is not None:
                raise ValueError(f"The scorer is {self.share} of a job, which meet in a folder: give output_dir.")
            target = _Memory(blocks)
        else:
            # Weights and regions are hashed by one process for all.
            job = self._job(blocks, job_of(output_dir)) if state.is_main_process else None
            target = BlockFolder(output_dir, broadcast_object_list([job])[0], state.process_index, self.share)
        own = (self.share or Share(0, 1)).of_process(state.process_index, state.num_processes)
        share = [] if target.is_complete else _share(len(blocks), target.done, own)
        if share:
            with evaluating(self.model):
                self._compute(blocks, target, share, own.count)
        return target.result(len(blocks), blocks.shape, blocks.positions)

    def _compute(
        self, blocks: "_Blocks", target: "BlockFolder | _Memory", share: list[int], num_processes: int
    ) -> None:
        encoder = self._encoder()
        show = self.verbose and start_processes().is_main_process
        if show and sum(blocks.lengths(block).sum() for block in share) >= PLAN_FROM_PASSES * self.max_tokens:
            tqdm.write(str(self._plan(blocks, encoder, target.done, num_processes)), file=sys.stderr)
        flops = [pair_flops(encoder.config, blocks.lengths(block)).sum() for block in share]
        embedded = _Embedded(blocks.items, encoder)
        # Counted in operations: pairs come in the order of their length, and the last would take longer than the first.
        with logging.tqdm(total=sum(flops), unit="FLOP", unit_scale=True, desc="Scoring", disable=not show) as progress:
            for block, cost in zip(share, flops, strict=True):
                scores = embedded.score(*blocks.pairs(block))
                if not np.isfinite(scores).all():
                    raise self._not_finite(blocks, block, scores)
                target.write(block, scores)
                progress.update(cost)

    def _not_finite(self, blocks: "_Blocks", block: int, scores: np.ndarray) -> ValueError:
        place = int(np.flatnonzero(~np.isfinite(scores))[0])
        caption, image = (int(index[place]) for index in blocks.pairs(block))
        text = self.processor.tokenizer.decode(blocks.items.token_ids[caption], skip_special_tokens=True)
        return ValueError(
            f"The score of image {blocks.items.record(image).image_id!r} with the caption {text!r:.80} is "
            f"{scores[place]}: the weights of {self.model.name_or_path or 'the model'} are not finite, or overflow in "
            f"{self.dtype or self.model.dtype}."
        )

    def _plan(self, blocks: "_Blocks", encoder: PairEncoder, done: set[int], num_processes: int) -> ScoringPlan:
        left = [block for block in range(len(blocks)) if block not in done]
        middle = left[len(left) // 2]
        captions, images = blocks.pairs(middle)
        lengths = blocks.lengths(middle)
        few = np.argsort(lengths, kind="stable")[: max(1, encoder.max_tokens // int(lengths.mean()))]
        embedded = _Embedded(blocks.items, encoder)
        embedded.score(captions[few], images[few])  # the first pass pays for what later ones find ready
        started = time.perf_counter()
        embedded.score(captions[few], images[few])
        rate = pair_flops(encoder.config, lengths[few]).sum() / (time.perf_counter() - started)
        return ScoringPlan(
            num_captions=len(blocks.items.token_ids),
            num_images=len(blocks.items.images),
            num_pairs=int(np.prod(blocks.shape)),
            num_done=sum(len(blocks.positions(block)) for block in done),
            flops=float(sum(pair_flops(encoder.config, blocks.lengths(block)).sum() for block in left)),
            flops_per_second=float(rate),
            num_processes=num_processes,
            where=f"{str(encoder.bert.dtype).removeprefix('torch.')} on {encoder.device.type}",
        )

    def _job(self, blocks: "_Blocks", before: Mapping[str, Any]) -> dict[str, Any]:
        """
        Collects all that decides on the bits of the scores. A job that was begun `before` by 9bccc44 tells model and
        regions by other digests, `model` and `regions`: if the folder has these, they are computed, and it goes on.
        """
        model: dict[str, Any]
        if "model" in before:
            model = {"model": former_scoring_digest(self.model)}
        else:
            model = {"weights": scoring_digest(self.model), **scoring_settings(self.model.config)}
        return {
            **model,
            "feature extractor": json_digest(self.processor.feature_extractor.to_dict())[:16],
            **blocks.items.digests(before),
            **blocks.digests(),
            "dtype": str(self.dtype or self.model.dtype),
            "max_tokens": self.max_tokens,
            "block_pairs": self.block_pairs,
        }


class _Items:
    """The captions and images of a job, without regions: these are read from the store when they are embedded."""

    def __init__(
        self,
        processor: UnicoderVLProcessor,
        store: Mapping[str, RegionRecord] | None,
        captions: Sequence[str],
        images: Sequence[Image],
        max_length: int,
    ):
        check_several("captions", captions)
        check_several("images", images)
        if len(images) == 0:
            raise ValueError("images is empty: give at least one image.")
        if max_length < 3:
            raise ValueError(f"max_length={max_length}; expected at least 3: [CLS], a token and [SEP].")
        self.processor = processor
        self.store = store
        self.images = processor.find_regions(images, self.store)
        tokenized = processor(text=list(captions), padding=False, max_length=max_length)
        self.token_ids: list[list[int]] = tokenized["input_ids"]
        self.num_tokens = np.array([len(ids) for ids in self.token_ids])
        if (bare := np.flatnonzero(self.num_tokens < 3)).size:
            raise ValueError(f"The tokenizer makes no token of the caption {captions[bare[0]]!r:.80}: take it out.")
        extractor = processor.feature_extractor
        # The store, where it holds all images: it tells of their regions without reading them.
        self.region_store: RegionStore | None = None
        if isinstance(self.store, RegionStore) and all(isinstance(image, str) for image in self.images):
            self.region_store = self.store
        if self.region_store is not None and extractor.score_threshold is None:
            counts = self.region_store.region_counts(cast(Sequence[str], self.images))
            self.num_regions = np.minimum(counts, extractor.max_regions)
        else:  # how many score above a threshold, the records alone know
            self.num_regions = np.array([len(extractor.select(record)) for record in self.records()])

    def record(self, image: int) -> RegionRecord:
        found = self.images[image]
        return self.store[found] if isinstance(found, str) else found  # type: ignore[index]

    def records(self) -> Iterator[RegionRecord]:
        return map(self.record, range(len(self.images)))

    def digests(self, before: Mapping[str, Any]) -> dict[str, str]:
        """
        Computes the digests of captions, images and regions; a store's manifest stands for its regions, see `_job`.
        """
        names: list[Any] = []

        def values() -> Iterator[bytes]:
            for record in self.records():
                names.append(record.image_id)
                for array in (record.features, record.locations(), record.object_scores):
                    yield b"-" if array is None else np.ascontiguousarray(array).tobytes()

        if self.region_store is None or "regions" in before:
            regions = {"regions": _digest(values())}
        else:
            names.extend(self.images)
            regions = {"store": manifest_checksum(self.region_store.manifest)}
        return {
            "captions": _digest(np.array([len(ids), *ids]).tobytes() for ids in self.token_ids),
            "images": _digest(repr(name).encode() for name in names),
            **regions,
        }


class _Blocks:
    """Pairs in blocks. The job alone decides on the block of a pair, never who computes it or when."""

    items: _Items
    shape: tuple[int, ...]  # of the scores

    def __len__(self) -> int:
        raise NotImplementedError

    def positions(self, block: int) -> np.ndarray:
        """The places of a block's scores in all scores, flattened."""
        raise NotImplementedError

    def pairs(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The captions and the images of a block's pairs."""
        raise NotImplementedError

    def lengths(self, block: int) -> np.ndarray:
        captions, images = self.pairs(block)
        return self.items.num_tokens[captions] + self.items.num_regions[images]

    def digests(self) -> dict[str, str]:
        return {}


class _Grid(_Blocks):
    """The pairs of every caption with every image, in about square blocks of captions, and images, of alike lengths."""

    def __init__(self, items: _Items, block_pairs: int):
        self.items = items
        self.shape = (num_captions, num_images) = len(items.token_ids), len(items.images)
        side = max(1, int(block_pairs**0.5))
        rows = min(num_captions, max(side, block_pairs // num_images))
        self.captions = _chunks(np.argsort(items.num_tokens, kind="stable"), rows)
        self.images = _chunks(np.argsort(items.num_regions, kind="stable"), max(1, block_pairs // rows))

    def __len__(self) -> int:
        return len(self.captions) * len(self.images)

    def positions(self, block: int) -> np.ndarray:
        column, row = divmod(block, len(self.captions))  # blocks of the same images follow each other
        return (self.captions[row][:, None] * self.shape[1] + self.images[column]).ravel()

    def pairs(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return np.divmod(self.positions(block), self.shape[1])


class _Pairs(_Blocks):
    """The pairs that were chosen, in the order of their images, and these in the order of their length."""

    def __init__(self, items: _Items, block_pairs: int, caption_index, image_index):
        self.items = items
        self.caption_index = _checked_index("caption_index", caption_index, len(items.token_ids))
        self.image_index = _checked_index("image_index", image_index, len(items.images))
        if self.caption_index.shape != self.image_index.shape:
            raise ValueError(
                f"caption_index has shape {self.caption_index.shape}, image_index {self.image_index.shape}; expected "
                "one of each for every pair."
            )
        self.shape = self.caption_index.shape
        captions, images = self.caption_index, self.image_index
        order = np.lexsort((items.num_tokens[captions], images, items.num_regions[images]))
        self.order = _chunks(order, block_pairs)

    def __len__(self) -> int:
        return len(self.order)

    def positions(self, block: int) -> np.ndarray:
        return self.order[block]

    def pairs(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return self.caption_index[self.order[block]], self.image_index[self.order[block]]

    def digests(self) -> dict[str, str]:
        return {"pairs": _digest([np.stack((self.caption_index, self.image_index)).tobytes()])}


class _Embedded:
    """The embeddings of a block's captions and images; the images stay while the next blocks ask for the same."""

    def __init__(self, items: _Items, encoder: PairEncoder):
        self.items = items
        self.encoder = encoder
        self.images = np.array([], dtype=np.int64)
        self.rows: Rows | None = None

    def score(self, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
        captions, caption_index = np.unique(captions, return_inverse=True)
        images, image_index = np.unique(images, return_inverse=True)
        if self.rows is None or not np.array_equal(images, self.images):
            extractor = self.items.processor.feature_extractor
            self.rows = self.encoder.embed_images(map(self.items.record, images), extractor)
            self.images = images
        rows = self.encoder.embed_captions([self.items.token_ids[caption] for caption in captions])
        return self.encoder.score(rows, self.rows, caption_index, image_index)


class _Memory:
    """Blocks that are kept in memory, as a `BlockFolder` keeps them on disk."""

    done: set[int] = set()
    is_complete = False

    def __init__(self, blocks: _Blocks):
        self.blocks = blocks
        self.scores = np.zeros(int(np.prod(blocks.shape)), dtype=np.float32)

    def write(self, block: int, values: np.ndarray) -> None:
        self.scores[self.blocks.positions(block)] = values

    def result(self, num_blocks: int, shape: tuple[int, ...], positions) -> np.ndarray:
        state = start_processes()
        if state.num_processes > 1:  # each score is of one process, and 0 in the others
            self.scores = reduce(torch.from_numpy(self.scores).to(state.device), "sum").cpu().numpy()
        return self.scores.reshape(shape)


@contextmanager
def evaluating(model: PairModel) -> Iterator[None]:
    """Runs a `with` block without dropout and graph, in the model's own dtype, whatever autocast is around it."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(was_training)


def _share(num_blocks: int, done: set[int], own: Share) -> list[int]:
    """The blocks of this process. They need no agreement between processes, which may start at different moments."""
    return [block for block in own.blocks(num_blocks) if block not in done]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; expected at least 1.")


def _best(items: Sequence[str], scores: np.ndarray, top_k: int) -> list[tuple[str, float]]:
    return [(items[place], float(scores[place])) for place in np.argsort(-scores, kind="stable")[:top_k]]


def _checked_index(name: str, index: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    array = np.asarray(index)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (len(array) and not 0 <= array.min() <= array.max() < size):
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, expected integers of shape (pairs,), each in [0, {size})."
        )
    return array.astype(np.int64, copy=False)


def distinct(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Gives the names that differ, in the order in which they first come, and for each name its place among these."""
    places: dict[str, int] = {}
    index = [places.setdefault(name, len(places)) for name in names]
    return list(places), np.array(index, dtype=np.int64)

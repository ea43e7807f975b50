"""Scores together what waits together: one thread computes, and requests that come meanwhile share its next call."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np

from ..records_unicoder_vl import RegionRecord
from ..regions.finding import RegionFinder
from ..scoring.scorer import ImageTextScorer
from .reading import Photo

# Photos whose regions are kept, in case they come again: 50 MB of 100 regions of 2,048 float16 numbers each.
PHOTOS_KEPT = 128

Pair = tuple[str, str | Photo]  # a sentence, and an image: its id in the store, or a photo
Scored = tuple[np.ndarray, int]  # the scores of a request's pairs, and the tokens of its sentences


@dataclass(eq=False)
class _Job:
    """The pairs of one request, and what will be their scores."""

    pairs: Sequence[Pair]
    scored: "Future[Scored]" = field(default_factory=Future)


class Batcher:
    """
    Scores the pairs of requests in a thread of its own, which alone touches the model and the detector. Requests are
    taken in their order, and one that cannot be scored fails alone.

    Args:
        scorer ([`ImageTextScorer`]): The scorer, whose weights change no more. Its store has the images by id.
        finder ([`RegionFinder`], *optional*): The function that finds the regions of photos.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a sentence; longer ones are cut.
        note (`callable`, *optional*): A function that is told the numbers of requests and of pairs of each call.
    """

    def __init__(
        self,
        scorer: ImageTextScorer,
        finder: RegionFinder | None = None,
        *,
        max_length: int = 44,
        note: Callable[[int, int], object] = lambda requests, pairs: None,
    ):
        scorer.processor.set_detector(None)  # with one, the scorer would take a name for that of a file, too
        self.scorer = scorer.freeze()
        self.finder = finder
        self.max_length = max_length
        self._note = note
        self._found: OrderedDict[str, RegionRecord] = OrderedDict()
        self._waiting: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, pairs: Sequence[Pair]) -> "Future[Scored]":
        """
        Gives what will be the scores of pairs, float32 `(P,)`, higher = better match, with the number of tokens of
        their sentences, each counted once. Where they cannot be scored, it holds the error of
        [`ImageTextScorer.score_pairs`].
        """
        job = _Job(pairs)
        self._waiting.put(job)
        return job.scored

    def is_alive(self) -> bool:
        """Tells whether the thread that scores is there."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread when it has scored all that was submitted."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            jobs = [job]
            # No more than the scorer computes at once, so that the first need not wait for all.
            while sum(len(each.pairs) for each in jobs) < self.scorer.block_pairs:
                try:
                    job = self._waiting.get_nowait()
                except Empty:
                    break
                if job is None:
                    self._waiting.put(None)
                    break
                jobs.append(job)
            self._score_together([each for each in jobs if each.scored.set_running_or_notify_cancel()])

    def _score_together(self, jobs: list[_Job]) -> None:
        try:
            scored = self._score([job.pairs for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].scored.set_exception(error)
            else:
                for job in jobs:
                    self._score_together([job])
            return
        for job, each in zip(jobs, scored, strict=True):
            job.scored.set_result(each)

    def _score(self, requests: list[Sequence[Pair]]) -> list[Scored]:
        pairs = [pair for request in requests for pair in request]
        if not pairs:
            return []
        captions, images = dict.fromkeys(text for text, _ in pairs), dict.fromkeys(image for _, image in pairs)
        caption_at = {caption: place for place, caption in enumerate(captions)}
        image_at = {image: place for place, image in enumerate(images)}
        scores = self.scorer.score_pairs(
            list(captions),
            [self._regions(image) if isinstance(image, Photo) else image for image in images],
            [caption_at[text] for text, _ in pairs],
            [image_at[image] for _, image in pairs],
            self.max_length,
        )
        counts = np.minimum(self.scorer.processor.count_tokens(list(captions)), self.max_length)
        self._note(len(requests), len(pairs))
        tokens = [int(sum(counts[caption_at[text]] for text in {text for text, _ in each})) for each in requests]
        ends = np.cumsum([len(request) for request in requests])
        return list(zip(np.split(scores, ends[:-1]), tokens, strict=True))

    def _regions(self, photo: Photo) -> RegionRecord:
        """Finds the regions of a photo, or remembers them. Raises ValueError where there are none."""
        if self.finder is None:
            raise ValueError(f"{photo.name} is a photo, and this server has no detector to find its regions.")
        if photo.digest in self._found:
            self._found.move_to_end(photo.digest)
        else:
            (self._found[photo.digest],) = self.finder([photo.open()])
            if len(self._found) > PHOTOS_KEPT:
                self._found.popitem(last=False)
        return self._found[photo.digest]

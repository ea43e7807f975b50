"""
The arguments of data and model of the two pre-training scripts, and the setup that is built of them.

Follows the paper's pre-training tasks; the scripts are `run.py` (our loop, by Accelerate) and `run_trainer.py`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from ... import logging
from ...data.image_ids import id_mapping
from ...data.negatives import PairsWithMismatches, pairs_digest
from ...data.rows import Row
from ...data.samplers import GivenRows, ReadAhead, StepBatchSampler, TokenBatchSampler
from ...data.streaming import CaptionStream, StreamedPairs
from ...modeling_unicoder_vl import UnicoderVLForPreTraining
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...regions.store import RegionStore
from ...runs.alignment import align_if_asked
from ...runs.arguments import DataArguments, option
from ...runs.model_card import pretrained_by
from ...runs.setup import (
    TrainingSetup,
    check_object_ids,
    in_words,
    load_model,
    load_processor,
    open_data,
    processor_for,
)
from .collator import DataCollatorForUnicoderVLPreTraining

logger = logging.get_logger(__name__)


@dataclass
class PretrainingArguments(DataArguments):
    """
    Names the data and the model of a pre-training run; without `captions` they are rendered scenes and a small one.
    """

    max_validation_pairs: int = option(
        5000, "Pairs of the validation split, drawn evenly; 0 evaluates none.", may_change=True
    )
    max_regions: int | None = option(100, "Most regions of an image; the best by score stay.")
    mlm_probability: float = option(0.15, "Share of the tokens that are predicted.")
    mask_replace_prob: float = option(1.0, "Share of the predicted tokens that becomes [MASK] (BERT: 0.8).")
    random_replace_prob: float = option(0.0, "Share of the predicted tokens that becomes random (BERT: 0.1).")
    whole_word_mask: bool = option(False, "Chooses whole words, with all of their tokens.")
    moc: bool = option(True, "Trains masked object classification; --no_moc for regions without classes.")
    moc_probability: float = option(0.15, "Share of the regions that are predicted.")
    tokens_per_batch: int | None = option(
        None,
        "Words and regions of an optimiser step over ALL processes, those of mismatches too, in place of "
        "--train_batch_size. Micro-batches then have alike lengths.",
    )
    streaming: bool = option(
        False,
        "Reads no more captions than the next steps need: --captions is a folder of parquet or JSON lines shards, or a "
        "dataset of the Hub. Takes --max_steps in place of epochs.",
    )
    shuffle_buffer_size: int = option(
        10_000, "Captions of a stream that are shuffled together, and among which mismatches are drawn."
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.streaming:
            return
        if self.on_scenes:
            raise ValueError("--streaming streams captions: give --captions and --regions.")
        for name in ("tokens_per_batch", "scale_features", "align_regions"):
            if getattr(self, name):
                raise ValueError(
                    f"--{name} looks at all captions before it begins, --streaming at none: give one of the two."
                )


@dataclass(frozen=True)
class TokenBudget:
    """
    Says how many tokens a step has, and how many the training pairs have.

    Args:
        tokens_per_batch (`int`): Tokens of a step over all processes and micro-batches.
        words (`np.ndarray` of shape `(num_pairs,)`): The tokens of each pair's caption.
        regions (`np.ndarray` of shape `(num_pairs,)`): The regions of each pair's image.
    """

    tokens_per_batch: int
    words: np.ndarray
    regions: np.ndarray


@dataclass
class PretrainingSetup(TrainingSetup):
    """
    The setup of a pre-training run, as [`prepare_pretraining`] builds it; without a `budget` its steps have equal
    numbers of pairs. In place of the pairs of a split it may train on those of a stream.
    """

    model: UnicoderVLForPreTraining
    collator: DataCollatorForUnicoderVLPreTraining
    train: PairsWithMismatches | StreamedPairs
    validation: PairsWithMismatches | None
    budget: TokenBudget | None = None

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The losses of the tasks that are trained."""
        return (*self.collator.masking.loss_parts, "matching_loss")

    @property
    def trained_by(self) -> str:
        """The tasks that are trained, in words."""
        return pretrained_by(self.loss_parts)

    @property
    def measured_on(self) -> str | None:
        """The numbers of validation captions and images, in words; None without any."""
        return None if self.validation is None else in_words(self.validation.pairs)

    @property
    def trained_on(self) -> str:
        """The number of training pairs, or of shards, in words."""
        if isinstance(self.train, StreamedPairs):
            return f"a stream of {self.train.num_shards:,} shards"
        return f"{len(self.train):,} pairs"

    @property
    def identity(self) -> dict[str, Any]:
        """Facts of the data by which a resumed run is the same run, see [`run_identity`]."""
        if isinstance(self.train, StreamedPairs):
            return {"train_shards": self.train.num_shards, "num_processes": self.train.num_processes}
        facts = {"train_pairs": len(self.train), "train_pairs_sha256": pairs_digest(self.train.pairs)}
        return facts if self.budget is None else facts | {"train_batch_size": None}

    def token_batches(self, **options: Any) -> TokenBatchSampler | None:
        """Makes the sampler of a run with a budget, with the options of [`TokenBatchSampler`]; None without one."""
        if self.budget is None:
            return None
        words, regions, train = self.budget.words, self.budget.regions, cast(PairsWithMismatches, self.train)

        def lengths(rows: np.ndarray, epoch: int) -> np.ndarray:
            """Gives the tokens of pairs and of their mismatches, `(len(rows), 2)`."""
            others, replaces_image = np.array([train.mismatch(row, epoch) for row in rows.tolist()]).T
            images, texts = np.where(replaces_image, others, rows), np.where(replaces_image, rows, others)
            return np.stack((words[rows] + regions[rows], words[texts] + regions[images]), axis=1)

        return TokenBatchSampler(
            lengths,
            len(train),
            num_tokens=2 * int((words + regions).sum()),  # the parts of mismatches are drawn uniformly
            tokens_per_batch=self.budget.tokens_per_batch,
            **options,
        )

    def train_batches(
        self, sampler: StepBatchSampler, device: torch.device, num_workers: int = 0
    ) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
        """Gives the micro-batches of the sampler's epoch from its start step on, each with its weight in its step."""
        self.train.set_epoch(sampler.epoch)
        parts, ahead = itertools.tee(sampler.parts())  # the loader reads ahead
        rows = (self.train.make_rows(numbers) for numbers, _ in ahead)
        loader = DataLoader(
            GivenRows(),
            batch_sampler=ReadAhead(rows, self._announce),
            collate_fn=self.collator,
            num_workers=num_workers,
            generator=torch.Generator(),  # or it would draw from the dropout's
        )
        for batch, (_, weight) in zip(loader, parts, strict=True):
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, weight

    def _announce(self, pairs: list[Row]) -> None:
        if isinstance(store := self.collator.store, RegionStore):
            store.will_need({pair[name] for pair in pairs for name in ("image_id", "mismatch_image_id")})


def prepare_pretraining(arguments: PretrainingArguments, output_dir: str | Path, seed: int) -> PretrainingSetup:
    """
    Reads captions and regions, joins them, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: a caption has no regions (unless `skip_missing`), the checkpoint is of another kind, or a file has
        a fault.
    """
    if arguments.streaming:
        return _prepare_stream(arguments, seed)
    data = open_data(arguments, output_dir)
    store, train = data.store, data.train
    validation = None
    if arguments.max_validation_pairs > 0:
        validation = data.validation(arguments.validation_split, without="--max_validation_pairs 0")
        step = max(1, math.ceil(len(validation) / arguments.max_validation_pairs))
        validation = validation.select(range(0, len(validation), step))

    model = load_model(arguments, store, UnicoderVLForPreTraining)
    if arguments.moc:
        images = [image_id for part in (train, validation) if part is not None for image_id in part.unique("image_id")]
        highest = check_object_ids(store, images, model.config.num_region_classes)
        if arguments.num_region_classes is None and store.provenance["num_classes"] is None:
            logger.warning(
                f"{store.path} does not say how many object classes its detector knows. The model predicts "
                f"{model.config.num_region_classes:,}; the highest id of these images is {highest}. If that is not the "
                "detector's number, give it: --num_region_classes, or once for all "
                f"`unicoder-vl merge {store.path} --output NEW --num-classes NUMBER`."
            )
    model.config.sparse_prediction = True
    processor = load_processor(arguments, data)
    align_if_asked(arguments, model, processor, data)
    budget = None
    if arguments.tokens_per_batch is not None and data.num_tokens is not None:
        # A score threshold may leave fewer regions, which the records alone know: then steps have fewer tokens.
        budget = TokenBudget(
            arguments.tokens_per_batch,
            words=data.num_tokens.clip(max=arguments.max_length),
            regions=store.region_counts(train["image_id"]).clip(max=processor.feature_extractor.max_regions),
        )
    return PretrainingSetup(
        model=model,
        processor=processor,
        collator=_collator(arguments, model, processor, store, seed),
        train=PairsWithMismatches(train, seed=seed),
        validation=None if validation is None else PairsWithMismatches(validation, seed=seed, fixed_epoch=0),
        data_name=data.name,
        budget=budget,
    )


def _prepare_stream(arguments: PretrainingArguments, seed: int) -> PretrainingSetup:
    """Opens the stream of captions and the store, and builds the model; validation pairs are the first of theirs."""
    store = RegionStore(str(arguments.regions))
    rename = None if arguments.caption_ids is None else id_mapping(arguments.caption_ids)
    options: dict[str, Any] = {"skip_missing": arguments.skip_missing, "rename": rename}
    path, processes, validation = str(arguments.captions), PartialState(), None
    if arguments.max_validation_pairs > 0:
        try:
            pairs = CaptionStream(path, arguments.validation_split, store, **options)
        except ValueError as error:
            raise ValueError(f"{error} To do without validation: --max_validation_pairs 0.") from error
        first = pairs.first(arguments.max_validation_pairs)
        validation = PairsWithMismatches(first, seed=seed, fixed_epoch=0)
    model = load_model(arguments, store, UnicoderVLForPreTraining)
    model.config.sparse_prediction = True
    processor = processor_for(arguments, store, [])
    return PretrainingSetup(
        model=model,
        processor=processor,
        collator=_collator(arguments, model, processor, store, seed),
        train=StreamedPairs(
            CaptionStream(path, arguments.train_split, store, **options),
            seed=seed,
            window=arguments.shuffle_buffer_size,
            process_index=processes.process_index,
            num_processes=processes.num_processes,
        ),
        validation=validation,
        data_name=Path(path).name,
    )


def _collator(
    arguments: PretrainingArguments,
    model: UnicoderVLForPreTraining,
    processor: UnicoderVLProcessor,
    store: RegionStore,
    seed: int,
) -> DataCollatorForUnicoderVLPreTraining:
    return DataCollatorForUnicoderVLPreTraining(
        processor,
        store,
        seed=seed,
        max_length=arguments.max_length,
        mlm_probability=arguments.mlm_probability,
        mask_replace_prob=arguments.mask_replace_prob,
        random_replace_prob=arguments.random_replace_prob,
        whole_word_mask=arguments.whole_word_mask,
        moc_probability=arguments.moc_probability if arguments.moc else 0.0,
        num_region_classes=model.config.num_region_classes,
    )

"""What the two pre-training scripts share: their data and model arguments, what these become, and evaluation.

Follows the paper's pre-training tasks; the loops are in `examples/run_pretraining.py` (Accelerate) and
`examples/run_pretraining_trainer.py` (Trainer).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset

from . import logging
from .data.collators import IGNORED, DataCollatorForUnicoderVLPreTraining
from .data.negatives import PairsWithMismatches
from .data.samplers import ReadAhead, StepBatchSampler
from .modeling_unicoder_vl import UnicoderVLForPreTraining
from .preparation import DataArguments, TrainingSetup, in_words, load_model, load_processor, open_data
from .processing_unicoder_vl import UnicoderVLProcessor
from .records_unicoder_vl import RegionRecord
from .regions.shards import NO_OBJECT_IDS
from .regions.store import RegionStore
from .retrieval.metrics import chance_recalls, retrieval_metrics, roc_auc
from .retrieval.scoring import ImageTextScorer
from .training import pretrained_by

logger = logging.get_logger(__name__)


@dataclass
class PretrainingArguments(DataArguments):
    """Data and model of a pre-training run. Without `captions` it runs on the rendered scenes with a small model."""

    max_validation_pairs: int = field(default=5000, metadata={"help": "Pairs of it, drawn evenly; 0 evaluates none."})
    max_regions: int | None = field(default=100, metadata={"help": "Regions of an image; the best by score stay."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are predicted."})
    mask_replace_prob: float = field(default=1.0, metadata={"help": "Of these, the share made [MASK] (BERT: 0.8)."})
    random_replace_prob: float = field(default=0.0, metadata={"help": "Of these, the share made random (BERT: 0.1)."})
    whole_word_mask: bool = field(default=False, metadata={"help": "Choose whole words."})
    moc: bool = field(
        default=True, metadata={"help": "Masked object classification; --no_moc for regions without classes."}
    )
    moc_probability: float = field(default=0.15, metadata={"help": "Share of the regions that are predicted."})


@dataclass
class LoopArguments:
    """The loop of `examples/run_pretraining.py`; the defaults are the paper's."""

    output_dir: str = field(metadata={"help": "Checkpoints, the log, and in the end the model."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the training pairs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Its peak, after the warm-up."})
    train_batch_size: int = field(default=192, metadata={"help": "Pairs of an optimiser step over ALL processes."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Micro-steps of an optimiser step."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with a rising learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW with 0 is the paper's Adam."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped; 0 clips none."})
    max_steps: int = field(default=-1, metadata={"help": "End after so many steps, whatever the epochs."})
    mixed_precision: str = field(
        default="auto", metadata={"help": "auto (what the hardware is fast in), no, bf16, fp16."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, a third more time."})
    seed: int = field(default=0, metadata={"help": "Masks, mismatches, order, dropout and new weights follow from it."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and mask."})
    logging_steps: int = field(default=20, metadata={"help": "Steps between lines of the log."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between evaluations. Default: every epoch."})
    eval_on_start: bool = field(default=False, metadata={"help": "Evaluate before the first step too."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint's folder, or 'latest'. With more steps than before the run becomes longer."},
    )
    report_to: str = field(default="none", metadata={"help": "A tracker of accelerate, such as tensorboard, or none."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the model, processor and card in the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository. Default: the output folder's name."})

    def __post_init__(self):
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}, expected at least 1, or -1 for all epochs.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}, expected a share of the steps in 0..1, below 1.")


# A run may be resumed with others of these; all other arguments decide what it computes.
MAY_CHANGE = set(
    "output_dir captions regions model_name_or_path skip_missing validation_split max_validation_pairs "
    "num_train_epochs max_steps gradient_accumulation_steps mixed_precision gradient_checkpointing "
    "dataloader_num_workers logging_steps save_steps save_total_limit eval_steps eval_on_start "
    "resume_from_checkpoint report_to push_to_hub hub_model_id".split()
)


def run_identity(*arguments: Any, **facts: Any) -> dict[str, Any]:
    """What makes a run the run it is, of the dataclasses of its command line, and `facts` of its data."""
    given = {name: value for of_class in arguments for name, value in dataclasses.asdict(of_class).items()}
    return {name: value for name, value in given.items() if name not in MAY_CHANGE} | facts


# The paper's recipe, and one that learns the scenes in minutes on two cores. A batch is counted in pairs.
PAPER = {"num_train_epochs": 10, "learning_rate": 1e-4, "train_batch_size": 192, "gradient_accumulation_steps": 4}
SCENES = {"num_train_epochs": 3, "learning_rate": 1e-3, "train_batch_size": 32, "gradient_accumulation_steps": 1}


@dataclass
class PretrainingSetup(TrainingSetup):
    """What [`prepare_pretraining`] builds."""

    model: UnicoderVLForPreTraining
    collator: DataCollatorForUnicoderVLPreTraining
    train: PairsWithMismatches
    validation: PairsWithMismatches | None

    @property
    def loss_parts(self) -> tuple[str, ...]:
        return (*self.collator.loss_parts, "matching_loss")

    @property
    def trained_by(self) -> str:
        return pretrained_by(self.loss_parts)

    @property
    def measured_on(self) -> str | None:
        return None if self.validation is None else in_words(self.validation.pairs)

    def train_batches(
        self, sampler: StepBatchSampler, device: torch.device, num_workers: int = 0
    ) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
        """The micro-batches of the sampler's epoch from the step where it stands, each with its weight in its step."""
        self.train.set_epoch(sampler.epoch)
        loader = DataLoader(
            self.train,
            batch_sampler=ReadAhead(sampler, self._announce),
            collate_fn=self.collator,
            num_workers=num_workers,
            generator=torch.Generator(),  # or it would draw from the dropout's
        )
        for batch, weight in zip(loader, sampler.weights(), strict=True):
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, weight

    def _announce(self, rows: list[int]) -> None:
        if isinstance(store := self.collator.store, RegionStore):
            pairs = self.train.make_rows(rows)
            store.will_need({pair[name] for pair in pairs for name in ("image_id", "mismatch_image_id")})


def prepare_pretraining(arguments: PretrainingArguments, output_dir: str | Path, seed: int) -> PretrainingSetup:
    """
    Reads captions and regions, joins them, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: captions without regions (unless `skip_missing`), a checkpoint of another kind, or a fault in a
        file.
    """
    data = open_data(arguments, output_dir)
    store, train = data.store, data.train
    validation = None
    if arguments.max_validation_pairs > 0:
        validation = data.validation(arguments.validation_split)
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
    model.sparse_prediction = True
    processor = load_processor(arguments, data)
    collator = DataCollatorForUnicoderVLPreTraining(
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
    return PretrainingSetup(
        model=model,
        processor=processor,
        collator=collator,
        train=PairsWithMismatches(train, seed=seed),
        validation=None if validation is None else PairsWithMismatches(validation, seed=seed, fixed_epoch=0),
        data_name=data.name,
    )


def check_object_ids(store: RegionStore, image_ids: Sequence[str], num_classes: int) -> int:
    """
    The highest object id of these images, all of which masked object classification is to predict.

    Raises:
        `ValueError`: an image has no object ids, or one that is not below `num_classes`. The collator would say so,
            too, but perhaps days later.
    """
    highest = store.highest_object_ids(image_ids)
    lacking, wrong = np.flatnonzero(highest == NO_OBJECT_IDS), np.flatnonzero(highest >= num_classes)
    if len(lacking) > 0:
        raise ValueError(
            f"{store.path}, image {image_ids[lacking[0]]!r}{_one_of(lacking)}: the record has no object_ids, "
            "which masked object classification predicts. Add them with `unicoder-vl label`, or leave it out: --no_moc."
        )
    if len(wrong) > 0:
        raise ValueError(
            f"{store.path}, image {image_ids[wrong[0]]!r}{_one_of(wrong)}: object_ids hold "
            f"{highest[wrong[0]]}, expected 0 to {num_classes - 1}, as the model predicts, or -1 for none. Ids count "
            "from 0, without background: convert the regions anew if theirs do not; or give the detector's number of "
            "classes with --num_region_classes; or leave the task out: --no_moc."
        )
    return int(highest.max())


def _one_of(images: np.ndarray) -> str:
    return f" (one of {len(images):,})" if len(images) > 1 else ""


@torch.no_grad()
def evaluate_pretraining(
    model: torch.nn.Module,
    pairs: PairsWithMismatches,
    collator: DataCollatorForUnicoderVLPreTraining,
    accelerator: Accelerator,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """
    The three tasks on a validation split, over all processes; nothing larger than a batch is kept.

    Masked tokens and regions are predicted on the matches, masked as in training. Matching is told on the UNMASKED
    pairs, one match and one mismatch each.

    Args:
        model: [`UnicoderVLForPreTraining`], prepared by accelerate or not.
        pairs ([`PairsWithMismatches`]): with `fixed_epoch`, so that each evaluation sees the same masks and mismatches.
        collator: that of training.
        accelerator ([`~accelerate.Accelerator`]): of the run.
        batch_size, num_workers (`int`): of each process.

    Returns:
        `dict[str, float]`: `mlm_loss` (mean negative log-likelihood of a masked token), `mlm_perplexity`,
        `mlm_accuracy`, `moc_loss`, `moc_accuracy`, each with `…_majority_accuracy`, that of naming the commonest
        target always (none of a task whose probability is 0); `matching_loss`, `matching_accuracy` and `matching_auc`
        (chance 0.5).
    """
    was_training = model.training
    model.eval()
    mine = Subset(pairs, range(accelerator.process_index, len(pairs), accelerator.num_processes))

    def batches(collate_fn: Any, name: str):
        loader = DataLoader(
            mine,
            batch_size=batch_size,
            collate_fn=collate_fn,
            num_workers=num_workers,
            generator=torch.Generator(),  # or it would draw from the dropout's
        )
        for batch in logging.tqdm(loader, desc=name, leave=False, disable=not accelerator.is_local_main_process):
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            with accelerator.autocast():
                yield batch, model(**batch)

    config = accelerator.unwrap_model(model).config
    tasks = {"mlm": ("labels", config.vocab_size), "moc": ("region_labels", config.num_region_classes)}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in tasks}  # of losses, of right predictions
    counts = {name: torch.zeros(size, dtype=torch.float64) for name, (_, size) in tasks.items()}  # of each target
    for batch, outputs in batches(collator.collate_matches, "Evaluating masked prediction"):
        for name, logits in (("mlm", outputs.prediction_logits), ("moc", outputs.region_logits)):
            labels = batch[tasks[name][0]]
            targets = labels[labels != IGNORED]
            if logits.ndim == 3:  # not sparse
                logits = logits[labels != IGNORED]
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            sums[name] += torch.stack((losses, (logits.argmax(-1) == targets).sum())).double().cpu()
            counts[name] += torch.bincount(targets, minlength=len(counts[name])).cpu()

    unmasked = dataclasses.replace(collator, mlm_probability=0.0, moc_probability=0.0)
    scores: list[float] = []
    for _, outputs in batches(unmasked, "Evaluating matching"):
        half = len(outputs.scores) // 2
        # (match, mismatch) pair by pair, so that processes may gather in any order.
        scores += torch.stack((outputs.scores[:half], outputs.scores[half:]), dim=1).flatten().tolist()

    model.train(was_training)
    all_scores = np.asarray(gather_object(scores) if accelerator.num_processes > 1 else scores, dtype=np.float32)
    matches = np.tile([1, 0], len(all_scores) // 2)

    metrics: dict[str, float] = {}
    for name in tasks:
        loss, right = accelerator.reduce(sums[name].to(accelerator.device), reduction="sum").tolist()
        targets_of_class = accelerator.reduce(counts[name].to(accelerator.device), reduction="sum")
        if (total := targets_of_class.sum().item()) > 0:
            metrics[f"{name}_loss"] = loss / total
            metrics[f"{name}_accuracy"] = right / total
            metrics[f"{name}_majority_accuracy"] = targets_of_class.max().item() / total
    if "mlm_loss" in metrics:
        metrics["mlm_perplexity"] = math.exp(min(metrics["mlm_loss"], 50.0))
    signed = np.where(matches == 1, all_scores, -all_scores)  # the margin of the right answer
    metrics |= {
        "matching_loss": float(np.logaddexp(0, -signed.astype(np.float64)).mean()),
        "matching_accuracy": float((signed > 0).mean()),
        "matching_auc": roc_auc(all_scores, matches),
    }
    return metrics


class ShuffledStore(Mapping[str, RegionRecord]):
    """A store that gives every image the regions of another: what a model tells from it, it tells from text."""

    def __init__(self, store: Mapping[str, RegionRecord], image_ids: Sequence[str], seed: int = 0):
        image_ids = sorted(set(image_ids))
        if len(image_ids) < 2:
            raise ValueError(f"image_ids holds {image_ids}, expected at least two images to take regions from.")
        order = np.random.default_rng(seed).permutation(len(image_ids))
        # One cycle through all images: none keeps its own regions.
        self.other = {image_ids[a]: image_ids[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
        self.store = store

    def __getitem__(self, image_id: str) -> RegionRecord:
        return dataclasses.replace(self.store[self.other[image_id]], image_id=image_id)

    def __iter__(self):
        return iter(self.other)

    def __len__(self) -> int:
        return len(self.other)


@dataclass
class ZeroShotRetrieval:
    """
    Retrieval by the matching head of a pre-trained model, without fine-tuning (paper, Image-Text Retrieval, zero-shot).

    Args:
        captions (`list[str]`), image_ids (`list[str]`): The C captions and M images.
        image_of_caption (`np.ndarray` of shape `(C,)`): The index in `image_ids` of each caption's image.
        scores (`np.ndarray` of shape `(C, M)`): Higher = better match.
        metrics, chance (`dict[str, float]`): See [`retrieval_metrics`] and [`chance_recalls`].
    """

    captions: list[str]
    image_ids: list[str]
    image_of_caption: np.ndarray
    scores: np.ndarray
    metrics: dict[str, float]
    chance: dict[str, float]


def zero_shot_retrieval(
    model: UnicoderVLForPreTraining,
    processor: UnicoderVLProcessor,
    store: Mapping[str, RegionRecord],
    captions: datasets.Dataset,
    num_images: int | None = None,
    dtype: torch.dtype | None = None,
) -> ZeroShotRetrieval:
    """
    Scores the first `num_images` images of `captions` (rows of `image_id` and `caption`) with all their captions, in
    `dtype` if it is not to be the model's.
    """
    image_ids = list(dict.fromkeys(captions["image_id"]))[:num_images]
    column = {image_id: index for index, image_id in enumerate(image_ids)}
    rows = [row for row in captions if row["image_id"] in column]
    image_of_caption = np.array([column[row["image_id"]] for row in rows])
    texts = [row["caption"] for row in rows]
    scores = ImageTextScorer(model, processor, store, dtype=dtype).score(texts, image_ids)
    return ZeroShotRetrieval(
        captions=texts,
        image_ids=image_ids,
        image_of_caption=image_of_caption,
        scores=scores,
        metrics=retrieval_metrics(scores, image_of_caption),
        chance=chance_recalls(image_of_caption),
    )


def metrics_table(metrics: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """A table of metrics, in percent, with what chance reaches beside each; names without chance are left out."""
    lines = [f"{'':24}{'model':>8}{'chance':>8}  (percent)"]
    lines += [f"{name:24}{100 * metrics[name]:8.1f}{100 * value:8.1f}" for name, value in chance.items()]
    return "\n".join(lines)


def pretraining_chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """What guessing reaches: the commonest target of each masked task, and a coin for matching."""
    chance = {
        name.replace("_majority", ""): value for name, value in metrics.items() if name.endswith("_majority_accuracy")
    }
    return chance | {"matching_accuracy": 0.5, "matching_auc": 0.5}

"""Fine-tuning for image-text retrieval: the arguments of `run.py`, the setup built of them, and evaluation.

Follows the paper's section Image-Text Retrieval: for each positive pair three captions and three images that do not
match it, and a triplet loss on the hardest of each; options beside it are the losses of `losses.py` and in-batch
negatives. Hard negatives are mined by `mining.py`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import nn
from transformers import AutoConfig

from ... import logging
from ...configuration_unicoder_vl import UnicoderVLConfig
from ...data.foils import read_foils
from ...data.negatives import PairsWithNegatives, read_duplicate_groups
from ...modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...records_unicoder_vl import RegionRecord
from ...runs.alignment import align_if_asked
from ...runs.arguments import DataArguments, option
from ...runs.setup import (
    CaptionedRegions,
    TrainingSetup,
    in_words,
    is_unicoder_vl,
    load_model,
    load_processor,
    open_data,
)
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import UnicoderVLDualEncoder
from .collator import DataCollatorForUnicoderVLRetrieval
from .losses import (
    BinaryMatchingLoss,
    ContrastiveLoss,
    GroupLoss,
    GroupSoftmaxLoss,
    HardestNegativeLoss,
    HardNegativeLoss,
    RetrievalLoss,
    SumOfNegativesLoss,
    TwoStageLoss,
)
from .metrics import retrieval_metrics, with_recall_sum
from .protocols import captions_of_images, retrieval_test
from .two_stage_report import SIMILARITY_WEIGHTS, describe_weight, evenly, measure_similarity_weight

logger = logging.get_logger(__name__)


@dataclass
class RetrievalArguments(DataArguments):
    """Names the data, model, groups and loss of a fine-tuning run; without `captions` it takes rendered scenes."""

    max_validation_images: int = option(
        100, "Images of the validation split, drawn evenly, with all captions; 0 evaluates none."
    )
    num_negative_captions: int = option(3, "Mismatching captions drawn for each pair.")
    num_negative_images: int = option(3, "Mismatching images drawn for each pair.")
    in_batch_negatives: bool = option(
        False, "Pairs all captions and images of a micro-batch, too; try it with 0 of the others."
    )
    foils: str | None = option(
        None,
        "File of training captions made false by a word (`unicoder-vl foil --for-training`): a pair has its own as "
        "further negatives.",
    )
    duplicates: str | None = option(
        None, "File of images that show the same, a group a line: .jsonl of lists of image ids, or .csv."
    )
    loss: Literal["hardest", "sum", "binary", "softmax", "none"] | None = option(
        None,
        "Loss: hardest is the triplet loss on the hardest negative (the paper's), sum on all, binary the "
        "cross-entropy of each pair (Oscar), softmax over the group (ViLBERT); none scores no pairs and trains a "
        "first stage of search alone, with its encoder. Default: hardest; for new weights sum.",
    )
    margin: float = option(UnicoderVLConfig.triplet_margin, "Margin of the triplet losses, on sigmoid(score).")
    caption_weight: float = option(1.0, "Weight of caption negatives in the triplet losses.")
    image_weight: float = option(1.0, "Weight of image negatives in the triplet losses.")
    contrastive_weight: float = option(
        0.0, "Weight of the contrastive loss of a first stage of search, trained along; 0 trains none."
    )
    projection_dim: int = option(256, "Width of the embeddings of a new first stage.")
    matching_head: Literal["unicoder_vl", "similarity"] | None = option(
        None,
        "Head that scores pairs: unicoder_vl is the paper's, similarity adds to it the first stage's logit of the "
        "states of the pair, and learns with it. Default: that of the model to start from; for a BERT unicoder_vl.",
    )
    similarity_in_training: bool = option(
        True,
        "With matching_head=similarity and text layers: whether [CLS] learns what the similarity leaves over, or else "
        "to score by itself; the training weighs the sum at its end.",
    )
    freeze_first_stage: bool = option(
        False,
        "Keeps the first stage of the model to start from as it is, with its text layers and region embeddings: what "
        "learns is the layers that read both, and the matching head.",
    )
    num_hard_negatives: int = option(
        0, "Mismatching captions, and images, of the micro-batch that the first stage likes best, a pair."
    )
    random_negative_epochs: int = option(
        0,
        "First epochs in which these are drawn at random: of hard ones the paper's matching head, new, learns nothing.",
    )
    scored_ratio: float = option(
        1.0,
        "Share of the matches of a micro-batch that are scored, with their negatives; the first stage learns from all "
        "of them.",
    )
    query_bank: int = option(
        0,
        "With matching_head=similarity and text layers: most training captions, and images, whose embeddings the model "
        "keeps, so that what is near to all of them scores less; 0 keeps none.",
    )
    bert_learning_rate: float | None = option(
        None,
        "Learning rate of what a BERT knows: embeddings of words, and layers; with text layers, those alone. "
        "0 trains none of it. Default: --learning_rate, as for all other weights.",
    )
    mask_probability: float = option(
        0.0,
        "Share of the words and regions hidden in training, as in pre-training, so that few photos are not "
        "learned by heart.",
    )
    joint_dropout: float = option(
        0.0,
        "Share of the words and regions of each pair that the layers which read both do not see in training, against "
        "learning pairs by heart.",
    )
    early_stopping_patience: int | None = option(
        None, "Evaluations without a better sum of recalls after which training stops."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_validation_images == 0 and self.early_stopping_patience is not None:
            raise ValueError(
                "--early_stopping_patience needs a validation, which --max_validation_images 0 leaves out."
            )
        if self.loss in ("binary", "softmax", "none") and (self.margin, self.caption_weight, self.image_weight) != (
            type(self).margin,
            type(self).caption_weight,
            type(self).image_weight,
        ):
            raise ValueError(
                f"--margin, --caption_weight and --image_weight are of the triplet losses: --loss {self.loss} has none."
            )

    @property
    def both_stages(self) -> bool:
        """Whether pairs are scored and a first stage of search is trained along."""
        return self.contrastive_weight > 0 and self.loss != "none"

    @property
    def training_loss(self) -> RetrievalLoss:
        """The loss that the options describe."""
        if self.loss == "none":
            return ContrastiveLoss(self.contrastive_weight)
        triplet = (self.margin, self.caption_weight, self.image_weight)
        losses: dict[str, GroupLoss] = {
            "hardest": HardestNegativeLoss(*triplet),
            "sum": SumOfNegativesLoss(*triplet),
            "binary": BinaryMatchingLoss(),
            "softmax": GroupSoftmaxLoss(),
        }
        # New weights learn nothing from the hardest of several negatives: all scores become one, and the loss stays at
        # twice the margin.
        groups = losses[self.loss or ("sum" if self.base_model is None else "hardest")]
        if self.num_hard_negatives > 0:
            return HardNegativeLoss(groups, self.contrastive_weight, self.num_hard_negatives, self.scored_ratio)
        return groups if self.contrastive_weight == 0 else TwoStageLoss(groups, self.contrastive_weight)


# The paper's recipe, but for the epochs and the warm-up, on which it is silent; and one for the scenes. A batch is
# counted in positive pairs.
PAPER = {"num_train_epochs": 10, "learning_rate": 5e-5, "train_batch_size": 192, "gradient_accumulation_steps": 4}
SCENES = {"num_train_epochs": 2, "learning_rate": 5e-4, "train_batch_size": 32, "gradient_accumulation_steps": 1}


# Options by which the matching head orders better than a first stage, see docs/matching_head.md.
STRONG = {
    "initializer_range": 0.08,
    "align_regions": True,
    "matching_head": "similarity",
    "loss": "softmax",
    "contrastive_weight": 1.0,
    "num_negative_captions": 0,
    "num_negative_images": 0,
    "num_hard_negatives": 1,
}
# The best model of docs/results.md in two runs: a first stage of search behind a BERT that reads words alone, and what
# reads words and regions behind that first stage, which stays.
FIRST_STAGE = STRONG | {
    "loss": "none",
    "num_hard_negatives": 0,
    "num_text_layers": -1,
    "scale_features": True,
    "bert_learning_rate": 3e-5,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 4,
}
SECOND_STAGE = STRONG | {
    "freeze_first_stage": True,
    "similarity_in_training": False,
    "num_hard_negatives": 2,
    "random_negative_epochs": 1,
    "joint_dropout": 0.2,
    "query_bank": 30_000,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
}
RECIPES = {"strong": STRONG, "first-stage": FIRST_STAGE, "second-stage": SECOND_STAGE}


# A weight that is folded into the score stays there, and pairs behind text layers cost little. On Flickr8k 250 captions
# and images chose 30 for one seed and 300 for another, where 2,000 captions and 1,000 images choose 30 for both.
FOLDING_QUERIES = 1250


@dataclass
class RetrievalSetup(TrainingSetup):
    """
    The setup of a fine-tuning run, as [`prepare_retrieval`] builds it.

    Args:
        loss ([`RetrievalLoss`]): The loss of the training.
        weighing (`datasets.Dataset`, *optional*): Captions of the validation split on which the weight of the
            similarity is measured; None if no first stage is trained, or it alone is, or there is no such split.
        search (`str`, *optional*): The sum by which a search orders its candidates, in words, once it is measured.
        bert_learning_rate (`float`, *optional*): Learning rate of [`bert_weights`], where it is one of their own.
        query_bank (`int`, *optional*, defaults to 0): Most training captions, and images, whose embeddings are kept.
    """

    model: UnicoderVLForImageTextRetrieval
    collator: DataCollatorForUnicoderVLRetrieval
    train: PairsWithNegatives
    validation: datasets.Dataset | None
    loss: RetrievalLoss = field(default_factory=HardestNegativeLoss)
    weighing: datasets.Dataset | None = None
    search: str | None = None
    bert_learning_rate: float | None = None
    query_bank: int = 0

    def measure_similarity_weight(self) -> None:
        """
        Measures the weight of the similarity for the model as it is, and notes it in its configuration and card. A
        query bank, if one is asked for, is filled before, with or without a validation split. A first stage that was
        trained alone is all that orders: pairs, which no head has learned to score, are not.
        """
        if self.first_stage_alone:
            self.model.config.similarity_weight = float(max(SIMILARITY_WEIGHTS))
            self.search = (
                "Candidates of the first stage keep its order, by score + "
                f"{self.model.config.similarity_weight:g} similarity: no pair was trained."
            )
            return
        if self.weighing is None and self.query_bank == 0:
            return
        max_length, store = self.collator.max_length, self.collator.store
        encoder = UnicoderVLDualEncoder(self.model, self.processor, store, "the trained model", max_length)
        if self.query_bank > 0:
            captions, images = self._drawn("caption"), self._drawn("image_id")
            logger.warning(f"The query bank takes {len(captions):,} training captions and {len(images):,} images.")
            embeddings = encoder.embed_captions(captions), encoder.embed_images(images)
            self.model.set_query_bank(*map(torch.from_numpy, embeddings))
        if self.weighing is None:
            return
        scorer = ImageTextScorer(self.model, self.processor, store)
        held = _holds_first_stage(self.model.config)
        num_queries = FOLDING_QUERIES if held else None
        report = measure_similarity_weight(encoder, scorer, self.weighing, max_length, num_queries)
        self.search = describe_weight(report)
        if held:
            self.model.fold_similarity_weight(report.best.similarity_weight)
            self.search += " The score holds that sum now, so that a search orders by the score alone."

    def _drawn(self, column: str) -> list[str]:
        """Draws at most `query_bank` different values of a column of the training split, evenly."""
        values = list(dict.fromkeys(self.train.pairs[:][column].to_pylist()))  # of Arrow's table
        return [values[place] for place in evenly(len(values), self.query_bank)]

    @property
    def facts(self) -> dict[str, Any]:
        """The digest of the foils, if there are any, and whether the first stage stays, if so."""
        foils, found = self.train.foils, {}
        if foils:
            found["foils"] = hashlib.sha256(repr(sorted(foils.items())).encode()).hexdigest()[:16]
        return found | ({"freeze_first_stage": True} if self._first_stage_stays else {})

    @property
    def _first_stage_stays(self) -> bool:
        return not any(weight.requires_grad for weight in first_stage_weights(self.model))

    @property
    def first_stage_alone(self) -> bool:
        """Whether no pair is scored, and a first stage of search is all that is trained."""
        return isinstance(self.loss, ContrastiveLoss)

    @property
    def card(self) -> dict[str, Any]:
        """The arguments of [`write_model_card`] that describe data, training and search."""
        return {**super().card, "search": self.search}

    @property
    def measured_on(self) -> str | None:
        """The numbers of validation captions and images, in words; None without any."""
        return None if self.validation is None else in_words(self.validation)

    @property
    def trained_by(self) -> str:
        """The groups and losses of the training, in words."""
        loss, train = self.loss, self.train
        if self.first_stage_alone:
            return (
                "fine-tuned as a first stage of image-text retrieval, by a contrastive loss; its matching head, which "
                "scores pairs, was left behind"
            )
        negatives = []
        if train.num_captions + train.num_images > 0:
            mined = train.hard_captions is not None or train.hard_images is not None
            negatives.append("mined hard negatives" if mined else "mismatches drawn at random")
        if train.foils:
            negatives.append("captions made false by a word")
        if self.collator.in_batch_negatives:
            negatives.append("all mismatches of the batch")
        if isinstance(loss, HardNegativeLoss):
            negatives.append("the mismatches of the batch that its first stage likes best")
            if self.collator.random_epochs > 0:
                negatives[-1] += f" (at random until the end of epoch {self.collator.random_epochs})"
        along = ", along with a first stage, by a contrastive loss" if isinstance(loss, TwoStageLoss) else ""
        if along and self._first_stage_stays:
            along = ", behind a first stage that stayed as it was"
        if self.model.config.matching_head == "similarity":
            along += ", by whose projections it scores pairs, too"
            if not self.model.config.similarity_in_training:
                along += ", though not in training"
        if self.model.config.query_bank_size is not None:
            along += " less what is near to a bank of {:,} training captions and {:,} images".format(
                *self.model.config.query_bank_size
            )
        groups = " and ".join(["a match", *negatives])
        if isinstance(loss, HardNegativeLoss) and loss.scored_ratio < 1:
            groups += f", for {100 * loss.scored_ratio:g} % of the matches of a batch"
        return f"fine-tuned for image-text retrieval on groups of {groups}{along}"


def first_stage_weights(model: UnicoderVLForImageTextRetrieval) -> list[nn.Parameter]:
    """Collects what the first stage of a model with text layers reads by: all but the joint layers and what follows."""
    stages: list[nn.Module] = [model.bert.embeddings, *model.bert.encoder.layer[model.bert.text_layers]]
    return [weight for module in (*stages, model.first_stage) if module is not None for weight in module.parameters()]


def bert_weights(model: UnicoderVLForImageTextRetrieval) -> list[nn.Parameter]:
    """Collects what a BERT knows: the embeddings of words and the layers, or the text layers, where there are any."""
    embed, layers = model.bert.embeddings, model.bert.encoder.layer[: model.config.num_text_layers or None]
    words = (embed.word_embeddings, embed.position_embeddings, embed.token_type_embeddings, embed.LayerNorm)
    return [weight for module in (*words, *layers) for weight in module.parameters()]


def prepare_retrieval(arguments: RetrievalArguments, output_dir: str | Path, seed: int) -> RetrievalSetup:
    """
    Reads captions and regions, joins them, and builds the model, before any time is spent on training.

    Raises:
        `ValueError`: a caption has no regions (unless `skip_missing`), the checkpoint is of another kind, a pair has no
        negatives, options contradict each other, or a file has a fault.
    """
    first_stage = _first_stage_fields(arguments)
    data = open_data(arguments, output_dir)
    held_out, validation = _held_out(arguments, data), None
    if held_out is not None and arguments.max_validation_images > 0:
        validation = captions_of_images(held_out, arguments.max_validation_images)
    train = PairsWithNegatives(
        data.train,
        seed=seed,
        num_captions=0 if arguments.loss == "none" else arguments.num_negative_captions,
        num_images=0 if arguments.loss == "none" else arguments.num_negative_images,
        duplicates=[] if arguments.duplicates is None else read_duplicate_groups(arguments.duplicates),
        foils=[] if arguments.foils is None else read_foils(arguments.foils),
    )
    model = load_model(arguments, data.store, UnicoderVLForImageTextRetrieval, **first_stage)
    model.config.first_stage_trained = arguments.contrastive_weight > 0
    model.config.similarity_weight = None  # that of another encoder, until the training has ended
    model.config.triplet_margin = arguments.margin
    model.config.joint_dropout_prob = arguments.joint_dropout
    loss = arguments.training_loss
    if isinstance(loss, ContrastiveLoss):
        logger.warning(
            "loss=none trains the first stage alone and leaves the matching head behind: train that afterwards, before "
            "pairs are scored."
        )
        joint = model.bert.encoder.layer[model.config.num_text_layers or len(model.bert.encoder.layer) :]
        for unused in (model.matching_head, model.bert.pooler, *joint):
            unused.requires_grad_(False)
    if arguments.query_bank > 0 and (arguments.loss == "none" or not _holds_first_stage(model.config)):
        raise ValueError(
            f"query_bank={arguments.query_bank} is subtracted from the first stage's logit, which scores hold with "
            "matching_head=similarity and text layers: give --matching_head similarity, --num_text_layers, and another "
            "--loss than none."
        )
    processor = load_processor(arguments, data)
    align_if_asked(arguments, model, processor, data)
    frozen = first_stage_weights(model) if arguments.freeze_first_stage else []
    if arguments.bert_learning_rate == 0:
        frozen += bert_weights(model)
    for weight in frozen:
        weight.requires_grad_(False)
    return RetrievalSetup(
        model=model,
        processor=processor,
        collator=DataCollatorForUnicoderVLRetrieval(
            processor,
            data.store,
            max_length=arguments.max_length,
            in_batch_negatives=arguments.in_batch_negatives,
            contrastive=arguments.contrastive_weight > 0,
            mask_probability=arguments.mask_probability,
            random_epochs=arguments.random_negative_epochs,
            scored_ratio=arguments.scored_ratio,
            seed=seed,
        ),
        train=train,
        validation=validation,
        data_name=data.name,
        loss=loss,
        weighing=held_out if arguments.both_stages else None,
        bert_learning_rate=arguments.bert_learning_rate,
        query_bank=arguments.query_bank,
    )


def _held_out(arguments: RetrievalArguments, data: CaptionedRegions) -> datasets.Dataset | None:
    """Gives the validation split. It may be missing if only the weight would be measured on it, which is then not."""
    if arguments.max_validation_images > 0:
        return data.validation(arguments.validation_split, without="--max_validation_images 0")
    if not arguments.both_stages:
        return None
    try:
        return data.validation(arguments.validation_split)
    except ValueError as error:
        logger.warning(f"{error} The weight of the similarity in a search will not be measured.")
        return None


def _first_stage_fields(arguments: RetrievalArguments) -> dict[str, Any]:
    """Makes the fields of a first stage that is trained, or of none: an old one would not fit the new encoder."""
    for each in ("contrastive_weight", "num_hard_negatives", "random_negative_epochs", "query_bank"):
        if getattr(arguments, each) < 0:
            raise ValueError(f"{each}={getattr(arguments, each)}; expected at least 0.")
    if arguments.contrastive_weight == 0 and (arguments.loss == "none" or arguments.num_hard_negatives > 0):
        raise ValueError(
            f"loss={arguments.loss}, num_hard_negatives={arguments.num_hard_negatives} need a first stage that learns: "
            "give --contrastive_weight, such as 1."
        )
    if arguments.matching_head == "similarity" and arguments.contrastive_weight == 0:
        raise ValueError(
            "matching_head=similarity reads a first stage that learns along: give --contrastive_weight, such as 1."
        )
    if not arguments.similarity_in_training and not arguments.both_stages:
        raise ValueError(
            "similarity_in_training=False needs scores and a first stage that learn: give --contrastive_weight, such "
            "as 1, and another --loss than none."
        )
    if arguments.random_negative_epochs > 0 and arguments.num_hard_negatives == 0:
        raise ValueError(
            f"random_negative_epochs={arguments.random_negative_epochs} says how --num_hard_negatives are drawn: give "
            "it, such as 1."
        )
    if arguments.bert_learning_rate is not None and not 0 <= arguments.bert_learning_rate < float("inf"):
        raise ValueError(f"bert_learning_rate={arguments.bert_learning_rate}, expected at least 0.")
    if not 0 <= arguments.joint_dropout < 1:
        raise ValueError(f"joint_dropout={arguments.joint_dropout}, expected a share of at least 0, below 1.")
    if not 0 < arguments.scored_ratio <= 1:
        raise ValueError(f"scored_ratio={arguments.scored_ratio}, expected a share of the matches: above 0, at most 1.")
    if arguments.scored_ratio < 1 and (arguments.in_batch_negatives or arguments.num_hard_negatives == 0):
        raise ValueError(
            f"scored_ratio={arguments.scored_ratio} is of matches with negatives of their own: give "
            "--num_hard_negatives, such as 1, and no --in_batch_negatives."
        )
    pairs = arguments.num_hard_negatives > 0 or arguments.in_batch_negatives or arguments.foils is not None
    if arguments.loss == "none" and (pairs or arguments.joint_dropout > 0):
        raise ValueError(
            "loss=none scores no pairs: it takes no num_hard_negatives, in_batch_negatives, foils or joint_dropout."
        )
    name, old = arguments.base_model, None
    if name is not None and is_unicoder_vl(name):
        config = AutoConfig.from_pretrained(name)
        old = config.projection_dim
    if arguments.freeze_first_stage:
        if old is None or not config.first_stage_trained or not config.num_text_layers:
            raise ValueError(
                f"freeze_first_stage keeps a trained first stage behind text layers, and {name or 'a new model'} has "
                "none: start from one, as --recipe first-stage trains it."
            )
        if not arguments.both_stages or arguments.bert_learning_rate is not None:
            raise ValueError(
                "freeze_first_stage trains scores alone, which a kept first stage helps to draw mismatches for: give "
                "--contrastive_weight, such as 1, another --loss than none, and no --bert_learning_rate."
            )
    if arguments.contrastive_weight > 0:
        head: dict[str, Any] = {"similarity_in_training": arguments.similarity_in_training}
        if arguments.matching_head is not None:
            head["matching_head"] = arguments.matching_head
        return {"projection_dim": old or arguments.projection_dim, **head}
    if old is not None:
        logger.warning(
            f"{name} has a first stage of search, which would not fit the encoder after this training: it is left out. "
            "Train it along with --contrastive_weight, or afterwards by `unicoder-vl train-first-stage`."
        )
    return {"projection_dim": None, "matching_head": "unicoder_vl", "similarity_in_training": True}


def _holds_first_stage(config: UnicoderVLConfig) -> bool:
    """Whether the score of a pair holds the first stage's logit of it, and not one of states that the pair has."""
    return config.matching_head == "similarity" and config.num_text_layers > 0


def evaluate_retrieval(
    model: UnicoderVLForImageTextRetrieval,
    processor: UnicoderVLProcessor,
    store: Mapping[str, RegionRecord],
    captions: datasets.Dataset,
    max_length: int = 44,
    by_first_stage: bool = False,
) -> dict[str, float]:
    """
    Scores all captions with all their images and ranks them. Every process calls it, and gets the whole.

    Args:
        model ([`UnicoderVLForImageTextRetrieval`]), processor ([`UnicoderVLProcessor`]): The model and its processor.
        store (`Mapping[str, RegionRecord]`): The regions of every image.
        captions (`datasets.Dataset`): Rows with `image_id` and `caption`.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption.
        by_first_stage (`bool`, *optional*, defaults to `False`): Whether similarities of the first stage rank, not
            scores, as after a training of the first stage alone.

    Returns:
        `dict[str, float]`: the metrics of [`retrieval_metrics`], and `recall_sum`, the sum of the six recalls. Names of
        the first stage's metrics begin with `first_stage_`, but for the sum. Where scores hold the first stage's own
        logit, after text layers, they are those of the best of `SIMILARITY_WEIGHTS`, which the training folds into the
        matching head at its end.
    """
    (fold,) = retrieval_test(captions).folds
    if not by_first_stage:
        scorer = ImageTextScorer(model, processor, store, verbose=False)
        scores = scorer.score(fold.captions, fold.image_ids, max_length=max_length)
        if not _holds_first_stage(model.config):
            return with_recall_sum(retrieval_metrics(scores, fold.image_of_caption))
    encoder = UnicoderVLDualEncoder(model, processor, store, "the model in training", max_length)
    texts, images = encoder.embed_captions(fold.captions), encoder.embed_images(fold.image_ids)
    if not by_first_stage:
        similarities = encoder.similarities_in_scores(texts, images)
        sums = (scores + weight * similarities for weight in SIMILARITY_WEIGHTS)
        measured = [with_recall_sum(retrieval_metrics(each, fold.image_of_caption)) for each in sums]
        return max(measured, key=lambda metrics: metrics["recall_sum"])
    metrics = with_recall_sum(retrieval_metrics(texts @ images.T, fold.image_of_caption))
    recall_sum = metrics.pop("recall_sum")
    return {f"first_stage_{name}": value for name, value in metrics.items()} | {"recall_sum": recall_sum}

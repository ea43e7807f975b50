"""
The losses of fine-tuning for retrieval: losses of the scores of groups, of a first stage of search, and of both.

Each is an object that a trainer or a plain loop calls on a batch of [`DataCollatorForUnicoderVLRetrieval`]:

    loss = SumOfNegativesLoss(margin=0.2)
    value = loss(model, batch)
    value.backward()

They call nothing but `model(...)`, once or twice, so that what wraps the model (DistributedDataParallel, accelerate)
synchronises its gradients. Follows the paper's section Image-Text Retrieval; beside its loss are those of Oscar and
ViLBERT, and the contrastive loss and the hard negatives of ALBEF. Left out: ALBEF's momentum encoder and its queue.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...configuration_unicoder_vl import UnicoderVLConfig
from ...modeling_unicoder_vl import hardest_negative_triplet_loss, negatives_of_matches, triplet_hinges

# What a batch says about its pairs, which the losses take and scoring does without.
_TARGETS = ("labels", "group_ids", "mismatches", "hardness")
_OF_GROUPS = ("labels", "group_ids", "caption_index", "image_index")
_OF_MATCHES = ("labels", "caption_index", "image_index", "mismatches")


class RetrievalLoss(Protocol):
    """Computes a loss of a model on a batch."""

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Computes the loss of a batch.

        Args:
            model ([`UnicoderVLForImageTextRetrieval`]):
                The model, wrapped (in DistributedDataParallel, say) or not.
            batch (`dict` of `torch.Tensor`):
                A batch of [`DataCollatorForUnicoderVLRetrieval`], for a contrastive loss one with `contrastive=True`.

        Returns:
            `torch.Tensor` of shape `()`: the mean over the matches of the batch, float32.

        Raises:
            `ValueError`: the batch lacks something, or the model has no first stage and the loss needs one.
        """
        ...


class GroupLoss:
    """A loss of the scores of groups, each of one or more matches and their mismatches. A subclass computes it."""

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        targets = _columns(batch, _OF_GROUPS)
        return self.of_scores(model(**_inputs(batch)).scores, *targets)

    def of_scores(
        self,
        scores: torch.Tensor,
        labels: torch.Tensor,
        group_ids: torch.Tensor,
        caption_index: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """
        Computes the loss of scores, whoever computed them.

        Args:
            scores, labels, group_ids, caption_index, image_index (`torch.Tensor` of shape `(batch_size,)`):
                The scores of the pairs, and what the batch says of them, see [`UnicoderVLForImageTextRetrieval`].

        Returns:
            `torch.Tensor` of shape `()`; 0 if there is no match.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class HardestNegativeLoss(GroupLoss):
    """
    The paper's triplet loss (section Image-Text Retrieval, after VSE++): the mean over the matches of `max(0, margin -
    s + s_caption) + max(0, margin - s + s_image)`, with the highest of the group's caption negatives (mismatches with
    the match's image) and of its image negatives (mismatches with its caption), all on `s = sigmoid(score)`.

    Args:
        margin (`float`, *optional*, defaults to 0.2): Margin between two values in `(0, 1)`.
        caption_weight, image_weight (`float`, *optional*, default to 1.0): Weights of the two terms.
    """

    margin: float = UnicoderVLConfig.triplet_margin
    caption_weight: float = 1.0
    image_weight: float = 1.0

    def of_scores(self, scores, labels, group_ids, caption_index, image_index):
        """
        Computes the mean over the matches of the hinges of their hardest negatives; the arguments are those of
        [`GroupLoss`].
        """
        return hardest_negative_triplet_loss(
            scores,
            labels,
            group_ids,
            caption_index,
            image_index,
            margin=self.margin,
            caption_weight=self.caption_weight,
            image_weight=self.image_weight,
        )


@dataclass(frozen=True)
class SumOfNegativesLoss(GroupLoss):
    """
    The triplet loss on ALL negatives: the mean over the matches of the sum of `max(0, margin - s + s_negative)` over
    the caption negatives and over the image negatives of the group; [`HardestNegativeLoss`] takes the highest of each
    instead. New weights can begin with this loss.

    Args:
        margin, caption_weight, image_weight (`float`, *optional*): The values of [`HardestNegativeLoss`].
    """

    margin: float = UnicoderVLConfig.triplet_margin
    caption_weight: float = 1.0
    image_weight: float = 1.0

    def of_scores(self, scores, labels, group_ids, caption_index, image_index):
        """Computes the mean over the matches of the sums of their hinges; the arguments are those of [`GroupLoss`]."""
        captions, images = triplet_hinges(scores, labels, group_ids, caption_index, image_index, self.margin)
        loss = self.caption_weight * captions.sum() + self.image_weight * images.sum()
        return loss / (labels == 1).sum().clamp(min=1)


@dataclass(frozen=True)
class GroupSoftmaxLoss(GroupLoss):
    """
    The loss of choosing the match in its group (ViLBERT's four-way choice, for any number): the mean over the matches
    of `-log softmax` over the scores of the match and of its negatives of both directions. Another match of the group
    is no negative.
    """

    def of_scores(self, scores, labels, group_ids, caption_index, image_index):
        """
        Computes the mean over the matches of `-log softmax` in their groups; the arguments are those of [`GroupLoss`].
        """
        captions, images = negatives_of_matches(labels, group_ids, caption_index, image_index)
        match = labels == 1
        options = captions | images | torch.diag(match)
        # Rows that are no match have no option: all -inf would be NaN, in the gradient too.
        options = options | ~match[:, None]
        log_normalizer = scores.masked_fill(~options, float("-inf")).logsumexp(dim=1)
        return ((log_normalizer - scores) * match).sum() / match.sum().clamp(min=1)


@dataclass(frozen=True)
class BinaryMatchingLoss(GroupLoss):
    """
    Binary cross-entropy of `sigmoid(score)` (Oscar): the mean over all matches and mismatches, whatever their groups.
    It equals the cross-entropy of the two logits.
    """

    def of_scores(self, scores, labels, group_ids, caption_index, image_index):
        """Computes the mean over all pairs of the binary cross-entropy; the arguments are those of [`GroupLoss`]."""
        known = labels != -100
        targets = (labels == 1).to(scores.dtype)
        losses = nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class ContrastiveLoss:
    """
    The loss of a first stage of search, trained with its encoder and without scoring a pair: `weight` times
    [`contrastive_loss`] of the captions and images of the batch's matches. The matching head learns nothing.

    Args:
        weight (`float`, *optional*, defaults to 1.0): Factor, above 0.
    """

    weight: float = 1.0

    def __post_init__(self):
        _check_positive("weight", self.weight)

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = _first_stage_alone(model, batch, *_matches(batch)[1:])
        # 0, of no pair: its graph gives the matching head, too, the gradient that DistributedDataParallel waits for.
        return self.weight * contrastive_loss(outputs.first_stage_logits, batch["mismatches"]) + outputs.scores.sum()


@dataclass(frozen=True)
class TwoStageLoss:
    """
    The loss of both stages of a search at once: the loss of the groups' scores, plus `contrastive_weight` times
    [`contrastive_loss`] of the captions and images of the batch's matches.

    Args:
        groups ([`GroupLoss`]): Loss of the scores.
        contrastive_weight (`float`, *optional*, defaults to 1.0): Weight of the contrastive loss, above 0.
    """

    groups: GroupLoss
    contrastive_weight: float = 1.0

    def __post_init__(self):
        _check_positive("contrastive_weight", self.contrastive_weight)

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        targets = _columns(batch, _OF_GROUPS)
        _, captions, images = _matches(batch)
        outputs = model(**_inputs(batch), first_stage_captions=captions, first_stage_images=images)
        contrastive = contrastive_loss(outputs.first_stage_logits, batch["mismatches"])
        return self.groups.of_scores(outputs.scores, *targets) + self.contrastive_weight * contrastive


@dataclass(frozen=True)
class HardNegativeLoss(TwoStageLoss):
    """
    The loss of both stages in which the second learns from the mistakes of the first. It is [`TwoStageLoss`] with more
    negatives in the group of each match: [`hard_negatives`], the mismatches of the batch that the first stage likes
    best (ALBEF draws them by its logits; these are the highest). Where the batch has a `hardness`, that decides.

    Args:
        groups, contrastive_weight: The arguments of [`TwoStageLoss`].
        num_hard_negatives (`int`, *optional*, defaults to 1): Captions, and as many images, for each match, at least 1.
        scored_ratio (`float`, *optional*, defaults to 1.0): Share of the matches, above 0, at most 1. Below 1, the
            first ones of the batch are scored, so many, with their negatives, and no other pair: scores cost most of a
            step, and more steps teach more than more pairs a step. Give the collator the same share.

    Raises:
        `ValueError`: below a share of 1, the matches of a batch are of one group, as `in_batch_negatives` makes them.
    """

    num_hard_negatives: int = 1
    scored_ratio: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_positive("num_hard_negatives", self.num_hard_negatives)
        if not 0 < self.scored_ratio <= 1:
            raise ValueError(f"scored_ratio={self.scored_ratio}, expected a share above 0, at most 1.")

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        _columns(batch, _OF_GROUPS)
        matches, captions, images = _matches(batch)
        group_of_match = batch["group_ids"][matches]
        first_stage = _first_stage_alone(model, batch, captions, images)
        logits = first_stage.first_stage_logits
        hardness = batch.get("hardness", logits)
        found: Sequence[torch.Tensor] = hard_negatives(hardness, batch["mismatches"], self.num_hard_negatives)
        if self.scored_ratio < 1:
            scored = math.ceil(self.scored_ratio * len(matches))
            found = [each.view(2, len(matches), -1)[:, :scored].flatten() for each in found]
            kept = torch.isin(batch["group_ids"], group_of_match[:scored]).nonzero()[:, 0]
            if scored < len(matches) and len(kept) == len(batch["group_ids"]):
                raise ValueError(
                    f"scored_ratio={self.scored_ratio} takes batches in which each match has a group of its own: leave "
                    "out in_batch_negatives."
                )
            batch = {**batch, **{name: batch[name][kept] for name in _OF_GROUPS}}
        match, caption, image, label = found
        more = {
            "labels": label,
            "group_ids": group_of_match[match],
            "caption_index": captions[caption],
            "image_index": images[image],
        }
        pairs = {**batch, **{name: torch.cat((batch[name], tensor)) for name, tensor in more.items()}}
        # Text layers have read the captions. No row for the first stage: so this graph holds all parameters, too, and
        # DistributedDataParallel takes none for unused that the call before has used.
        none = label.new_zeros(0)
        words = {} if first_stage.word_states is None else {"word_states": first_stage.word_states}
        outputs = model(**_inputs(pairs), **words, first_stage_captions=none, first_stage_images=none)
        contrastive = contrastive_loss(logits, batch["mismatches"])
        return (
            self.groups.of_scores(outputs.scores, *_columns(pairs, _OF_GROUPS)) + self.contrastive_weight * contrastive
        )


def contrastive_loss(logits: torch.Tensor, mismatches: torch.Tensor) -> torch.Tensor:
    r"""
    Computes the symmetric cross-entropy of CLIP without false negatives: the mean over the matches of `-log softmax` of
    each one's logit, among the images that its caption does not match, and among the captions that its image does not
    match; mean of the two.

    Args:
        logits (`torch.Tensor` of shape `(num_matches, num_matches)`):
            Logit of caption p with image q; p with p is a match.
        mismatches (`torch.BoolTensor` of shape `(num_matches, num_matches)`):
            Whether caption p and image q are a mismatch. Other pairs, but p with p, are left out.

    Returns:
        `torch.Tensor` of shape `()`.

    Raises:
        `ValueError`: the shapes differ.
    """
    if mismatches.shape != logits.shape:
        raise ValueError(f"mismatches has shape {tuple(mismatches.shape)}, expected {tuple(logits.shape)}.")
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~(mismatches | own), float("-inf"))
    log_normalizers = logits.logsumexp(dim=1) + logits.logsumexp(dim=0)
    return (log_normalizers / 2 - logits.diagonal()).mean()


def hard_negatives(
    logits: torch.Tensor, mismatches: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Finds the mismatches of a batch that a first stage most takes for matches: for each match the `count` images with
    the highest logits that its caption does not match, and the `count` captions that its image does not match.

    Args:
        logits, mismatches: The arguments of [`contrastive_loss`].
        count (`int`): Number in each direction; at most `num_matches` are taken.

    Returns:
        Four `torch.LongTensor` of shape `(2 * count * num_matches,)`: the match whose negative a pair is, the
        matches whose caption and whose image it has, and its label: 0, or -100 if there are fewer mismatches.
    """
    likely = logits.detach().masked_fill(~mismatches, float("-inf"))
    count = min(count, len(likely))
    images, captions = likely.topk(count, dim=1), likely.T.topk(count, dim=1)
    own = torch.arange(len(likely), device=likely.device).repeat_interleave(count)
    found = torch.cat((images.values, captions.values)).flatten()
    return (
        own.repeat(2),
        torch.cat((own, captions.indices.flatten())),
        torch.cat((images.indices.flatten(), own)),
        torch.full_like(found, -100, dtype=torch.long).masked_fill(found > float("-inf"), 0),
    )


def _inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Picks the arguments of a call that scores."""
    return {name: tensor for name, tensor in batch.items() if name not in _TARGETS}


def _matches(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the rows of a batch that are matches, their captions and their images, each `(num_matches,)`."""
    labels, captions, images, mismatches = _columns(batch, _OF_MATCHES)
    # In their order, without a look at how many there are.
    matches = (labels == 1).long().argsort(descending=True, stable=True)[: len(mismatches)]
    return matches, captions[matches], images[matches]


def _first_stage_alone(
    model: nn.Module, batch: Mapping[str, torch.Tensor], captions: torch.Tensor, images: torch.Tensor
) -> Any:
    """Calls the model for the logits of these captions with each of these images, and the scores of no pair, `(0,)`."""
    none = captions.new_zeros(0)
    no_pair = {**_inputs(batch), "caption_index": none, "image_index": none}
    return model(**no_pair, first_stage_captions=captions, first_stage_images=images)


def _columns(batch: Mapping[str, torch.Tensor], names: Sequence[str]) -> list[torch.Tensor]:
    """Picks these parts of a batch, in this order; raises ValueError for those that it lacks."""
    if missing := [name for name in names if batch.get(name) is None]:
        options = "(processor, store, contrastive=True)" if "mismatches" in missing else ""
        raise ValueError(
            f"The batch lacks {', '.join(missing)}, which the loss needs: DataCollatorForUnicoderVLRetrieval{options} "
            "gives them."
        )
    return [batch[name] for name in names]


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}, expected above 0.")

"""
Which proposals of a Faster R-CNN become regions: the two rules of the field, on tensors of one photo.

Both give indices, best first, at most `max_regions`. Fewer than `min_regions` are filled up by rank, as far as
proposals go. Ties go to the lower index.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

SCORE_THRESHOLD, NMS_THRESHOLD = 0.2, 0.3  # of bottom-up attention's generate_tsv.py


def caffe(
    boxes: Tensor,
    scores: Tensor,
    *,
    min_regions: int,
    max_regions: int,
    score_threshold: float = SCORE_THRESHOLD,
    nms_threshold: float = NMS_THRESHOLD,
) -> Tensor:
    """
    Bottom-up attention's own rule: NMS in each class by itself; a proposal counts with the best class that it survives
    in, and is kept if that scores at least `score_threshold`.

    Args:
        boxes (`torch.Tensor` of shape `(n, 4)`): The proposals, not regressed.
        scores (`torch.Tensor` of shape `(n, K)`): Probability of each class, without background.
    """
    confidence = (scores * survivors(boxes, scores, nms_threshold)).amax(1)
    # What survives nowhere has confidence 0; among those, the better scored first.
    order = scores.amax(1).argsort(descending=True, stable=True)
    order = order[confidence[order].argsort(descending=True, stable=True)]
    count = int((confidence >= score_threshold).sum())
    return order[: min(max(count, min_regions), max_regions)]


def max_nms(
    boxes: Tensor, scores: Tensor, *, min_regions: int, max_regions: int, nms_thresholds: Sequence[float]
) -> Tensor:
    """
    The rule of the ports to PyTorch: one NMS for all, on the boxes regressed for the top class.

    Args:
        boxes (`torch.Tensor` of shape `(n, 4)`): Each proposal's box of its best class.
        scores (`torch.Tensor` of shape `(n,)`): Probability of that class.
        nms_thresholds (sequence of `float`): Tried in turn until `min_regions` are left.
    """
    for threshold in nms_thresholds:
        kept = nms(boxes, scores, threshold)[:max_regions]
        if len(kept) >= min_regions:
            return kept
    dropped = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    dropped[kept] = False
    order = scores.argsort(descending=True, stable=True)
    return torch.cat([kept, order[dropped[order]][: min_regions - len(kept)]])


def survivors(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Of NMS in each of K classes: `(n, K)` booleans from boxes `(n, 4)` and scores `(n, K)`, all classes at once."""
    apart = (box_iou(boxes, boxes) <= threshold).fill_diagonal_(True)
    alive = torch.ones_like(scores.T, dtype=torch.bool)  # (K, n)
    classes = torch.arange(scores.shape[1], device=scores.device)
    # Step i looks at the box of rank i in each class, and silences all that overlap it if it is alive itself. None of
    # these outranks it and is alive: that one would have silenced it.
    for current in scores.argsort(dim=0, descending=True, stable=True):
        alive &= apart[current] | ~alive[classes, current, None]
    return alive.T

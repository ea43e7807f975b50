"""
Selection of the proposals of a Faster R-CNN that become regions: the two rules in use, on tensors of one photo.

Both give indices `(m,)`, best first, at most `max_regions`. Fewer than `min_regions` are filled up by rank, as long as
there are proposals. Ties go to the lower index.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

SCORE_THRESHOLD, NMS_THRESHOLD = 0.2, 0.3  # as in generate_tsv.py of bottom-up attention


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
    Selects by the rule of bottom-up attention: NMS in each class by itself; a proposal counts with the best class in
    which it survives, and is kept if that class scores at least `score_threshold`.

    Args:
        boxes (`torch.Tensor` of shape `(n, 4)`): The proposals, x1 y1 x2 y2, not regressed.
        scores (`torch.Tensor` of shape `(n, K)`): Probability of each class, 0 to 1, without background.
    """
    confidence = (scores * survivors(boxes, scores, nms_threshold)).amax(1)
    # Proposals that survive in no class have confidence 0; among these, the better scored come first.
    order = scores.amax(1).argsort(descending=True, stable=True)
    order = order[confidence[order].argsort(descending=True, stable=True)]
    count = int((confidence >= score_threshold).sum())
    return order[: min(max(count, min_regions), max_regions)]


def max_nms(
    boxes: Tensor, scores: Tensor, *, min_regions: int, max_regions: int, nms_thresholds: Sequence[float]
) -> Tensor:
    """
    Selects by the rule of the ports to PyTorch: one NMS for all classes, on the boxes regressed for the top class.

    Args:
        boxes (`torch.Tensor` of shape `(n, 4)`): Box of each proposal, regressed for its best class.
        scores (`torch.Tensor` of shape `(n,)`): Probability of that class.
        nms_thresholds (sequence of `float`): Overlaps (0 to 1) that are tried in turn until `min_regions` are left.
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
    """Runs NMS in each of K classes, all at once: gives `(n, K)` booleans from boxes `(n, 4)` and scores `(n, K)`."""
    apart = (box_iou(boxes, boxes) <= threshold).fill_diagonal_(True)
    alive = torch.ones_like(scores.T, dtype=torch.bool)  # (K, n)
    classes = torch.arange(scores.shape[1], device=scores.device)
    # Step i takes the box of rank i in each class, and, if it is alive, silences all boxes that overlap it. A box of
    # higher rank among these is not alive: otherwise it would have silenced this one.
    for current in scores.argsort(dim=0, descending=True, stable=True):
        alive &= apart[current] | ~alive[classes, current, None]
    return alive.T

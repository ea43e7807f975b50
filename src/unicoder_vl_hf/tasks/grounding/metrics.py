"""The metrics of expressions that refer to a region: accuracy, recall among the best, and how many could be met."""

from collections.abc import Sequence

import numpy as np

from ...regions.comparison import box_iou

MIN_IOU = 0.5


def target_ious(boxes: np.ndarray, target: Sequence[float], width: int, height: int) -> np.ndarray:
    """
    Measures how much each box overlaps the one that is meant.

    Args:
        boxes (`np.ndarray` of shape `(num_regions, 4)`): x1 y1 x2 y2 as fractions of the image.
        target (sequence of 4 `float`): The box that is meant, in pixels.
        width, height (`int`): The size of the image in pixels.

    Returns:
        `np.ndarray` of shape `(num_regions,)`: intersection over union, in `[0, 1]`.
    """
    wanted = np.array([target], dtype=np.float64) / (width, height, width, height)
    return box_iou(boxes, wanted)[:, 0]


def grounding_metrics(scores: Sequence[np.ndarray], ious: Sequence[np.ndarray]) -> dict[str, float]:
    """
    Measures how often the regions of the highest scores are those that are meant, by an intersection over union of 0.5.

    Args:
        scores (sequence of arrays of shape `(num_regions,)`): The score of each region of an image, higher = better.
        ious (sequence of arrays of shape `(num_regions,)`): How much each overlaps the box that is meant, see
            [`target_ious`].

    Returns:
        `dict` of `accuracy`, in `[0, 1]`, which is recall@1, `recall@5`, `recall@10`, and `reachable`, the share of
        expressions that any region meets.

    Raises:
        `ValueError`: there is no expression, or a score is NaN or lacks its overlap.
    """
    if not len(scores) or len(scores) != len(ious):
        raise ValueError(
            f"There are {len(scores)} rows of scores and {len(ious)} of overlaps; expected as many, not 0."
        )
    ranks = []  # of the first region that meets what is meant, from 0
    for number, (of_row, overlaps) in enumerate(zip(scores, ious, strict=True)):
        if np.shape(of_row) != np.shape(overlaps) or np.isnan(of_row).any():
            raise ValueError(
                f"scores[{number}] are {np.shape(of_row)} with {np.shape(overlaps)} overlaps, or hold NaN."
            )
        met = np.asarray(overlaps)[np.argsort(-np.asarray(of_row), kind="stable")] >= MIN_IOU
        ranks.append(int(met.argmax()) if met.any() else np.inf)
    found = {f"recall@{count}": float(np.mean(np.array(ranks) < count)) for count in (1, 5, 10)}
    return {"accuracy": found.pop("recall@1"), **found, "reachable": float(np.isfinite(ranks).mean())}

"""Both selection rules: by hand where they differ, and against slow loops."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from unicoder_vl_hf.regions.detectors.selection import caffe, max_nms

# Two boxes of one thing (IoU 0.82), one of another, and one that overlaps the first two by 0.43.
BOXES = torch.tensor([[0.0, 0, 100, 50], [0, 0, 90, 55], [200, 10, 260, 40], [0, 20, 100, 70]])


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def greedy(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        for other in kept:
            width = min(boxes[index][2], boxes[other][2]) - max(boxes[index][0], boxes[other][0])
            height = min(boxes[index][3], boxes[other][3]) - max(boxes[index][1], boxes[other][1])
            common = max(width, 0) * max(height, 0)
            if common / (area(boxes[index]) + area(boxes[other]) - common) > threshold:
                break
        else:
            kept.append(int(index))
    return kept


def test_where_the_rules_differ():
    scores = torch.tensor([[0.6, 0.0, 0.1], [0.5, 0.45, 0.0], [0.0, 0.0, 0.1], [0.3, 0.0, 0.25]])
    # Box 1 loses class 0 to box 0 but wins class 1, box 3 wins class 2: Caffe keeps both. Box 2 scores below 0.2.
    assert caffe(BOXES, scores, min_regions=1, max_regions=10).tolist() == [0, 1, 3]
    # One NMS for all keeps one box of each place; no score is too low.
    top = scores.max(1).values
    assert max_nms(BOXES, top, min_regions=1, max_regions=10, nms_thresholds=[0.3]).tolist() == [0, 2]
    assert max_nms(BOXES, top, min_regions=1, max_regions=10, nms_thresholds=[0.6]).tolist() == [0, 3, 2]


def test_the_survivors_rank_not_the_scores():
    # Box 1 scores 0.5 in class 0, which it does not survive in; what counts is its 0.2 in class 1.
    scores = torch.tensor([[0.6, 0.1], [0.5, 0.2], [0.0, 0.3], [0.0, 0.0]])
    assert caffe(BOXES, scores, min_regions=1, max_regions=10).tolist() == [0, 2, 1]
    assert caffe(BOXES, scores, min_regions=1, max_regions=2).tolist() == [0, 2]
    assert caffe(BOXES, scores, min_regions=1, max_regions=10, score_threshold=0.25).tolist() == [0, 2]


def test_score_at_the_threshold_is_kept():
    scores = torch.tensor([[0.25, 0.0], [0.0, 0.0], [0.0, 0.125], [0.0, 0.0]])
    assert caffe(BOXES, scores, min_regions=1, max_regions=4, score_threshold=0.25).tolist() == [0]
    assert caffe(BOXES, scores, min_regions=1, max_regions=4, score_threshold=0.125).tolist() == [0, 2]


def test_fewer_than_min_are_filled_by_rank():
    scores = torch.tensor([[0.1, 0.0], [0.08, 0.0], [0.0, 0.05], [0.09, 0.0]])
    # 0 and 2 survive but score low; 3 and 1 survive where they score 0, and rank by what they scored.
    assert caffe(BOXES, scores, min_regions=2, max_regions=10).tolist() == [0, 2]
    assert caffe(BOXES, scores, min_regions=4, max_regions=10).tolist() == [0, 2, 3, 1]
    assert caffe(BOXES, scores, min_regions=36, max_regions=36).tolist() == [0, 2, 3, 1]
    top = scores.max(1).values
    options = {"nms_thresholds": [0.3]}
    assert max_nms(BOXES, top, min_regions=2, max_regions=10, **options).tolist() == [0, 2]
    assert max_nms(BOXES, top, min_regions=3, max_regions=10, **options).tolist() == [0, 2, 3]
    assert max_nms(BOXES, top, min_regions=36, max_regions=36, **options).tolist() == [0, 2, 3, 1]
    assert max_nms(BOXES, top, min_regions=1, max_regions=1, **options).tolist() == [0]


def test_thresholds_are_tried_in_turn():
    top = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert max_nms(BOXES, top, min_regions=3, max_regions=9, nms_thresholds=[0.3, 0.6]).tolist() == [0, 2, 3]
    assert max_nms(BOXES, top, min_regions=2, max_regions=9, nms_thresholds=[0.3, 0.6]).tolist() == [0, 2]


@pytest.mark.parametrize("counts", [(36, 36), (10, 100), (100, 100)])
def test_against_slow_loops(counts):
    low, high = counts
    rng = np.random.default_rng(0)
    for trial in range(2):
        n, classes = 110, 8
        corners = rng.uniform(0, 200, (n, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 120, (n, 2))], 1).astype(np.float32)
        scores = rng.dirichlet(np.full(classes, 0.1), n).astype(np.float32) * rng.choice([0.15, 1], (n, 1))
        scores = scores.astype(np.float32)

        confidence = np.zeros(n, np.float32)
        for column in range(classes):
            kept = greedy(boxes, scores[:, column], 0.3)
            confidence[kept] = np.maximum(confidence[kept], scores[kept, column])
        count = min(max(int((confidence >= 0.2).sum()), low), high)
        expected = sorted(range(n), key=lambda i: (-confidence[i], -scores[i].max(), i))[:count]
        found = caffe(torch.tensor(boxes), torch.tensor(scores), min_regions=low, max_regions=high)
        assert found.tolist() == expected, trial

        top = scores.max(1)
        kept = greedy(boxes, top, 0.5)[:high]
        rest = sorted(set(range(n)) - set(kept), key=lambda i: (-top[i], i))
        expected = kept + rest[: max(low - len(kept), 0)]
        found = max_nms(torch.tensor(boxes), torch.tensor(top), min_regions=low, max_regions=high, nms_thresholds=[0.5])
        assert found.tolist() == expected, trial


def test_equal_scores_go_to_the_lower_index():
    apart = torch.tensor([[0.0, 0, 9, 5], [20, 0, 29, 5], [40, 0, 49, 5]])
    scores = torch.full((3, 2), 0.5)
    assert caffe(apart, scores, min_regions=1, max_regions=2).tolist() == [0, 1]
    assert max_nms(apart, scores[:, 0], min_regions=1, max_regions=2, nms_thresholds=[0.5]).tolist() == [0, 1]

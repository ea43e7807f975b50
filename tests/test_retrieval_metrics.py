import numpy as np
import pytest

from unicoder_vl_hf.retrieval.metrics import retrieval_metrics, retrieval_ranks, roc_auc

# Eight captions (rows), four images (columns). Image 0 owns captions 0-2, image 1 owns 3-4, image 2 5-6, image 3 7.
IMAGE_OF_CAPTION = [0, 0, 0, 1, 1, 2, 2, 3]
SCORES = [
    [9, 1, 2, 3],  # caption 0: its image first
    [2, 3, 4, 1],  # caption 1: third (4 and 3 above 2)
    [5, 5, 1, 1],  # caption 2: tied with a wrong image, so second
    [7, 6, 0, 0],  # caption 3: second
    [0, 0, 0, 0],  # caption 4: all tied, so last: fourth
    [1, 1, 8, 9],  # caption 5: second
    [1, 1, 3, 1],  # caption 6: first
    [1, 6, 8, 2],  # caption 7: third
]
IMAGE_RANKS = [1, 3, 2, 2, 4, 2, 1, 3]
# Image 0: best 9, no wrong caption reaches it: 1. Image 1: best 6, tied with wrong caption 7: 2.
# Image 2: best 8, tied with wrong caption 7: 2. Image 3: best 2; wrong captions 0 (3) and 5 (9) are above: 3.
TEXT_RANKS = [1, 2, 2, 3]


def test_hand_worked_matrix():
    image_ranks, text_ranks = retrieval_ranks(SCORES, IMAGE_OF_CAPTION)
    assert image_ranks.tolist() == IMAGE_RANKS
    assert text_ranks.tolist() == TEXT_RANKS
    assert retrieval_metrics(SCORES, IMAGE_OF_CAPTION, ks=(1, 2, 3)) == {
        "image_retrieval_recall@1": 2 / 8,
        "image_retrieval_recall@2": 5 / 8,
        "image_retrieval_recall@3": 7 / 8,
        "image_retrieval_median_rank": 2.0,
        "image_retrieval_mean_rank": 18 / 8,
        "text_retrieval_recall@1": 1 / 4,
        "text_retrieval_recall@2": 3 / 4,
        "text_retrieval_recall@3": 4 / 4,
        "text_retrieval_median_rank": 2.0,
        "text_retrieval_mean_rank": 8 / 4,
    }


def test_default_ks():
    names = [f"{direction}_recall@{k}" for direction in ("image_retrieval", "text_retrieval") for k in (1, 5, 10)]
    assert set(names) <= set(retrieval_metrics(SCORES, IMAGE_OF_CAPTION))


def slow_ranks(scores: np.ndarray, image_of_caption: np.ndarray) -> tuple[list[int], list[int]]:
    """Sort each query's candidates, wrong ones first among equals, and walk down to the first right one."""
    captions, images = scores.shape
    image_ranks, text_ranks = [], []
    for c in range(captions):
        order = sorted(range(images), key=lambda i: (-scores[c, i], i == image_of_caption[c]))
        image_ranks.append(1 + order.index(image_of_caption[c]))
    for i in range(images):
        order = sorted(range(captions), key=lambda c: (-scores[c, i], image_of_caption[c] == i))
        text_ranks.append(1 + next(place for place, c in enumerate(order) if image_of_caption[c] == i))
    return image_ranks, text_ranks


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    images = int(rng.integers(1, 12))
    image_of_caption = rng.permutation(
        np.concatenate([np.arange(images), rng.integers(images, size=rng.integers(0, 40))])
    )
    levels = int(rng.choice([2, 5, 10**6]))  # many ties, some, none
    scores = rng.integers(levels, size=(len(image_of_caption), images)).astype(np.float32)
    image_ranks, text_ranks = retrieval_ranks(scores, image_of_caption)
    assert (image_ranks.tolist(), text_ranks.tolist()) == slow_ranks(scores, image_of_caption)


def test_constant_scores_earn_nothing():
    metrics = retrieval_metrics(np.zeros((20, 20)), np.arange(20))
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == 0.0
    assert metrics["image_retrieval_mean_rank"] == metrics["text_retrieval_mean_rank"] == 20.0


def test_ranked_in_float32():
    scores = np.array([[1.0, 1.0 + 2**-40], [0.0, 1.0]])  # a tie in float32, though float64 tells them apart
    assert retrieval_ranks(scores[:, ::-1], [0, 1])[0].tolist() == [2, 2]


def test_infinite_scores_rank_first_and_last():
    assert retrieval_ranks([[np.inf, 0.0], [-np.inf, -np.inf]], [0, 1])[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "scores, image_of_caption, message",
    [
        (np.zeros(4), [0] * 4, r"scores have shape \(4,\)"),
        (np.zeros((0, 4)), np.zeros(0, int), r"scores have shape \(0, 4\)"),
        (np.zeros((4, 8)), [0] * 8, r"transposed"),
        (np.zeros((2, 2)), [0.0, 1.0], r"float64"),
        (np.zeros((2, 2)), [0, 2], r"image_of_caption\[1\] is 2; expected a column of scores, 0 to 1"),
        (np.zeros((2, 2)), [-1, 1], r"image_of_caption\[0\] is -1"),
        (np.zeros((3, 3)), [0, 2, 2], r"1 images have no caption, such as \[1\]"),
        ([[0.0, 1.0], [np.nan, 1.0]], [0, 1], r"scores\[1, 0\] is NaN"),
    ],
)
def test_refuses(scores, image_of_caption, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, image_of_caption)


def test_refuses_k_below_one():
    with pytest.raises(ValueError, match=r"ks=\[0, 5\]"):
        retrieval_metrics(SCORES, IMAGE_OF_CAPTION, ks=(0, 5))


def test_roc_auc_by_hand():
    assert roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert roc_auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1.0
    assert roc_auc([1, 2, 3, 4], [1, 1, 0, 0]) == 0.0
    assert roc_auc([5, 5, 5], [0, 1, 1]) == 0.5
    assert roc_auc([1, 1, 2], [0, 1, 1]) == 0.75  # one tie, one win


@pytest.mark.parametrize("seed", range(10))
def test_roc_auc_counts_pairs(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0, 1, *rng.integers(2, size=30)])
    scores = rng.integers(6, size=32) / 4
    wins = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert roc_auc(scores, labels) == pytest.approx(np.mean(wins), abs=1e-12)


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([1.0, 2.0], [1, 1], "labels hold"),
        ([1.0, 2.0], [0, -100], "labels hold"),
        ([1.0], [0, 1], "equal length"),
        ([1.0, np.nan], [0, 1], r"scores\[1\] is NaN"),
    ],
)
def test_roc_auc_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        roc_auc(scores, labels)

import tracemalloc

import numpy as np
import pytest

from unicoder_vl_hf.tasks.pretraining.evaluation import roc_auc
from unicoder_vl_hf.tasks.retrieval import metrics
from unicoder_vl_hf.tasks.retrieval.metrics import (
    confidence_intervals,
    rank_queries,
    retrieval_metrics,
    summarize,
)

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


# Best first, image 0's captions rank 1, 3, 4 (behind caption 3's 7); image 1's 2 and 8; image 2's 2 and 4; image 3's 3.
AVERAGE_PRECISIONS = [(1 + 2 / 3 + 3 / 4) / 3, (1 / 2 + 2 / 8) / 2, (1 / 2 + 2 / 4) / 2, 1 / 3]


def test_hand_worked_matrix():
    ranked = rank_queries(SCORES, IMAGE_OF_CAPTION)
    assert ranked["image_retrieval"].ranks.tolist() == IMAGE_RANKS
    assert ranked["text_retrieval"].ranks.tolist() == TEXT_RANKS
    assert ranked["text_retrieval"].average_precisions == pytest.approx(AVERAGE_PRECISIONS, abs=1e-15)
    assert np.flatnonzero(ranked["image_retrieval"].tied).tolist() == [2, 4]
    assert np.flatnonzero(ranked["text_retrieval"].tied).tolist() == [1, 2]
    assert retrieval_metrics(SCORES, IMAGE_OF_CAPTION, ks=(1, 2, 3)) == pytest.approx(
        {
            "image_retrieval_recall@1": 2 / 8,
            "image_retrieval_recall@2": 5 / 8,
            "image_retrieval_recall@3": 7 / 8,
            "image_retrieval_median_rank": 2.0,
            "image_retrieval_mean_rank": 18 / 8,
            "image_retrieval_map": 53 / 96,
            "image_retrieval_tied_ranks": 2,
            "text_retrieval_recall@1": 1 / 4,
            "text_retrieval_recall@2": 3 / 4,
            "text_retrieval_recall@3": 4 / 4,
            "text_retrieval_median_rank": 2.0,
            "text_retrieval_mean_rank": 8 / 4,
            "text_retrieval_map": 145 / 288,
            "text_retrieval_tied_ranks": 2,
        },
        abs=1e-15,
    )


def test_default_ks():
    names = [f"{direction}_recall@{k}" for direction in ("image_retrieval", "text_retrieval") for k in (1, 5, 10)]
    assert set(names) <= set(retrieval_metrics(SCORES, IMAGE_OF_CAPTION))


def slow_query(scores, is_right) -> tuple[int, float, bool]:
    """Sort the candidates, wrong ones first among equals, and walk down: first rank, average precision, tied."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], is_right[i]))
    places = [1 + place for place, i in enumerate(order) if is_right[i]]
    precision = sum(found / place for found, place in enumerate(places, 1)) / len(places)
    best = max(score for score, right in zip(scores, is_right, strict=True) if right)
    tied = any(score == best and not right for score, right in zip(scores, is_right, strict=True))
    return places[0], precision, tied


def assert_equals_slow_loop(scores: np.ndarray, image_of_caption: np.ndarray):
    ranked = rank_queries(scores, image_of_caption)
    is_right = image_of_caption[:, None] == np.arange(scores.shape[1])
    for direction, queries, rights in (
        ("image_retrieval", scores, is_right),
        ("text_retrieval", scores.T, is_right.T),
    ):
        expected = [slow_query(*query) for query in zip(queries.tolist(), rights.tolist(), strict=True)]
        found = ranked[direction]
        assert found.ranks.tolist() == [rank for rank, _, _ in expected]
        assert found.average_precisions == pytest.approx([precision for _, precision, _ in expected], abs=1e-12)
        assert found.tied.tolist() == [tied for _, _, tied in expected]


def random_world(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a few images with one to many captions each, in any order; many ties, some, or none."""
    images = int(rng.integers(1, 12))
    image_of_caption = rng.permutation(
        np.concatenate([np.arange(images), rng.integers(images, size=rng.integers(0, 40))])
    )
    levels = int(rng.choice([2, 5, 10**6]))
    return rng.integers(levels, size=(len(image_of_caption), images)).astype(np.float32), image_of_caption


@pytest.mark.parametrize("block", [1, 37, 1 << 20])  # rows at a time: one, some, all
@pytest.mark.parametrize("seed", range(20))
def test_equals_a_slow_loop(seed, block, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    assert_equals_slow_loop(*random_world(np.random.default_rng(seed)))


@pytest.mark.parametrize("seed", range(10))
def test_order_of_captions_and_images_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    scores, image_of_caption = random_world(rng)
    captions, images = rng.permutation(len(scores)), rng.permutation(scores.shape[1])
    shuffled = rank_queries(scores[captions][:, images], np.argsort(images)[image_of_caption[captions]])
    ranked = rank_queries(scores, image_of_caption)
    for direction, order in (("image_retrieval", captions), ("text_retrieval", images)):
        assert (shuffled[direction].ranks == ranked[direction].ranks[order]).all()
        assert (shuffled[direction].tied == ranked[direction].tied[order]).all()
        assert shuffled[direction].average_precisions == pytest.approx(ranked[direction].average_precisions[order])


def test_constant_scores_earn_nothing():
    metrics = retrieval_metrics(np.zeros((20, 20)), np.arange(20))
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == 0.0
    assert metrics["image_retrieval_mean_rank"] == metrics["text_retrieval_mean_rank"] == 20.0


@pytest.mark.parametrize("right", [1.0 + 2**-40, 1.0 - 2**-40])  # float64 tells them from 1, in float32 they tie
def test_ranked_in_float32(right):
    ranked = rank_queries(np.array([[right, 1.0], [1.0, 0.0]]), [0, 1])
    assert ranked["image_retrieval"].ranks.tolist() == [2, 2]
    assert ranked["text_retrieval"].ranks.tolist() == [2, 2]
    assert ranked["image_retrieval"].tied.tolist() == [True, False]


def test_a_float16_matrix_gains_nothing_from_its_ties():
    """The mistake to be kept out: rounded scores tie, and a sort that leaves the right one in front calls it first."""
    scores = np.full((20, 20), 1.0 + 2**-12, dtype=np.float32)
    np.fill_diagonal(scores, 1.0)  # the right one is last, by less than float16 can tell
    scores = np.roll(scores, 1, axis=0)
    image_of_caption = np.roll(np.arange(20), 1)
    assert set(np.argmax(scores.astype(np.float16), axis=1)) == {0}  # all equal: the first wins
    for dtype, tied in ((np.float32, 0), (np.float16, 20)):
        found = retrieval_metrics(scores.astype(dtype), image_of_caption)
        assert (found["image_retrieval_mean_rank"], found["image_retrieval_tied_ranks"]) == (20.0, tied)
        assert found["text_retrieval_recall@10"] == 0.0


@pytest.mark.parametrize("seed", range(10))
def test_rounding_never_helps(seed):
    rng = np.random.default_rng(seed)
    image_of_caption = np.concatenate([np.arange(30), rng.integers(30, size=100)])
    scores = rng.standard_normal((130, 30)).astype(np.float32)
    exact, rounded = rank_queries(scores, image_of_caption), rank_queries(np.round(scores, 1), image_of_caption)
    for direction in exact:
        assert (rounded[direction].ranks >= exact[direction].ranks).all()
        # What the rounding changed for the worse by a tie is told.
        assert rounded[direction].tied[rounded[direction].ranks > exact[direction].ranks].all()


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda scores: np.repeat(scores, 2, axis=1)[:, ::2]])
def test_any_memory_layout(layout):
    scores, image_of_caption = random_world(np.random.default_rng(5))
    assert retrieval_metrics(layout(scores), image_of_caption) == retrieval_metrics(scores, image_of_caption)


def test_infinite_scores_rank_first_and_last():
    ranked = rank_queries([[np.inf, 0.0], [-np.inf, -np.inf]], [0, 1])
    assert ranked["image_retrieval"].ranks.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int32])
def test_any_integers_name_the_images(dtype):
    image_of_caption = np.array(IMAGE_OF_CAPTION, dtype=dtype)
    assert retrieval_metrics(SCORES, image_of_caption) == retrieval_metrics(SCORES, IMAGE_OF_CAPTION)


def test_memory_beside_the_scores_is_a_few_blocks(tmp_path):
    scores = np.lib.format.open_memmap(tmp_path / "scores.npy", mode="w+", dtype=np.float16, shape=(4000, 2000))
    image_of_caption = np.arange(4000) // 2
    scores[np.arange(4000), image_of_caption] = 1
    tracemalloc.start()
    ranked = rank_queries(scores, image_of_caption)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (ranked["image_retrieval"].ranks == 1).all() and (ranked["text_retrieval"].average_precisions == 1).all()
    assert peak < 4000 * 2000 * 2  # in float32 the matrix alone would be twice that


# Folds


def test_summary_of_folds_is_their_mean_and_the_sum_of_ties():
    other = ([[0, 1], [1, 0], [1, 1]], [0, 1, 1])  # one image ranks 2, the other has a caption that ties
    folds = [rank_queries(SCORES, IMAGE_OF_CAPTION), rank_queries(*other)]
    both = [retrieval_metrics(SCORES, IMAGE_OF_CAPTION), retrieval_metrics(*other)]
    found = summarize(folds)
    assert set(found) == set(both[0])
    for name, value in found.items():
        total = both[0][name] + both[1][name]
        assert value == pytest.approx(total if name.endswith("tied_ranks") else total / 2, abs=1e-15), name


# Confidence intervals


def slow_intervals(folds, k, level, num_resamples, seed) -> dict[str, tuple[float, float]]:
    """Draw the images, write down the rank of every query of each, and take the share of hits."""
    resamples = {"image_retrieval": np.zeros(num_resamples), "text_retrieval": np.zeros(num_resamples)}
    for index, (scores, image_of_caption) in enumerate(folds):
        rng = np.random.default_rng([seed, index])
        image_ranks, text_ranks = (queries.ranks for queries in rank_queries(scores, image_of_caption).values())
        for resample in range(num_resamples):
            drawn = rng.integers(len(text_ranks), size=len(text_ranks))
            of_captions = [image_ranks[c] for i in drawn for c in np.flatnonzero(np.equal(image_of_caption, i))]
            for direction, ranks in (("image_retrieval", of_captions), ("text_retrieval", text_ranks[drawn])):
                resamples[direction][resample] += np.mean(np.array(ranks) <= k) / len(folds)
    return {
        f"{direction}_recall@{k}": tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
        for direction, values in resamples.items()
    }


def test_intervals_equal_a_slow_loop():
    folds = [(SCORES, IMAGE_OF_CAPTION), random_world(np.random.default_rng(3))]
    ranked = [rank_queries(*fold) for fold in folds]
    found = confidence_intervals(ranked, [2], level=0.8, num_resamples=50, seed=7)
    for name, expected in slow_intervals(folds, 2, 0.8, 50, 7).items():
        assert found[name] == pytest.approx(expected, abs=1e-12)
    assert set(found) == {name for name in summarize(ranked, [2]) if "median" not in name and "tied" not in name}


def test_intervals_are_those_of_images_not_of_captions():
    """Five captions that stand or fall together tell no more than one, and the interval is no narrower."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((400, 400)).astype(np.float32)
    scores[np.arange(400), np.arange(400)] += 4 * rng.integers(2, size=400)
    one = confidence_intervals([rank_queries(scores, np.arange(400))])
    five = confidence_intervals([rank_queries(np.repeat(scores, 5, axis=0), np.repeat(np.arange(400), 5))])
    assert five["image_retrieval_recall@1"] == pytest.approx(one["image_retrieval_recall@1"], abs=1e-12)
    low, high = one["image_retrieval_recall@1"]
    point = retrieval_metrics(scores, np.arange(400))["image_retrieval_recall@1"]
    expected = 2 * 1.96 * (point * (1 - point) / 400) ** 0.5  # of independent images
    assert low < point < high and high - low == pytest.approx(expected, rel=0.1)


def test_intervals_are_deterministic_and_points_where_nothing_varies():
    ranked = [rank_queries(SCORES, IMAGE_OF_CAPTION)]
    first, again, other = (confidence_intervals(ranked, num_resamples=5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    perfect = confidence_intervals([rank_queries(np.eye(8), np.arange(8))])
    assert set(perfect.values()) == {(1.0, 1.0)}


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 95}, {"num_resamples": 0}])
def test_intervals_refuse(options):
    with pytest.raises(ValueError, match=r"expected a level in \(0, 1\) and at least 1 resample"):
        confidence_intervals([rank_queries(SCORES, IMAGE_OF_CAPTION)], **options)


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
        ([[1j, 1.0], [0.0, 1.0]], [0, 1], r"hold complex128; expected numbers"),
    ],
)
def test_refuses(scores, image_of_caption, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, image_of_caption)


def test_names_the_nan_of_a_later_block(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 1)
    scores = np.zeros((4, 2))
    scores[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"scores\[2, 1\] is NaN"):
        rank_queries(scores, [0, 1, 0, 1])


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

import datasets
import numpy as np
import pytest
from places import SHARED

from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.tasks.retrieval.metrics import chance_recalls, retrieval_metrics
from unicoder_vl_hf.tasks.retrieval.protocols import (
    PROTOCOLS,
    RetrievalResult,
    chance,
    evaluate_folds,
    results_table,
    retrieval_test,
)

FLICKR8K = SHARED / "data/flickr8k/dataset_flickr8k.json"


def rows(captions_of_image: list[int], **columns) -> datasets.Dataset:
    """Caption k of image i is "i k", image by image; `columns` are given by image."""
    images = np.repeat(np.arange(len(captions_of_image)), captions_of_image)
    texts = [f"{i} {k}" for i, count in enumerate(captions_of_image) for k in range(count)]
    beside = {name: [values[i] for i in images] for name, values in columns.items()}
    return datasets.Dataset.from_dict({"image_id": [f"img{i}" for i in images], "caption": texts, **beside})


@pytest.fixture(scope="module")
def coco():
    """COCO's test split by its numbers: 5,000 images, 25,010 captions, 8 images with 6 of them and one with 7."""
    counts = [5] * 5_000
    for image in (3, 999, 1_000, 2_500, 2_501, 4_000, 4_001, 4_999):
        counts[image] = 6
    counts[1_999] = 7
    return rows(counts, imgid=[7 * i for i in range(5_000)])


def coco_scores(fold, right: float) -> np.ndarray:
    """Every pair scores 0, but the match scores `right`."""
    scores = np.zeros((len(fold.captions), len(fold.image_ids)), dtype=np.float32)
    scores[np.arange(len(scores)), fold.image_of_caption] = right
    return scores


def test_coco_5k(coco):
    test = retrieval_test(coco, "coco-5k")
    (fold,) = test.folds
    assert test.title == "COCO 5K: 5,000 images, the first 5 captions of each"
    assert (len(fold.captions), len(fold.image_ids)) == (25_000, 5_000)
    assert (fold.image_of_caption == np.arange(25_000) // 5).all()
    assert "1999 4" in fold.captions and "1999 5" not in fold.captions


def test_coco_5k_all_captions(coco):
    """The mistake to be kept out: an evaluator that takes caption c for one of image c // 5."""
    test = retrieval_test(coco, "coco-5k", captions_per_image="all")
    (fold,) = test.folds
    assert test.title == "COCO 5K: 5,000 images, all 25,010 captions"
    assert fold.captions == coco["caption"][:]
    assert [int(text.split()[0]) for text in fold.captions] == fold.image_of_caption.tolist()
    assert np.bincount(fold.image_of_caption)[[3, 4, 1_999]].tolist() == [6, 5, 7]


@pytest.mark.parametrize(
    "captions_per_image, sizes, words",
    [
        (None, [5_000] * 5, "the first 5 captions of each"),
        ("all", [5_002, 5_003, 5_002, 5_000, 5_003], "all 25,010 captions"),
    ],
)
def test_coco_1k_folds(coco, captions_per_image, sizes, words):
    test = retrieval_test(coco, "coco-1k", captions_per_image=captions_per_image)
    assert test.title == f"COCO 1K: mean over 5 folds of 1,000 images, {words}"
    assert [len(fold.captions) for fold in test.folds] == sizes
    for start, fold in zip(range(0, 5_000, 1_000), test.folds, strict=True):
        assert fold.image_ids == [f"img{i}" for i in range(start, start + 1_000)]
        assert [int(text.split()[0]) - start for text in fold.captions] == fold.image_of_caption.tolist()


def test_coco_1k_is_the_mean_over_the_folds(coco):
    """The mistake to be kept out: one fold, and the best of them, reported as 1K."""
    test = retrieval_test(coco, "coco-1k")
    # A match that scores 1 ranks first; one that ties with all others ranks last.
    found = evaluate_folds(
        test, (coco_scores(fold, right) for fold, right in zip(test.folds, [1, 0, 0, 1, 0], strict=True))
    )
    assert found.metrics["image_retrieval_recall@1"] == found.metrics["text_retrieval_recall@10"] == 0.4
    assert found.metrics["image_retrieval_mean_rank"] == (1 + 1000 + 1000 + 1 + 1000) / 5
    assert found.metrics["text_retrieval_median_rank"] == pytest.approx((1 + 4_996 + 4_996 + 1 + 4_996) / 5)
    assert found.metrics["image_retrieval_tied_ranks"] == 15_000 and found.metrics["text_retrieval_tied_ranks"] == 3_000
    assert found.intervals["image_retrieval_recall@1"] == pytest.approx((0.4, 0.4))  # nothing varies within a fold


def test_coco_1k_never_meets_the_candidates_of_another_fold(coco):
    test = retrieval_test(coco, "coco-1k")
    scores = np.ones((25_000, 5_000), dtype=np.float32)  # everything in another fold scores as the match does
    for i, block in enumerate(test.blocks(scores)):
        assert block.shape == (5_000, 1_000)
        block[:] = coco_scores(test.folds[i], right=1)
    assert evaluate_folds(test, test.blocks(scores)).metrics["image_retrieval_recall@1"] == 1.0
    assert (scores[4_999, 999], scores[4_999, 1_000], scores[5_000, 1_000]) == (1, 1, 1)
    assert (scores[4_999, 998], scores[5_000, 1_001]) == (0, 0)
    with pytest.raises(ValueError, match=r"scores have shape \(5000, 25000\); expected \(25000, 5000\)"):
        list(test.blocks(scores.T))


def test_coco_1k_wants_the_order_of_the_file(coco):
    with pytest.raises(
        ValueError, match=r"imgid \d+ stands before \d+; expected the images in the order of Karpathy's file"
    ):
        retrieval_test(coco.shuffle(seed=0), "coco-1k")
    without = retrieval_test(coco.remove_columns("imgid"), "coco-1k")  # nothing to tell the order by
    assert without.folds[1].image_ids[0] == "img1000"


def test_evaluates_one_matrix_for_each_fold(coco):
    test = retrieval_test(coco, "coco-1k")
    held = []

    def scores():
        for fold in test.folds:
            held.append(len(held))
            yield coco_scores(fold, right=1)

    evaluate_folds(test, scores())
    assert held == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="shorter"):
        evaluate_folds(test, [coco_scores(test.folds[0], right=1)])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_part_never_bears_the_name_of_the_whole(protocol, coco):
    whole = PROTOCOLS[protocol].num_images
    with pytest.raises(ValueError, match=rf"has {whole:,} test images, but the captions have {whole - 1:,}"):
        retrieval_test(rows([5] * (whole - 1)), protocol)
    if protocol == "coco-1k":
        with pytest.raises(ValueError, match="num_images=1000, but COCO 1K is a mean over folds"):
            retrieval_test(coco, protocol, num_images=1_000)
        return
    part = retrieval_test(rows([5] * whole), protocol, num_images=1_000 if whole > 1_000 else 200)
    assert ": the first " in part.title and "1K" not in part.title and part.paper == {}
    assert "1K" not in retrieval_test(rows([5] * 1_000)).title


def test_without_a_protocol():
    test = retrieval_test(rows([1, 6, 2, 7]))
    assert test.title == "Retrieval: 4 images, all 16 captions" and test.paper == {}
    first = retrieval_test(rows([1, 6, 2, 7]), num_images=2)
    assert first.title == "Retrieval: the first 2 images, all 7 captions"
    assert first.folds[0].image_ids == ["img0", "img1"] and first.folds[0].captions[-1] == "1 5"
    scores = np.random.default_rng(0).random((7, 2))
    assert evaluate_folds(first, [scores]).metrics == retrieval_metrics(scores, [0, 1, 1, 1, 1, 1, 1])


def test_images_whose_captions_are_scattered():
    """COCO's own annotations are in no order of images; a counter that starts again at each row would go astray."""
    scattered = datasets.Dataset.from_dict({"image_id": list("babbcaac"), "caption": list("12345678")})
    (fold,) = retrieval_test(scattered, captions_per_image=2).folds
    assert fold.image_ids == ["b", "a", "c"]
    assert fold.captions == ["1", "2", "3", "5", "6", "8"]
    assert fold.image_of_caption.tolist() == [0, 1, 0, 2, 1, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"protocol": "coco"}, "protocol='coco' is unknown; expected one of flickr8k, flickr30k, coco-5k, coco-1k"),
        ({"captions_per_image": 0}, "captions_per_image=0; expected at least 1, or 'all'"),
        ({"captions_per_image": 3}, "Image 'img1' has 2 captions, fewer than captions_per_image=3"),
        ({"num_images": 0}, "num_images=0; expected 1 to 2"),
        ({"num_images": 3}, "num_images=3; expected 1 to 2"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_test(rows([3, 2]), **options)


def test_chance_is_the_mean_over_the_folds(coco):
    test = retrieval_test(coco, "coco-1k", captions_per_image="all")
    assert chance(test)["image_retrieval_recall@10"] == pytest.approx(0.01)
    expected = np.mean([chance_recalls(fold.image_of_caption)["text_retrieval_recall@5"] for fold in test.folds])
    assert chance(test)["text_retrieval_recall@5"] == pytest.approx(expected)


def test_table():
    test = retrieval_test(rows([5] * 1_000), "flickr30k")
    names = [f"{direction}_recall@{k}" for direction in ("text_retrieval", "image_retrieval") for k in (1, 5, 10)]
    metrics = dict(zip(names, [0.5, 0.75, 1.0, 0.0123, 0.3, 0.4], strict=True))
    metrics |= {"text_retrieval_tied_ranks": 3, "image_retrieval_tied_ranks": 1_234}
    result = RetrievalResult(metrics, dict.fromkeys(names, (0.251, 0.75)))
    title, blank, header, _, *lines = results_table(test, {"zero-shot, float32": result}).splitlines()
    assert (title, blank) == ("Flickr30k: 1,000 images, the first 5 captions of each", "")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert cells[0] == ["percent", "TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "tied TR, IR"]
    assert cells[2] == ["paper, zero-shot", "64.3", "85.8", "92.3", "48.4", "76.0", "85.2", ""]
    assert cells[-3] == ["zero-shot, float32", "50.0", "75.0", "100.0", "1.2", "30.0", "40.0", "3, 1,234"]
    assert cells[-2] == ["95 % interval over images", *["25.1-75.0"] * 6, ""]
    assert cells[-1] == ["chance", "0.1", "0.5", "1.0", "0.1", "0.5", "1.0", ""]
    assert len(cells) == 10 and len({len(line) for line in (header, *lines)}) == 1


def test_paper_rows():
    """Spot checks against the paper's tables: text retrieval first, then image retrieval."""
    assert PROTOCOLS["flickr30k"].paper["fine-tuned"] == (86.2, 96.3, 99.0, 71.5, 90.9, 94.9)
    assert PROTOCOLS["coco-5k"].paper["fine-tuned"][3:] == (46.7, 76.0, 85.3)
    for protocol in PROTOCOLS.values():
        for row in protocol.paper.values():
            assert len(row) == 6 and sorted(row[:3]) == list(row[:3]) and sorted(row[3:]) == list(row[3:])


@pytest.mark.skipif(not FLICKR8K.exists(), reason=f"{FLICKR8K} is absent")
def test_flickr8k():
    captions = read_captions(FLICKR8K, split="test")
    (fold,) = retrieval_test(captions, "flickr8k").folds
    assert (len(fold.captions), len(fold.image_ids)) == (5_000, 1_000)
    assert fold.captions == captions["caption"][:]
    with pytest.raises(ValueError, match=r"Flickr8k has 1,000 test images, but the captions have 8,000"):
        retrieval_test(read_captions(FLICKR8K), "flickr8k")

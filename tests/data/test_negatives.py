import pickle
from collections import defaultdict

import datasets
import numpy as np
import pytest
from places import SHARED
from torch.utils.data import DataLoader

from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.negatives import MismatchIndex, PairsWithMismatches, fold_caption, read_duplicate_groups

FLICKR8K = SHARED / "data/flickr8k/dataset_flickr8k.json"


def pairs(num_images=40, captions_per_image=5) -> datasets.Dataset:
    ids = [f"image{i}" for i in range(num_images) for _ in range(captions_per_image)]
    return datasets.Dataset.from_dict({"image_id": ids, "caption": [f"caption {k}" for k in range(len(ids))]})


def texts_of_images(rows: datasets.Dataset) -> dict[str, set[str]]:
    texts = defaultdict(set)
    for image_id, caption in zip(rows["image_id"], rows["caption"], strict=True):
        texts[image_id].add(" ".join(caption.lower().split()))
    return texts


def assert_mismatches(made: PairsWithMismatches, rows: datasets.Dataset, epochs=range(1)) -> None:
    texts, image_ids, captions = texts_of_images(rows), rows["image_id"][:], rows["caption"][:]
    for epoch in epochs:
        made.set_epoch(epoch)
        for i, item in enumerate(made.__getitems__(range(len(made)))):
            assert (item["image_id"], item["caption"]) == (image_ids[i], captions[i])
            assert (item["row_index"], item["epoch"]) == (i, epoch)
            assert " ".join(item["mismatch_caption"].lower().split()) not in texts[item["mismatch_image_id"]]
            same_image = item["image_id"] == item["mismatch_image_id"]
            assert same_image != (item["caption"] == item["mismatch_caption"])  # exactly one of the two is replaced


def test_fold_caption():
    assert fold_caption("  A  Dog\truns .\n") == "a dog runs ." == fold_caption("a dog RUNS .")
    assert fold_caption("Straße") == fold_caption("STRASSE")


def test_item():
    rows = datasets.Dataset.from_dict({"image_id": ["1", "2"], "caption": ["A dog", "A cat"], "split": ["train"] * 2})
    made = PairsWithMismatches(rows, seed=0)
    assert len(made) == len(list(made)) == 2
    seen = set()
    for epoch in range(20):
        made.set_epoch(epoch)
        item = made[0]
        seen.add((item.pop("mismatch_image_id"), item.pop("mismatch_caption")))
        assert item == {"image_id": "1", "caption": "A dog", "row_index": 0, "epoch": epoch}
    assert seen == {("1", "A cat"), ("2", "A dog")}
    assert made[-1] == made[1]
    with pytest.raises(IndexError, match="Row 2 is out of range; there are 2 pairs"):
        made[2]


def test_never_a_false_mismatch():
    rows = datasets.Dataset.from_dict(
        {
            # "A dog" belongs to 1, 2 and 3 in three spellings; "a cat" to 3 and 4.
            "image_id": ["1", "1", "2", "2", "3", "3", "4", "4"],
            "caption": ["A dog", "one", "a  DOG ", "two", "A dog", "A cat", "a cat", "four"],
        }
    )
    assert_mismatches(PairsWithMismatches(rows, seed=3), rows, range(200))


def test_every_mismatch_can_be_drawn():
    rows = datasets.Dataset.from_dict({"image_id": ["1", "1", "2", "3"], "caption": ["a", "b", "b", "c"]})
    drawn = {PairsWithMismatches(rows, seed=seed).mismatch(1, epoch) for seed in range(5) for epoch in range(50)}
    assert drawn == {(3, True), (3, False)}  # "b" of image 1: row 2 has the same text, rows 0 and 1 the same image


def test_uniform_over_the_split():
    """The mistake to be kept out: a counter reset per image, so that every negative comes from the first image."""
    made = PairsWithMismatches(pairs(), seed=1)
    drawn = [made.mismatch(row, epoch) for epoch in range(100) for row in range(200)]
    for replace_image in (True, False):
        others = np.array([other for other, image in drawn if image == replace_image])
        assert abs(len(others) - 10_000) < 4 * np.sqrt(5_000)  # a fair coin, within 4 standard deviations
        counts = np.bincount(others, minlength=200)
        expected = len(others) / 200
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 199 + 5 * np.sqrt(2 * 199)  # 5 standard deviations above its mean
    rows = np.array([other for other, _ in drawn]).reshape(100, 200)
    assert all(len(set(rows[:, row])) > 50 for row in range(200))  # each row meets many others over the epochs
    assert len(set(rows[0] // 5)) > 35  # and a single epoch meets nearly all 40 images


def test_images_are_drawn_as_often_as_they_are_captioned():
    ids = ["many"] * 60 + [f"image{i}" for i in range(60)]
    rows = datasets.Dataset.from_dict({"image_id": ids, "caption": [f"caption {k}" for k in range(120)]})
    made = PairsWithMismatches(rows, seed=0)
    drawn = [made.mismatch(row, epoch) for epoch in range(40) for row in range(60, 120)]
    share = np.mean([other < 60 for other, replace_image in drawn if replace_image])
    assert abs(share - 60 / 119) < 0.06  # as in matches, so that the image alone does not tell the label


def test_pure_function_of_seed_epoch_and_row():
    rows = pairs()
    made, again, other = (PairsWithMismatches(rows, seed=seed) for seed in (7, 7, 8))
    forward = [made[row] for row in range(200)]
    assert [again[row] for row in reversed(range(200))][::-1] == forward
    assert made.__getitems__([5, 3, 5]) == [forward[5], forward[3], forward[5]]
    assert [other[row] for row in range(200)] != forward
    made.set_epoch(1)
    second = [made[row] for row in range(200)]
    assert sum(a["mismatch_image_id"] != b["mismatch_image_id"] for a, b in zip(forward, second, strict=True)) > 100
    made.set_epoch(0)
    assert [made[row] for row in range(200)] == forward


def test_fixed_epoch_for_evaluation():
    rows = pairs()
    fixed, free = PairsWithMismatches(rows, seed=0, fixed_epoch=3), PairsWithMismatches(rows, seed=0)
    free.set_epoch(3)
    fixed.set_epoch(9)
    assert fixed.epoch == 3 and fixed.__getitems__(range(200)) == free.__getitems__(range(200))


def test_rows_of_a_selection():
    rows = pairs().select(range(100, 200)).shuffle(seed=0)  # an indices mapping over the table
    assert_mismatches(PairsWithMismatches(rows, seed=0), rows)


def test_falls_back_to_the_other_direction():
    everywhere = datasets.Dataset.from_dict({"image_id": ["A", "A", "B", "B"], "caption": ["t", "a", "t", "b"]})
    made = PairsWithMismatches(everywhere, seed=0)  # "t" belongs to all images, so that only a caption can be replaced
    assert {made.mismatch(0, epoch) for epoch in range(20)} == {(3, False)}
    owner = datasets.Dataset.from_dict({"image_id": ["A", "A", "B", "C"], "caption": ["t", "u", "t", "u"]})
    made = PairsWithMismatches(owner, seed=0)  # all texts belong to A, so that only the image can be replaced
    assert {made.mismatch(0, epoch) for epoch in range(20)} == {(3, True)}


@pytest.mark.parametrize("seed", range(30))
def test_index_equals_sets(seed):
    rng = np.random.default_rng(seed)
    count, num_images, num_texts = rng.integers(1, 40), rng.integers(1, 8), rng.integers(1, 8)
    ids, texts = rng.integers(num_images, size=count), rng.integers(num_texts, size=count)
    rows = datasets.Dataset.from_dict({"image_id": [f"i{i}" for i in ids], "caption": [f" T {t}" for t in texts]})
    groups = [[f"i{i}" for i in rng.integers(10, size=rng.integers(4))] for _ in range(rng.integers(6))]
    index = MismatchIndex.from_pairs(rows, groups)

    merged = [{f"i{i}"} for i in range(10)]
    for group in groups * len(groups):  # as often, so that groups that share an image have met
        touched = [images for images in merged if images & set(group)]
        merged = [images for images in merged if not images & set(group)] + [set().union(*touched)] * bool(touched)
    same = [next(k for k, images in enumerate(merged) if f"i{i}" in images) for i in ids]
    known = set(zip(texts.tolist(), same, strict=True))
    for row in range(count):
        for replace_image, codes in ((True, same), (False, texts.tolist())):
            pairs_made = [(texts[row], c) if replace_image else (c, same[row]) for c in codes]
            allowed = {codes[other] for other, made in enumerate(pairs_made) if made not in known}
            assert index.makes_match(row, np.arange(count), replace_image).tolist() == [p in known for p in pairs_made]
            assert index.irreplaceable(replace_image)[row] == (not allowed)
            drawn = [codes[other] for other in index.draw_distinct(rng, row, replace_image, 3)]
            assert len(set(drawn)) == len(drawn) == min(3, len(allowed)) and set(drawn) <= allowed
        belonging = {same[other] for other in range(count) if texts[other] == texts[row]}
        code_of = dict(zip(index.images.tolist(), same, strict=True))
        assert sorted(code_of[code] for code in index.images_of(index.texts[row]).tolist()) == sorted(belonging)


def test_codes_of_large_splits_do_not_overflow():
    many = np.arange(60_000, dtype=np.int32)  # texts times images are more than 32 bits hold, as in Flickr30k
    index = MismatchIndex(many, many)
    assert index.images_of(index.texts[-1]).tolist() == [59_999]
    assert index.belongs(index.texts[-1], index.images[-3:]).tolist() == [False, False, True]


def test_spaces_after_commas_are_no_part_of_an_id(tmp_path):
    (tmp_path / "groups.csv").write_text("a, b\n\nc,d\n")
    assert read_duplicate_groups(tmp_path / "groups.csv") == [["a", "b"], ["c", "d"]]


def test_a_long_chain_of_duplicates_is_one_group():
    ids = [str(i) for i in range(50_000)]
    rows = datasets.Dataset.from_dict({"image_id": [*ids, "other"], "caption": [*ids, "other"]})
    index = MismatchIndex.from_pairs(rows, ([ids[i + 1], ids[i]] for i in range(len(ids) - 1)))
    assert set(index.images[:-1]) == {0} and index.images[-1] == 1


def test_duplicates_of_other_images_are_said(caplog):
    MismatchIndex.from_pairs(pairs(), [["image1", "image2"], ["99", "98"]])
    assert not caplog.text
    MismatchIndex.from_pairs(pairs(), [["1.jpg", "2.jpg"]])
    assert "None of the 2 images that duplicates names, such as '1.jpg', is among those of the pairs" in caplog.text


def test_rejection_gives_way_to_enumeration():
    texts = np.zeros(5_000, np.int32)
    texts[1234] = 1  # one text among 5,000 is another
    index = MismatchIndex(np.arange(5_000, dtype=np.int32), texts)
    assert index.draw(np.random.default_rng(0), 0, replace_image=True) == 1234
    assert index.draw(np.random.default_rng(0), 0, replace_image=False) == 1234


@pytest.mark.parametrize(
    "image_ids, captions, message",
    [
        (["one"] * 3, ["a", "b", "c"], "image 'one'"),
        (["x", "y"], ["a", "A "], "for 2 of 2 pairs, such as row 0, image 'x'"),
        ([], [], "no pairs"),
    ],
)
def test_refuses_where_no_mismatch_exists(image_ids, captions, message):
    rows = datasets.Dataset.from_dict({"image_id": image_ids, "caption": captions})
    with pytest.raises(ValueError, match=message):
        PairsWithMismatches(rows, seed=0)


def test_names_only_the_stuck_rows():
    # "t" belongs to both images, and every text there is belongs to A.
    rows = datasets.Dataset.from_dict({"image_id": ["B", "A"], "caption": ["t", "t"]})
    with pytest.raises(ValueError, match="for 2 of 2 pairs, such as row 0, image 'B'"):
        PairsWithMismatches(rows, seed=0)
    index = MismatchIndex(np.array([0, 0, 1]), np.array([0, 1, 0]))  # A has a and t, B has t
    assert index.stuck().tolist() == [0]  # (A, t): t belongs to both images, and both texts to A


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 0, "fixed_epoch": -1}])
def test_refuses_negative_numbers(options):
    with pytest.raises(ValueError, match=r"=-1; expected an integer of at least 0"):
        PairsWithMismatches(pairs(), **options)
    with pytest.raises(ValueError, match="epoch=-1"):
        PairsWithMismatches(pairs(), seed=0).set_epoch(-1)


def test_refuses_missing_columns_and_values():
    with pytest.raises(ValueError, match="no column caption; their columns are"):
        PairsWithMismatches(pairs().rename_column("caption", "text"), seed=0)
    with pytest.raises(ValueError, match="'caption' has no value in 1 of the rows"):
        PairsWithMismatches(datasets.Dataset.from_dict({"image_id": ["1", "2"], "caption": ["a", None]}), seed=0)


def keep(items):  # at the top of the module, so that a pickle finds it
    return items


@pytest.mark.parametrize("context, workers", [("fork", 2), ("forkserver", 1)])
def test_set_epoch_reaches_persistent_workers(context, workers):
    rows = pairs(8, 2)
    made, expected = PairsWithMismatches(rows, seed=0), PairsWithMismatches(rows, seed=0)
    options = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": context}
    loader = DataLoader(made, batch_size=3, collate_fn=keep, **options)
    for epoch in range(3):
        made.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert [item for batch in loader for item in batch] == expected.__getitems__(range(16))


def test_same_items_for_any_number_of_workers():
    made = PairsWithMismatches(pairs(8, 2), seed=0)
    made.set_epoch(2)
    batches = [list(DataLoader(made, batch_size=3, collate_fn=keep, num_workers=workers)) for workers in (0, 1, 2)]
    assert batches[0] == batches[1] == batches[2]


def test_pickles_small_where_the_pairs_lie_on_disk(tmp_path):
    pairs(2_000).save_to_disk(tmp_path / "pairs")
    made = PairsWithMismatches(datasets.load_from_disk(tmp_path / "pairs"), seed=0)
    copy = pickle.dumps(made)
    assert len(copy) < 10_000 * 17  # the integers, 16 bytes a pair; not the texts
    assert pickle.loads(copy)[9_999] == made[9_999]


@pytest.mark.skipif(not FLICKR8K.exists(), reason=f"{FLICKR8K} is absent")
def test_flickr8k():
    rows = read_captions(FLICKR8K)
    images = defaultdict(set)
    for image_id, texts in texts_of_images(rows).items():
        for text in texts:
            images[text].add(image_id)
    assert sum(len(ids) > 1 for ids in images.values()) == 196  # texts that belong to several images
    made = PairsWithMismatches(rows, seed=0)
    assert_mismatches(made, rows)
    # The worst texts, drawn for many epochs.
    worst = max(images, key=lambda text: len(images[text]))
    at = next(i for i, caption in enumerate(rows["caption"][:]) if " ".join(caption.lower().split()) == worst)
    ids = rows["image_id"][:]
    drawn = [made.mismatch(at, epoch) for epoch in range(2_000)]
    assert not {ids[other] for other, replace_image in drawn if replace_image} & images[worst]

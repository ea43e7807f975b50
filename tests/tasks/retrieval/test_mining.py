"""Hard negatives: the rule by hand, no false negative, the columns, and a job that is stopped or shared out."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import small_world

from unicoder_vl_hf import ImageTextScorer, RegionStore, UnicoderVLForImageTextRetrieval, UnicoderVLProcessor
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.negatives import MismatchIndex, PairsWithNegatives
from unicoder_vl_hf.tasks.retrieval import mining
from unicoder_vl_hf.tasks.retrieval.mining import MiningRule, mine, mine_hard_negatives


def logit(p):
    return math.log(p / (1 - p))


# Two matches, of which the lower decides on margins, and candidates of which two are the same (code 6).
PROBABILITIES = [0.95, 0.90, 0.75, 0.70, 0.65, 0.60, 0.59, 0.30, 0.80]
MATCH = np.array([0, 1, 0, 0, 0, 0, 0, 0, 1], dtype=bool)
CODES = np.array([1, 2, 3, 4, 5, 6, 6, 7, 8])
CHOICES = [
    ({}, [0, 2, 3]),
    ({"num_negatives": 5}, [0, 2, 3, 4, 5]),
    ({"num_negatives": 9}, [0, 2, 3, 4, 5, 7]),  # 6 is 5 again
    ({"range_min": 2, "num_negatives": 2}, [3, 4]),
    ({"range_max": 3, "range_min": 1, "num_negatives": 2}, [2, 3]),
    ({"max_score": 0.7}, [3, 4, 5]),
    ({"min_score": 0.65}, [0, 2, 3]),
    ({"min_score": 0.72, "num_negatives": 2}, [0, 2]),
    ({"absolute_margin": 0.1}, [3, 4, 5]),  # at most 0.80 - 0.1: of the LOWEST match, not 0.90
    ({"absolute_margin": 0.0}, [2, 3, 4]),
    ({"relative_margin": 0.25}, [5, 7]),  # at most 0.80 * 0.75
    ({"relative_margin": 0.05, "max_score": 0.65, "range_min": 1, "num_negatives": 1}, [5]),
    ({"range_max": 3, "max_score": 0.5}, []),  # the guards see what the range leaves
]


@pytest.mark.parametrize(("options", "expected"), CHOICES)
def test_rule_by_hand(options, expected):
    scores = np.array([logit(p) for p in PROBABILITIES])
    chosen = MiningRule(**options).choose(scores, MATCH, CODES, np.random.default_rng(0))
    assert chosen.tolist() == expected


def test_a_relative_margin_does_not_turn_round_where_scores_are_negative():
    """With a positive at -1 and a margin of 10 %, `score <= -1 * 0.9` would let in -0.95, which is above it."""
    scores = np.array([-1.0, -0.95, -1.3])
    rule = MiningRule(relative_margin=0.1, num_negatives=1)
    # sigmoid(-1) * 0.9 = 0.242; sigmoid(-0.95) = 0.279, sigmoid(-1.3) = 0.214
    assert rule.choose(scores, scores == -1.0, np.arange(3), np.random.default_rng(0)).tolist() == [2]


def test_random_sampling_takes_any_of_what_the_guards_leave():
    scores = np.array([logit(p) for p in PROBABILITIES])
    rule = MiningRule(sampling_strategy="random", num_negatives=2, max_score=0.8)
    drawn = [rule.choose(scores, MATCH, CODES, np.random.default_rng(seed)).tolist() for seed in range(200)]
    assert all(pair == sorted(pair) and len(set(pair)) == 2 for pair in drawn)  # the best first
    assert {row for pair in drawn for row in pair} == {2, 3, 4, 5, 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "expected at least 1 and 0"),
        ({"range_max": 3, "range_min": 1}, r"range_max=3; expected at least range_min \+ num_negatives = 4"),
        ({"relative_margin": -0.1}, r"relative_margin=-0.1; expected a value in 0..1"),
        ({"max_score": 2.5}, "max_score=2.5"),
        ({"sampling_strategy": "best"}, "expected 'top' or 'random'"),
    ],
)
def test_rule_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MiningRule(**options)


# On pairs


class Matrix:
    """A scorer whose scores are given, by text and image id."""

    def __init__(self, texts, image_ids, scores):
        self.scores = {(t, i): scores[a][b] for a, t in enumerate(texts) for b, i in enumerate(image_ids)}

    def score_pairs(self, captions, images, caption_index, image_index, max_length=44, output_dir=None):
        pairs = zip(caption_index, image_index, strict=True)
        return np.array([self.scores[captions[c], images[i]] for c, i in pairs], dtype=np.float32)


def small_split():
    """Image 3 shows what image 0 shows; "A dog" is of image 0 and, in another spelling, of image 1."""
    rows = [("0", "A dog"), ("0", "one"), ("1", "a  DOG"), ("1", "two"), ("2", "three"), ("3", "four"), ("4", "five")]
    return datasets.Dataset.from_dict({"image_id": [i for i, _ in rows], "caption": [c for _, c in rows]})


# fmt: off
SCORES = [  # of each row with images 0 to 4
    [9.0, 8.0, 3.0, 7.0, 1.0],  # A dog
    [5.0, 4.0, 3.0, 9.0, 2.0],  # one
    [9.0, 9.0, 6.0, 9.0, 0.5],  # a  DOG
    [2.0, 6.0, 3.0, 1.0, 4.0],  # two
    [7.0, 1.0, 8.0, 5.0, 0.0],  # three
    [9.0, 3.0, 2.0, 5.0, 1.0],  # four
    [1.0, 0.0, 6.0, 3.0, 4.0],  # five
]
# fmt: on


def mined_by_hand(**options):
    pairs = small_split()
    scorer = Matrix(pairs["caption"][:], ["0", "1", "2", "3", "4"], SCORES)
    options = {"duplicates": [["0", "3"]], "images_per_set": 9, **options}
    return mine_hard_negatives(pairs, scorer, options.pop("rule", MiningRule(num_negatives=2)), **options)


def sigmoids(*scores):
    return pytest.approx([1 / (1 + math.exp(-score)) for score in scores], rel=1e-6)


def test_columns_by_hand():
    mined = mined_by_hand()
    # Never image 0 or 3 for a caption of either, nor 0, 1 or 3 for "A dog"; of 0 and 3, which are the same, the better.
    assert mined["negative_image_ids"][:] == [
        ["2", "4"], ["1", "2"], ["2", "4"], ["4", "2"], ["0", "1"], ["1", "2"], ["2", "3"]
    ]  # fmt: skip
    assert mined["negative_image_scores"][4] == sigmoids(7, 1)
    # By image: of 0 and 3 no caption of either, and the text of both spellings once.
    of_image = dict(zip(mined["image_id"], mined["negative_captions"], strict=True))
    assert of_image == {
        "0": ["three", "two"], "1": ["one", "four"], "2": ["a  DOG", "five"], "3": ["three", "five"],
        "4": ["two", "one"],
    }  # fmt: skip
    assert mined["negative_captions"][0] == mined["negative_captions"][1]
    assert mined["negative_caption_scores"][0] == sigmoids(7, 2)
    assert mined["caption"][:] == small_split()["caption"][:]


def test_without_the_duplicates_the_photo_shown_twice_is_taken():
    assert mined_by_hand(duplicates=[])["negative_image_ids"][1] == ["3", "1"]


def test_too_few_are_drawn_at_random_never_false():
    rule = MiningRule(num_negatives=2, max_score=0.9)  # score 2.197
    index, filled = MismatchIndex.from_pairs(small_split(), [["0", "3"]]), set()
    for seed in range(12):
        mined = mined_by_hand(rule=rule, seed=seed)
        row = mined[0]  # "A dog": image 2 at 3.0 is too good, and the only other image that is none of its own
        assert row["negative_image_ids"] == ["4", "2"] and row["negative_image_scores"][1] is None
        for row, item in enumerate(mined):
            for name in ("negative_captions", "negative_image_ids"):
                assert len(set(item[name])) == 2
            firsts = [mined["image_id"][:].index(image_id) for image_id in item["negative_image_ids"]]
            assert not index.makes_match(row, np.array(firsts), True).any()
            rows = [mined["caption"][:].index(caption) for caption in item["negative_captions"]]
            assert not index.makes_match(row, np.array(rows), False).any()
        filled.add(tuple(mined["negative_image_ids"][1]))
    assert filled == {("4", "1"), ("4", "2")}  # "one"


@pytest.mark.parametrize(
    ("max_score", "says"),
    [
        # Scores up to 1.05. Captions: 1 lacks for image 0 and its two rows, 2 for image 2, 1 for image 3.
        (0.74, "5 of 14 negative captions (36%) and 8 of 14 negative images (57%) were not found within the guards"),
        # Up to 4.6: image 2 has 6.0 with "a  DOG", to which image 4 alone is left.
        (0.99, "1 of 14 negative images (7%) were not found within the guards"),
        (0.9999, None),
    ],
)
def test_what_lacks_is_said_as_a_share_of_the_rows(max_score, says, monkeypatch):
    said = []
    monkeypatch.setattr(mining.logger, "warning", said.append)
    mined_by_hand(rule=MiningRule(num_negatives=2, max_score=max_score))
    assert [text.split(",")[0] for text in said] == ([] if says is None else [says])


def test_sets_deal_out_every_image_once(monkeypatch):
    """Of 5 images in sets of 2 or 3, every caption meets those of its set; a missing negative comes from elsewhere."""
    asked = []
    monkeypatch.setattr(
        Matrix,
        "score_pairs",
        lambda self, captions, images, rows, columns, **_: asked.append((rows, columns)) or np.zeros(len(rows)),
    )
    mined = mined_by_hand(images_per_set=2)
    ((rows, columns),) = asked
    met = {int(row): {int(c) for r, c in zip(rows, columns, strict=True) if r == row} for row in rows}
    image_of_row = [int(image_id) for image_id in small_split()["image_id"]]
    assert sorted(met) == list(range(7)) and all(image_of_row[row] in images for row, images in met.items())
    assert sorted({image for images in map(tuple, map(sorted, met.values())) for image in images}) == [0, 1, 2, 3, 4]
    assert len(rows) < 7 * 5 and all(len(names) == 2 for names in mined["negative_image_ids"])


class Planes:
    """A first stage of given embeddings: of each row of `small_split`, and of images 0 to 4."""

    def __init__(self, texts, images):
        self.texts, self.images = (np.array(rows, dtype=np.float32) for rows in (texts, images))

    def embed_captions(self, captions):
        assert list(captions) == small_split()["caption"][:]
        return self.texts

    def embed_images(self, image_ids):
        assert list(image_ids) == ["0", "1", "2", "3", "4"]
        return self.images


# A row of numbers for each caption: its inner products with the images.
NEAR = Planes(
    [[0, 4, 3, 2, 1], [0, 0, 9, 1, 8], [3, 1, 5, 0, 6], [2, 3, 0, 1, 7], [9, 1, 2, 0, 8], [5, 7, 1, 6, 0],
     [1, 0, 2, 5, 3]],
    np.eye(5),
)  # fmt: skip


def test_candidates_by_hand():
    """Row 1, "one" of image 0, is scored with the nearest images 2 and 4 and its own, never with the hard image 1."""
    mined = mined_by_hand(encoder=NEAR, candidates=2, rule=MiningRule(num_negatives=2))
    assert mined["negative_image_ids"][1] == ["2", "4"] and mined["negative_image_scores"][1] == sigmoids(3, 2)
    # The nearest rows of image 4 are row 1 (8) and row 4 (8); of these "three" (0) scores worse than "one" (2).
    assert mined["negative_captions"][6] == ["one", "three"] and mined["negative_caption_scores"][6] == sigmoids(2, 0)
    # Those of image 3 are row 5, its own, and row 6; the second negative is drawn.
    assert mined["negative_captions"][5][0] == "five" and mined["negative_caption_scores"][5][1] is None


def test_only_candidates_and_matches_are_scored(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Matrix,
        "score_pairs",
        lambda self, captions, images, rows, columns, **_: (
            asked.extend(zip(rows, columns, strict=True)) or np.zeros(len(rows))
        ),
    )
    mined_by_hand(encoder=NEAR, candidates=1, rule=MiningRule(num_negatives=1))
    own = {(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 3), (6, 4)}
    of_rows = {(0, 1), (1, 2), (2, 4), (3, 4), (4, 0), (5, 1), (6, 3)}
    of_images = {(4, 0), (5, 1), (1, 2), (5, 3), (1, 4)}
    assert sorted(asked) == sorted(own | of_rows | of_images)


@pytest.mark.parametrize("rule", [MiningRule(num_negatives=2), MiningRule(absolute_margin=0.01, range_min=1)])
def test_candidates_that_are_all_there_is_find_what_one_set_of_all_finds(rule):
    everything = mined_by_hand(rule=rule)
    assert mined_by_hand(rule=rule, encoder=NEAR, candidates=7).to_dict() == everything.to_dict()


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match=r"candidates=2; expected at least range_min \+ num_negatives = 3"):
        mined_by_hand(rule=MiningRule(num_negatives=2, range_min=1), encoder=NEAR, candidates=2)


# The whole command


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mining")
    world = small_world.build(folder)
    inputs = small_world.save_retrieval(folder / "model", world, spread=0.2)
    options = {"images_per_set": 10, "num_negatives": 4, "max_score": 0.999, "seed": 3}
    return folder, inputs, options


@pytest.fixture(scope="module")
def mined(job):
    folder, inputs, options = job
    return mine(*inputs, str(folder / "mined"), **options)


def test_mined_captions_are_read_like_any(job, mined):
    folder, (_, captions, _), _ = job
    read = read_captions(folder / "mined")
    assert len(read) == len(read_captions(captions)) and read.column_names[:3] == ["image_id", "caption", "split"]
    train = read.filter(lambda row: row["split"] == "train")
    others = read.filter(lambda row: row["split"] != "train")
    assert set(map(len, train["negative_captions"])) == set(map(len, train["negative_image_ids"])) == {4}
    assert set(map(len, others["negative_captions"])) == {0}
    assert not (folder / "mined.scores").exists() and not (folder / "mined.partial").exists()
    of_train = set(train["image_id"])
    assert all(image_id in of_train for names in train["negative_image_ids"] for image_id in names)
    item = PairsWithNegatives(train, seed=0)[5]  # takes three of the four
    assert set(item["negative_captions"]) < set(train["negative_captions"][5])
    assert set(item["negative_image_ids"]) < set(train["negative_image_ids"][5])


def test_hardest_first_by_the_model_itself(job, mined):
    """Against scores of the whole split: what was mined is what is best within one set."""
    _, (checkpoint, _, regions), _ = job
    model = UnicoderVLForImageTextRetrieval.from_pretrained(checkpoint)
    scorer = ImageTextScorer(model, UnicoderVLProcessor.from_pretrained(checkpoint), RegionStore(regions))
    train = mined.filter(lambda row: row["split"] == "train")
    image_ids = train.unique("image_id")
    scores = 1 / (1 + np.exp(-scorer.score(train["caption"][:], image_ids).astype(np.float64)))
    for row in range(0, 80, 7):
        found, values = train["negative_image_ids"][row], train["negative_image_scores"][row]
        known = [(i, v) for i, v in zip(found, values, strict=True) if v is not None]
        assert [v for _, v in known] == sorted((v for _, v in known), reverse=True)
        for image_id, value in known:
            assert value == pytest.approx(scores[row, image_ids.index(image_id)], abs=1e-5) and value <= 0.999


def test_all_candidates_of_the_first_stage_find_what_one_set_of_all_finds(job):
    folder, (checkpoint, *data), _ = job
    model = UnicoderVLForImageTextRetrieval.from_pretrained(checkpoint, projection_dim=8)
    model.config.first_stage_trained = True
    model.save_pretrained(folder / "search")
    UnicoderVLProcessor.from_pretrained(checkpoint).save_pretrained(folder / "search")
    rule = {"num_negatives": 4, "max_score": 0.999}
    everything = mine(checkpoint, *data, str(folder / "everything"), images_per_set=40, **rule)
    candidates = mine(str(folder / "search"), *data, str(folder / "candidates"), candidates=80, **rule)
    assert candidates.to_dict() == everything.to_dict()
    few = mine(str(folder / "search"), *data, str(folder / "few"), candidates=4, **rule)
    assert few.to_dict() != everything.to_dict()


def test_candidates_need_a_first_stage(job):
    folder, inputs, _ = job
    with pytest.raises(ValueError, match=r"The first stage of .*model was not trained.*`unicoder-vl mine` without --c"):
        mine(*inputs, str(folder / "none"), candidates=10)
    assert not (folder / "none").exists()


def test_a_stopped_job_goes_on_without_scoring_again(job, mined, monkeypatch):
    folder, inputs, options = job

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mining, "mine_hard_negatives", lambda *a, **k: (mine_hard_negatives(*a, **k), stop()))
        mine(*inputs, str(folder / "again"), **options)
    assert (folder / "again.scores").exists() and not (folder / "again").exists()
    monkeypatch.setattr(ImageTextScorer, "_compute", lambda *_: pytest.fail("scored again"))
    assert mine(*inputs, str(folder / "again"), **options).to_dict() == mined.to_dict()


def test_a_folder_of_something_else_is_never_overwritten(job):
    folder, (checkpoint, captions, regions), options = job
    (folder / "notes").mkdir()
    read_captions(captions).save_to_disk(folder / "captions")
    for restart in (False, True):
        for name in ("notes", "captions"):
            with pytest.raises(ValueError, match=f"{name} exists and holds no mined captions"):
                mine(checkpoint, captions, regions, str(folder / name), restart=restart, **options)
        with pytest.raises(ValueError, match="holds the captions to be mined"):
            mine(checkpoint, str(folder / "captions"), regions, str(folder / "captions"), restart=restart, **options)
    assert len(read_captions(folder / "captions")) == len(read_captions(captions))
    with pytest.raises(ValueError, match="has no split 'dev'; its splits are"):
        mine(checkpoint, captions, regions, str(folder / "other"), split="dev", **options)


def test_what_is_finished_stays_as_it_is(job, mined, monkeypatch, caplog):
    folder, inputs, options = job
    shutil.copytree(folder / "mined", folder / "finished")
    with monkeypatch.context() as patch:
        patch.setattr(mining, "mine_hard_negatives", lambda *_, **__: pytest.fail("mined again"))
        assert mine(*inputs, str(folder / "finished"), **options).to_dict() == mined.to_dict()
        assert f"{folder / 'finished'} is finished, and stays as it is" in caplog.text
        with pytest.raises(ValueError, match=r"finished was mined with seed=3, not 4: begin anew .*--restart"):
            mine(*inputs, str(folder / "finished"), **options | {"seed": 4})
        rows = [json.loads(line) for line in Path(inputs[1]).read_text().splitlines()]
        moved = rows[0] | {"split": "val" if rows[0]["split"] != "val" else "train"}
        (folder / "redrawn.jsonl").write_text("\n".join(map(json.dumps, [moved, *rows[1:]])))
        with pytest.raises(ValueError, match=r"finished was mined with splits='.*', not '.*': begin anew"):
            mine(inputs[0], str(folder / "redrawn.jsonl"), inputs[2], str(folder / "finished"), **options)
        (folder / "finished" / "mining.json").unlink()  # as an older version left it
        with pytest.raises(ValueError, match=r"finished does not tell how its captions were mined: begin anew"):
            mine(*inputs, str(folder / "finished"), **options)
    anew = mine(*inputs, str(folder / "finished"), restart=True, **options | {"num_negatives": 2})
    assert set(map(len, anew["negative_captions"])) == {0, 2}
    assert not list(folder.glob("*.before-restart")) and not list(folder.glob("*.scores"))


def test_without_a_column_split_all_of_it_is_mined_and_said(job, caplog):
    folder, (checkpoint, captions, regions), options = job
    read_captions(captions, split="train").remove_columns("split").save_to_disk(folder / "unsplit")
    mined = mine(checkpoint, str(folder / "unsplit"), regions, str(folder / "all"), **options)
    assert set(map(len, mined["negative_captions"])) == {4}
    assert f"{folder / 'unsplit'} has no column 'split': all of it is mined." in caplog.text

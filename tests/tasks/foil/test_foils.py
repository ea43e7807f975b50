"""Foils of nouns: which words are found and put in, what is named, how they are balanced and filtered."""

import dataclasses
from collections import Counter

import datasets
import numpy as np
import pytest
import tiny
from region_stores import write_store

from unicoder_vl_hf.data.foils import Foil, put_word, read_foils, write_foils
from unicoder_vl_hf.tasks.foil import (
    accuracies_by_kind,
    foil_accuracy,
    foil_gain,
    gains_by_kind,
    hard_foils,
    noun_foils,
    nouns,
    text_only,
    train_text_only,
    training_foils,
)
from unicoder_vl_hf.tasks.foil.making import couples
from unicoder_vl_hf.tasks.foil.text_only import hide_word


@pytest.mark.parametrize(
    "caption, found",
    [
        ("A Dog runs with an umbrella .", ["dog", "umbrella"]),
        ("two dogs chase a soccer ball.", ["dogs", "soccer ball"]),
        ("Dogs, horses and a tennis racket", ["dogs", "horses", "tennis racket"]),
        ("a dog toy, a toy car and a tie-dye chair-lift", []),  # parts of compounds, or no real thing
        ("a dog chases another dog", []),  # the other one would still be there
        ("a cyclist on a bike", []),  # named twice, too
        ("a man and a woman", []),  # people stand for one class
        ("the category of a scarf", []),  # "cat" and "car" within words
        ("", []),
    ],
)
def test_mentions(caption, found):
    assert [mention.noun.text for mention in nouns.mentions(caption)] == found
    assert [caption[m.start : m.end].lower() for m in nouns.mentions(caption)] == found


def test_every_noun_replaces_others_of_its_kind_and_number_alone():
    for (kind, plural), alike in nouns.nouns_by_kind().items():
        assert all((noun.kind, noun.plural) == (kind, plural) for noun in alike)
        for noun in alike:
            assert nouns.named_classes(f"the {noun.text} there") >= {noun.object_class}
            assert [m.noun for m in nouns.mentions(f"the {noun.text} there")] in ([noun], [])


@pytest.mark.parametrize(
    "text, word, foil",
    [
        ("a dog runs", "elephant", "an elephant runs"),
        ("An elephant runs", "dog", "A dog runs"),
        ("Dog runs", "elephant", "Elephant runs"),
        ("the Dog runs", "elephant", "the elephant runs"),
        ("banana dog", "apple", "banana apple"),
        ("a brown dog", "elephant", "a brown elephant"),
    ],
)
def test_put_word_mends_the_article(text, word, foil):
    start = text.lower().index("elephant" if "elephant" in text else "dog")
    end = start + (8 if "elephant" in text else 3)
    assert put_word(text, start, end, word) == foil


def test_classes_of_a_detector():
    assert nouns.class_numbers(None, 80)[16] == 16 == nouns.class_numbers(["__", "dog"], 2)[1]
    for names, count in ((None, 1600), (None, None), (["tree", "sky"], 2)):
        with pytest.raises(ValueError, match=r"object classes, named .* expected COCO's names"):
            nouns.class_numbers(names, count)


def rows(**captions: list[str]) -> datasets.Dataset:
    found = [(image_id, text) for image_id, texts in captions.items() for text in texts]
    ids, texts = zip(*found, strict=True)
    return datasets.Dataset.from_dict({"image_id": ids, "caption": texts, "split": ["val"] * len(ids)})


def store(folder, **classes: list[int] | None):
    records = [
        dataclasses.replace(tiny.record(image_id), object_ids=None if ids is None else np.array(ids))
        for image_id, ids in classes.items()
    ]
    return write_store(records, folder, num_classes=80)


def test_a_foil_names_nothing_that_a_caption_or_a_region_names(tmp_path):
    captions = rows(a=["A dog sleeps .", "A kitten beside a pet ."], b=["a dog"])
    regions = store(tmp_path / "store", a=[17, -1, 0], b=[-1, -1, -1])
    foils = noun_foils(captions, regions)
    of_a = {foil.foil_word for foil in foils if foil.image_id == "a" and foil.word == "dog"}
    of_b = {foil.foil_word for foil in foils if foil.image_id == "b"}
    assert of_b - of_a == {"cat", "kitten", "horse", "pony"}  # by another caption, and by a region
    assert of_a >= {"bird", "cow", "elephant"} and not of_b & {"dog", "puppy", "dogs"}
    assert Foil("b", "val", "a dog", "an elephant", "dog", "elephant", "animal") in foils


def test_regions_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="image 'a': the record has no object_ids"):
        noun_foils(rows(a=["a dog"]), store(tmp_path / "store", a=None))


def foil(word: str, other: str, number: int = 0, around: str = "sits there") -> Foil:
    return Foil(
        f"image{number}", "val", f"a {word} {around} {number}", f"a {other} {around} {number}", word, other, "animal"
    )


def test_couples_balance_words_and_begin_with_the_hardest():
    foils = [foil("dog", "cat", n) for n in range(4)] + [foil("cat", "dog", 9), foil("dog", "cow", 5)]
    foils += [foil("cat", "dog", 8)]
    ease = np.array([0.9, 0.1, 0.5, 0.7, 0.2, 0.0, 0.1])
    assert couples(foils, ease).tolist() == [[6, 1], [4, 2]]
    foils[1] = dataclasses.replace(foils[1], split="test")  # where it has no partner
    assert couples(foils, ease).tolist() == [[6, 2], [4, 3]]


def test_foils_to_learn_from_are_balanced_and_of_every_couple():
    foils = [foil("dog", "cat", n) for n in range(4)] + [foil("cat", "dog", 9), foil("dog", "cow", 5)]
    foils += [foil("cat", "dog", 8)]
    chosen = [training_foils(foils, seed) for seed in range(20)]
    assert all([each.word for each in found].count("dog") == 2 == len(found) / 2 for found in chosen)
    assert {each.image_id for found in chosen for each in found if each.word == "dog"} == {
        f"image{n}" for n in range(4)
    }
    assert chosen[3] == training_foils(foils, 3)
    with pytest.raises(ValueError, match="No two words of the training captions replace each other"):
        training_foils(foils[:4])


@pytest.mark.parametrize(
    "caption, other, hidden",
    [
        ("A dog runs.", "A cat runs.", "a [MASK] runs ."),
        ("An elephant runs", "A dog runs", "a [MASK] runs"),
        ("the end is a dog", "the end is an elephant", "the end is a [MASK]"),
        ("a tennis racket there", "a ball there", "a [MASK] there"),
        ("dog dog dog", "dog cat dog", "dog [MASK] dog"),
        ("there is 1 star", "there are 2 stars", "there [MASK]"),
        ("a star to the left of a ring", "a star to the right of a ring", "a star to the [MASK] of a ring"),
    ],
)
def test_the_word_that_differs_is_hidden_alike_in_both(caption, other, hidden):
    assert hide_word(Foil("a", "val", caption, other, "x", "y", "kind")) == hidden
    assert hide_word(Foil("a", "val", other, caption, "y", "x", "kind")) == hidden


def test_long_captions_keep_the_hidden_word():
    long = " ".join(f"w{n}" for n in range(90))
    text = hide_word(Foil("a", "val", f"{long} dog {long}", f"{long} cat {long}", "dog", "cat", "animal"))
    assert text.split() == [f"w{n}" for n in range(70, 90)] + ["[MASK]"] + [f"w{n}" for n in range(20)]


def barking(split: str, count: int) -> list[Foil]:
    """Half the contexts tell the word: dogs bark and cats mew; in the other half both sleep."""
    found = []
    for number in range(count):
        for word, other, told in (("dog", "cat", "barks"), ("cat", "dog", "mews")):
            for around in (told, "sleeps"):
                made = foil(word, other, number, f"{around} by tree {number % 7}")
                found.append(dataclasses.replace(made, split=split, image_id=f"{split}{number}"))
    return found


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(text_only, "BATCH_SIZE", 16)


def test_the_vocabulary_has_an_order_of_its_own():
    """That of first occurrences: else every process would draw other weights for a word."""
    foils = [foil("dog", "cat", n % 2, f"barks at {word}") for n in range(6) for word in ("trees", "birds")]
    vocabulary = text_only.word_tokenizer(
        [dataclasses.replace(f, caption=f"{f.caption} {n}") for n, f in enumerate(foils)]
    )
    words = [word for word in vocabulary.get_vocab() if len(word) > 1 and word[0] not in "#["]
    assert sorted(words, key=vocabulary.get_vocab().get) == ["dog", "barks", "at", "trees", "birds"]


def test_a_text_only_scorer_learns_context_and_no_words(small_batches):
    scorer = train_text_only(barking("train", 60), seed=0, epochs=3)
    margins = scorer.margins(held := barking("val", 20))
    told = np.array(["sleeps" not in foil.caption for foil in held])
    assert (margins[told] > 0).all() and (margins[~told] > 0).mean() == 0.5
    assert scorer.knows(held[0]) and not scorer.knows(foil("dog", "yak"))


def test_a_word_that_is_common_is_no_clue(small_batches):
    """Dogs are replaced 20 times as often as they are put in, and it teaches nothing about dogs."""
    dogs, cats = range(600), range(0, 600, 20)
    train = [foil("dog", "cat", n, f"sleeps by tree {n % 7}") for n in dogs]
    train += [foil("cat", "dog", n, f"sleeps by tree {n % 7}") for n in cats]
    scorer = train_text_only(train, seed=0, epochs=1)
    margins = scorer.margins([foil("dog", "cat", 7, "sleeps by tree 3"), foil("cat", "dog", 7, "sleeps by tree 3")])
    assert margins[0] == -margins[1] and abs(margins[0]) < 1


def test_filtered_foils_are_balanced_and_cannot_be_told(small_batches):
    hard = hard_foils(barking("val", 30), barking("train", 40))
    assert len(hard) >= 40
    counts = Counter(foil.word for foil in hard)
    assert counts["dog"] == counts["cat"] == Counter(foil.foil_word for foil in hard)["dog"]
    told = np.mean([margin > 0 for foil in hard for margin in foil.text_only])
    assert told <= 0.55 and all(len(foil.text_only) == 3 for foil in hard)
    unfiltered = np.mean([margin > 0 for scorer in [train_text_only(barking("train", 40), 7)]
                          for margin in scorer.margins(barking("val", 30))])  # fmt: skip
    assert unfiltered > 0.6


def test_foils_that_are_all_told_are_refused(monkeypatch):
    monkeypatch.setattr(text_only, "BATCH_SIZE", 4)
    told = [[f for f in barking(split, 60) if "sleeps" not in f.caption] for split in ("val", "train")]
    with pytest.raises(ValueError, match="tell all foils apart"):
        hard_foils(*told)
    with pytest.raises(ValueError, match="No word of the foils to train on"):
        train_text_only([foil("dog", "cat"), foil("cat", "cow")], seed=0)


def test_accuracy_by_hand():
    measured = foil_accuracy([0.5, -0.1, 2.0, 0.0], ["a", "a", "b", "c"])
    assert (measured.accuracy, measured.num_foils, measured.num_ties) == (0.625, 4, 1)
    # By image the errors are (1 - .625) + (0 - .625), 1 - .625, .5 - .625; their squares sum to .21875, times 3 / 2.
    half = 1.96 * 0.328125**0.5 / 4
    assert (measured.low, measured.high) == pytest.approx((0.625 - half, 0.625 + half))
    assert str(foil_accuracy([1.0, 1.0], ["a", "b"])) == "100.0 (100.0 to 100.0)"
    assert str(foil_accuracy([1.0, 1.0], ["a", "a"])) == "100.0 (0.0 to 100.0)"  # one image tells nothing
    runs = foil_accuracy([[1, -1, 1], [1, 1, 1]], ["a", "b"])
    assert runs.accuracy == pytest.approx(5 / 6) and runs.num_foils == 2


def test_gain_by_hand():
    measured = foil_gain([0.5, -0.1, 2.0, 1.0], [[0.5, -1], [-0.1, -1], [-1.0, 1], [-0.5, 0]], ["a", "a", "b", "c"])
    gains = np.array([0.5, 0, 0.5, 0.75])  # each less the mean of the two runs of the other
    assert measured.gain == pytest.approx(gains.mean())
    errors = np.array([gains[:2].sum() - 2 * gains.mean(), *(gains[2:] - gains.mean())])
    half = 1.96 * (np.square(errors).sum() * 3 / 2) ** 0.5 / 4
    assert (measured.low, measured.high) == pytest.approx((measured.gain - half, measured.gain + half))
    assert str(foil_gain([1.0, 1.0], [1.0, -1.0], ["a", "a"])) == "+50.0 (-100.0 to +100.0)"  # one image tells nothing
    assert str(foil_gain([-1.0, -1.0], [1.0, 1.0], ["a", "b"])) == "-100.0 (-100.0 to -100.0)"
    runs = np.array([[1, -1, -1], [1, 1, -1], [1, 1, 1]])
    none = foil_gain(runs, runs[[2, 0, 1]], ["a", "b", "c"])
    assert -1e-9 < none.gain < 0 and str(none) == "+0.0 (-65.3 to +65.3)"  # and not -0.0
    with pytest.raises(ValueError, match=r"^other_margins\[0\] is NaN"):
        foil_gain([1.0], [np.nan], ["a"])
    with pytest.raises(ValueError, match=r"^other_margins has shape"):
        foil_gain([1.0], [1.0, 2.0], ["a"])


def test_the_interval_of_a_gain_is_of_the_same_foils():
    """Two scorers that agree on most foils: each interval is wide, that of their difference is narrow."""
    rng = np.random.default_rng(0)
    margins = rng.choice([-1, 1], 400)
    better = np.where(rng.random(400) < 0.05, 1, margins)
    images = np.arange(400).astype(str).tolist()
    gain, wide = foil_gain(better, margins, images), foil_accuracy(margins, images)
    assert gain.gain > 0 and gain.high - gain.low < (wide.high - wide.low) / 2
    kinds = gains_by_kind(better, margins, ["a"] * 300 + ["b"] * 100, images)
    assert kinds["all"] == gain and kinds["a"] == foil_gain(better[:300], margins[:300], images[:300])


def test_the_interval_holds_for_images_not_pairs():
    """A thousand draws of a coin for each image, whose ten pairs agree: 95 % of the intervals hold the half."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(60), 10).astype(str).tolist()
    measured = [foil_accuracy(np.repeat(rng.choice([-1, 1], 60), 10), images) for _ in range(1000)]
    assert 0.92 < np.mean([each.low <= 0.5 <= each.high for each in measured]) < 0.97


def test_accuracy_of_kinds():
    kinds = accuracies_by_kind([1, -1, 1], ["sports", "animal", "sports"], ["a", "b", "c"])
    assert {name: (each.accuracy, each.num_foils) for name, each in kinds.items()} == {
        "all": (2 / 3, 3),
        "sports": (1, 2),
        "animal": (0, 1),
    }
    assert list(kinds) == ["all", "sports", "animal"]


@pytest.mark.parametrize("margins, images", [([], []), ([1.0], ["a", "b"]), ([[[1.0]]], ["a"])])
def test_margins_that_do_not_fit(margins, images):
    with pytest.raises(ValueError, match="expected a margin"):
        foil_accuracy(margins, images)


def test_margins_that_are_nan():
    with pytest.raises(ValueError, match=r"margins\[1\] is NaN"):
        foil_accuracy([0.0, np.nan], ["a", "b"])


def test_files(tmp_path):
    foils = [dataclasses.replace(foil("dog", "cat"), text_only=[0.5, -1.25]), foil("café", "cat", 2)]
    write_foils(tmp_path / "foils.jsonl", foils)
    assert read_foils(tmp_path / "foils.jsonl") == foils
    with pytest.raises(ValueError, match="exists already"):
        write_foils(tmp_path / "foils.jsonl", foils)
    for line, fault in (("{", "line 2: expected a JSON object"), ('{"image_id": "a"}', "line 2"), ("[]", "line 2")):
        (tmp_path / "broken.jsonl").write_text((tmp_path / "foils.jsonl").read_text().splitlines()[0] + f"\n{line}\n")
        with pytest.raises(ValueError, match=fault):
            read_foils(tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no foil"):
        read_foils(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="expected two texts"):
        foil("dog", "dog")

from collections import Counter

import pytest

from unicoder_vl_hf.scenes import foils as words
from unicoder_vl_hf.scenes.foils import caption_foils, scene_foils, world_foils
from unicoder_vl_hf.scenes.world import (
    _separation,
    counted_shape,
    sample_scene,
    say_count,
    scene_captions,
    scene_tokenizer,
)

SCENES = [sample_scene(number, split) for split in ("train", "test") for number in range(60)]
FOILS = [(scene, foil) for scene in SCENES for foil in scene_foils(scene)]


def objects(text: str, scene):
    """The objects of a scene that a text names, None for a name that no object has."""
    for match in words._NAME.finditer(text):
        named = (words._COLOURS[match["colour"]], words._SHAPES[match["shape"]])
        size = match["size"] and words._SIZES[match["size"]]
        fitting = [o for o in scene.objects if (o.colour, o.shape) == named and size in (None, o.size)]
        yield fitting[0] if fitting else None


def relations(text: str, scene) -> list[tuple[str, str]]:
    """How the first object of a text lies to each that it is put in relation with: in truth, and as the text says."""
    things = list(objects(text, scene))
    said = [words._RELATIONS[match["relation"]] for match in words._RELATION.finditer(text)]
    return [(_separation(things[0].box, other.box)[0], word) for other, word in zip(things[1:], said, strict=True)]


def test_captions_are_true_and_foils_false():
    for scene, foil in FOILS:
        if foil.kind == "count":
            continue
        assert foil.caption in scene_captions(scene) and None not in objects(foil.caption, scene)
        if foil.kind == "relation":
            assert relations(foil.foil, scene) != relations(foil.caption, scene)
            assert all(true == said for true, said in relations(foil.caption, scene))
            assert [true == said for true, said in relations(foil.foil, scene)].count(False) == 1
        else:
            assert list(objects(foil.foil, scene)).count(None) == 1


def test_words_that_differ_are_of_the_kind():
    tables = {"colour": words._COLOURS, "shape": words._SHAPES, "size": words._SIZES, "relation": words._RELATIONS}
    for _, foil in FOILS:
        if foil.kind in tables:
            table = tables[foil.kind]
            assert table[foil.word] != table[foil.foil_word]
            assert Counter(foil.caption.split()) != Counter(foil.foil.split())
            assert " a o" not in foil.foil and " an " not in foil.foil.replace(" an o", "")
    assert {foil.kind for _, foil in FOILS} == {*tables, "count"}


def test_counts_are_exact():
    for scene in SCENES:
        count, word = counted_shape(scene)
        assert count == sum(thing.shape == words._SHAPES[word] for thing in scene.objects)
        (foil,) = [foil for foil in scene_foils(scene) if foil.kind == "count"]
        assert foil.caption == say_count(count, word) and abs(int(foil.foil_word) - count) == 1
        assert foil.foil == say_count(int(foil.foil_word), word) and foil.foil_word != "0"


@pytest.mark.parametrize("count, shape, text", [(1, "box", "there is 1 box"), (3, "box", "there are 3 boxes")])
def test_counts_are_words_of_the_vocabulary(count, shape, text):
    assert say_count(count, shape) == text
    assert "[UNK]" not in scene_tokenizer().tokenize(text)


def test_foils_are_a_function_of_the_scene():
    assert scene_foils(sample_scene(7, "val")) == [f for f in world_foils("val") if f.image_id == "val-00007"]
    with pytest.raises(ValueError, match="expected one of"):
        world_foils("none")


def test_foils_to_learn_from_are_of_what_captions_of_all_scenes_say(monkeypatch):
    assert words.NUM_SCENES["train"] == 3000
    monkeypatch.setitem(words.NUM_SCENES, "train", 20)
    found = caption_foils("train")
    assert {foil.image_id for foil in found} == {f"train-{number:05}" for number in range(20)}
    for foil in found:
        assert foil.caption in scene_captions(sample_scene(int(foil.image_id[-5:]), "train")) and foil.kind != "count"
    # They would teach that no picture shows the pairs that the test scenes ask for.
    named = [
        {(words._COLOURS[match["colour"]], words._SHAPES[match["shape"]]) for match in words._NAME.finditer(foil.foil)}
        for foil in (*found, *(foil for number in range(20) for foil in scene_foils(sample_scene(number))))
    ]
    told = [not words.HELD_OUT.isdisjoint(pairs) for pairs in named]
    assert not any(told[: len(found)]) and any(told[len(found) :])
    with pytest.raises(ValueError, match="expected one of"):
        caption_foils("none")

"""The rendered world: true captions, honest boxes and features, and a split that holds what it promises."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

pytest.importorskip("PIL")

from PIL import Image

from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.regions.store import RegionStore
from unicoder_vl_hf.scenes import world as scenes
from unicoder_vl_hf.scenes.world import (
    CLASS_NAMES,
    COLOURS,
    FEATURE_DIM,
    HELD_OUT,
    SHAPE_WORDS,
    build_scenes,
    pool_pixels,
    render_scene,
    sample_scene,
    scene_captions,
    scene_record,
    scene_regions,
    scene_tokenizer,
)

# What the words mean, written down a second time.
SAME_WORD = {
    "crimson": "red", "violet": "purple", "disc": "circle", "box": "square", "plus": "cross", "hoop": "ring",
    "rhombus": "diamond", "little": "small", "big": "large", "lawn": "grass", "beach": "sand", "lake": "water",
    "ice": "snow", "left of": "left", "to the left of": "left", "right of": "right", "to the right of": "right",
    "over": "above", "under": "below", "on the left": "left", "on the right": "right", "at the top": "top",
    "at the bottom": "bottom", "in the middle": "middle", "in the centre": "middle",
}  # fmt: skip
THING = r"an? (?:(small|little|large|big) )?([a-z]+) ([a-z]+)"
RELATION = r"((?:to the )?left of|(?:to the )?right of|above|over|below|under)"
PLACE = r"(on the left|on the right|at the top|at the bottom|in the (?:middle|centre))"
GROUND = r"on the (grass|lawn|sand|beach|water|lake|snow|ice)"
FORMS = {
    "listing": rf"{THING}, {THING} and {THING}",
    "on ground": rf"{GROUND} there is {THING}, {THING} and {THING}",
    "related": rf"{THING} {RELATION} {THING} {GROUND}",
    "twice related": rf"{THING} {RELATION} {THING} and {RELATION} {THING}",
    "placed": rf"{THING} {PLACE} and {THING} {PLACE}",
}


def parse(caption):
    """(form, groups with synonyms resolved) of a caption; fails on one that no form fits."""
    for form, pattern in FORMS.items():
        if match := re.fullmatch(pattern, caption):
            return form, [SAME_WORD.get(word, word) for word in match.groups()]
    raise AssertionError(f"No form fits {caption!r}.")


def is_true(caption, scene):
    form, words = parse(caption)
    if form == "on ground":
        return words[0] == scene.ground and all(find(scene, *words[i : i + 3]) for i in (1, 4, 7))
    if form == "listing":
        return all(find(scene, *words[i : i + 3]) for i in (0, 3, 6))
    first, second = find(scene, *words[:3]), find(scene, *words[4:7])
    if first is None or second is None:
        return False
    if form == "related":
        return words[7] == scene.ground and lies(first, words[3], second)
    if form == "twice related":
        third = find(scene, *words[8:11])
        return third is not None and lies(first, words[3], second) and lies(first, words[7], third)
    return in_place(first, words[3], scene) and in_place(second, words[7], scene)


def find(scene, size, colour, shape):
    """The one object that fits; colour and shape alone must name it."""
    same = [thing for thing in scene.objects if (thing.colour, thing.shape) == (colour, shape)]
    assert len(same) <= 1
    small = bool(same) and same[0].box[2] - same[0].box[0] < 40
    return same[0] if same and size in (None, "small" if small else "large") else None


def lies(thing, relation, other):
    (x1, y1, x2, y2), (u1, v1, u2, v2) = thing.box, other.box
    return {"left": x2 < u1, "right": u2 < x1, "above": y2 < v1, "below": v2 < y1}[relation]


def in_place(thing, place, scene):
    x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
    left, right, top, bottom = x < 64, x > 128, y < 48, y > 96
    middle = not (left or right or top or bottom)
    return {"left": left, "right": right, "top": top, "bottom": bottom, "middle": middle}[place]


def pairs_of(scene):
    return {(thing.colour, thing.shape) for thing in scene.objects}


@pytest.fixture(scope="module")
def test_split():
    return [sample_scene(index, "test") for index in range(150)]


@pytest.fixture(scope="module")
def train_split():
    return [sample_scene(index, "train") for index in range(1500)]


def test_a_scene_known_by_heart():
    """The same on every machine: what a finished folder, and a result reported on it, may rely on."""
    scene = sample_scene(0, "test")
    assert (scene.image_id, scene.ground) == ("test-00000", "grass")
    assert [(thing.size, thing.colour, thing.shape) for thing in scene.objects] == [
        ("large", "white", "square"),
        ("small", "yellow", "diamond"),
        ("small", "green", "triangle"),
        ("large", "yellow", "ring"),
    ]
    assert scene_captions(scene) == [
        "a green triangle at the bottom and a yellow ring at the bottom",
        "a large white square above a small green triangle on the grass",
        "a small yellow rhombus, a green triangle and a yellow ring",
        "a small yellow rhombus right of a big white box and above a large yellow ring",
        "on the grass there is a green triangle, a yellow diamond and a yellow ring",
    ]


def test_a_scene_depends_on_nothing_but_its_number():
    alone = scene_record(sample_scene(7))
    for index in range(10):
        scene_captions(sample_scene(index))
    again = scene_record(sample_scene(7))
    np.testing.assert_array_equal(alone.features, again.features)
    np.testing.assert_array_equal(alone.boxes, again.boxes)
    ids = [sample_scene(7, seed=1), sample_scene(8), sample_scene(7, "val")]
    assert all(other.objects != sample_scene(7).objects for other in ids)
    # The same objects in another world are drawn, found and told another way.
    scene, other = sample_scene(7), dataclasses.replace(sample_scene(7), seed=1)
    assert scene_captions(other) != scene_captions(scene)
    assert (scene_regions(other)[0] != scene_regions(scene)[0]).any()
    assert render_scene(other).tobytes() != render_scene(scene).tobytes()
    with pytest.raises(ValueError, match="'dev'"):
        sample_scene(0, "dev")


def test_held_out_pairs_are_one_for_each_colour_and_shape():
    assert len(HELD_OUT) == 8
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPE_WORDS)


def test_training_never_shows_a_held_out_pair_and_every_test_scene_does(train_split, test_split):
    seen = set().union(*map(pairs_of, train_split))
    assert seen == {(colour, shape) for colour in COLOURS for shape in SHAPE_WORDS} - HELD_OUT
    assert not any(pairs_of(sample_scene(index, "val")) & HELD_OUT for index in range(300))
    assert all(pairs_of(scene) & HELD_OUT for scene in test_split)
    assert set().union(*map(pairs_of, test_split)) >= HELD_OUT


def test_captions_are_true_and_of_every_form(train_split, test_split):
    forms = Counter()
    for scene in train_split[:300] + test_split:
        captions = scene_captions(scene)
        assert len(set(captions)) == 5
        for caption in captions:
            assert is_true(caption, scene), (caption, scene)
            forms[parse(caption)[0]] += 1
    assert set(forms.values()) == {450}


def test_a_caption_names_its_test_scene_almost_alone(test_split):
    """How often a perfect model, guessing among the scenes for which a caption is true, finds the right one."""
    chances = [
        1 / sum(is_true(caption, other) for other in test_split)
        for scene in test_split
        for caption in scene_captions(scene)
    ]
    assert np.mean(chances) > 0.97


def test_captions_beyond_the_forms_start_over():
    assert Counter(parse(caption)[0] for caption in scene_captions(sample_scene(3), 10)) == dict.fromkeys(FORMS, 2)


def test_objects_are_drawn_where_their_boxes_say(test_split):
    for scene in test_split[:40]:
        pixels = np.asarray(render_scene(scene), dtype=int)
        ground = np.asarray(render_scene(dataclasses.replace(scene, objects=())), dtype=int)
        assert pixels.shape == (144, 192, 3)
        changed = (pixels != ground).any(axis=-1)
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            drawn = changed[y1:y2, x1:x2]
            # Tight: the shape reaches all four sides.
            assert all(side.any() for side in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1])), thing
            colour = np.abs(pixels[y1:y2, x1:x2] - COLOURS[thing.colour]).max(axis=-1) <= 10
            assert colour.mean() > 0.1, thing
            changed[y1:y2, x1:x2] = False
        assert not changed.any()


def test_shapes_look_as_they_are_called():
    def shape_at(name, *points):
        thing = scenes.SceneObject(name, "red", "large", (60, 40, 120, 100))
        pixels = np.asarray(render_scene(scenes.Scene("one", "snow", (thing,))), dtype=int)
        return [bool(np.abs(pixels[40 + y, 60 + x] - COLOURS["red"]).max() <= 10) for x, y in points]

    # Centre, top left, top, halfway to the top left, beside the top, bottom left.
    points = (30, 30), (4, 4), (30, 5), (14, 14), (22, 5), (8, 56)
    expected = {
        "circle": "1.111.",
        "square": "111111",
        "triangle": "1.1..1",
        "cross": "1.1.1.",
        "ring": "..111.",
        "diamond": "1.1...",
        "heart": "1..11.",
    }
    assert {name: "".join(".1"[inside] for inside in shape_at(name, *points)) for name in expected} == expected
    assert shape_at("ring", (38, 30), (30, 22), (50, 30)) == [False, False, True]
    assert shape_at("star", (30, 30), (4, 4), (8, 56), (12, 25), (48, 25)) == [True, False, False, True, True]


def test_regions_overlap_what_they_name(test_split):
    for scene in test_split[:40]:
        boxes, object_ids, scores = scene_regions(scene)
        assert len(boxes) == len(scene.objects) + 1
        tight = {thing.box: thing.shape for thing in scene.objects} | {(0, 0, 192, 144): scene.ground}
        assert Counter(CLASS_NAMES[i] for i in object_ids) == Counter(tight.values())
        for box, object_id, score in zip(boxes, object_ids, scores, strict=True):
            overlaps = {true: overlap(box, true) for true in tight}
            best = max(overlaps, key=overlaps.get)
            assert tight[best] == CLASS_NAMES[object_id]
            assert score == pytest.approx(overlaps[best], abs=1e-5)
        assert (np.diff(scores) <= 0).all()


def overlap(box, other):
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return shared / (sum(areas) - shared)


def test_features_are_the_pixels_and_nothing_else():
    """A slow loop over the cells of each box; and other labels on the same picture change no feature."""
    scene = sample_scene(3, "test")
    image = render_scene(scene)
    record = scene_record(scene, image)
    for box, feature in zip(record.boxes, record.features, strict=True):
        crop = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, box=tuple(box.tolist()))) / 255
        expected = np.zeros((4, 8, 8))
        for y in range(16):
            for x in range(16):
                down = np.abs(crop[y + 1, x] - crop[y, x]) if y < 15 else 0
                right = np.abs(crop[y, x + 1] - crop[y, x]) if x < 15 else 0
                expected[:3, y // 2, x // 2] += (crop[y, x] - 0.5) / 0.25 / 4
                expected[3, y // 2, x // 2] += (np.max(down + right) - 0.1) / 0.1 / 4
        np.testing.assert_allclose(feature, expected.ravel(), atol=1e-4)
    renamed = tuple(dataclasses.replace(thing, shape="star", colour="red", size="small") for thing in scene.objects)
    other = scene_record(dataclasses.replace(scene, ground="sand", objects=renamed), image)
    assert (other.object_ids != record.object_ids).any()
    np.testing.assert_array_equal(other.features, record.features)


def test_plain_pixels_have_features_known_by_hand():
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 0), (10, 0, 20, 10))
    red, half = pool_pixels(image, np.array([[0, 0, 8, 8], [0, 0, 20, 10]])).reshape(2, 4, 8, 8)
    np.testing.assert_allclose(red[0], 2)
    np.testing.assert_allclose(red[1:3], -2)
    np.testing.assert_allclose(red[3], -1, atol=1e-6)
    np.testing.assert_allclose(half[0, :, :3], 2)
    np.testing.assert_allclose(half[0, :, 5:], -2)
    assert (half[3, :, 3:5].max(axis=1) > 0).all()


def test_the_tokenizer_knows_every_word_and_spells_others(tmp_path):
    tokenizer = scene_tokenizer()
    for split in scenes.SPLITS:
        for index in range(200):
            for caption in scene_captions(sample_scene(index, split)):
                tokens = tokenizer.tokenize(caption)
                assert tokens == re.findall(r"[a-z]+|,", caption)
    assert tokenizer.tokenize("Zebras") == ["z", "##e", "##b", "##r", "##a", "##s"]
    assert tokenizer.tokenize("a red heart") == ["a", "red", "heart"]
    assert len(tokenizer) < 300
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "two hoops, left of a zebra"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(loaded("a red ring").input_ids) == "[CLS] a red ring [SEP]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_scenes(tmp_path_factory.mktemp("world") / "scenes", 6, 2, 3, captions_per_image=4, seed=5)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_built_world_is_what_its_scenes_are(world):
    store = RegionStore(world / "regions")
    expected = [f"{split}-{i:05d}" for split, n in (("train", 6), ("val", 2), ("test", 3)) for i in range(n)]
    assert list(store) == expected
    assert store.provenance["detector"] == "scenes: drawing boxes"
    assert store.provenance["class_names"] == list(CLASS_NAMES)
    assert store.feature_dim == FEATURE_DIM
    for image_id in expected:
        photo = Image.open(world / "photos" / f"{image_id}.png")
        record, scene = store[image_id], sample_scene(int(image_id[-5:]), image_id[:-6], seed=5)
        # Features come from the saved photo: recompute them from its file.
        np.testing.assert_array_equal(record.features, pool_pixels(photo, record.boxes).astype(np.float16))
        np.testing.assert_array_equal(record.object_ids, scene_record(scene).object_ids)
        assert (record.image_width, record.image_height) == photo.size == (192, 144)
    rows = read_captions(world / "captions.jsonl")
    assert rows.column_names == ["image_id", "caption", "split"]
    assert Counter(rows["image_id"]) == dict.fromkeys(expected, 4)
    assert rows[4]["caption"] == scene_captions(sample_scene(1, "train", seed=5), 4)[0]
    assert set(read_captions(world / "captions.jsonl", split="test")["image_id"]) == set(expected[8:])


def test_building_twice_gives_the_same_bytes(world, tmp_path):
    again = build_scenes(tmp_path / "again", 6, 2, 3, captions_per_image=4, seed=5)
    assert contents(again) == contents(world)


def test_a_larger_world_begins_with_the_smaller(world, tmp_path):
    larger = build_scenes(tmp_path / "larger", 8, 2, 3, captions_per_image=4, seed=5)
    for name, photo in contents(world / "photos").items():
        assert (larger / "photos" / name).read_bytes() == photo


def test_a_finished_folder_is_kept_and_another_is_replaced(tmp_path, monkeypatch):
    folder = build_scenes(tmp_path / "scenes", 3, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "_write_world", None)  # not even called
        assert build_scenes(folder, 3, 1, 1) == folder
    build_scenes(folder, 4, 1, 1)
    assert len(RegionStore(folder / "regions")) == 6
    monkeypatch.setattr(scenes, "_WORLD", scenes._WORLD + 1)
    build_scenes(folder, 4, 1, 1)
    assert json.loads((folder / "scenes.json").read_text())["world"] == scenes._WORLD
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_build_leaves_nothing_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "scene_captions", interrupted_at("train-00002"))
        with pytest.raises(KeyboardInterrupt):
            build_scenes(tmp_path / "scenes", 4, 1, 1)
    assert list(tmp_path.iterdir()) == []
    folder = build_scenes(tmp_path / "scenes", 4, 1, 1)
    # A later interruption, while replacing, leaves the finished world as it was.
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "scene_captions", interrupted_at("train-00002"))
        with pytest.raises(KeyboardInterrupt):
            build_scenes(folder, 5, 1, 1)
    assert contents(folder) == before


def interrupted_at(image_id):
    def captions(scene, count):
        if scene.image_id == image_id:
            raise KeyboardInterrupt
        return scene_captions(scene, count)

    return captions


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no scenes"):
        build_scenes(tmp_path, 1, 1, 1)
    assert (tmp_path / "thesis.txt").read_text() == "mine"

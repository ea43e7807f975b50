"""Questions about rendered scenes: true answers, and nothing but the reference that tells them."""

import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLMultipleChoice,
    RegionStore,
    UnicoderVLFeatureExtractor,
    UnicoderVLProcessor as Processor,
)
from unicoder_vl_hf.scenes.questions import FORMS, build_vcr_scenes, sample_vcr_scene, scene_questions
from unicoder_vl_hf.scenes.world import SPLITS, pool_pixels, scene_tokenizer
from unicoder_vl_hf.tasks.vcr.data import VCRExamples, read_vcr

SCENES = [sample_vcr_scene(index) for index in range(150)]
QUESTIONS = [(scene, form, item) for scene in SCENES for form, item in zip(FORMS, scene_questions(scene), strict=True)]


def quarter(scene, index):
    """The quarter that holds the whole box: (left, top)."""
    x1, y1, x2, y2 = scene.objects[index].box
    return {(True, False): True, (False, True): False}[x2 < 96, x1 >= 96], {(True, False): True, (False, True): False}[
        y2 < 72, y1 >= 72
    ]


def says(choice):
    """The objects that a choice refers to, and its words."""
    references = [token for token in choice if not isinstance(token, str)]
    return references, " ".join(token for token in choice if isinstance(token, str))


def holds(scene, objects, words):
    """Whether what is said of the objects is true, whatever it is about."""
    colours = " and ".join(scene.objects[index].colour for index in objects)
    return words in (f"is {colours} .", f"{colours} .")


def test_a_scene_has_two_kinds_with_one_in_each_quarter_and_of_each_colour():
    for scene in SCENES:
        kinds = Counter(thing.shape for thing in scene.objects)
        assert sorted(kinds.values()) == [4, 4]
        for kind in kinds:
            alike = [index for index, thing in enumerate(scene.objects) if thing.shape == kind]
            assert len({quarter(scene, index) for index in alike}) == 4
            assert len({scene.objects[index].colour for index in alike}) == 4


def test_one_choice_is_true_and_each_would_be_of_another_reference():
    for scene, form, item in QUESTIONS:
        (asked,), words = says(item["question"])
        assert words == {"colour": "what colour is ?", "colours": "what colours are ?"}[form]
        others = [thing.shape != scene.objects[asked[0]].shape for thing in scene.objects]
        for name in ("answer", "rationale"):
            choices, label = item[f"{name}_choices"], item[f"{name}_label"]
            of_choices = [says(choice)[0] or [asked] for choice in choices]
            assert of_choices == [of_choices[0]] * 4  # all of the same objects
            ((*meant,),) = of_choices[0]
            assert meant == asked if name == "answer" else others[meant[0]]
            texts = [says(choice)[1] for choice in choices]
            assert [holds(scene, meant, text) for text in texts] == [index == label for index in range(4)]

            kind = scene.objects[meant[0]].shape
            alike = [index for index, thing in enumerate(scene.objects) if thing.shape == kind]
            possible = [[i] for i in alike] if len(meant) == 1 else [[i, j] for i in alike for j in alike if i < j]
            for text in texts:
                assert sum(holds(scene, objects, text) for objects in possible) == 1
    assert {form for _, form, _ in QUESTIONS} == set(FORMS)


def test_pairs_of_colours_share_each_object_twice():
    """Or the colour that stands in most of the choices would tell."""
    for _, form, item in QUESTIONS:
        if form == "colours":
            words = Counter(token for choice in item["answer_choices"] for token in choice if token not in ("and", "."))
            assert sorted(words.values()) == [2, 2, 2, 2]


def test_what_is_right_has_no_place_and_no_number():
    for values in (
        [item["answer_label"] for _, _, item in QUESTIONS],
        [item["rationale_label"] for _, _, item in QUESTIONS],
        [says(item["question"])[0][0][0] % 4 for _, form, item in QUESTIONS if form == "colour"],
    ):
        counts = np.bincount(values, minlength=4) / len(values)
        np.testing.assert_allclose(counts, 0.25, atol=4 * (0.1875 / len(values)) ** 0.5)


def test_no_scene_is_in_two_splits():
    shown = [
        {sample_vcr_scene(index, split, seed).objects for index in range(100)} for split in SPLITS for seed in range(2)
    ]
    assert len(set().union(*shown)) == 600


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'dev', expected one of"):
        sample_vcr_scene(0, "dev")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_vcr_scenes(tmp_path_factory.mktemp("vcr") / "world", 3, 2, 2, seed=7)


def test_the_files_are_vcrs_and_the_test_split_has_no_labels(world):
    rows = {split: read_vcr(world / f"{split}.jsonl", metadata_dir=world / "images") for split in SPLITS}
    assert {split: len(questions) for split, questions in rows.items()} == {"train": 6, "val": 4, "test": 4}
    assert set(rows["test"]["answer_label"]) == set(rows["test"]["rationale_label"]) == {-100}
    scene = sample_vcr_scene(1, "val", seed=7)
    for row, item in zip(rows["val"].select(range(2, 4)), scene_questions(scene), strict=True):
        assert row["image_id"] == "vcr-val-00001"
        assert {name: row[name] for name in item} == item
        assert row["objects"] == [thing.shape for thing in scene.objects]
        assert row["boxes"] == [list(thing.box) for thing in scene.objects]
        assert (row["image_width"], row["image_height"]) == (192, 144)
    store, photo = RegionStore(world / "regions"), Image.open(world / "images" / "vcr-val-00001.png")
    record = store["vcr-val-00001"]
    np.testing.assert_array_equal(record.features, pool_pixels(photo, record.boxes).astype(np.float16))
    assert len(store) == 7


def test_a_reference_leads_to_its_box_and_all_words_are_known(world):
    store = RegionStore(world / "regions")
    processor = Processor(UnicoderVLFeatureExtractor(), scene_tokenizer())
    rows = read_vcr(world / "train.jsonl", metadata_dir=world / "images", store=store)
    examples = VCRExamples(rows, "qar")
    batch = DataCollatorForUnicoderVLMultipleChoice(processor, store)([examples[index] for index in range(6)])
    for number, row in enumerate(rows):
        words = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][number, 0])
        assert not any(word == "[UNK]" or (len(word) == 1 and word.isalpha()) for word in words), words
        pointing = batch["token_region_ids"][number, 0].tolist()
        first = next(position for position, region in enumerate(pointing) if region >= 0)
        assert words[first] in row["objects"]
        (asked,), _ = says(row["question"])
        x1, y1, x2, y2 = row["boxes"][asked[0]]
        found = batch["region_locations"][number, pointing[first], :4]
        np.testing.assert_allclose(found, [x1 / 192, y1 / 144, x2 / 192, y2 / 144], atol=1e-6)


def test_a_finished_world_is_kept_and_built_alike_again(world, tmp_path):
    before = (world / "train.jsonl").stat().st_mtime_ns
    assert build_vcr_scenes(world, 3, 2, 2, seed=7) == world
    assert (world / "train.jsonl").stat().st_mtime_ns == before
    again = build_vcr_scenes(tmp_path / "again", 3, 2, 2, seed=7)
    files = [path.relative_to(world) for path in sorted(world.rglob("*")) if path.is_file()]
    assert all((again / name).read_bytes() == (world / name).read_bytes() for name in files)
    assert json.loads((world / "scenes.json").read_text())["scenes"] == {"train": 3, "val": 2, "test": 2}

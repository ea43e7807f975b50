"""What is read of VCR's files, what a model is shown of a question, and the tensors of it, exactly."""

import inspect
import json

import numpy as np
import pytest
import tiny
import torch
import vcr_miniature
from places import SHARED
from vcr_miniature import FEATURE_DIM, OBJECTS, STORE, VOCABULARY, detections

from unicoder_vl_hf import DataCollatorForUnicoderVLMultipleChoice, RegionRecord, UnicoderVLForMultipleChoice
from unicoder_vl_hf.tasks.vcr.data import (
    PERSON_NAMES,
    Token,
    VCRExamples,
    boxes_of_images,
    closest_regions,
    ground_truth_boxes,
    ground_truth_record,
    read_vcr,
    referenced_objects,
    truncate,
    words_of,
)

GD_VCR = SHARED / "data/vcr/gd_vcr_val_200.jsonl"
IMAGES = list(OBJECTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vcr_miniature.write(tmp_path_factory.mktemp("vcr"))


@pytest.fixture(scope="module")
def rows(folder):
    return read_vcr(folder / "val.jsonl", metadata_dir=folder, store=STORE)


@pytest.fixture(scope="module")
def test_rows(folder):
    return read_vcr(folder / "test.jsonl", metadata_dir=folder, store=STORE)


def row_of(image: str, **changes) -> dict:
    """The first question of an image, without its text."""
    return {
        "annot_id": "val-0",
        "image_id": image,
        "objects": [category for category, _ in OBJECTS[image]],
        "boxes": [box for _, box in OBJECTS[image]],
        "image_width": 100,
        "image_height": 50,
    } | changes


def collator(store=STORE, *, processor=None, **options):
    return DataCollatorForUnicoderVLMultipleChoice(processor or vcr_miniature.processor(), store, **options)


def spell(batch, row: int, choice: int) -> list[str]:
    """Each attended token of a choice, with `@region` where it refers to one."""
    tokens, regions, mask = (
        batch[name][row, choice].tolist() for name in ("input_ids", "token_region_ids", "attention_mask")
    )
    assert mask == sorted(mask, reverse=True)
    assert all(
        token == 0 and region == -1 for token, region, real in zip(tokens, regions, mask, strict=True) if not real
    )
    real = list(zip(tokens, regions, strict=True))[: sum(mask)]
    return [VOCABULARY[token] + (f"@{region}" if region >= 0 else "") for token, region in real]


# Reading


def test_a_row_holds_what_the_files_say(rows):
    assert len(rows) == 24
    assert rows[0] == {
        "annot_id": "val-0",
        "image_id": "kitchen",
        "img_fn": "film/kitchen.jpg",
        "metadata_fn": "film/kitchen.json",
        "objects": ["person", "person", "potted plant", "bottle"],
        "boxes": [[0, 0, 20, 40], [40, 0, 60, 40], [80, 20, 100, 50], [22, 30, 26, 40]],
        "image_width": 100,
        "image_height": 50,
        "question": ["why", "is", [0], "smiling", "?"],
        "answer_choices": [
            [[0], "likes", [1], "."],
            [[1], "is", "sad", "."],
            [[0, 1], "are", "old", "."],
            ["no", "one", "is", "here", "."],
        ],
        "rationale_choices": [
            [[1], "is", "by", [2], "."],
            [[0], "sees", [1], "."],
            [[3], "is", "empty", "."],
            ["it", "is", "cold", "."],
        ],
        "answer_label": 0,
        "rationale_label": 1,
    }
    assert rows[2]["question"] == ["where", "is", [1, 0, 2], "?"]  # the order is the file's
    assert len(rows[12]["objects"]) == len(rows[12]["boxes"]) == 31
    assert rows[6]["boxes"][0] == [-5, -3, 30, 40]  # as the file has it


def test_what_is_missing_is_none_or_minus_100(folder, rows, test_rows):
    assert (rows[9]["image_id"], rows[9]["image_width"], rows[9]["image_height"]) == ("nosize", None, None)
    assert test_rows["answer_label"] == test_rows["rationale_label"] == [-100] * 6
    assert read_vcr(folder / "val.jsonl")[0]["boxes"] is None
    assert read_vcr(folder / "val.jsonl", ids="path")[0]["image_id"] == "film/kitchen.jpg"


def test_rows_do_not_depend_on_the_order_of_the_file(folder, rows, tmp_path):
    lines = (folder / "val.jsonl").read_text().splitlines()
    (tmp_path / "val.jsonl").write_text("\n".join(lines[::-1]))
    assert list(read_vcr(tmp_path / "val.jsonl", metadata_dir=folder))[::-1] == list(rows)


@pytest.mark.skipif(not GD_VCR.exists(), reason="the shared data are not here")
def test_gd_vcr_is_read_whole():
    rows = read_vcr(GD_VCR)
    assert len(rows) == 200
    segments = [[row["question"], *row["answer_choices"], *row["rationale_choices"]] for row in rows]
    references = [token for row in segments for tokens in row for token in tokens if isinstance(token, list)]
    assert [sum(len(token) == count for token in references) for count in (1, 2, 3)] == [1291, 158, 32]
    assert max(map(len, rows["objects"])) == 31


ITEM = vcr_miniature.items(vcr_miniature.VALIDATION, "val")[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"annot_id": None}, "val.jsonl, line 2: annot_id is None, expected a text that is not empty."),
        ({"img_fn": ""}, "line 2, annot_id 'x': img_fn is '', expected a text that is not empty."),
        ({"metadata_fn": 3}, "line 2, annot_id 'x': metadata_fn is 3, expected a text"),
        ({"objects": "person"}, "line 2, annot_id 'x': objects is 'person', expected a list of category names."),
        ({"question": []}, "line 2, annot_id 'x': question is [], expected a list of tokens that is not empty."),
        ({"question": ["why", 3]}, "question[1] is 3, expected a text or a list of object indices."),
        ({"question": ["why", []]}, "question[1] is [], expected a text or a list of object indices."),
        ({"question": [[4]]}, "question[0] is [4], expected indices of the 4 objects, from 0."),
        ({"question": [[0, -1]]}, "question[0] is [0, -1], expected indices of the 4 objects"),
        ({"question": [[True]]}, "question[0] is [True], expected indices of the 4 objects"),
        ({"answer_choices": [["a"]] * 3}, "answer_choices is [['a'], ['a'], ['a']], expected a list of 4."),
        ({"rationale_choices": [["a"], ["b"], [[9]], ["c"]]}, "rationale_choices[2][0] is [9], expected indices"),
        ({"answer_label": 4}, "answer_label is 4, expected 0..3, or none as in the test split."),
        ({"rationale_label": "1"}, "rationale_label is '1', expected 0..3"),
        ({"annot_id": "val-0"}, "line 2: annot_id 'val-0' is that of line 1 too; expected one each."),
        ({"img_fn": "other/kitchen.png"}, "film/kitchen.jpg and other/kitchen.png both have the id 'kitchen'"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path, change, message):
    (tmp_path / "val.jsonl").write_text(json.dumps(ITEM) + "\n" + json.dumps(ITEM | {"annot_id": "x"} | change))
    with pytest.raises(ValueError) as error:
        read_vcr(tmp_path / "val.jsonl")
    assert message in str(error.value)


def test_other_faults_of_a_file(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps(ITEM)[:-9])
    with pytest.raises(ValueError, match=r"val.jsonl, line 1, column \d+: malformed json"):
        read_vcr(path)
    path.write_text("\n[]\n")
    with pytest.raises(ValueError, match=r"val.jsonl, line 2: the line is \[\], expected an object."):
        read_vcr(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_vcr(path)
    with pytest.raises(ValueError, match="ids is 'name', expected 'stem' or 'path'"):
        read_vcr(path, ids="name")
    path.write_text(json.dumps(ITEM))
    with pytest.raises(ValueError, match=r"the store lacks 1 of 1 images, such as \['kitchen'\]; it has \['plain'\]"):
        read_vcr(path, store={"plain": STORE["plain"]})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"boxes": [[0, 0, 1, 1]] * 3},
            "3 boxes of ['person', 'person', 'potted plant', 'bottle'], but annot_id 'val-0'",
        ),
        (
            {"names": ["person"] * 4},
            "but annot_id 'val-0' has 4 objects, ['person', 'person', 'potted plant', 'bottle']",
        ),
        ({"boxes": [[0, 0, 1, 1]] * 3 + [[5, 0, 1, 1]]}, "boxes[3] is [5.0, 0.0, 1.0, 1.0], expected x1 y1 x2 y2"),
        ({"boxes": [[0, 0, 1]] * 4}, "boxes[0] is [0.0, 0.0, 1.0], expected x1 y1 x2 y2"),
        ({"boxes": None}, "expected json with boxes [[x1, y1, x2, y2, score], …]"),
        ({"width": 0}, "width and height are [0, 50], expected pixels, or neither."),
    ],
)
def test_a_fault_of_metadata_is_named(folder, tmp_path, change, message):
    (tmp_path / "val.jsonl").write_text(json.dumps(ITEM))
    (tmp_path / "film").mkdir()
    path = tmp_path / "film/kitchen.json"
    with pytest.raises(
        FileNotFoundError,
        match=r"kitchen.json, the metadata of annot_id '[^']+', does not exist",
    ):
        read_vcr(tmp_path / "val.jsonl", metadata_dir=tmp_path)
    path.write_text(json.dumps(json.loads((folder / "film/kitchen.json").read_text()) | change))
    with pytest.raises(ValueError) as error:
        read_vcr(tmp_path / "val.jsonl", metadata_dir=tmp_path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


# Examples


def test_examples_of_both_tasks(rows):
    qa, qar = VCRExamples(rows, "qa"), VCRExamples(rows, "qar")
    assert len(qa) == len(qar) == 24
    question, answers, rationales = rows[1]["question"], rows[1]["answer_choices"], rows[1]["rationale_choices"]
    assert qa[1] == {
        **{name: rows[1][name] for name in ("annot_id", "image_id", "objects", "boxes", "image_width", "image_height")},
        "choices": [[question, answer] for answer in answers],
        "label": 3,
    }
    assert qar[1]["choices"] == [[question, [[3], "is", "a", "cup", "."], rationale] for rationale in rationales]
    assert qar[1]["label"] == 0


def test_every_answer_as_the_premise(rows, test_rows):
    examples = VCRExamples(rows, "qar", every_answer=True)
    assert len(examples) == 96
    assert [examples[i]["label"] for i in range(4, 8)] == [-100, -100, -100, 0]
    assert [examples[i]["choices"][2][1] for i in range(4, 8)] == rows[1]["answer_choices"]
    assert {examples[i]["annot_id"] for i in range(4, 8)} == {"val-1"}
    unlabelled = VCRExamples(test_rows, "qar", every_answer=True)
    assert len(unlabelled) == 24
    assert {example["label"] for example in unlabelled} == {-100}


def test_faults_of_examples(rows, test_rows):
    with pytest.raises(ValueError, match="annot_id 'test-0' has no answer_label"):
        VCRExamples(test_rows, "qar")
    with pytest.raises(ValueError, match="task is 'q2a', expected 'qa' or 'qar'"):
        VCRExamples(rows, "q2a")
    with pytest.raises(ValueError, match="every_answer is for task='qar'"):
        VCRExamples(rows, "qa", every_answer=True)


# Text


def test_names_are_distinct_and_chosen_by_the_original_index():
    assert len(set(PERSON_NAMES)) == len(PERSON_NAMES) == 14
    objects = ["cup", *["person"] * 30]
    words = words_of([[0, 15, 1], "left"], objects)
    assert words == [
        ("cup", 0, True),
        ("and", -1, True),
        ("Riley", 15, True),
        ("and", -1, True),
        ("Riley", 1, True),
        ("left", -1, False),
    ]
    assert referenced_objects([[["a", [3, 1]], [[2]]], [["b"]]]) == {1, 2, 3}


def parts_of(*texts: str) -> list[list[Token]]:
    """A token a letter; capitals are of references."""
    return [[Token(ord(letter), -1, letter.isupper()) for letter in text] for text in texts]


@pytest.mark.parametrize(
    "texts, max_tokens, left",
    [
        (("abc", "de"), 5, ("abc", "de")),
        (("abc", "de"), 4, ("ab", "de")),
        (("ab", "cd"), 3, ("ab", "c")),  # of equally long ones the later
        (("aBc", "d"), 2, ("B", "d")),  # the reference stays, what stands before it goes
        (("aBCD", "ef"), 4, ("BCD", "e")),  # the longest has nothing but references left
    ],
)
def test_truncation_takes_from_the_longest_part_and_keeps_references(texts, max_tokens, left):
    parts = parts_of(*texts)
    assert truncate(parts, max_tokens) == (texts != left)
    assert parts == parts_of(*left)


# Regions


@pytest.mark.parametrize(
    "image, features",
    [
        ("kitchen", [0, 1, 3, 4, 2, 5]),  # two on the plant: the better; the bottle meets the whole photo alone
        ("twins", [1, 1, 0]),  # one serves two and is not repeated
        ("edge", [1, 0, 1, 2]),  # nothing meets the cup: the best by score
        ("crowd", [*range(30, -1, -1), 31]),
        ("fractions", [1, 0, 2]),
        ("resized", [1, 0]),
        ("noscores", [1, 3, 0, 2]),  # two on the person: the earlier
        ("plain", [2, 1, 0, 3]),
    ],
)
def test_ground_truth_takes_the_detection_that_overlaps_most(image, features):
    record, region_of_object = ground_truth_record(row_of(image), STORE[image])
    count = len(OBJECTS[image])
    assert record.features.tolist() == [[value, value] for value in features]
    assert record.object_ids.tolist() == features
    if STORE[image].object_scores is not None:
        assert record.object_scores.tolist() == STORE[image].object_scores[features].tolist()
    assert region_of_object.tolist() == list(range(count))
    assert record.boxes[count:].tolist() == STORE[image].boxes[features[count:]].tolist()
    checked = RegionRecord(**record.to_dict())  # what was not checked holds
    assert (checked.image_id, checked.image_width) == (image, STORE[image].image_width)


def test_locations_are_those_of_the_ground_truth():
    locations = {
        "kitchen": [
            [0, 0, 0.2, 0.8, 0.16],
            [0.4, 0, 0.6, 0.8, 0.16],
            [0.8, 0.4, 1, 1, 0.12],
            [0.22, 0.6, 0.26, 0.8, 0.008],
        ],
        "edge": [[0, 0, 0.3, 0.8, 0.24], [0.9, 0.8, 1, 1, 0.02], [1, 0, 1, 0.4, 0]],  # cut at the border
        "fractions": [[0.5, 0, 1, 1, 0.5], [0, 0, 0.5, 0.5, 0.25]],
        "resized": [[0, 0, 0.5, 1, 0.5], [0.5, 0, 1, 1, 0.5]],
    }
    for image, expected in locations.items():
        record, _ = ground_truth_record(row_of(image), STORE[image])
        np.testing.assert_allclose(record.locations()[: len(expected)], expected, atol=1e-6)
    assert ground_truth_boxes(row_of("resized"), STORE["resized"]).tolist() == [[0, 0, 100, 100], [100, 0, 200, 100]]
    unsized = row_of("nosize", image_width=None, image_height=None)
    assert ground_truth_boxes(unsized, STORE["nosize"]).tolist() == [[0, 0, 50, 50], [50, 0, 100, 50]]


def test_boxes_to_extract_features_in(rows):
    boxes = boxes_of_images(rows)
    assert list(boxes) == IMAGES[:8]
    assert boxes["edge"].tolist() == [[0, 0, 30, 40], [90, 40, 100, 50], [100, 0, 100, 20]]
    assert boxes["nosize"].tolist() == [[0, 0, 50, 50], [50, 0, 100, 50]]
    assert boxes["edge"].dtype == np.float32


def test_ious_and_their_ties():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 20, 10]])
    record = detections("x", [[0, 0, 10, 10], [0, 0, 20, 10], [0, 0, 20, 10], [0, 0, 10, 10]], [0.1, 0.2, 0.4, 0.1])
    rows, ious = closest_regions(boxes, record)
    assert (rows.tolist(), ious.tolist()) == ([0, 2], [1, 1])  # score, then the earlier row
    rows, ious = closest_regions(boxes[:1], detections("x", [[0, 0, 20, 20], [5, 0, 15, 10]], [0.9, 0.1]))
    assert (rows.tolist(), ious.tolist()) == ([1], [50 / 150])


def test_the_best_of_the_other_detections_follow_in_record_order():
    row = row_of("alone", objects=["person"], boxes=[[0, 0, 10, 10]])
    boxes = [[0, 0, 10, 10], *[[50, 0, 60, 10]] * 4]
    record, _ = ground_truth_record(row, detections("alone", boxes, [0.9, 0.3, 0.5, 0.2, 0.5]), 3)
    assert record.object_ids.tolist() == [0, 2, 4]
    record, _ = ground_truth_record(row, detections("alone", boxes, None), 3)
    assert record.object_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "max_regions, kept", [(32, [*range(31)]), (31, [*range(31)]), (4, [0, 1, 2, 16]), (3, [0, 2, 16]), (1, [2, 16])]
)
def test_a_cut_loses_no_referenced_object(max_regions, kept):
    record, region_of_object = ground_truth_record(row_of("crowd"), STORE["crowd"], max_regions, referenced=[16, 2])
    assert record.object_ids.tolist() == [30 - index for index in kept] + [31] * (max_regions == 32)
    assert record.boxes[: len(kept)].tolist() == [OBJECTS["crowd"][index][1] for index in kept]
    assert region_of_object.tolist() == [kept.index(index) if index in kept else -1 for index in range(31)]


def given(image: str, count: int, **changes) -> RegionRecord:
    return RegionRecord(
        image,
        **{
            "image_width": 100,
            "image_height": 50,
            "boxes": np.array([[10.0 * i, 0, 10 * i + 10, 10] for i in range(count)]),
            "features": np.full((count, FEATURE_DIM), 100) + np.arange(count)[:, None],
        }
        | changes,
    )


def test_features_of_the_ground_truth_itself():
    row = row_of("plain", boxes=None)  # they are in the store
    record, region_of_object = ground_truth_record(row, STORE["plain"], 5, given=given("plain", 3))
    assert record.features[:, 0].tolist() == [100, 101, 102, 0, 1]  # every detection may follow, the best do
    assert record.boxes[:3].tolist() == [[0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10]]
    assert record.object_ids is None  # one of both has none
    assert region_of_object.tolist() == [0, 1, 2]
    record, _ = ground_truth_record(row_of("fractions"), STORE["fractions"], given=given("fractions", 2))
    np.testing.assert_allclose(record.boxes[:2], [[0, 0, 0.1, 0.2], [0.1, 0, 0.2, 0.2]], atol=1e-6)


def test_faults_of_regions():
    kitchen = STORE["kitchen"]
    with pytest.raises(
        ValueError, match=r"annot_id 'val-0', image 'kitchen': boxes is None, .*--metadata.*--gt_features"
    ):
        ground_truth_record(row_of("kitchen", boxes=None), kitchen)
    with pytest.raises(
        ValueError, match="image 'fractions': neither the metadata nor the store knows width and height"
    ):
        ground_truth_record(row_of("fractions", image_width=None, image_height=None), STORE["fractions"])
    bare = RegionRecord("kitchen", features=kitchen.features)
    with pytest.raises(ValueError, match="Image 'kitchen': boxes is None"):
        ground_truth_record(row_of("kitchen"), bare)
    with pytest.raises(
        ValueError, match=r"'plain': .* have 2 rows, boxes, expected a row and a box for each of 3 objects"
    ):
        ground_truth_record(row_of("plain"), STORE["plain"], given=given("plain", 2))
    with pytest.raises(ValueError, match=r"'plain': .* have 3 rows, no boxes"):
        ground_truth_record(row_of("plain"), STORE["plain"], given=given("plain", 3, boxes=None))
    with pytest.raises(ValueError, match=r"width 2 and boxes, the ground truth features of width 3"):
        ground_truth_record(row_of("plain"), STORE["plain"], given=given("plain", 3, features=np.ones((3, 3))))


# Collating


def test_the_tensors_of_a_batch(rows):
    qa = VCRExamples(rows, "qa")
    batch = collator()([qa[0], qa[3]])
    expected = {
        "input_ids": (2, 4, 14),
        "token_type_ids": (2, 4, 14),
        "attention_mask": (2, 4, 14),
        "token_region_ids": (2, 4, 14),
        "region_features": (2, 6, FEATURE_DIM),
        "region_locations": (2, 6, 5),
        "region_attention_mask": (2, 6),
        "labels": (2,),
    }
    assert {name: tuple(value.shape) for name, value in batch.items()} == expected
    start = "[CLS] why is casey@0 smiling ? ;"
    assert [" ".join(spell(batch, 0, choice)) for choice in range(4)] == [
        f"{start} casey@0 likes riley@1 . [SEP]",
        f"{start} riley@1 is sad . [SEP]",
        f"{start} casey@0 and riley@1 are old . [SEP]",
        f"{start} no one is here . [SEP]",
    ]
    assert " ".join(spell(batch, 1, 0)) == "[CLS] who is riley@1 ? ; a brother of casey@0 . [SEP]"
    assert batch["token_region_ids"][0, 2].tolist() == [-1, -1, -1, 0, -1, -1, -1, 0, -1, 1, -1, -1, -1, -1]
    assert batch["token_type_ids"].unique().tolist() == [0]
    assert batch["region_features"][:, :, 0].tolist() == [[0, 1, 3, 4, 2, 5], [1, 1, 0, 0, 0, 0]]
    assert batch["region_attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    torch.testing.assert_close(batch["region_locations"][1, 1], torch.tensor([0.12, 0.2, 0.32, 1, 0.16]))
    assert batch["labels"].tolist() == [0, 0]
    assert {value.dtype for name, value in batch.items() if "id" in name or "label" in name} == {torch.int64}


def test_every_wordpiece_of_a_reference_points_at_its_region(rows):
    batch = collator()([VCRExamples(rows, "qar")[2]])
    assert " ".join(spell(batch, 0, 3)) == (
        "[CLS] where is riley@1 and casey@0 and pot@2 ##ted@2 plant@2 ? ; there . ; bottle@3 is empty . [SEP]"
    )
    assert batch["labels"].tolist() == [3]


def test_names_collide_and_regions_do_not(rows):
    batch = collator()([VCRExamples(rows, "qa")[12]])
    assert " ".join(spell(batch, 0, 2)) == ("[CLS] who sees casey@14 ? ; casey@0 and casey@14 and casey@28 do . [SEP]")
    assert " ".join(spell(batch, 0, 3)) == "[CLS] who sees casey@14 ? ; tie@30 does . [SEP]"


def test_a_cut_remaps_references_and_leaves_names(rows):
    batch = collator(max_regions=3)([VCRExamples(rows, "qa")[14]])
    assert " ".join(spell(batch, 0, 3)) == "[CLS] where is jes@1 ##sie@1 ? ; jes@2 ##sie@2 left . [SEP]"
    assert batch["region_features"][0, :, 0].tolist() == [30, 28, 14]


def test_unlabelled_examples_without_references(test_rows):
    batch = collator()([VCRExamples(test_rows, "qar", every_answer=True)[1]])
    assert " ".join(spell(batch, 0, 2)) == "[CLS] is it cold ? ; no . ; it is here . [SEP]"
    assert batch["token_region_ids"].unique().tolist() == [-1]
    assert batch["labels"].tolist() == [-100]


def test_the_feature_extractor_selects_detections_and_never_ground_truth(rows):
    example = VCRExamples(rows, "qa")[0]
    best_two = collator(processor=vcr_miniature.processor(max_regions=2))
    for _ in range(2):  # the second time as the first
        assert best_two([example])["region_features"][0, :, 0].tolist() == [0, 1, 0, 0]  # plant and bottle meet neither
    # Above the threshold is 0 alone, 1 is there as min_regions, and serves a person, who stays; the mean is subtracted.
    options = {"score_threshold": 0.85, "min_regions": 2, "feature_mean": [1, 1]}
    batch = collator(processor=vcr_miniature.processor(**options))([example])
    assert batch["region_features"][0, :, 0].tolist() == [-1, 0, -1, -1]


def test_given_features_replace_those_of_detections(rows):
    batch = collator(gt_features={"twins": given("twins", 2)})([VCRExamples(rows, "qa")[3]])
    assert batch["region_features"][0, :, 0].tolist() == [100, 101, 0, 1]


def test_truncated_text_keeps_its_references(rows):
    example = VCRExamples(rows, "qa")[2]
    batch = collator(max_length=12)([example])
    assert " ".join(spell(batch, 0, 2)) == "[CLS] riley@1 and casey@0 and pot@2 ##ted@2 plant@2 ; by bottle@3 [SEP]"
    assert " ".join(spell(batch, 0, 0)) == "[CLS] riley@1 and casey@0 and pot@2 ##ted@2 plant@2 ; here . [SEP]"
    with pytest.raises(
        ValueError, match=r"annot_id 'val-2': its references alone have 8 tokens, expected at most 7: raise"
    ):
        collator(max_length=10)([example])


def test_what_is_cut_and_what_meets_nothing_is_counted(rows):
    qa = VCRExamples(rows, "qa")
    assert [collator(max_length=length).count_truncated([qa[0], qa[3]]) for length in (11, 12, 13, 14)] == [5, 2, 1, 0]
    assert collator().count_low_ious(qa) == (2, 48)  # the bottle and the cup outside, each once
    row = row_of("alone", objects=["person"], boxes=[[0, 0, 10, 10]])
    for height, low in ((10, 0), (10.5, 1)):  # an IoU of exactly 0.1 is not under it
        store = {"alone": detections("alone", [[0, 0, 100, height]], None)}
        assert collator(store).count_low_ious([row]) == (low, 1)


def test_no_row_depends_on_its_batch(rows):
    examples = [*VCRExamples(rows, "qa")]
    whole = collator()(examples)
    for index, example in enumerate(examples):
        alone = collator()([example])
        for name, value in alone.items():
            part = whole[name][index]
            assert torch.equal(value[0], part[tuple(slice(size) for size in value[0].shape)]), name


def test_a_model_takes_a_batch(rows):
    torch.manual_seed(0)
    config = tiny.config(vocab_size=len(VOCABULARY), region_feature_dim=FEATURE_DIM)
    model = UnicoderVLForMultipleChoice(config).eval()
    qa = VCRExamples(rows, "qa")
    batch = collator()([qa[0], qa[12]])
    assert set(batch) <= set(inspect.signature(model.forward).parameters)
    outputs = model(**batch)
    assert outputs.logits.shape == (2, 4)
    assert outputs.loss.isfinite()
    elsewhere = batch | {"token_region_ids": torch.where(batch["token_region_ids"] >= 0, 3, -1)}
    assert (model(**elsewhere).logits - outputs.logits).abs().max() > 1e-3
    alone = model(**collator()([qa[0]]))
    torch.testing.assert_close(alone.logits[0], outputs.logits[0], rtol=1e-4, atol=1e-5)

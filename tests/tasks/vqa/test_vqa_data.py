"""The files of VQA, OK-VQA and GQA, their faults, the answers that are chosen among, and the collator's tensors."""

import json

import numpy as np
import pytest
import tiny
import torch
import vqa_miniature

from unicoder_vl_hf.tasks.vqa import AnswerVocabulary, DataCollatorForUnicoderVLQuestionAnswering, read_questions
from unicoder_vl_hf.tasks.vqa.metrics import answer_accuracy


@pytest.fixture
def folder(tmp_path):
    return vqa_miniature.write(tmp_path)


def read(folder):
    return read_questions(folder / "questions.json", folder / "annotations.json")


def test_vqa(folder):
    rows = read(folder)
    assert rows["question_id"] == [str(name) for name in vqa_miniature.GIVEN]
    assert rows[1] == {
        "question_id": "458752001",
        "image_id": "458752",
        "question": "Question 458752001?",
        "layout": "vqa",
        "question_type": "what",
        "answer_type": "other",
        "answer": "pitcher",
        "answers": vqa_miniature.GIVEN[458752001],
    }


def test_ok_vqa_counts_the_answers_and_not_the_raw_ones(folder):
    rows = read_questions(folder / "questions.json", folder / "ok_annotations.json")
    assert rows.to_dict() == read(folder).to_dict()


def test_a_test_split_has_no_answers(folder):
    rows = read_questions(folder / "questions.json")
    assert rows["answers"] == [[]] * 5 and rows["answer"] == [None] * 5 and rows["question_type"] == [None] * 5
    assert read_questions(folder / "gqa_test.json")["answers"] == [[], []]


def test_gqa(folder):
    rows = read_questions(folder / "gqa.json")
    assert rows["question_id"] == ["201307251", "201640614"] and rows["image_id"] == ["2354786", "n161313"]
    assert rows["answers"] == [["yes"], ["the woman"]] and rows["answer_type"] == ["binary", "open"]
    assert rows["question_type"] == ["verify", "query"] and set(rows["layout"]) == {"gqa"}


def test_images_get_other_ids_by_a_rule(folder):
    (folder / "ids.csv").write_text("source_id,image_id\n458752,a\n262146,b\n393226,c\n")
    rows = read_questions(folder / "questions.json", ids=str(folder / "ids.csv"))
    assert rows["image_id"] == ["a", "a", "a", "b", "c"]


def changed(content, *path, to):
    """The content with one value changed, or, with `to=None`, taken out."""
    *path, last = path
    at = content
    for step in path:
        at = at[step]
    if to is None:
        del at[last]
    else:
        at[last] = to
    return content


QUESTIONS, ANNOTATIONS, GQA = vqa_miniature.vqa_questions, vqa_miniature.vqa_annotations, vqa_miniature.gqa_questions


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("questions", [], r"questions.json holds a list at its top; expected VQA's json of questions, or GQA's"),
        ("questions", {"annotations": []}, r"holds the keys \['annotations'\] at its top"),
        ("questions", {"questions": []}, "holds no question"),
        ("questions", changed(QUESTIONS(), "questions", 2, "question", to=" "), r"questions\[2\]: question is ' '"),
        ("questions", changed(QUESTIONS(), "questions", 2, "image_id", to=None), r"questions\[2\]: image_id is None"),
        ("questions", changed(QUESTIONS(), "questions", 2, "question_id", to=1.5), r"\[2\]: question_id is 1.5"),
        ("questions", changed(QUESTIONS(), "questions", 0, "question_id", to=458752001), "458752001 stands twice"),
        ("questions", changed(QUESTIONS(), "questions", 1, to=None), "question_id 458752001 is not, or no more, among"),
        ("annotations", QUESTIONS(), "annotations.json has no list of annotations at its top"),
        ("annotations", changed(ANNOTATIONS(), "annotations", 1, to=None), "has no answer to 1 of the questions of"),
        (
            "annotations",
            changed(ANNOTATIONS(), "annotations", 0, "image_id", to=7),
            r"\[0\]: image_id is 7, but 393226",
        ),
        ("annotations", changed(ANNOTATIONS(), "annotations", 0, "answers", to=[]), r"\[0\]: answers are \[\]"),
        (
            "annotations",
            changed(ANNOTATIONS(), "annotations", 0, "answers", 3, "answer", to=4),
            r"annotations\[0\].answers\[3\]: answer is 4, expected a text",
        ),
        (
            "annotations",
            {"annotations": ANNOTATIONS()["annotations"] + ANNOTATIONS()["annotations"][:1]},
            r"annotations\[5\]: question_id 393226000 is not, or no more",
        ),
    ],
)
def test_faults_name_file_and_field(folder, name, content, message):
    (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (changed(GQA(), "201307251", "question", to=""), r"gqa.json, '201307251': question is ''"),
        (changed(GQA(), "201307251", "answer", to=["yes"]), r"answer is \['yes'\], expected a text"),
    ],
)
def test_faults_of_gqa(folder, content, message):
    (folder / "gqa.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_questions(folder / "gqa.json")


def test_gqa_takes_no_annotations(folder):
    with pytest.raises(ValueError, match=r"gqa.json is GQA's, which has its answers in it: leave out"):
        read_questions(folder / "gqa.json", folder / "annotations.json")


# Answers


def rows_of(*answers):
    return {"answer": [given[0] for given in answers], "answers": [list(given) for given in answers]}


def test_frequent_answers_in_the_spelling_of_the_evaluation_those_of_more_questions_first():
    cats, twos = (["The cat"] * 9 + ["dog"], ["cat."] * 9 + ["dog"]), (["two"] * 9 + ["3"], ["2"] * 10)
    rows = rows_of(*cats * 2, *twos * 3, ["rare"] * 10)
    assert AnswerVocabulary.build(rows, 2).answers == ["2", "cat"]
    assert AnswerVocabulary.build(rows, 1).answers == ["2", "cat", "rare"]
    unanimous = rows_of(["The cat"] * 10, ["mcdonald's"] * 10)  # which no other spelling would meet
    vocabulary = AnswerVocabulary.build(unanimous, 1)
    assert vocabulary.answers == ["The cat", "mcdonald's"]
    assert [vocabulary.targets(given) for given in unanimous["answers"]] == [{0: 1.0}, {1: 1.0}]
    with pytest.raises(ValueError, match="There are 0 answers"):
        AnswerVocabulary.build(rows)  # nine of each are needed


def test_gqas_answers_stay_as_they_are():
    assert AnswerVocabulary.build(rows_of(["the woman"], ["woman"], ["woman"]), 1).answers == ["woman", "the woman"]


def test_targets_are_the_accuracies_of_all_answers():
    vocabulary = AnswerVocabulary(["2", "two", "catcher", "pitcher", "yes", "no", "black white", "black/white", "net"])
    for given in vqa_miniature.GIVEN.values():
        accuracies = [answer_accuracy(answer, given) for answer in vocabulary.answers]
        found = vocabulary.targets(given)
        np.testing.assert_allclose([found.get(label, 0) for label in range(9)], accuracies)
        assert all(found.values())
    assert vocabulary.targets(["two"]) == {1: 1.0} and vocabulary.targets(["three"]) == {}


@pytest.mark.parametrize("answers", [["yes"], ["yes", "no", "yes"]])
def test_too_few_answers_or_one_twice_are_refused(answers):
    with pytest.raises(ValueError, match="expected at least two, each once"):
        AnswerVocabulary(answers)


# Tensors


def test_a_batch_has_an_image_once_and_soft_labels(folder):
    rows, store = read(folder), {name: tiny.record(name) for name in ("458752", "262146", "393226")}
    vocabulary = AnswerVocabulary(["pitcher", "catcher", "yes"])
    collator = DataCollatorForUnicoderVLQuestionAnswering(tiny.processor(), store, vocabulary)
    batch = collator([rows[3], rows[1], rows[0]])
    assert batch["image_index"].tolist() == [0, 1, 1] and len(batch["region_features"]) == 2
    np.testing.assert_array_equal(batch["region_features"][1], store["458752"].features)
    expected = [[0, 0, 1], [1, 0.9, 0], [0, 0, 0]]
    torch.testing.assert_close(batch["labels"], torch.tensor(expected))


def test_visualberts_head_needs_a_mask_token_before_the_end(folder):
    rows, store = read(folder), {name: tiny.record(name) for name in ("458752", "262146", "393226")}
    processor = tiny.processor()
    collator = DataCollatorForUnicoderVLQuestionAnswering(
        processor, store, AnswerVocabulary(["yes", "no"]), with_mask_token=True
    )
    batch = collator([rows[0], rows[3]])
    lengths = batch["attention_mask"].sum(1)
    last_but_one = batch["input_ids"][torch.arange(2), lengths - 2]
    assert last_but_one.tolist() == [processor.tokenizer.mask_token_id] * 2


def test_rows_that_lack_something_are_refused():
    collator = DataCollatorForUnicoderVLQuestionAnswering(tiny.processor(), {}, AnswerVocabulary(["yes", "no"]))
    with pytest.raises(ValueError, match=r"no image_id, answers\. Train on the rows of read_questions"):
        collator([{"question": "why?"}])

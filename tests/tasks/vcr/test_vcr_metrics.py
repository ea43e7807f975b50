"""Accuracies by hand, the submission's columns, and a broken file for each thing that its check must find."""

import numpy as np
import pytest
import vcr_miniature

from unicoder_vl_hf.cli import main
from unicoder_vl_hf.tasks.vcr.metrics import HEADER, check_submission, choice_metrics, vcr_metrics, write_submission

ANNOT_IDS = [f"test-{index}" for index in range(6)]
# Questions: both right, answer alone, rationale alone, none; a tie with the right answer, and one of two wrong ones.
ANSWERS = [[9, 1, 2, 3], [1, 9, 2, 3], [1, 9, 2, 3], [1, 2, 3, 9], [5, 5, 1, 2], [1, 1, 5, 2]]
RATIONALES = [[1, 2, 9, 3], [9, 1, 2, 3], [1, 2, 3, 9], [9, 1, 2, 3], [9, 1, 2, 3], [1, 1, 1, 2]]
ANSWER_LABELS, RATIONALE_LABELS = [0, 1, 0, 0, 0, 2], [2, 1, 3, 1, 0, 3]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    return vcr_miniature.write(tmp_path_factory.mktemp("vcr")) / "test.jsonl"


@pytest.fixture
def submission(tmp_path):
    """One that is right: an answer's rationales have 0.1, 0.2, 0.3 and 0.4, turned by the answer."""
    answers = np.tile([0.4, 0.3, 0.2, 0.1], (6, 1))
    rationales = np.stack([np.roll([0.1, 0.2, 0.3, 0.4], answer) for answer in range(4)])
    write_submission(tmp_path / "test.csv", ANNOT_IDS, answers, np.tile(rationales, (6, 1, 1)))
    return tmp_path / "test.csv"


def test_accuracies_by_hand():
    expected = {"answer_accuracy": 3 / 6, "rationale_accuracy": 4 / 6, "joint_accuracy": 2 / 6}
    expected |= {"answer_ties": 1, "rationale_ties": 0}
    assert vcr_metrics(ANSWERS, RATIONALES, ANSWER_LABELS, RATIONALE_LABELS) == expected


def test_a_tie_is_counted_where_it_costs_the_question():
    """One at the top, alone or among three; below the top, or among wrong choices, it changes nothing."""
    scores = [[5, 5, 1, 2], [5, 5, 5, 2], [5, 5, 9, 2], [9, 5, 5, 2], [0, 0, 0, 0]]
    assert choice_metrics("answer", scores, [0, 2, 0, 0, 3]) == {"answer_accuracy": 1 / 5, "answer_ties": 3}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"answer_labels": [0, 1, 0, 0, 0, -100]},
            r"answer_labels\[5\] is -100, expected a choice, 0..3: the test split",
        ),
        ({"answer_labels": [0, 1]}, r"answer_scores have shape \(6, 4\) and answer_labels \(2,\); expected"),
        ({"rationale_scores": [[0.1, 0.2, 0.3, np.nan]] * 6}, r"rationale_scores\[0\] hold NaN"),
        ({"answer_scores": ANSWERS[:2], "answer_labels": [0, 1]}, "2 questions have answers, 6 rationales"),
    ],
)
def test_metrics_say_what_is_wrong(change, message):
    arguments = {
        "answer_scores": ANSWERS,
        "rationale_scores": RATIONALES,
        "answer_labels": ANSWER_LABELS,
        "rationale_labels": RATIONALE_LABELS,
    }
    with pytest.raises(ValueError, match=message):
        vcr_metrics(**arguments | change)


def test_the_submission_has_the_columns_of_the_leaderboard(submission, annotations):
    header, first, *others = submission.read_text().splitlines()
    assert header == (
        "annot_id,answer_0,answer_1,answer_2,answer_3,"
        "rationale_conditioned_on_a0_0,rationale_conditioned_on_a0_1,rationale_conditioned_on_a0_2,"
        "rationale_conditioned_on_a0_3,rationale_conditioned_on_a1_0,rationale_conditioned_on_a1_1,"
        "rationale_conditioned_on_a1_2,rationale_conditioned_on_a1_3,rationale_conditioned_on_a2_0,"
        "rationale_conditioned_on_a2_1,rationale_conditioned_on_a2_2,rationale_conditioned_on_a2_3,"
        "rationale_conditioned_on_a3_0,rationale_conditioned_on_a3_1,rationale_conditioned_on_a3_2,"
        "rationale_conditioned_on_a3_3"
    )
    assert first == "test-0,0.4,0.3,0.2,0.1,0.1,0.2,0.3,0.4,0.4,0.1,0.2,0.3,0.3,0.4,0.1,0.2,0.2,0.3,0.4,0.1"
    assert [line.split(",")[0] for line in others] == ANNOT_IDS[1:]
    assert list(check_submission(submission, annotations)) == []


def test_a_submission_that_is_wrong_is_not_written(tmp_path):
    answers, rationales = np.full((2, 4), 0.25), np.full((2, 4, 4), 0.25)
    (tmp_path / "test.csv").write_text("before")
    wrong = rationales.copy()
    wrong[1, 2, 3] = 0.3
    for arguments, message in (
        (
            (["a", "b"], answers, wrong),
            r"annot_id 'b': rationale_conditioned_on_a2_0..3 sum to 1.05, expected 1 within",
        ),
        (
            (["a", "b"], answers * np.nan, rationales),
            "annot_id 'a': answer_0..3 hold nan, expected probabilities in 0..1",
        ),
        ((["a", "a"], answers, rationales), "annot_id 'a' stands twice"),
        (
            (["a", "b"], answers, rationales[:, 0]),
            r"have shapes \(2, 4\) and \(2, 4\), expected \(2, 4\) and \(2, 4, 4\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            write_submission(tmp_path / "test.csv", *arguments)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("test.csv", "before")]


def cell(column: str, value: str):
    """Changes a cell of line 3, which is that of test-1."""

    def change(lines: list[str]) -> list[str]:
        cells = lines[2].split(",")
        cells[HEADER.index(column)] = value
        return [*lines[:2], ",".join(cells), *lines[3:]]

    return change


HALF = "line 3, annot_id 'test-1': {} sum to {}, expected 1 within 0.001."


@pytest.mark.parametrize(
    "change, problems",
    [
        (
            lambda lines: ["annot_id,x," + lines[0].split(",", 2)[2], *lines[1:]],
            ["line 1: the header lacks 'answer_0' and holds 'x'; expected annot_id, answer_0, … rationale_conditi"],
        ),
        (
            lambda lines: [lines[0].replace("answer_0,answer_1", "answer_1,answer_0"), *lines[1:]],
            ["line 1: the header has its columns in another order, or twice; expected annot_id, answer_0, … ration"],
        ),
        (lambda lines: [], ["line 1: the header lacks 'annot_id', 'answer_0', 'answer_1', … (21 in all); expected "]),
        (lambda lines: lines[:-1], ["annot_id 'test-5' is missing."]),
        (
            lambda lines: lines[:1],
            [*(f"annot_id 'test-{number}' is missing." for number in range(5)), "1 more are missing, of 6."],
        ),
        (
            lambda lines: [*lines, lines[1].replace("test-0", "val-0")],
            ["line 8, annot_id 'val-0': not among the 6 of "],
        ),
        (lambda lines: [*lines, lines[1]], ["line 8, annot_id 'test-0': stands in line 2 too."]),
        (
            lambda lines: [*lines[:2], lines[1], *lines[3:]],
            ["line 3, annot_id 'test-0': stands in line 2 too.", "annot_id 'test-1' is missing."],
        ),
        (
            lambda lines: [*lines[:2], lines[2] + ",0", *lines[3:]],
            ["line 3, annot_id 'test-1': 22 cells, expected 21."],
        ),
        (lambda lines: [*lines, ""], ["line 8, annot_id '': not among", "line 8, annot_id '': 1 cells, expected 21."]),
        (cell("answer_1", "nan"), ["line 3, annot_id 'test-1': answer_0..3 hold nan, expected probabilities in 0..1."]),
        (cell("answer_1", "-0.3"), ["line 3, annot_id 'test-1': answer_0..3 hold -0.3, expected probabilities"]),
        (cell("answer_1", ""), ["line 3, annot_id 'test-1': answer_1 is '', expected a number."]),
        (cell("answer_0", "0.402"), [HALF.format("answer_0..3", "1.002")]),
        (cell("rationale_conditioned_on_a0_0", "0"), [HALF.format("rationale_conditioned_on_a0_0..3", "0.9")]),
        (cell("rationale_conditioned_on_a1_0", "0"), [HALF.format("rationale_conditioned_on_a1_0..3", "0.6")]),
        (cell("rationale_conditioned_on_a2_0", "0"), [HALF.format("rationale_conditioned_on_a2_0..3", "0.7")]),
        (cell("rationale_conditioned_on_a3_3", "0"), [HALF.format("rationale_conditioned_on_a3_0..3", "0.9")]),
        (cell("answer_0", "0.4009"), []),  # within the tolerance
        (lambda lines: [lines[0], *lines[:0:-1]], []),  # in any order
    ],
)
def test_each_fault_of_a_submission_is_found(submission, annotations, change, problems, capsys):
    submission.write_text("".join(f"{line}\n" for line in change(submission.read_text().splitlines())))
    found = list(check_submission(submission, annotations))
    assert len(found) == len(problems)
    assert all(each.startswith(problem) for each, problem in zip(found, problems, strict=True)), found
    assert main(["vcr-check", str(submission), "--annotations", str(annotations)]) == bool(problems)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == found


def test_a_file_that_is_no_submission(tmp_path, annotations, capsys):
    (tmp_path / "test.csv").write_bytes(b"\xff\xfe\x00")
    assert main(["vcr-check", str(tmp_path / "test.csv"), "--annotations", str(annotations)]) == 1
    assert "test.csv, after line 0: no CSV in UTF-8 (" in capsys.readouterr().err
    assert main(["vcr-check", str(tmp_path / "none.csv"), "--annotations", str(annotations)]) == 1
    assert "none.csv" in capsys.readouterr().err

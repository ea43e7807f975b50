"""The official accuracy: its own rules by hand, and a loop that follows its text."""

import itertools
import random

import pytest
import vqa_miniature

from unicoder_vl_hf.tasks.vqa.metrics import answer_accuracy, compared_answers, normalise_answer, vqa_metrics

# By https://visualqa.org/evaluation.html: letters become small, periods and articles go, numbers are digits, words get
# their apostrophe, other marks but these and colons become a blank, but for those within numbers and beside blanks.
SPELLINGS = {
    "The two Dogs.": "2 dogs",
    "dont": "don't",
    "none": "0",
    "ten": "10",
    "eleven": "eleven",
    "a": "",
    "1,000": "1000",
    "1.5": "1.5",
    "u.s.a.": "usa",
    "black/white": "black white",
    "black / white": "black  white".replace("  ", " "),
    "what's up": "what's up",
    "mcdonald's": "mcdonald's",
    "yes!": "yes",
    "t-shirt": "t shirt",
    "it is 5:30": "it is 5:30",
    "couldn'tve": "couldn't've",
    "yall'll": "y'all'll",
    "red,\nblue": "red blue",
    "\tan apple\n": "apple",
    "Youre": "you're",
}


@pytest.mark.parametrize("answer", SPELLINGS)
def test_the_spelling_of_the_official_evaluation(answer):
    assert normalise_answer(answer) == SPELLINGS[answer]


def slow_accuracy(answer, given):
    """The text of the evaluation: min(matches / 3, 1), averaged over all ten sets of nine annotators."""
    accuracies = []
    for others in itertools.combinations(given, len(given) - 1):
        matches = sum(other == answer for other in others)
        accuracies.append(min(matches / 3, 1))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_accuracy_of_an_answer_that_some_of_ten_gave(matches, accuracy):
    given = ["yes"] * matches + ["no"] * (10 - matches)
    assert answer_accuracy("yes", given) == pytest.approx(accuracy) == pytest.approx(slow_accuracy("yes", given))


def test_a_loop_over_all_sets_of_annotators_agrees():
    random.seed(0)
    for _ in range(300):
        given = random.choices(["red", "blue", "a cat.", "2", "dark red"], k=random.choice([2, 3, 10]))
        answer = random.choice(["red", "Blue", "cat", "two", "dark red", "green"])
        expected = slow_accuracy(*compared_answers([answer], given), compared_answers(given, given))
        assert answer_accuracy(answer, given) == pytest.approx(expected)


def test_answers_are_spelled_alike_only_where_annotators_differ():
    for answer, unanimous in (("black/white", 1), ("Black white", 0), ("black white.", 0)):
        assert answer_accuracy(answer, ["black/white"] * 10) == unanimous
        assert answer_accuracy(answer, ["black/white"] * 9 + ["grey"]) == 1
    assert answer_accuracy("dog", ["a dog"] * 8 + ["cat"] * 2) == 1
    assert answer_accuracy("2", ["two"] * 8 + ["2"] * 2) == 1
    assert answer_accuracy("can't tell", ["can't tell\n"] * 10) == 1


def test_a_single_answer_has_to_be_met_exactly_as_in_gqa():
    assert answer_accuracy("the woman", ["the woman"]) == 1
    assert answer_accuracy("woman", ["the woman"]) == 0


def test_metrics_by_type_are_means_of_their_questions():
    given, types = list(vqa_miniature.GIVEN.values()), [name for _, name in vqa_miniature.TYPES.values()]
    answers = ["net", "catcher", "2", "no", "black white"]
    by_hand = [1, 0.9, 1, 0.3, 1]
    assert [answer_accuracy(*pair) for pair in zip(answers, given, strict=True)] == pytest.approx(by_hand)
    found = vqa_metrics(answers, given, types)
    assert found == pytest.approx(
        {
            "accuracy": sum(by_hand) / 5,
            "number_accuracy": 1,
            "other_accuracy": (1 + 0.9 + 1) / 3,
            "yes/no_accuracy": 0.3,
        }
    )
    assert vqa_metrics(answers, given, [None] * 5) == pytest.approx({"accuracy": sum(by_hand) / 5})


@pytest.mark.parametrize(
    "answers, given, types, message",
    [
        ([], [], None, "expected as many of each, at least one"),
        (["yes"], [["yes"], ["no"]], None, "expected as many"),
        (["yes"], [["yes"]], [], "expected as many"),
        (["yes", "no"], [["yes"], []], None, r"given\[1\] is empty"),
    ],
)
def test_what_cannot_be_measured_is_refused(answers, given, types, message):
    with pytest.raises(ValueError, match=message):
        vqa_metrics(answers, given, types)

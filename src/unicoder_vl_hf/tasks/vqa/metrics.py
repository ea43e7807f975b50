"""The accuracy of answers, as the official evaluations of VQA and GQA measure it. Pure Python, no model and no files.

Annotators agree on few answers, so that VQA's is soft: the mean, over all of the ten annotators but one, of min(1,
matches / 3). Where they differ, texts are brought to one spelling before, by `vqaEval.py` of GT-Vision-Lab/VQA as it is
since 2020 (earlier ones took other marks out). GQA has one answer, which has to be met exactly.
"""

import re
from collections.abc import Iterable, Sequence

# Words that lack one of their apostrophes get it back.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
        "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
        "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
        "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
        "you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've "
        "somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've "
        "y'all'll you'd've"
    ).split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the official evaluation has it
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes, colons and others stay
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalise_answer(answer: str) -> str:
    """
    Brings an answer to the spelling in which VQA's official evaluation compares it: without marks and articles, in
    lower case, numbers up to ten as digits.

    Example:

    ```python
    >>> normalise_answer("The two dogs.")
    '2 dogs'
    ```
    """
    words = _without_marks(_on_one_line(answer)).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def compared_answers(answers: Sequence[str], given: Sequence[str]) -> list[str]:
    """
    Brings answers to the spelling in which they are compared with those of annotators: that of [`normalise_answer`]
    where the annotators differ, else as they are.
    """
    spelled = _on_one_line if of_one_mind(given) else normalise_answer
    return [spelled(answer) for answer in answers]


def of_one_mind(given: Sequence[str]) -> bool:
    """Tells whether annotators gave one and the same answer, down to its marks."""
    return len(set(map(_on_one_line, given))) == 1


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    """Takes out marks beside a blank, and all marks of a text with digits like 1,000; others become a blank."""
    found = text
    for mark in _MARKS:
        goes = f"{mark} " in text or f" {mark}" in text or _GROUPED_DIGITS.search(text)
        found = found.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", found, count=32)  # of which the official evaluation takes out so many


def agreement(matches: int, annotators: int) -> float:
    """Gives the accuracy, in `[0, 1]`, of an answer that so many of the annotators gave."""
    if annotators == 1:
        return float(matches)
    of_others = matches * min(1, (matches - 1) / 3) + (annotators - matches) * min(1, matches / 3)
    return of_others / annotators


def answer_accuracy(answer: str, given: Sequence[str]) -> float:
    """
    Measures an answer, in `[0, 1]`: VQA's accuracy where several annotators answered, GQA's where one did.

    Args:
        answer (`str`): The answer of a model.
        given (sequence of `str`): The answers of the annotators, at least one.

    Example:

    ```python
    >>> answer_accuracy("Two.", ["2"] * 3 + ["3"] * 7)
    0.9
    ```
    """
    spelled, *others = compared_answers([answer, *given], given)
    return agreement(others.count(spelled), len(given))


def vqa_metrics(
    answers: Sequence[str], given: Sequence[Sequence[str]], types: Sequence[str | None] | None = None
) -> dict[str, float]:
    """
    Averages [`answer_accuracy`] over questions.

    Args:
        answers (sequence of `str`): The answer of a model to each question.
        given (sequence of sequences of `str`): The answers of the annotators.
        types (sequence of `str`, *optional*): The type of each question or answer, such as VQA's `"yes/no"`.

    Returns:
        `dict` of `accuracy`, in `[0, 1]`, and for each type of `{type}_accuracy`.

    Raises:
        `ValueError`: there is no question, a question without an answer of an annotator, or the lengths differ.
    """
    if not answers or len(answers) != len(given) or (types is not None and len(types) != len(answers)):
        counts = (len(answers), len(given), None if types is None else len(types))
        raise ValueError(f"There are {counts} answers, questions and types; expected as many of each, at least one.")
    for number, some in enumerate(given):
        if not some:
            raise ValueError(f"given[{number}] is empty: a question without an annotator's answer cannot be measured.")
    accuracies = [answer_accuracy(answer, some) for answer, some in zip(answers, given, strict=True)]
    found = {"accuracy": _mean(accuracies)}
    for name in sorted({name for name in types or () if name}):
        of_type = [accuracy for accuracy, of in zip(accuracies, types or (), strict=True) if of == name]
        found[f"{name}_accuracy"] = _mean(of_type)
    return found


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)

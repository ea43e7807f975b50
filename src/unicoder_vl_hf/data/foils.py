"""
Foils: true captions beside false ones that differ in a word, as FOIL-COCO and VALSE have them, in a file of a JSON
object a line.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike

from ..files import new_file
from ..name_lists import numbered_lines


@dataclass(frozen=True)
class Foil:
    """
    A true caption of an image, and a false one that differs from it in a word or phrase.

    Args:
        image_id (`str`): The image.
        split (`str`): The split of the image.
        caption, foil (`str`): The true and the false caption.
        word, foil_word (`str`): What differs.
        kind (`str`): The kind of the word, such as `animal` or `colour`; the two words are of one kind.
        text_only (`list[float]`, *optional*): By how much each of several scorers that see no image prefers the
            caption (above 0) or the foil (below 0); they were not used to choose the pair.
    """

    image_id: str
    split: str
    caption: str
    foil: str
    word: str
    foil_word: str
    kind: str
    text_only: list[float] = field(default_factory=list)

    def __post_init__(self):
        if self.caption == self.foil:
            raise ValueError(
                f"image {self.image_id!r}: caption and foil are both {self.caption!r}, expected two texts."
            )


def put_word(text: str, start: int, end: int, word: str) -> str:
    """Puts a word in the place of the characters `start` to `end`, and gives it the article that it takes."""
    before, was = text[:start], text[start:end]
    if was[0].isupper() and not re.search(r"\w", before):
        word = word[0].upper() + word[1:]
    article = "n" if word[0].lower() in "aeiou" else ""
    return re.sub(r"\b([Aa])n?( +)$", rf"\g<1>{article}\g<2>", before) + word + text[end:]


def write_foils(path: str | PathLike[str], foils: Iterable[Foil]) -> None:
    """Writes foils to a new file, a JSON object a line. Raises ValueError if the file exists."""
    with new_file(path) as file:
        for foil in foils:
            file.write(json.dumps(dataclasses.asdict(foil), ensure_ascii=False).encode() + b"\n")


def read_foils(path: str | PathLike[str]) -> list[Foil]:
    """
    Reads a file of [`write_foils`].

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a line is no JSON object of the fields of [`Foil`], naming the line; or there is none.
    """
    foils, names = [], [field.name for field in dataclasses.fields(Foil)]
    for number, line in numbered_lines(path):
        try:
            foils.append(Foil(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object of {', '.join(names)} ({error})."
            ) from error
    if not foils:
        raise ValueError(f"{path} holds no foil: make some with `unicoder-vl foil`.")
    return foils

"""Names: text files that hold one a line, of classes, image ids, groups or photos; unknown ones, and what was meant."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from itertools import islice, takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from . import logging

logger = logging.get_logger(__name__)

# An error looks for the name that was meant among this many, which takes a fraction of a second.
NAMES_LOOKED_AT = 100_000


def numbered_lines(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """
    Yields the lines of a text file that are not blank, each with its number from 1 and without its line end. A
    byte-order mark is left out.

    Raises:
        ValueError: The file is not UTF-8.
    """
    with Path(path).open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error


def not_utf8(path: str | PathLike[str], error: UnicodeDecodeError) -> ValueError:
    """Makes the error of a file that is not UTF-8."""
    return ValueError(
        f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#x}); convert the file to UTF-8."
    )


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """
    Yields the values of a file of one JSON a line, each with the number of its line.

    Raises:
        ValueError: The file is not UTF-8, or a line is not JSON; the message names the line and the column.
    """
    for number, line in numbered_lines(path):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, column {error.colno}: malformed json ({error.msg}); expected an object. Is it "
                "complete?"
            ) from error


def read_json(path: str | PathLike[str]) -> Any:
    """
    Reads a json file; a byte-order mark is left out.

    Raises:
        ValueError: The file is not UTF-8, or not JSON, where the message names the line and the column; or an object
            has a key twice, of which one value would be lost.
    """

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
            raise ValueError(f"{path}: an object has the key {twice!r} twice; expected each key once.")
        return found

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=as_object)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: malformed json ({error.msg}). Is it complete?"
        ) from error


def read_names(path: str | PathLike[str]) -> list[str]:
    """
    Reads a list of one name a line. A byte-order mark, blanks behind a name and empty lines are left out. A warning
    tells of empty lines between names, because they do not count where a name is known by its line.

    Raises:
        ValueError: The file is not UTF-8.
    """
    lines = [(number, line.rstrip()) for number, line in numbered_lines(path)]
    if lines and (empty := lines[-1][0] - lines[0][0] + 1 - len(lines)):
        logger.warning(f"{path}: {empty} empty line(s) between names are left out and not counted.")
    return [line for _, line in lines]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """
    Asks, for the end of an error that names an unknown name, whether one of the known names was meant.

    That is one of the same number, where either is nothing but a number, as COCO's `285` is `000000000285`; else one
    that is spelled nearly so, with equal digits: another number is another thing.

    Args:
        name (`str`): The name that is unknown.
        names (iterable of `str`): The known names, of which the first `NAMES_LOOKED_AT` are looked at.

    Returns:
        `str`: The question, after a blank; empty where none is near.
    """
    known = list(islice(names, NAMES_LOOKED_AT))
    number = _number_at_end(name)
    near = [
        each
        for each in known
        if number is not None and _number_at_end(each) == number and (name.isdecimal() or each.isdecimal())
    ]
    digits = re.findall(r"\d", name)
    near = near or get_close_matches(
        name, [each for each in known if re.findall(r"\d", each) == digits], n=1, cutoff=0.7
    )
    return f" Did you mean {near[0]!r}?" if near else ""


def check_model_name(name: str | PathLike[str]) -> None:
    """
    Checks that a model may be found by its name, without asking the Hub.

    Raises:
        ValueError: There is no such folder or file, and the name is none of a repository of the Hub, or its first part
            is a folder here; the message asks whether the one that lies beside was meant.
    """
    path = Path(name)
    may_be_of_hub = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)) is not None
    if path.exists() or (may_be_of_hub and (len(path.parts) == 1 or not path.parent.is_dir())):
        return
    while not path.parent.is_dir():
        path = path.parent
    folder = path.parent.absolute() if len(path.parts) == 1 else path.parent
    raise ValueError(
        f"There is no {name}: {folder} holds no {path.name!r}."
        f"{did_you_mean(path.name, (each.name for each in path.parent.iterdir()))}"
        + (f" A repository of the Hub is not sought where {folder} is a folder." if may_be_of_hub else "")
    )


def hub_options(name: str | PathLike[str]) -> dict[str, Any]:
    """
    Gives the arguments by which `from_pretrained` looks for a model where it can be found: without the Hub where that
    does not answer, whose own client would ask six times, for half a minute.

    Raises:
        ValueError: See [`check_model_name`].
    """
    check_model_name(name)
    if Path(name).exists():
        return {}
    from huggingface_hub import constants, get_session, hf_hub_url

    try:  # any answer will do
        get_session().head(hf_hub_url(str(name), "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of a library that versions of huggingface_hub have different ones of
        return {"local_files_only": True}
    return {}


def unknown_option(words: Iterable[str], options: Collection[str]) -> str | None:
    """
    Looks for an option that a command does not have. Argparse would first miss what the misspelt one was to give.

    Args:
        words (iterable of `str`): The command line.
        options (collection of `str`): The options of the command, with their dashes.

    Returns:
        `str`: The fault of the first unknown option, in words, and the one that was meant; None where all are known.
    """
    for word in takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if name.startswith("--") and " " not in name and name not in options:
            return f"there is no option {name}.{did_you_mean(name, options)}"
    return None


def _number_at_end(name: str) -> str | None:
    """Gives the number that a name ends in, without leading zeros; a suffix of a file does not count."""
    found = re.search(r"(\d+)(\.[A-Za-z]\w*)?$", name)
    return None if found is None else found[1].lstrip("0")

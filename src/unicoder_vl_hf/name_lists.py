"""Text files that hold one name a line: classes, image ids, groups, photos."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from . import logging

logger = logging.get_logger(__name__)


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
            raise ValueError(
                f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#x}); convert the file to "
                "UTF-8."
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

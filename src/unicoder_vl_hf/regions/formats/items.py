"""
Images of a foreign file before they are decoded: the place of each, its id, and the function that makes its record.
"""

from collections.abc import Callable
from typing import NamedTuple

from ...records_unicoder_vl import RegionRecord


class Item(NamedTuple):
    """
    An image of a file. It must be decoded before the next one is asked for.

    Args:
        file (`str`): Path of the file.
        where (`str`): The place in it, such as `line 3` or `key 'a.npz'`; empty where the file is the image.
        image_id (`str`): Id of the image as the source has it; bytes that are no text are escaped.
        load (`Callable[[], RegionRecord]`): Makes the record. Raises ValueError where the image is broken.
    """

    file: str
    where: str
    image_id: str
    load: Callable[[], RegionRecord]

    @property
    def place(self) -> str:
        """The file and the place in it, as errors name them."""
        return f"{self.file}, {self.where}" if self.where else self.file

    def record(self) -> RegionRecord:
        """Makes the record. Raises ValueError, naming the place, where the image is broken."""
        try:
            return self.load()
        except ValueError as error:
            raise ValueError(self.explain(error)) from error

    def explain(self, error: ValueError) -> str:
        """
        Says what is wrong with the image, after its place; the place is left out where the error begins with the file
        itself.
        """
        return str(error) if str(error).startswith(self.file) else f"{self.place}: {error}"


def broken(file: str, image_id: str, error: Exception, where: str = "") -> Item:
    """Makes an image that cannot be decoded, which stands for the content of a damaged file, or of a part of it."""

    def load() -> RegionRecord:
        raise ValueError(str(error)) from error

    return Item(file, where, image_id, load)


def text_id(data: bytes) -> str:
    """
    Gives the id for the bytes of a key. Bytes that are no UTF-8 are escaped; `check_text` refuses them when the image
    is decoded.
    """
    return data.decode(errors="backslashreplace")


def check_text(data: bytes) -> None:
    """Raises ValueError where the bytes of an id are no UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the image_id {data[:80]!r} is no UTF-8 ({error.reason}).") from None

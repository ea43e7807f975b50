"""Images of a foreign file before they are decoded: where each lies, its id, and how its record is made."""

from collections.abc import Callable
from typing import NamedTuple

from ...records_unicoder_vl import RegionRecord


class Item(NamedTuple):
    """
    One image of a file. It is to be decoded before the next one is asked for.

    Args:
        file (`str`): Path of the file.
        where (`str`): The place in it, such as `line 3` or `key 'a.npz'`; empty where the file is the image.
        image_id (`str`): Id of the image as the source has it; of bytes that are no text, their escapes.
        load (`Callable[[], RegionRecord]`): Makes the record. Raises ValueError where the image is broken.
    """

    file: str
    where: str
    image_id: str
    load: Callable[[], RegionRecord]

    @property
    def place(self) -> str:
        """File and place, as errors name them."""
        return f"{self.file}, {self.where}" if self.where else self.file

    def record(self) -> RegionRecord:
        """Makes the record. Raises ValueError, after the place, where the image is broken."""
        try:
            return self.load()
        except ValueError as error:
            raise ValueError(self.explain(error)) from error

    def explain(self, error: ValueError) -> str:
        """What is wrong with the image, after the place, where the error does not begin with the file itself."""
        return str(error) if str(error).startswith(self.file) else f"{self.place}: {error}"


def broken(file: str, image_id: str, error: Exception, where: str = "") -> Item:
    """Stands for what a damaged file, or a part of it, would hold: an image that cannot be decoded."""

    def load() -> RegionRecord:
        raise ValueError(str(error)) from error

    return Item(file, where, image_id, load)


def text_id(data: bytes) -> str:
    """The id that bytes are. What is no UTF-8 is escaped; `check_text` refuses it where the image is decoded."""
    return data.decode(errors="backslashreplace")


def check_text(data: bytes) -> None:
    """Raises ValueError where an id is no UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the image_id {data[:80]!r} is no UTF-8 ({error.reason}).") from None

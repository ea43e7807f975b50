"""
Reads requests: sentences and images, in the JSON that rerankers share. A string is never taken for the name of a file:
it is a sentence, the id of an image of the store, or a photo in a data URI.
"""

import base64
import binascii
import hashlib
import reprlib
import urllib.request
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException as ProtocolError
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from fastapi import HTTPException
from pydantic import AliasChoices, BaseModel, Field, model_validator

if TYPE_CHECKING:
    from PIL.Image import Image

# Kinds of photos that are opened, whatever a data URI says: Pillow knows others that are programs.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
URL_SECONDS = 10


@dataclass(frozen=True)
class Limits:
    """
    The most that a server takes.

    Args:
        max_waiting (`int`, *optional*, defaults to 64): Requests that are computed or wait; further ones get 429.
        max_bytes (`int`, *optional*, defaults to 32 MiB): Bytes of a request, and of a photo of a URL.
        max_pixels (`int`, *optional*, defaults to 50 million): Pixels of a photo.
        max_documents (`int`, *optional*, defaults to 1000): Documents of a request.
        photo_hosts (sequence of `str`, *optional*): Hosts of which photos are fetched, as they stand in a URL. None by
            default, so that nobody makes the server ask others.

    Raises:
        `ValueError`: a number is below 1.
    """

    max_waiting: int = 64
    max_bytes: int = 32 << 20
    max_pixels: int = 50_000_000
    max_documents: int = 1000
    photo_hosts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "photo_hosts" and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1.")


class Item(BaseModel):
    """A sentence or an image, said to be one."""

    text: str | None = None
    image: str | None = Field(None, description="data URI of a photo, or id of an image of the store")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("give either text or image")
        return self


class RerankRequest(BaseModel):
    """A request of `/v1/rerank`. Other fields are passed over, as other servers do."""

    model: str | None = None
    query: str | Item
    documents: list[str | Item] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class ScoreRequest(BaseModel):
    """A request of `/v1/score`: one query and several documents, or as many of each, which are paired."""

    model: str | None = None
    queries: str | Item | list[str | Item] = Field(validation_alias=AliasChoices("queries", "text_1"))
    documents: str | Item | list[str | Item] = Field(validation_alias=AliasChoices("documents", "text_2"))


def content(given: str | Item, plain_is_image: bool) -> tuple[str, bool]:
    """Gives the string of an item, and whether it is an image, which a plain one is if told so, or a data URI."""
    if isinstance(given, str):
        return given, plain_is_image or given.startswith("data:")
    return (given.text, False) if given.text is not None else (str(given.image), True)


@dataclass(frozen=True)
class Photo:
    """A photo that came with a request, and its place there. Photos of the same bytes are equal."""

    digest: str
    data: bytes = field(compare=False, repr=False)
    name: str = field(compare=False)

    def open(self) -> "Image":
        """Opens the photo, whose pixels are decoded later. Raises what Pillow raises where it is none."""
        from PIL import Image

        opened = Image.open(BytesIO(self.data), formats=PHOTO_FORMATS)
        opened.filename = self.name
        return opened


class Reader:
    """
    Makes pairs of what requests hold, and refuses what cannot be scored, or is too much, with the status of HTTP.

    Args:
        store (container of `str`): The ids of images that requests may name.
        limits ([`Limits`]): The most that is read.
    """

    def __init__(self, store: Container[str], limits: Limits):
        self.store = store
        self.limits = limits

    def pairs(self, queries: list[str | Item], documents: list[str | Item]) -> list[tuple[str, str | Photo]]:
        """
        Pairs one query with every document, or each query with its document. Raises HTTPException.

        A plain string is a photo if it is a data URI. Any other is a sentence as a query, and as a document the
        contrary of its query: an image id where the query is a sentence, a sentence where it is an image.
        """
        if len(documents) > self.limits.max_documents:
            raise HTTPException(413, f"{len(documents):,} documents; at most {self.limits.max_documents:,} are taken.")
        if not documents or len(queries) not in (1, len(documents)):
            raise HTTPException(422, f"{len(queries)} queries, {len(documents)} documents: give one query, or as many.")
        names = [f"queries[{place}]" for place in range(len(queries))] if len(queries) > 1 else ["query"]
        read = [self._read(query, name, False) for query, name in zip(queries, names, strict=True)]
        pairs = []
        for place, document in enumerate(documents):
            query, of_image = read[place if len(read) > 1 else 0]
            name = f"documents[{place}]"
            found, is_image = self._read(document, name, not of_image)
            if is_image == of_image:
                kind, other = ("an image", "a sentence") if is_image else ("a sentence", "an image")
                raise HTTPException(422, f"{name} is {kind}, and so is its query: expected {other}.")
            pairs.append((found, query) if of_image else (query, found))
        return pairs  # type: ignore[return-value]  # the first of each is a sentence

    def _read(self, given: str | Item, name: str, plain_is_image: bool) -> tuple[str | Photo, bool]:
        """Reads an item, and tells whether it is an image."""
        value, is_image = content(given, plain_is_image)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise HTTPException(422, f"{name} is no text of Unicode: {error.reason}.") from error
        if is_image:
            return self._image(value, name), True
        if not value or value.isspace():
            raise HTTPException(422, f"{name} is {value!r}: a sentence needs at least one word.")
        return value, False

    def _image(self, value: str, name: str) -> str | Photo:
        if value.startswith("data:"):
            header, _, encoded = value.partition(",")
            try:
                data = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError):
                data = b""
            if not data or not header.endswith(";base64"):
                raise HTTPException(422, f"{name} is no data URI of the form data:image/jpeg;base64,…")
            return self._photo(data, name)
        if value in self.store:
            return value
        if value.startswith(("http://", "https://")):
            return self._photo(self._fetch(value, name), name)
        raise HTTPException(
            422,
            f"{name} is {reprlib.repr(value)}, neither the id of an image of the store nor the data URI of a photo.",
        )

    def _photo(self, data: bytes, name: str) -> Photo:
        from PIL.Image import DecompressionBombError

        photo = Photo(hashlib.sha256(data).hexdigest(), data, name)
        try:
            width, height = photo.open().size
        except DecompressionBombError as error:
            raise HTTPException(413, f"{name}: {error}") from error
        except Exception as error:  # of any kind, where a file is damaged
            raise HTTPException(422, f"{name} is no photo: expected {', '.join(PHOTO_FORMATS)}.") from error
        if width * height > self.limits.max_pixels:
            raise HTTPException(
                413, f"{name} has {width} x {height} pixels; at most {self.limits.max_pixels:,} are taken."
            )
        return photo

    def _fetch(self, url: str, name: str) -> bytes:
        try:
            host = urlsplit(url).netloc
        except ValueError as error:
            raise HTTPException(422, f"{name} is {reprlib.repr(url)}, which is no URL: {error}") from error
        if host not in self.limits.photo_hosts:
            raise HTTPException(422, f"{name} is a URL, and this server fetches no photos of {host}: send a data URI.")
        try:
            with _without_redirects.open(url, timeout=URL_SECONDS) as response:
                data = response.read(self.limits.max_bytes + 1)
        except (OSError, ValueError, ProtocolError) as error:
            raise HTTPException(422, f"{name}: {host} does not give it: {error}") from error
        if len(data) > self.limits.max_bytes:
            raise HTTPException(413, f"{name} has more than {self.limits.max_bytes:,} bytes.")
        return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which might lead to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_without_redirects = urllib.request.build_opener(_NoRedirect)

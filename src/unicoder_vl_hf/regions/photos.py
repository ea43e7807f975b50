"""
Photos by id: which files of a folder, a .tar, a list or a dataset are photos, what their ids are, and how one is
decoded. A listing names the files that it leaves out, with the reasons.
"""

import math
import os
import re
import tarfile
import uuid
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

import numpy as np

from ..name_lists import read_names
from .conversion import Rename, UnmappedId
from .remote import RemotePath

if TYPE_CHECKING:
    import datasets
    from PIL import Image

SUFFIXES = frozenset(".avif .bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
ARCHIVES = frozenset(".7z .bz2 .gz .rar .tgz .xz .zip .zst".split())
# Suffixes that a stem leaves out, those of features too: such files are named after photos.
STEM_SUFFIXES = SUFFIXES | {".npy", ".npz"}
PHOTO_IDS = ("stem", "path", "key")
HIDDEN = "hidden: a name begins with a point"
# Pillow refuses files that claim more than about 179 million pixels. Photos of 500 million exist; a small file may
# claim still more.
MAX_PIXELS = 500_000_000
# Photos of four times as many pixels are halved in width and height, and so on: detectors scale them down anyway.
ENOUGH_PIXELS = 8_000_000

AnyPath = Path | RemotePath


def stem(name: str) -> str:
    """
    Gives the name of a file without its folders, written with `/` or with a backslash, and without the suffix of a
    photo or of a file of features. Whatever else follows a point is part of the name, such as the time codes of VCR.
    """
    name = re.split(r"[/\\]", name)[-1] or name
    base, _, suffix = name.rpartition(".")
    return base if base and f".{suffix.lower()}" in STEM_SUFFIXES else name


class LeftOut(NamedTuple):
    """A file that a listing leaves out, and the reason."""

    file: str
    reason: str


class PhotoSource(Protocol):
    """Photos by index, and the files that their listing left out."""

    ids: list[str]
    left_out: list[LeftOut]

    def name(self, index: int) -> str:
        """Names a photo in the form that a user finds it by: its path, or its row."""
        ...

    def read(self, index: int) -> bytes:
        """Reads the bytes of a photo's file."""
        ...

    def only(self, indices: Sequence[int]) -> Self:
        """Gives the same with some of the photos alone, small enough to be sent to another process."""
        ...


@dataclass(kw_only=True)
class _Listing:
    """Photos by their ids and places, which each kind of listing has of its own, and the files that it left out."""

    ids: list[str] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def only(self, indices: Sequence[int]) -> Self:
        ids, places = ([values[index] for index in indices] for values in (self.ids, self.places))
        return replace(self, ids=ids, places=places, left_out=[])


class _Files(_Listing):
    """
    Photos in files and in members of .tar files: the place of each is a path, a member (empty for a file), and the
    beginning and the length of its bytes in the file.
    """

    def name(self, index: int) -> str:
        path, member, _, _ = self.places[index]
        return f"{path}:{member}" if member else str(path)

    def read(self, index: int) -> bytes:
        path, _, offset, length = self.places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(None if length < 0 else length)


@dataclass(kw_only=True)
class _Column(_Listing):
    """Photos in a column of encoded images: the place of each is its row."""

    images: "datasets.Dataset"
    column: str

    def name(self, index: int) -> str:
        row = self.places[index]
        return (self.images[row][self.column] or {}).get("path") or f"row {row}"

    def read(self, index: int) -> bytes:
        return _bytes_of(self.images[self.places[index]][self.column])


@dataclass(kw_only=True)
class _Tables(_Listing):
    """
    Photos in a column of .parquet files: the place of each is a file, a row group, the first row of that, and its own
    row.
    """

    column: str
    listing: str = field(default_factory=lambda: uuid.uuid4().hex)  # by which a process knows what it has read

    def name(self, index: int) -> str:
        path, _, _, row = self.places[index]
        return f"{path}: row {row}"

    def read(self, index: int) -> bytes:
        path, group, first, row = self.places[index]
        image = _row_group(self.listing, path, group, self.column)[row - first].as_py()
        return image if isinstance(image, bytes) else _bytes_of(image)


def _bytes_of(image: dict[str, Any]) -> bytes:
    """Gives the file of a photo as `datasets.Image` stores it: its bytes, or where it lies."""
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


@lru_cache(maxsize=1)
def _row_group(listing: str, path: AnyPath, group: int, column: str) -> Any:
    """Reads the photos of a row group. The next one that a process is asked for is often of the same."""
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        return ParquetFile(file).read_row_group(group, columns=[column]).column(column)


def list_photos(
    photos: "str | PathLike | datasets.Dataset",
    *,
    ids: str = "stem",
    rename: Rename | None = None,
    skip_unmapped: bool = False,
    image_column: str = "image",
    id_column: str = "image_id",
    split: str | None = None,
) -> PhotoSource:
    """
    Lists the photos of a folder, a .tar, a .txt that names files, or a dataset on disk or in memory; see
    `extraction.extract`.

    Args:
        photos (`str`, `os.PathLike` or `datasets.Dataset`): See `extraction.extract`.
        ids (`str`, defaults to `"stem"`): Rule by which photos get their ids, one of `PHOTO_IDS`.
        rename (`Rename`, *optional*): Rule that gives the id instead, from the path, the file's name or its stem,
            whichever of them the rule knows; in a dataset, from `id_column`.
        skip_unmapped (`bool`, defaults to `False`): Whether to leave out photos that `rename` does not cover.
        image_column, id_column (`str`): Columns of a dataset that hold the photos and their ids.
        split (`str`, *optional*): Split to take from a dataset that has several.

    Raises:
        FileNotFoundError: There is nothing at `photos`.
        ValueError: There is no photo, a list names a file that is not there, two photos have one id, or `rename` gives
            one no id or several.
    """
    if ids not in PHOTO_IDS:
        raise ValueError(f"ids is {ids!r}, expected one of {', '.join(map(repr, PHOTO_IDS))}.")
    naming = _Naming(ids, rename, skip_unmapped)
    source: PhotoSource
    if not isinstance(photos, (str, PathLike)):
        source = _column(photos, image_column, id_column, naming)
    elif "://" in str(photos):
        source = _list_files(RemotePath.of(str(photos)), image_column, id_column, naming)
    elif not (path := Path(photos)).exists():
        raise FileNotFoundError(f"{path} does not exist.")
    elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        source = _column(_open_dataset(path, split), image_column, id_column, naming)
    else:
        source = _list_files(path, image_column, id_column, naming)
    if not source.ids:
        raise ValueError(
            f"{photos} holds no photo: expected files that end in {', '.join(sorted(SUFFIXES))}. {in_words(source)}"
        )
    first: dict[str, int] = {}
    for index, image_id in enumerate(source.ids):
        if (other := first.setdefault(image_id, index)) != index:
            raise ValueError(
                f"{source.name(other)} and {source.name(index)} both have the id {image_id!r}: with ids='path' "
                "(--ids path) the path is the id; in a dataset give different ids."
            )
    return source


def in_words(source: PhotoSource) -> str:
    """Says how many photos there are, and how many files were left out for which reasons, in one line."""
    kinds = Counter(reason for _, reason in source.left_out).most_common()
    shown = [f"{count:,} ({reason})" for reason, count in kinds[:6]] + (["…"] if len(kinds) > 6 else [])
    return f"{len(source.ids):,} photos." + (f" Left out: {', '.join(shown)}." if shown else "")


@dataclass
class _Naming:
    """The rule by which photos get their ids."""

    ids: str
    rename: Rename | None
    skip_unmapped: bool

    def of_path(self, path: str) -> str:
        """
        Gives the id of a photo by its path below the folder or .tar that is listed. Raises UnmappedId where the rule
        gives none, and ValueError where it gives several.
        """
        if self.rename is None:
            return path if self.ids == "path" else _key(path)[0] if self.ids == "key" else stem(path)
        found: dict[str, str] = {}
        for spelling in dict.fromkeys((path, PurePosixPath(path).name, stem(path))):
            try:
                found.setdefault(self.rename(spelling), spelling)
            except UnmappedId as error:
                problem = error
        if not found:
            raise UnmappedId(f"{problem} Neither is its path, {path!r}.")
        if len(found) > 1:
            given = " and ".join(f"{image_id!r} (of {spelling!r})" for image_id, spelling in found.items())
            raise ValueError(f"{self.rename.rule} gives the photo {path} several ids: {given}.")
        return next(iter(found))

    def of_row(self, image_id: Any, column: str, row: int) -> str:
        """Gives the id of a photo by that of its row. Raises as `of_path` does, and where there is none."""
        if image_id is None or not str(image_id).strip():
            raise ValueError(f"The dataset's column {column!r} holds {image_id!r} in row {row}; expected an id.")
        return str(image_id) if self.rename is None else self.rename(str(image_id))

    def left_out(self, error: UnmappedId) -> str:
        """Gives the reason to leave a photo out. Raises the error where photos must not be left out."""
        if not self.skip_unmapped:
            raise UnmappedId(f"{error} skip_unmapped=True (--skip-unmapped) leaves such photos out.") from error
        return "its id is not mapped"


def _key(path: str) -> tuple[str, str]:
    """
    Splits a path as webdataset does: into the key, which ends at the first point of the file's name, and the extension.
    """
    folder, slash, name = path.rpartition("/")
    base, _, extension = name.partition(".")
    return folder + slash + base, extension


def _open_dataset(path: Path, split: str | None) -> "datasets.Dataset":
    import datasets

    table = datasets.load_from_disk(path)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{path} has the splits {list(table)}, got {split!r}: name one with split (--split).")
        table = table[split]
    return table


def _column(table: "datasets.Dataset", image_column: str, id_column: str, naming: _Naming) -> _Column:
    import datasets

    _check_columns(table.column_names, image_column, id_column)
    images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    column = _Column(images=images, column=image_column)
    for row, image_id in enumerate(table[id_column]):
        try:
            column.ids.append(naming.of_row(image_id, id_column, row))
            column.places.append(row)
        except UnmappedId as error:
            column.left_out.append(LeftOut(f"row {row}", naming.left_out(error)))
    return column


def _check_columns(columns: Sequence[str], *needed: str) -> None:
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(
            f"The dataset has no column {missing}, but {columns}: name image_column (--image-column) and id_column "
            "(--id-column)."
        )


def _list_rows(
    files: Iterable[tuple[AnyPath, str]], image_column: str, id_column: str, naming: _Naming, left_out: list[LeftOut]
) -> _Tables:
    from pyarrow.parquet import ParquetFile

    tables = _Tables(column=image_column, left_out=left_out)
    for path, _ in files:
        if path.suffix.lower() != ".parquet":
            left_out.append(LeftOut(str(path), "no .parquet, as the others are"))
            continue
        with path.open("rb") as file, ParquetFile(file) as table:
            _check_columns(table.schema_arrow.names, image_column, id_column)
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            ids = table.read(columns=[id_column]).column(0).to_pylist()
        starts = [0, *accumulate(sizes)]
        for row, image_id in enumerate(ids):
            group = bisect_right(starts, row) - 1
            try:
                tables.ids.append(naming.of_row(image_id, id_column, row))
                tables.places.append((path, group, starts[group], row))
            except UnmappedId as error:
                left_out.append(LeftOut(f"{path}: row {row}", naming.left_out(error)))
    return tables


def _list_files(root: AnyPath, image_column: str, id_column: str, naming: _Naming) -> _Files | _Tables:
    left_out: list[LeftOut] = []
    found = list(_named(root) if isinstance(root, Path) and root.suffix == ".txt" else _walk(root, left_out))
    suffixes = {path.suffix.lower() for path, _ in found}
    if ".parquet" in suffixes and suffixes.isdisjoint({*SUFFIXES, ".tar"}):
        return _list_rows(found, image_column, id_column, naming, left_out)
    files = _Files(left_out=left_out)
    for path, below in found:
        if path.suffix.lower() == ".tar":
            for member in _members(path):
                place = (path, member.name, member.offset_data, member.size)
                _add(files, naming, place, member.name.removeprefix("./"), _no_photo(member))
        else:
            _add(files, naming, (path, "", 0, -1), below)
    return files


def _add(files: _Files, naming: _Naming, place: tuple[AnyPath, str, int, int], below: str, problem: str = "") -> None:
    """
    Adds a photo by its path below the folder or .tar that is listed; a file that is no photo is added to those left
    out.
    """
    suffix = PurePosixPath(below).suffix.lower()
    if problem:
        pass
    elif suffix in ARCHIVES:
        problem = f"{suffix} is a compressed archive; only a .tar without compression is read"
    elif suffix not in SUFFIXES:
        problem = f"{suffix or 'no suffix'} is no suffix of photos"
    elif naming.ids == "key" and naming.rename is None and f".{_key(below)[1].lower()}" not in SUFFIXES:
        problem = "its extension, from the first point on, is no suffix of photos (ids='key')"
    else:
        try:
            files.ids.append(naming.of_path(below))
            files.places.append(place)
            return
        except UnmappedId as error:
            problem = naming.left_out(error)
    files.left_out.append(LeftOut(f"{place[0]}:{place[1]}" if place[1] else str(place[0]), problem))


def _no_photo(member: tarfile.TarInfo) -> str:
    """Says why a member of a .tar is no photo, whatever its suffix; empty if it may be one."""
    if not member.isfile() or member.issparse():
        return "a link, or no plain file, in a .tar"
    hidden = any(part.startswith(".") for part in PurePosixPath(member.name).parts if part != "..")
    return HIDDEN if hidden else ""


def _members(path: AnyPath) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a .tar, except folders. One behind a URL is read through: a request a member is slower."""
    mode: Literal["r:", "r|"] = "r:" if isinstance(path, Path) else "r|"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode=mode, bufsize=2**22) as archive:
            yield from (member for member in archive if not member.isdir())
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no .tar file without compression, or it is cut short: {error}.") from error


def _walk(root: AnyPath, left_out: list[LeftOut]) -> Iterator[tuple[AnyPath, str]]:
    """
    Yields all files below a folder with their paths below it, or the file itself, in an order that does not depend on
    the file system. Hidden files, links to folders, and folders that cannot be opened are added to `left_out`.
    """
    if isinstance(root, RemotePath):
        for file, below in root.walk():
            if any(part.startswith(".") for part in PurePosixPath(below).parts):
                left_out.append(LeftOut(str(file), HIDDEN))
            else:
                yield file, below
        return
    if root.is_file():
        yield root, root.name
        return

    def unreadable(error: OSError) -> None:
        left_out.append(LeftOut(str(error.filename), f"a folder that cannot be opened: {error.strerror}"))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders.sort()
        left_out += [LeftOut(str(Path(folder, name)), HIDDEN) for name in (*folders, *names) if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        left_out += [LeftOut(str(path), "a link to a folder, which is not followed") for path in links]
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            yield path, path.relative_to(root).as_posix()


def _named(path: Path) -> Iterator[tuple[Path, str]]:
    """Yields the files that a list names, relative to its own folder."""
    for name in read_names(path):
        if not (file := path.parent / name).is_file():
            raise ValueError(f"{path} holds no photo but a list, whose name {name!r} is of no file: {file}.")
        yield file, Path(name).as_posix()


def decode_photo(data: bytes) -> "tuple[Image.Image, tuple[int, int]]":
    """
    Decodes a photo as RGB and upright, and gives it with its width and height; a photo of 32 million pixels or more is
    decoded at a smaller size.

    An animation gives its first frame. Transparent pixels become white, 16 bits become 8.

    Raises:
        Exception: Pillow finds the file damaged, and raises any kind of error.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    with _pixel_limit():
        try:
            image = Image.open(BytesIO(data))
        except UnidentifiedImageError:
            raise ValueError(f"its {len(data)} bytes are no image of a known format") from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS}")
        factor = max(1, math.isqrt(width * height // ENOUGH_PIXELS))
        # JPEG decodes to a half, a quarter or an eighth at no cost.
        drafted = image.draft(None, (-(-width // factor), -(-height // factor)))
        lies = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8
        ImageOps.exif_transpose(image, in_place=True)
    size = image.size if drafted is None else (height, width) if lies else (width, height)
    return _small_rgb(image), size


def read_photo(photo: "str | PathLike[str] | Image.Image", name: str) -> "tuple[Image.Image, tuple[int, int]]":
    """
    Reads a photo, a file or opened, as [`decode_photo`] does; an opened one stays as it is.

    Raises:
        ValueError: The photo cannot be read; the message has its `name`.
        OSError: There is no such file.
    """
    data = Path(photo).read_bytes() if isinstance(photo, (str, PathLike)) else None
    try:
        return upright(photo.copy()) if data is None else decode_photo(data)  # type: ignore[union-attr]
    except Exception as error:  # of any kind, where a file is damaged
        raise ValueError(f"{name} is no photo that can be read: {describe(error)}.") from error


def describe(error: Exception) -> str:
    """Says in words why a photo has no record."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def upright(image: "Image.Image") -> "tuple[Image.Image, tuple[int, int]]":
    """Makes of an opened photo what `decode_photo` makes of its file. The photo itself may be changed."""
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    return _small_rgb(image), image.size


def _small_rgb(image: "Image.Image") -> "Image.Image":
    rgb = _to_rgb(image)
    factor = max(1, math.isqrt(rgb.width * rgb.height // ENOUGH_PIXELS))
    return rgb.reduce(factor) if factor > 1 else rgb


@contextmanager
def _pixel_limit() -> Iterator[None]:
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
    try:
        with warnings.catch_warnings():  # up to twice as many Pillow warns alone, where decode_photo refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow's own conversion makes all values above 255 white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels run from {values.min()} to {values.max()}, expected 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are fractions of unknown range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")

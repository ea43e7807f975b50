"""Caption files of every common layout, read into one `datasets.Dataset`, and joined with a store of regions.

Every row is one caption: `image_id` and `caption` (both `str`), beside what the source has (`split`, `file_name`,
`caption_id`, …). The layouts are those of Karpathy's json, COCO's captions json, Flickr's `.token`, plain tables
(jsonl, json, csv, tsv, parquet) and folders of `datasets`. Rows keep the file's order, and duplicates; ids are never
mapped to one another here, a join only says which do not meet. Conceptual Captions' `caption<TAB>url` is left out: it
has no image ids before the photos are fetched.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import logging

logger = logging.get_logger(__name__)

JSON_LAYOUTS = ("karpathy", "coco", "mapping", "rows")
FORMATS = ("json", *JSON_LAYOUTS, "token", "jsonl", "csv", "parquet", "datasets")

Entry = tuple[str, dict[str, Any]]  # where the row is in its file ("line 3"), and the row

_TOKEN_LINE = re.compile(r"([^\t]+)#(\d+)\t(.*)")
_EXAMPLES = 5
_CHUNK = 10_000


def read_captions(
    path: str | PathLike[str], *, format: str | None = None, split: str | None = None, skip_empty: bool = False
) -> datasets.Dataset:
    """
    Read a caption file or a folder of `datasets` into one row a caption, in the order of the file.

    Args:
        path (`str` or `os.PathLike`):
            A file in any layout of `FORMATS`, or a folder that `datasets` saved or can load.
        format (`str`, *optional*):
            One of `FORMATS`; found from the file's content and name by default. With `"datasets"`, `path` may also be
            a repository of the Hub.
        split (`str`, *optional*):
            Keep this split only (the column `split`, or the split of a `DatasetDict`). Karpathy's `restval` counts
            as, and becomes, `train`.
        skip_empty (`bool`, *optional*, defaults to `False`):
            Drop captions that are empty or whitespace, with a warning, instead of raising.

    Returns:
        `datasets.Dataset` with columns `image_id` (`str`), `caption` (`str`), and those that the source has beside:

        - Karpathy: `split`, `file_name`, `caption_id` (`sentid`), and `imgid`, `cocoid`, `filepath` where present;
          `image_id` is the stem of the file's name.
        - COCO: `file_name` (where `images` names it), `caption_id`; `image_id` is the number as text.
        - Flickr `.token`: `file_name`, `caption_id` (after `#`); `image_id` is the stem of the file's name.
        - tables and `datasets`: every further column, as it is. Numeric image ids become text.

    Raises:
        `FileNotFoundError`: there is nothing at `path`.
        `ValueError`: the file is malformed, a column, value or split is missing, or a caption is empty. The message
            names the file, the place in it, the field and its value, and what was expected.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"format={format!r} is unknown; expected one of {', '.join(FORMATS)}, or None to find it from the file."
        )
    if format != "datasets" and not Path(path).exists():
        raise FileNotFoundError(f"No caption file at {path}. For a repository of the Hub pass format='datasets'.")
    try:
        format = format or detect_format(path)
        logger.info(f"Reading captions from {path} as {format}.")
        if format == "datasets":
            rows = _check_table(_load_datasets(path, split), path, skip_empty)
        elif format == "parquet":
            rows = _check_table(_read_parquet(Path(path), split), path, skip_empty)
        else:
            entries = _READERS[format](Path(path), format)
            rows = datasets.Dataset(_to_arrow(_check_entries(entries, path, split, skip_empty), path))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#x}); convert the file to UTF-8."
        ) from error
    if len(rows) == 0:
        raise ValueError(f"{path} holds no captions (format {format!r}, split {split!r}); expected at least one.")
    return rows


def detect_format(path: str | PathLike[str]) -> str:
    """
    Name the format of a caption file: content decides, and the name where content leaves two possibilities.

    `"json"` stands for all of `JSON_LAYOUTS`: which one it is shows when the whole has been read.
    """
    path = Path(path)
    if path.is_dir():
        return "datasets"
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    with _open(path) as file:
        line = ""
        while not line.strip():
            line = file.readline(1 << 16)
            if not line:
                raise ValueError(f"{path} is empty; expected captions in one of the formats {', '.join(FORMATS)}.")
    if line.lstrip()[0] in "{[":
        return "jsonl" if path.suffix in (".jsonl", ".ndjson") or _is_row(line) else "json"
    if _TOKEN_LINE.match(line):
        return "token"
    if path.suffix in (".csv", ".tsv") or "caption" in re.split(r"[,\t]", line.strip()):
        return "csv"
    raise ValueError(
        f"{path} has no layout that is known: its first line is {line.strip()[:80]!r}. Expected one of "
        f"{', '.join(FORMATS)}; a csv or tsv needs a header with image_id and caption. In Python, "
        "read_captions(…, format=…) names the layout."
    )


@dataclass(frozen=True)
class JoinReport:
    """
    How captions and stored regions meet, counted in images, with a few example ids each.

    Attributes:
        matched (`int`): images that have both captions and regions.
        missing (`int`): images that have captions but no regions.
        unused (`int`): images that have regions but no captions.
        missing_captions (`int`): captions of the missing images, which training has to leave out.
    """

    matched: int
    missing: int
    unused: int
    missing_captions: int
    matched_examples: tuple[str, ...] = ()
    missing_examples: tuple[str, ...] = ()
    unused_examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'images':<32}{'count':>10}  examples"]
        for name, count, examples in (
            ("matched (captions and regions)", self.matched, self.matched_examples),
            ("missing (captions, no regions)", self.missing, self.missing_examples),
            ("unused (regions, no captions)", self.unused, self.unused_examples),
        ):
            more = ", …" if count > len(examples) else ""
            # An id that is no text, as of a dict by number, joins nothing: it has to look like none.
            shown = (example if isinstance(example, str) else f"{example!r} (no text)" for example in examples)
            lines.append(f"{name:<32}{count:>10,}  {', '.join(shown)}{more}".rstrip())
        return "\n".join(lines)


def join(
    captions: datasets.Dataset,
    store: Mapping[str, Any],
    *,
    skip_missing: bool = False,
    skip_option: str | None = "skip_missing=True (--skip-missing)",
) -> tuple[datasets.Dataset, JoinReport]:
    """
    Keep the captions whose image is in `store`, and report what does not meet. No record of the store is read.

    Args:
        captions (`datasets.Dataset`): rows with a column `image_id`.
        store (`Mapping`): image id -> record, such as a `RegionStore`.
        skip_missing (`bool`, *optional*, defaults to `False`): drop captions whose image is not in `store`, with a
            warning, instead of raising.
        skip_option (`str`, *optional*): how the caller's user asks for that, for the message; None if they cannot.

    Raises:
        `ValueError`: an image is missing from `store` and `skip_missing` is not set, or no image at all is there.
    """
    if "image_id" not in captions.column_names:
        raise ValueError(f"The captions have no column 'image_id'; their columns are {captions.column_names}.")
    if (dtype := captions.features["image_id"].dtype) not in ("string", "large_string"):
        raise ValueError(f"The captions' column 'image_id' holds {dtype}; expected text, as read_captions gives.")
    distinct, codes = encode_column(captions, "image_id")
    ids = distinct.to_pylist()
    found = np.fromiter((image_id in store for image_id in ids), dtype=bool, count=len(ids))
    matched = int(found.sum())
    keep = found[codes]
    captioned = set(ids)
    unused = (key for key in store if key not in captioned)
    report = JoinReport(
        matched=matched,
        missing=len(ids) - matched,
        unused=len(store) - matched,
        missing_captions=int((~keep).sum()),
        matched_examples=tuple(ids[i] for i in np.flatnonzero(found)[:_EXAMPLES]),
        missing_examples=tuple(ids[i] for i in np.flatnonzero(~found)[:_EXAMPLES]),
        unused_examples=tuple(islice(unused, _EXAMPLES)) if len(store) > matched else (),
    )
    if report.missing == 0:
        return captions, report
    summary = (
        f"{report.missing:,} of {len(ids):,} captioned images ({report.missing_captions:,} captions) have no regions "
        f"in the store.\n{report}"
    )
    if matched == 0:
        raise ValueError(
            f"{summary}\nNothing would be left: bring the ids of both sides to one spelling (compare the examples), or "
            "extract regions for these images."
        )
    if not skip_missing:
        leave_out = "take these captions out of the file" if skip_option is None else f"leave them out: {skip_option}"
        raise ValueError(
            f"{summary}\nBring the ids of both sides to one spelling (compare the examples), extract the missing "
            f"regions, or {leave_out}."
        )
    logger.warning(f"Leaving captions out: {summary}")
    return captions.select(np.flatnonzero(keep)), report


def encode_column(
    rows: datasets.Dataset, name: str, transform: Callable[[str], str] | None = None
) -> tuple[pa.Array, np.ndarray]:
    """The distinct values of a text column in order of first appearance, and each row's index among them (int32)."""
    column = rows.select_columns([name]).with_format("arrow")
    chunks: list[pa.Array] = []
    for start in range(0, len(rows), _CHUNK):
        values = column[start : start + _CHUNK][name].cast(pa.string())
        if values.null_count:
            raise ValueError(
                f"Column {name!r} has no value in {values.null_count} of the rows from {start}; expected text."
            )
        chunks += [pa.array(map(transform, values.to_pylist()), pa.string())] if transform else values.chunks
    encoded = pa.chunked_array(chunks, pa.string()).dictionary_encode().combine_chunks()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int32)


# The readers: each yields the place and the row for every caption of a file, and knows nothing of splits.


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, without their ends."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\n")


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and "caption" in row


def _read_json(path: Path, format: str) -> Iterator[Entry]:
    with _open(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}, column {error.colno}: malformed json ({error.msg}). Is it complete?"
            ) from error
    layout = _json_layout(content)
    if layout is None or format not in ("json", layout):
        shape = f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        expected = format if format != "json" else "one of the layouts " + ", ".join(JSON_LAYOUTS)
        raise ValueError(
            f"{path} holds {shape} at its top; expected {expected}. They are Karpathy's images with sentences, COCO's "
            "images and annotations, {image id: [captions]}, and a list of {image_id, caption}."
        )
    if layout == "karpathy":
        return _karpathy(content["images"], path)
    if layout == "coco":
        return _coco(content, path)
    if layout == "mapping":
        return _mapping(content)
    return ((f"entry {i}", row) for i, row in enumerate(content))


def _json_layout(content: Any) -> str | None:
    if isinstance(content, list):
        return "rows"
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("annotations"), list):
        return "coco"
    if isinstance(content.get("images"), list) and all(
        isinstance(image, dict) and "sentences" in image for image in content["images"][:1]
    ):
        return "karpathy"
    return "mapping" if content and all(isinstance(captions, list) for captions in content.values()) else None


def _karpathy(images: list[dict[str, Any]], path: Path) -> Iterator[Entry]:
    kept = [name for name in ("imgid", "cocoid", "filepath") if any(name in image for image in images)]
    for i, image in enumerate(images):
        where = f"images[{i}]"
        file_name = _field(image, "filename", path, where)
        split = _field(image, "split", path, where)
        beside = {"split": "train" if split == "restval" else split, "file_name": file_name}
        beside |= {name: image.get(name) for name in kept}
        for k, sentence in enumerate(_field(image, "sentences", path, where)):
            where = f"images[{i}].sentences[{k}]"
            row = {"image_id": _stem(file_name), "caption": _field(sentence, "raw", path, where)}
            yield where, row | {"caption_id": sentence.get("sentid")} | beside


def _coco(content: dict[str, Any], path: Path) -> Iterator[Entry]:
    names = {
        _field(image, "id", path, f"images[{i}]"): image.get("file_name")
        for i, image in enumerate(content.get("images", ()))
    }
    for i, annotation in enumerate(content["annotations"]):
        where = f"annotations[{i}]"
        image_id = _field(annotation, "image_id", path, where)
        if names and image_id not in names:
            raise ValueError(
                f"{path}, {where}: image_id {image_id!r} is not among the file's {len(names):,} images; expected the "
                "id of one of them."
            )
        row = {"image_id": image_id, "caption": _field(annotation, "caption", path, where)}
        yield where, row | {"caption_id": annotation.get("id")} | ({"file_name": names[image_id]} if names else {})


def _mapping(content: dict[str, list[str]]) -> Iterator[Entry]:
    for image_id, captions in content.items():
        for k, caption in enumerate(captions):
            yield f"{image_id!r}[{k}]", {"image_id": image_id, "caption": caption}


def _read_token(path: Path, format: str) -> Iterator[Entry]:
    for number, line in _lines(path):
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r} is malformed; expected 'name.jpg#k', a tab, and the caption."
            )
        file_name, k, caption = match.groups()
        row = {"image_id": _stem(file_name), "caption": caption, "file_name": file_name, "caption_id": int(k)}
        yield f"line {number}", row


def _read_jsonl(path: Path, format: str) -> Iterator[Entry]:
    for number, line in _lines(path):
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, column {error.colno}: malformed json ({error.msg}); expected an object"
            ) from error


def _read_csv(path: Path, format: str) -> Iterator[Entry]:
    with _open(path) as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",", strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row or None in row.values():  # the key of cells too many, the value of cells too few
                    raise ValueError(
                        f"{path}, {where}: expected {len(reader.fieldnames or ())} cells, {reader.fieldnames}, got "
                        "another number. Is a caption with a comma not quoted?"
                    )
                yield where, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: malformed csv ({error}).") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Entry]]] = {
    "json": _read_json,
    **dict.fromkeys(JSON_LAYOUTS, _read_json),
    "token": _read_token,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}


def _read_parquet(path: Path, split: str | None) -> datasets.Dataset:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: malformed parquet ({error}).") from error
    for i, field in enumerate(table.schema):  # pandas' categories, which `datasets` does not take
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    rows = datasets.Dataset(table)
    return rows if split is None else select_split(rows, path, split)


def _load_datasets(path: str | PathLike[str], split: str | None) -> datasets.Dataset:
    saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded if split is None else select_split(loaded, path, split)
    if split is not None and split not in loaded:
        raise ValueError(_no_split(path, split, loaded))
    if split is not None:
        return loaded[split]
    parts = [
        part if "split" in part.column_names else part.add_column("split", pa.array([name] * len(part), pa.string()))
        for name, part in loaded.items()
    ]
    return datasets.concatenate_datasets(parts)


# The checks, one row at a time for files, and whole columns for what comes as Arrow.


def _field(item: Any, name: str, path: Path, where: str) -> Any:
    if not isinstance(item, dict) or name not in item:
        shown = f"has keys {list(item)}" if isinstance(item, dict) else f"is a {type(item).__name__}"
        raise ValueError(f"{path}, {where}: no field {name!r}; the entry {shown}.")
    return item[name]


def _stem(file_name: Any) -> Any:
    return PurePosixPath(file_name).stem if isinstance(file_name, str) else file_name


def _check_row(row: Any, path: str | PathLike[str], where: str, skip_empty: bool) -> bool:
    """Bring `image_id` to text and check both fields; `False` for a row to be left out."""
    if not isinstance(row, dict):
        raise ValueError(f"{path}, {where}: {row!r:.80} is not an object; expected one with image_id and caption.")
    for name in ("image_id", "caption"):
        if name not in row:
            raise ValueError(_no_column(f"{path}, {where}", name, row))
    image_id, caption = row["image_id"], row["caption"]
    if isinstance(image_id, int) and not isinstance(image_id, bool):
        row["image_id"] = str(image_id)
    elif not isinstance(image_id, str) or not image_id.strip():
        raise ValueError(
            f"{path}, {where}: image_id is {image_id!r}; expected a text that is not empty, or an integer."
        )
    if caption is not None and not isinstance(caption, str):
        raise ValueError(
            f"{path}, {where}: caption of image {image_id!r} is {caption!r:.80}; expected a text, one row a caption."
        )
    if caption and not caption.isspace():
        return True
    if skip_empty:
        return False
    raise ValueError(
        f"{path}, {where}: caption of image {image_id!r} is {caption!r}; expected a text that is not empty. Mend the "
        "file; in Python, read_captions(…, skip_empty=True) leaves such captions out."
    )


def _check_entries(
    entries: Iterable[Entry], path: str | PathLike[str], split: str | None, skip_empty: bool
) -> Iterator[dict[str, Any]]:
    splits: dict[str, None] = {}
    skipped = rows = 0
    for where, row in entries:
        rows += 1
        if split is not None and isinstance(row, dict):
            if "split" not in row:
                raise ValueError(_no_split_column(f"{path}, {where}", row))
            splits[row["split"]] = None
            if row["split"] != split:
                continue
        if _check_row(row, path, where, skip_empty):
            yield row
        else:
            skipped += 1
    if rows and split is not None and split not in splits:
        raise ValueError(_no_split(path, split, splits))
    _warn_skipped(path, skipped)


def _check_table(table: datasets.Dataset, path: str | PathLike[str], skip_empty: bool) -> datasets.Dataset:
    if len(table) == 0:
        return table
    for name in ("image_id", "caption"):
        if name not in table.column_names:
            raise ValueError(_no_column(path, name, table.column_names))
    columns = table.select_columns(["image_id", "caption"]).with_format("arrow")[:]
    suspect = np.zeros(len(table), dtype=bool)
    for name in ("image_id", "caption"):
        values = columns[name]
        text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if not text and not (name == "image_id" and pa.types.is_integer(values.type)):
            expected = "text or integers" if name == "image_id" else "text, one row a caption"
            raise ValueError(f"{path}: column {name!r} holds {values.type}; expected {expected}.")
        bare = pc.utf8_trim_whitespace(values.cast(pa.string())) if text else values
        suspect |= pc.fill_null(pc.equal(bare, "") if text else pc.is_null(values), True).to_numpy()
    keep = np.ones(len(table), dtype=bool)
    for index in np.flatnonzero(suspect):
        row = {name: columns[name][int(index)].as_py() for name in ("image_id", "caption")}
        keep[index] = _check_row(row, path, f"row {index}", skip_empty)
    if not keep.all():
        _warn_skipped(path, int((~keep).sum()))
        table = table.select(np.flatnonzero(keep))
    for name in ("image_id", "caption"):
        if table.features[name] != datasets.Value("string"):
            table = table.cast_column(name, datasets.Value("string"))
    return table


def select_split(table: datasets.Dataset, path: str | PathLike[str], split: str) -> datasets.Dataset:
    """The rows of a split, by the column of that name. Raises ValueError naming `path`, where they come from."""
    if "split" not in table.column_names:
        raise ValueError(_no_split_column(path, table.column_names))
    splits = table.select_columns(["split"]).with_format("arrow")[:]["split"].to_pylist()
    if split not in splits:
        raise ValueError(_no_split(path, split, dict.fromkeys(splits)))
    return table.select([i for i, name in enumerate(splits) if name == split])


def _no_column(place: str | PathLike[str], name: str, columns: Iterable[str]) -> str:
    return f"{place}: no column {name!r}; the columns are {list(columns)}. Rename the one that holds it to {name!r}."


def _no_split_column(place: str | PathLike[str], columns: Iterable[str]) -> str:
    return (
        f"{place}: no column 'split'; the columns are {list(columns)}. Add it: train, val or test for each caption. "
        "COCO's json and Flickr's .token have no place for it: write what read_captions gives as jsonl, and the column."
    )


def _no_split(path: str | PathLike[str], split: str, splits: Iterable[str]) -> str:
    return f"{path} has no split {split!r}; its splits are {', '.join(map(str, splits))}."


def _warn_skipped(path: str | PathLike[str], count: int) -> None:
    if count:
        logger.warning(f"{path}: left out {count:,} captions that are empty.")


def _to_arrow(rows: Iterator[dict[str, Any]], path: str | PathLike[str]) -> pa.Table:
    """Arrow in chunks, so that Python objects of a few thousand rows live at a time; columns are those of any row."""
    tables = []
    try:
        while chunk := list(islice(rows, _CHUNK)):
            names = dict.fromkeys(name for row in chunk for name in row)
            tables.append(pa.table({name: [row.get(name) for row in chunk] for name in names}))
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: {error.object!r:.80} holds half a character, {error.object[error.start]!r}; expected text that "
            "UTF-8 can hold."
        ) from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: a column mixes types ({error}); expected one type a column.") from error

"""
Readers of caption files of every common layout, which give one `datasets.Dataset`.

The layouts are those of Karpathy's json, COCO's captions json, `{image id: captions}`, Flickr's `.token`, plain tables
(jsonl, json, csv, tsv, parquet) and folders of `datasets`. Rows keep the file's order, and duplicates. Conceptual
Captions' `caption<TAB>url` is left out: it has no image ids before the photos are fetched.
"""

import csv
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import logging
from ..name_lists import not_utf8, numbered_lines, read_json, read_jsonl
from ..regions.photos import stem

logger = logging.get_logger(__name__)

JSON_LAYOUTS = ("karpathy", "coco", "mapping", "rows")
FORMATS = ("json", *JSON_LAYOUTS, "token", "jsonl", "csv", "parquet", "datasets")

LISTS = datasets.List | datasets.LargeList
# Columns of a table that may name the image, by its id or by the name of its file, and that may hold the caption. The
# first one that a table has is taken.
IMAGE_COLUMNS = ("image_id", "image", "file_name", "image_name", "filename")
CAPTION_COLUMNS = ("caption", "captions", "comment", "text")
# Separators of a csv or tsv. Between commas or semicolons a cell may be quoted; between tabs or bars a quote is text.
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
QUOTING = ",;"

Entry = tuple[str, Any]  # the place of the row in its file ("line 3"), and the row: a dict unless the file is malformed

_TOKEN_LINE = re.compile(r"([^\t]+)#(\d+)\t(.*)")
# A character that a reader can see: neither blank nor a control or format character.
_VISIBLE = r"[^\p{Cc}\p{Cf}\p{Z}]"
_INVISIBLE = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp", "Zs"])
_QUOTES = 'A quote that is text is written twice, within quotes: """Stop"" says a sign."; in a .tsv it needs nothing.'
EXAMPLES = 5  # of ids and captions in a report
_CHUNK = 10_000


def read_caption_file(
    path: str | PathLike[str], format: str | None = None, split: str | None = None, skip_empty: bool = False
) -> datasets.Dataset:
    """Reads a caption file and keeps its ids; arguments, result and errors are those of `read_captions`."""
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"format={format!r} is unknown; expected one of {', '.join(FORMATS)}, or None to detect it from the file."
        )
    if format != "datasets" and not Path(path).exists():
        raise FileNotFoundError(f"No caption file at {path}. For a repository of the Hub pass format='datasets'.")
    try:
        format = format or caption_format(path)
        logger.info(f"Reading captions from {path} as {format}.")
        if format == "datasets":
            rows = _check_table(_load_datasets(path, split), path, skip_empty)
        elif format == "parquet":
            rows = _check_table(_read_parquet(Path(path), split), path, skip_empty)
        else:
            entries = _entries(Path(path), format)
            rows = datasets.Dataset(_to_arrow(_check_entries(entries, path, split, skip_empty), path))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    if len(rows) == 0:
        raise ValueError(f"{path} holds no captions (format {format!r}, split {split!r}); expected at least one.")
    return rows


def caption_format(path: str | PathLike[str]) -> str:
    """
    Names the format of a caption file, one of `FORMATS`. Its content decides; where that leaves two possibilities, the
    name of the file does.

    `"json"` stands for all of `JSON_LAYOUTS`: which of them it is can be told only when the whole file has been read.

    Raises:
        `ValueError`: the file is empty, or has no known layout.
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
    if path.suffix in (".csv", ".tsv") or _separator(line) is not None:
        return "csv"
    raise ValueError(
        f"{path} has no known layout: its first line is {line.strip()[:80]!r}. Expected one of "
        f"{', '.join(FORMATS)}; a csv or tsv needs a header with image_id and caption. In Python, "
        "read_captions(…, format=…) names the layout."
    )


# The readers. Each yields the place and the row of every caption of a file, and knows nothing of splits.


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and all(any(name in row for name in some) for some in (IMAGE_COLUMNS, CAPTION_COLUMNS))


def _read_json(path: Path, format: str) -> Iterator[Entry]:
    content = read_json(path)
    layout = _json_layout(content)
    if layout is None or format not in ("json", layout):
        shape = f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        expected = format if format != "json" else "one of the layouts " + ", ".join(JSON_LAYOUTS)
        raise ValueError(
            f"{path} holds {shape} at its top; expected {expected}. They are Karpathy's images with sentences, COCO's "
            "images and annotations, {image id: captions}, and a list of {image_id, caption}."
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
    return "mapping" if content and all(map(_are_captions, content.values())) else None


def _are_captions(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and not any(isinstance(item, dict) for item in value[:1]))


def _karpathy(images: list[dict[str, Any]], path: Path) -> Iterator[Entry]:
    kept = [name for name in ("imgid", "cocoid", "filepath") if any(name in image for image in images)]
    for i, image in enumerate(images):
        where = f"images[{i}]"
        file_name = _field(image, "filename", path, where)
        split = _field(image, "split", path, where)
        beside = {"split": "train" if split == "restval" else split, "file_name": file_name}
        beside |= {name: image.get(name) for name in kept}
        for k, sentence in enumerate(_field(image, "sentences", path, where) or ()):
            where = f"images[{i}].sentences[{k}]"
            row = {"image_id": stem_of(file_name), "caption": _field(sentence, "raw", path, where)}
            yield where, row | {"caption_id": sentence.get("sentid")} | beside


def _coco(content: dict[str, Any], path: Path) -> Iterator[Entry]:
    names = {
        _field(image, "id", path, f"images[{i}]"): image.get("file_name")
        for i, image in enumerate(content.get("images") or ())
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


def _mapping(content: dict[str, str | list[str]]) -> Iterator[Entry]:
    return ((repr(image_id), {"image_id": image_id, "caption": captions}) for image_id, captions in content.items())


def _read_token(path: Path, format: str) -> Iterator[Entry]:
    for number, line in numbered_lines(path):
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r} is malformed; expected 'name.jpg#k', a tab, and the caption."
            )
        file_name, k, caption = match.groups()
        row = {"image_id": stem_of(file_name), "caption": caption, "file_name": file_name, "caption_id": int(k)}
        yield f"line {number}", row


def _read_jsonl(path: Path, format: str) -> Iterator[Entry]:
    return ((f"line {number}", row) for number, row in read_jsonl(path))


def _read_csv(path: Path, format: str) -> Iterator[Entry]:
    with _open(path) as file:
        header = file.readline()
    separator = _separator(header) or max(SEPARATORS, key=header.count)
    # Between tabs quotes are text, unless the file is named .csv, as spreadsheets name theirs.
    quoting = separator in QUOTING or (separator == "\t" and path.suffix == ".csv")
    rows = (_quoted_rows if quoting else _plain_rows)(path, separator)
    _, names = next(rows)
    names = [name.strip() for name in names]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}, line 1: the columns, between {SEPARATORS[separator]}, are {names}; expected each name once."
        )
    for number, cells in rows:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {number}: expected {len(names)} cells between {SEPARATORS[separator]}, {names}, got "
                f"{len(cells)}. {'Quote captions that hold' if quoting else 'A caption cannot hold'} "
                f"{SEPARATORS[separator]}."
            )
        yield f"line {number}", dict(zip(names, cells, strict=True))


def _separator(header: str) -> str | None:
    """
    Finds the separator in the first line of a csv or tsv: the one whose columns can be an image and its caption; None
    if none does.
    """
    for separator in SEPARATORS:
        names = {name.strip().strip('"') for name in header.split(separator)}
        if names & set(IMAGE_COLUMNS) and names & set(CAPTION_COLUMNS):
            return separator
    return None


def _plain_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """
    Yields the line numbers and cells of a file in which a quote is text; warns where a spreadsheet seems to have meant
    otherwise.
    """
    as_csv = 0
    for number, line in numbered_lines(path):
        cells = line.split(separator)
        as_csv += any(re.fullmatch(r'"[^"]*(?:""[^"]*)+"', cell) is not None for cell in cells)
        yield number, cells if separator == "\t" else [cell.strip() for cell in cells]
    if as_csv:
        logger.warning(
            f"{path}: {as_csv:,} lines hold cells in quotes with doubled quotes within, as spreadsheets write them. "
            "Between tabs and bars quotes are text and were kept; name a file with tabs .csv to have them undone."
        )


def _quoted_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """
    Yields the cells of each row with the number of the line where it ends. A quoted cell may span lines, but none of
    them may look like a row by itself.
    """
    with _open(path) as file:
        lines: list[str] = []
        spaced = re.match(f".*{re.escape(separator)} ", file.readline()) is not None  # a blank follows each separator
        file.seek(0)
        reader = csv.reader(_noting(file, lines), delimiter=separator, strict=True, skipinitialspace=spaced)
        width = 0
        try:
            for cells in reader:
                width = width or len(cells)
                for line in lines[1:]:
                    if line.count(separator) == width - 1:
                        raise ValueError(
                            f"{path}, line {reader.line_num - len(lines) + 1}: a cell that begins with a quote spans "
                            f"{len(lines)} lines, and {line.strip()[:80]!r} among them looks like a row by itself. "
                            f"{_QUOTES} If this is one caption, take its line breaks out."
                        )
                lines.clear()
                if "".join(cells).strip():
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: malformed csv ({error}). {_QUOTES}") from error


def _noting(lines: Iterable[str], noted: list[str]) -> Iterator[str]:
    for line in lines:
        noted.append(line)
        yield line


# The column of hard negatives, see `negatives`: it holds ids of images, too.
_NEGATIVES = "negative_image_ids"

_READERS: dict[str, Callable[[Path, str], Iterator[Entry]]] = {
    "json": _read_json,
    **dict.fromkeys(JSON_LAYOUTS, _read_json),
    "token": _read_token,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}


def _entries(path: Path, format: str) -> Iterator[Entry]:
    """
    Yields the place and the row of every caption of a file, one row a caption; `image_id` and `caption` have these
    names.
    """
    names: tuple[str, str] | None = None
    for where, row in _READERS[format](path, format):
        if not isinstance(row, dict):
            yield where, row  # the check refuses it
            continue
        if names is None:
            names = find_columns(path, row)
        image, caption = names
        if image != "image_id" and image in row:
            row["image_id"] = stem_of(row[image])
        if caption != "caption" and caption in row:
            row["caption"] = row.pop(caption)
        if isinstance(captions := row.get("caption"), list) and captions:
            yield from ((f"{where}[{k}]", row | {"caption": text}) for k, text in enumerate(captions))
        else:
            yield where, row


def find_columns(path: str | PathLike[str], names: Iterable[str]) -> tuple[str, str]:
    """
    Finds the columns of image and caption, and warns where they have other names; the usual names where there are none.
    """
    names = set(names)
    image = next((name for name in IMAGE_COLUMNS if name in names), "image_id")
    caption = next((name for name in CAPTION_COLUMNS if name in names), "caption")
    if image != "image_id":
        logger.warning(
            f"{path} has no column 'image_id': {image!r} names the images, by files without folder and suffix."
        )
    if caption != "caption":
        logger.warning(f"{path} has no column 'caption': {caption!r} holds the captions.")
    return image, caption


def _read_parquet(path: Path, split: str | None) -> datasets.Dataset:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: malformed parquet ({error}): copy or write it again.") from error
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
        raise ValueError(no_split(path, split, loaded))
    if split is not None:
        return loaded[split]
    parts = [
        part if "split" in part.column_names else part.add_column("split", pa.array([name] * len(part), pa.string()))
        for name, part in loaded.items()
    ]
    return datasets.concatenate_datasets(parts)


# The checks. Files are checked row by row, Arrow tables by whole columns.


def _field(item: Any, name: str, path: Path, where: str) -> Any:
    if not isinstance(item, dict) or name not in item:
        shown = f"has keys {list(item)}" if isinstance(item, dict) else f"is a {type(item).__name__}"
        raise ValueError(f"{path}, {where}: no field {name!r}; the entry {shown}.")
    return item[name]


def stem_of(file_name: Any) -> Any:
    """Gives the stem of the name of a file; a value that is no text stays as it is, for the check to refuse."""
    return stem(file_name) if isinstance(file_name, str) else file_name


def is_blank(text: str) -> bool:
    """
    Tells whether a text shows nothing: it is empty, or holds only blanks and control or format characters, such as
    U+200B.
    """
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def check_row(row: Any, path: str | PathLike[str], where: str, skip_empty: bool) -> bool:
    """
    Turns `image_id` into text and checks both fields; False for a row to be left out. Raises ValueError where a field
    is missing or holds something else.
    """
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, {where}: {row!r:.80} is not an object; expected an object with image_id and caption."
        )
    for name in ("image_id", "caption"):
        if name not in row:
            raise ValueError(no_column(f"{path}, {where}", name, row))
    image_id, caption = row["image_id"], row["caption"]
    if isinstance(image_id, int) and not isinstance(image_id, bool):
        row["image_id"] = str(image_id)
    elif not isinstance(image_id, str) or not image_id.strip():
        raise ValueError(
            f"{path}, {where}: image_id is {image_id!r}; expected a text that is not empty, or an integer."
        )
    if caption is not None and caption != [] and not isinstance(caption, str):
        raise ValueError(
            f"{path}, {where}: caption of image {image_id!r} is {caption!r:.80}; expected a text, one row a caption."
        )
    if caption and not is_blank(caption):
        return True
    if skip_empty:
        return False
    raise ValueError(
        f"{path}, {where}: caption of image {image_id!r} is {caption!r}; expected a text that shows something. Mend "
        "the file; in Python, read_captions(…, skip_empty=True) leaves such captions out."
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
            if not isinstance(row["split"], str | None):
                raise ValueError(f"{path}, {where}: split is {row['split']!r:.80}; expected a name, such as 'train'.")
            splits[str(row["split"])] = None
            if row["split"] != split:
                continue
        if check_row(row, path, where, skip_empty):
            yield row
        else:
            skipped += 1
    if rows and split is not None and split not in splits:
        raise ValueError(no_split(path, split, splits))
    _warn_skipped(path, skipped)


def _check_table(table: datasets.Dataset, path: str | PathLike[str], skip_empty: bool) -> datasets.Dataset:
    if len(table) == 0:
        return table
    table = _one_caption_a_row(table, path, skip_empty)
    for name in ("image_id", "caption"):
        if name not in table.column_names:
            raise ValueError(no_column(path, name, table.column_names))
    columns = table.select_columns(["image_id", "caption"]).with_format("arrow")[:]
    suspect = np.zeros(len(table), dtype=bool)
    for name in ("image_id", "caption"):
        values = columns[name]
        text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if not text and not (name == "image_id" and pa.types.is_integer(values.type)):
            expected = "text or integers" if name == "image_id" else "text, one row a caption"
            raise ValueError(f"{path}: column {name!r} holds {values.type}; expected {expected}.")
        visible = pc.match_substring_regex(values, _VISIBLE) if text else pc.is_valid(values)
        suspect |= ~pc.fill_null(visible, False).to_numpy()
    keep = np.ones(len(table), dtype=bool)
    for index in np.flatnonzero(suspect):
        row = {name: columns[name][int(index)].as_py() for name in ("image_id", "caption")}
        keep[index] = check_row(row, path, f"row {index}", skip_empty)
    if not keep.all():
        _warn_skipped(path, int((~keep).sum()))
        table = table.select(np.flatnonzero(keep))
    for name in ("image_id", "caption"):
        if table.features[name] != datasets.Value("string"):
            table = table.cast_column(name, datasets.Value("string"))
    return table


def _one_caption_a_row(table: datasets.Dataset, path: str | PathLike[str], skip_empty: bool) -> datasets.Dataset:
    """
    Gives a table one row a caption: other names of the columns become `image_id` and `caption`, and lists of captions
    are unfolded. An empty list is a fault, or with `skip_empty` none.
    """
    # A column of pictures may be called image, too.
    usable = (name for name, kind in table.features.items() if isinstance(kind, datasets.Value | LISTS))
    image, caption = find_columns(path, usable)
    if image != "image_id" and image in table.column_names:
        stems, codes = encode_column(table, image, stem)
        table = _add_column(table, "image_id", stems.take(pa.array(codes)))
    if caption != "caption" and caption in table.column_names:
        table = table.rename_column(caption, "caption")
    if "caption" not in table.column_names or not isinstance(table.features["caption"], LISTS):
        return table
    lists = table.select_columns(["caption"]).with_format("arrow")[:]["caption"].combine_chunks()
    empty = np.flatnonzero(pc.fill_null(pc.list_value_length(lists), 0).to_numpy() == 0)
    if len(empty) and not skip_empty:
        raise ValueError(f"{path}: row {empty[0]} has no caption in its list; expected at least one.")
    _warn_skipped(path, len(empty))
    pictures = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    rest = table.remove_columns(["caption", *pictures]).select(pc.list_parent_indices(lists).to_numpy())
    return _add_column(rest, "caption", pc.list_flatten(lists))


def _add_column(table: datasets.Dataset, name: str, values: Any) -> datasets.Dataset:
    """Adds a column without the progress bar that `datasets` shows while it copies selected rows."""
    with logging.without_bars_of_datasets():
        return table.add_column(name, values)


def no_column(place: str | PathLike[str], name: str, columns: Iterable[str]) -> str:
    """Says that a column is missing, and what to do."""
    return f"{place}: no column {name!r}; the columns are {list(columns)}. Rename the one that holds it to {name!r}."


def _no_split_column(place: str | PathLike[str], columns: Iterable[str]) -> str:
    return (
        f"{place}: no column 'split'; the columns are {list(columns)}. `unicoder-vl prepare` writes captions with it. "
        "Or add it, train, val or test for each caption; COCO's json and Flickr's .token have no place for it: write "
        "what read_captions gives as jsonl, and the column."
    )


def no_split(path: str | PathLike[str], split: str, splits: Iterable[str]) -> str:
    """Says that a split is missing, and which there are."""
    return f"{path} has no split {split!r}; its splits are {', '.join(map(str, splits))}."


def _warn_skipped(path: str | PathLike[str], count: int) -> None:
    if count:
        logger.warning(f"{path}: left out {count:,} captions that are empty.")


def _to_arrow(rows: Iterator[dict[str, Any]], path: str | PathLike[str]) -> pa.Table:
    """
    Makes an Arrow table in chunks, so that Python objects of only a few thousand rows live at a time. Its columns are
    those of any row.
    """
    tables = []
    try:
        while chunk := list(islice(rows, _CHUNK)):
            names = dict.fromkeys(name for row in chunk for name in row)
            tables.append(pa.table({name: [row.get(name) for row in chunk] for name in names}))
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: {error.object!r:.80} holds half a character, {error.object[error.start]!r}; expected text that "
            "UTF-8 can encode."
        ) from error
    except OverflowError as error:
        raise ValueError(f"{path}: a number has more than 64 bits ({error}); expected it as text.") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: a column mixes types ({error}); expected one type a column.") from error


def encode_column(
    rows: datasets.Dataset, name: str, transform: Callable[[str], str] | None = None
) -> tuple[pa.Array, np.ndarray]:
    """
    Gives the distinct values of a text column in the order of their first appearance, and the index of each row among
    them (int32).
    """
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


def select_split(table: datasets.Dataset, path: str | PathLike[str], split: str) -> datasets.Dataset:
    """
    Gives the rows of one split, by the column `split`. Raises ValueError, naming `path`, the file that they come from,
    where there is no such column or split.
    """
    if "split" not in table.column_names:
        raise ValueError(_no_split_column(path, table.column_names))
    splits = table.select_columns(["split"]).with_format("arrow")[:]["split"].to_pylist()
    if split not in splits:
        raise ValueError(no_split(path, split, dict.fromkeys(splits)))
    return table.select([i for i, name in enumerate(splits) if name == split])

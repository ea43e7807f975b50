"""
Captions as all commands read them: from a file of any layout, under ids that match those of the regions, and joined
with a store.

Every row is one caption: `image_id` and `caption` (both `str`), and further columns of the source (`split`,
`file_name`, `caption_id`, …). Ids change by a rule that the caller names, or not at all: a join only reports ids that
do not match.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .. import logging
from .caption_files import (
    _CHUNK,
    _NEGATIVES,
    _READERS,
    EXAMPLES,
    _add_column,
    _entries,
    caption_format,
    encode_column,
    read_caption_file,
)

logger = logging.get_logger(__name__)


def read_captions(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    split: str | None = None,
    skip_empty: bool = False,
    ids: str | None = None,
) -> datasets.Dataset:
    """
    Reads a caption file or a folder of `datasets` into one row a caption, in the order of the file.

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
            Drop captions that are empty or show nothing, such as whitespace, with a warning, instead of raising.
        ids (`str`, *optional*):
            Rule that gives the images other ids: `"stem"`, `"coco"`, a .csv, or any other of `image_ids.id_mapping`.

    Returns:
        `datasets.Dataset` with columns `image_id` (`str`), `caption` (`str`), and further ones by the layout:

        - Karpathy: `split`, `file_name`, `caption_id` (`sentid`), and `imgid`, `cocoid`, `filepath` where present;
          `image_id` is the stem of the file's name.
        - COCO: `file_name` (where `images` names it), `caption_id`; `image_id` is the number as text.
        - Flickr `.token`: `file_name`, `caption_id` (after `#`); `image_id` is the stem of the file's name.
        - `{image id: caption}` and `{image id: [captions]}`: no further ones.
        - tables and `datasets`: every further column, as it is. Numeric image ids become text. Without a column
          `image_id` or `caption`, another of `IMAGE_COLUMNS` or `CAPTION_COLUMNS` is taken, and a warning says which;
          where it names files, `image_id` is the stem of the name. A row with a list of captions becomes one row a
          caption. In a .tsv no cell spans lines, and quotes are text.

    Raises:
        `FileNotFoundError`: there is nothing at `path`.
        `ValueError`: the file is malformed, a column, value or split is missing, a caption is empty, `ids` does not
            cover an image or gives two images one id. The message names the file, the place in it, the field and its
            value, and what was expected.
    """
    rows = read_caption_file(path, format, split, skip_empty)
    return rename_images(rows, path, ids)


@dataclass(frozen=True)
class JoinReport:
    """
    A report of how captions and stored regions match, counted in images, with a few example ids each.

    Attributes:
        matched (`int`): images that have both captions and regions.
        missing (`int`): images that have captions but no regions.
        unused (`int`): images that have regions but no captions.
        missing_captions (`int`): captions of the missing images, which training has to leave out.
        things (`str`): the word for what captions are joined with: regions, or photos.
        texts (`str`): the word for what is joined: captions, or questions and others.
    """

    matched: int
    missing: int
    unused: int
    missing_captions: int
    matched_examples: tuple[str, ...] = ()
    missing_examples: tuple[str, ...] = ()
    unused_examples: tuple[str, ...] = ()
    things: str = "regions"
    texts: str = "captions"

    def __str__(self) -> str:
        lines = [f"{'images':<32}{'count':>10}  examples"]
        for name, count, examples in (
            (f"matched ({self.texts} and {self.things})", self.matched, self.matched_examples),
            (f"missing ({self.texts}, no {self.things})", self.missing, self.missing_examples),
            (f"unused ({self.things}, no {self.texts})", self.unused, self.unused_examples),
        ):
            more = ", …" if count > len(examples) else ""
            # An id that is no text, such as a key of a dict by number, matches nothing: show that it is none.
            shown = (example if isinstance(example, str) else f"{example!r} (no text)" for example in examples)
            lines.append(f"{name:<32}{count:>10,}  {', '.join(shown)}{more}".rstrip())
        return "\n".join(lines)


def join(
    captions: datasets.Dataset,
    store: Mapping[str, Any],
    *,
    skip_missing: bool = False,
    skip_option: str | None = "skip_missing=True (--skip-missing)",
    texts: str = "captions",
    renamed_by: str = "`unicoder-vl prepare` or --caption_ids",
) -> tuple[datasets.Dataset, JoinReport]:
    """
    Keeps the captions whose image is in `store`, and reports ids that do not match. No record of the store is read.

    Args:
        captions (`datasets.Dataset`): rows with a column `image_id`.
        store (`Mapping`): image id -> record, such as a `RegionStore`.
        skip_missing (`bool`, *optional*, defaults to `False`): drop captions whose image is not in `store`, with a
            warning, instead of raising.
        skip_option (`str`, *optional*): the option that skips missing images, as the error names it to the user; None
            if there is none.
        texts (`str`, *optional*, defaults to `"captions"`): the word for the rows.
        renamed_by (`str`, *optional*): the options that give images other ids.

    Raises:
        `ValueError`: an image is missing from `store` and `skip_missing` is not set, or all images are missing.
    """
    if "image_id" not in captions.column_names:
        raise ValueError(f"The {texts} have no column 'image_id'; their columns are {captions.column_names}.")
    if (dtype := captions.features["image_id"].dtype) not in ("string", "large_string"):
        raise ValueError(f"The {texts}' column 'image_id' holds {dtype}; expected text, as read_captions gives.")
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
        matched_examples=tuple(ids[i] for i in np.flatnonzero(found)[:EXAMPLES]),
        missing_examples=tuple(ids[i] for i in np.flatnonzero(~found)[:EXAMPLES]),
        unused_examples=tuple(islice(unused, EXAMPLES)) if len(store) > matched else (),
        texts=texts,
    )
    if report.missing == 0:
        return captions, report
    summary = (
        f"{report.missing:,} of {len(ids):,} images with {texts} ({report.missing_captions:,} {texts}) have no regions "
        f"in the store.\n{report}"
    )
    if matched == 0:
        raise ValueError(
            f"{summary}\nNothing would be left: bring the ids of both sides to one spelling (compare the examples; "
            f"{renamed_by} does it), or extract regions for these images."
        )
    if not skip_missing:
        leave_out = f"take these {texts} out of the file" if skip_option is None else f"leave them out: {skip_option}"
        raise ValueError(
            f"{summary}\nBring the ids of both sides to one spelling (compare the examples; {renamed_by} does it), "
            f"extract the missing regions, or {leave_out}."
        )
    logger.warning(f"Leaving {texts} out: {summary}")
    return captions.select(np.flatnonzero(keep)), report


def rename_images(rows: datasets.Dataset, path: str | PathLike[str], rule: str | None) -> datasets.Dataset:
    """
    Gives the images of rows other ids, or leaves them theirs without a rule.

    Args:
        rows (`datasets.Dataset`): Rows with a column `image_id`.
        path (`str` or `os.PathLike`): Their file, for the message.
        rule (`str`, *optional*): The rule, see `image_ids.id_mapping`.

    Raises:
        `ValueError`: the rule does not cover an image, or gives two images one id.
    """
    if rule is None:
        return rows
    from .image_ids import UnmappedId, id_mapping

    rename = id_mapping(rule)
    distinct, codes = encode_column(rows, "image_id")
    try:
        names = {image_id: rename(image_id) for image_id in distinct.to_pylist()}
        if _NEGATIVES in rows.column_names:
            negatives = [some and [rename(str(image_id)) for image_id in some] for some in rows[_NEGATIVES]]
            rows = _add_column(rows.remove_columns(_NEGATIVES), _NEGATIVES, negatives)
    except UnmappedId as error:
        raise ValueError(f"{path}, with the ids of {rule}: {error}") from error
    first: dict[str, str] = {}
    for before, after in names.items():
        # A table of pairs may map several ids to one image; a rule that shortens names must keep images apart.
        if rule in ("stem", "coco") and (other := first.setdefault(after, before)) != before:
            raise ValueError(f"{path}: by the rule {rule} the images {other!r} and {before!r} both become {after!r}.")
    renamed = pa.array(names.values(), pa.string()).take(pa.array(codes))
    return _add_column(rows.remove_columns("image_id"), "image_id", renamed)


def check_tokens(
    rows: datasets.Dataset, tokenizer: Callable[..., Mapping[str, Any]], path: str | PathLike[str]
) -> None:
    """
    Checks that a tokenizer makes at least one token of each caption, before anything is computed.

    Args:
        rows (`datasets.Dataset`): The captions, from `read_captions`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the model.
        path (`str` or `os.PathLike`): The file of the captions, for the message.

    Raises:
        `ValueError`: a caption has no token, such as one of control characters; the message names the images, the
            captions, and their lines.
    """
    texts = rows.select_columns(["image_id", "caption"])
    bare: list[dict[str, str]] = []
    for start in range(0, len(texts), _CHUNK):
        some = texts[start : start + _CHUNK]
        tokens = tokenizer(some["caption"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        bare += [texts[start + index] for index, ids in enumerate(tokens["input_ids"]) if not ids]
    if not bare:
        return
    places = _places(path, {row["caption"] for row in bare[:EXAMPLES]})
    shown = "\n".join(
        f"image {row['image_id']!r}: {row['caption']!r:.80}" + (f", {place}" if place else "")
        for row in bare[:EXAMPLES]
        for place in [places.get(row["caption"])]
    )
    more = f"\nand {len(bare) - EXAMPLES:,} more" if len(bare) > EXAMPLES else ""
    raise ValueError(
        f"{path}: the tokenizer makes no token of {len(bare):,} captions. Mend them, or take them out:\n{shown}{more}"
    )


def _places(path: str | PathLike[str], captions: set[str]) -> dict[str, str]:
    """Finds the places in a file where captions first stand; none where the file has no lines."""
    if not Path(path).is_file() or (format := caption_format(path)) not in _READERS:
        return {}
    places: dict[str, str] = {}
    for where, row in _entries(Path(path), format):
        if row["caption"] in captions:
            places.setdefault(row["caption"], where)
    return places

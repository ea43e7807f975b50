"""Expressions that refer to an object of a photo, read from the files of RefCOCO and of Flickr30k Entities."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ... import logging
from ...data.captions import rename_images
from ...data.labelled_files import table_of, text_field
from ...name_lists import numbered_lines, read_json, read_names
from ...regions.formats import restricted_pickle

logger = logging.get_logger(__name__)

MAX_OPCODES = 50_000_000  # RefCOCO's 142,000 expressions with their tokens take some 10 million, a minute
_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        **dict.fromkeys(("expression_id", "image_id", "expression", "split"), _TEXT),
        "box": datasets.List(datasets.Value("float32")),
        **dict.fromkeys(("image_width", "image_height"), datasets.Value("int64")),
    }
)
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/\w+)+) ([^\]]+)\]")


def read_references(
    refs: str | PathLike[str],
    instances: str | PathLike[str],
    *,
    split: str | None = None,
    ids: str | None = None,
    skip_missing: bool = False,
) -> datasets.Dataset:
    """
    Reads RefCOCO, RefCOCO+ or RefCOCOg into one row an expression, in the order of the file.

    Args:
        refs (`str` or `os.PathLike`):
            The file `refs(unc).p`, `refs(google).p` or `refs(umd).p`, of which nothing is executed; or a json of it.
        instances (`str` or `os.PathLike`):
            The file `instances.json`, with the sizes of the photos and the boxes of the objects.
        split (`str`, *optional*):
            Keep this split only, such as `"train"`, `"val"`, `"testA"` or `"testB"`.
        ids (`str`, *optional*):
            Rule that gives the images other ids than COCO's numbers, as in `read_captions`.
        skip_missing (`bool`, *optional*, defaults to `False`):
            Leave out references whose object has no box in `instances`, with a warning, instead of raising.

    Returns:
        `datasets.Dataset` with the columns `expression_id`, `image_id`, `expression`, `split`, `box` (x1 y1 x2 y2 in
        pixels), `image_width` and `image_height`.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a file is malformed, an expression is empty, an object has no box, or there is no such split. The
            message names the file, the place in it and the field.
    """
    path, content = Path(refs), read_json(instances)
    boxes = _by_id(content, "annotations", instances)
    sizes = _by_id(content, "images", instances)
    if path.suffix == ".json":
        items = read_json(path)
    else:
        items = restricted_pickle.load(path.read_bytes(), fspath(path), MAX_OPCODES)
    if not isinstance(items, list):
        raise ValueError(f"{path} holds {restricted_pickle.brief(items)}, expected a list of references.")
    rows, missing, splits = [], [], set()
    for number, ref in enumerate(items):
        where = f"{path}, reference {number}"
        needed = ("ann_id", "image_id", "split", "sentences")
        ann_id, image_id, of_split, sentences = (_field(ref, name, where) for name in needed)
        if not isinstance(of_split, str) or not isinstance(sentences, list):
            raise ValueError(
                f"{where}: split is {of_split!r:.80} and sentences is a {type(sentences).__name__}; expected a name "
                "and a list."
            )
        splits.add(of_split)
        if split not in (None, of_split):
            continue
        if ann_id not in boxes or image_id not in sizes:
            missing.append(f"reference {number} (ann_id {ann_id}, image_id {image_id})")
            continue
        box = _box(boxes[ann_id], f"{instances}, annotation {ann_id}")
        photo = f"{instances}, image {image_id}"
        width, height = (_field(sizes[image_id], side, photo) for side in ("width", "height"))
        if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
            raise ValueError(f"{photo}: it is {width!r} x {height!r}; expected pixels, at least 1 each way.")
        for sentence in sentences:
            name, text = str(_field(sentence, "sent_id", where)), text_field(sentence, "sent", where)
            rows.append((name, str(image_id), text, of_split, box, width, height))
    if missing and not skip_missing:
        raise ValueError(
            f"{path}: {len(missing):,} references have no box or photo in {instances}, such as {missing[0]}. Are "
            "both of one dataset? Leave them out with skip_missing=True (--skip_missing)."
        )
    if missing:
        logger.warning(f"{path}: left out {len(missing):,} references without a box or photo, such as {missing[0]}.")
    nothing = f"{path} has no expression of split {split!r}, only of {sorted(splits)}."
    return rename_images(table_of(rows, FEATURES, nothing), path, ids)


def read_entities(
    sentences: str | PathLike[str],
    annotations: str | PathLike[str],
    images: str | PathLike[str] | Iterable[str],
    *,
    ids: str | None = None,
) -> datasets.Dataset:
    """
    Reads Flickr30k Entities into one row a phrase that has a box. Several boxes of a phrase become the one around them,
    as its evaluations have it; phrases without a box are left out.

    Args:
        sentences, annotations (`str` or `os.PathLike`):
            The folders `Sentences` and `Annotations`.
        images (`str`, `os.PathLike` or iterable of `str`):
            The images to read, or a file of them, such as `test.txt`.
        ids (`str`, *optional*):
            Rule that gives the images other ids than Flickr's, as in `read_captions`.

    Returns:
        `datasets.Dataset` as that of [`read_references`]; `split` is None, and `expression_id` is
        image#sentence#phrase.

    Raises:
        `FileNotFoundError`: an image has no file in one of the folders.
        `ValueError`: a file is malformed, or no phrase has a box.
    """
    names = read_names(images) if isinstance(images, (str, PathLike)) else list(images)
    rows = []
    for name in names:
        boxes, width, height = _entity_boxes(Path(annotations, f"{name}.xml"))
        for number, line in numbered_lines(Path(sentences, f"{name}.txt")):
            for place, (entity, _, phrase) in enumerate(_PHRASE.findall(line)):
                if entity in boxes:
                    rows.append((f"{name}#{number}#{place}", name, phrase, None, boxes[entity], width, height))
    nothing = f"{sentences}: none of {len(names):,} images has a phrase with a box."
    return rename_images(table_of(rows, FEATURES, nothing), sentences, ids)


def _field(item: Any, name: str, where: str) -> Any:
    if not isinstance(item, dict) or name not in item:
        raise ValueError(f"{where}: no field {name!r}; it is {restricted_pickle.brief(item)}.")
    return item[name]


def _by_id(content: Any, name: str, path: str | PathLike[str]) -> dict[Any, Any]:
    items = content.get(name) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"{path} has no list of {name} at its top; expected the instances.json of RefCOCO.")
    return {_field(item, "id", f"{path}, {name}[{number}]"): item for number, item in enumerate(items)}


def _box(annotation: Any, where: str) -> list[float]:
    """Gives the corners of a box that is given as x, y, width and height."""
    box = _field(annotation, "bbox", where)
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: bbox is {box!r:.80}, expected x, y, width and height.") from error
    if not np.isfinite([x, y, width, height]).all() or width <= 0 or height <= 0:
        raise ValueError(f"{where}: bbox is {box!r:.80}, expected a width and a height above 0.")
    return [x, y, x + width, y + height]


def _entity_boxes(path: Path) -> tuple[dict[str, list[float]], int, int]:
    """Reads the boxes of an image of Flickr30k Entities by entity, each around all of its boxes, and its size."""
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(str(root.findtext(f"size/{side}"))) for side in ("width", "height"))
        found: dict[str, list[list[float]]] = {}
        for thing in root.iter("object"):
            corners = [thing.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            if None in corners:
                continue  # a scene, or something that has no box
            for entity in thing.iterfind("name"):
                found.setdefault(str(entity.text), []).append([float(str(corner)) for corner in corners])
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: expected the xml of Flickr30k Entities, with a size and boxes ({error}).") from error
    around = {entity: np.array(boxes) for entity, boxes in found.items()}
    return {name: [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)] for name, boxes in around.items()}, width, height

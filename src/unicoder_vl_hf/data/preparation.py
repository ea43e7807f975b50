"""
Captions made ready for photos: with the ids of the photos and splits that share no image, in one file that every script
takes.

Photos keep their ids, since a store has them. The images of the captions get these ids by a rule that is found and
reported. An id that could mean two photos is an error: nothing is guessed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from os import PathLike
from pathlib import Path

import datasets

from .. import logging
from ..files import complete, partial_path, say_finished
from ..name_lists import read_names
from ..regions.conversion import UnmappedId
from ..regions.photos import in_words, list_photos, stem
from ..regions.shards import MANIFEST, UNFINISHED
from ..regions.store import RegionStore
from .caption_files import EXAMPLES
from .captions import JoinReport, read_captions
from .image_ids import coco_number, photo_ids

logger = logging.get_logger(__name__)

COLUMNS = ("image_id", "caption", "split")
SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)
# Rules by which ids of captions and of photos are compared, the surest first.
RULES: dict[str, Callable[[str], str]] = {"equal": str, "stem": stem, "coco": coco_number}
RULES_IN_WORDS = {
    "equal": "equal on both sides",
    "stem": "by the rule stem, without folders and suffix",
    "coco": "by the rule coco, the number at the end",
}


@dataclass(frozen=True)
class PreparedCaptions:
    """
    The outcome of `prepare`; `str` of it is a report.

    Attributes:
        path (`Path`): The file of captions that was written.
        rule (`str`): The rule by which the ids match, a key of `RULES`.
        join (`JoinReport`): Counts of images that match and that do not; those without a photo have the ids of the
            captions.
        splits (`dict[str, tuple[int, int]]`): Number of images and of captions of each split.
        drawn (`str`): The origin of the splits, in words.
        photo_of (`dict[str, str]`): Id of an image in the captions -> id of its photo, where it has one.
        skipped (`Path`, *optional*): The list of captions and photos that are left out, with reasons; None where there
            are none.
    """

    path: Path
    rule: str
    join: JoinReport
    splits: dict[str, tuple[int, int]]
    drawn: str
    photo_of: Mapping[str, str] = field(repr=False, default_factory=dict)
    skipped: Path | None = None

    def __str__(self) -> str:
        before, after = next(iter(self.photo_of.items()))
        example = "" if before == after else f": {before!r} is the photo {after!r}"
        lines = [
            f"{self.path}: {sum(captions for _, captions in self.splits.values()):,} captions of "
            f"{sum(images for images, _ in self.splits.values()):,} images",
            f"ids {RULES_IN_WORDS[self.rule]}{example}",
            str(self.join),
            f"{f'splits, {self.drawn}':<32}{'images':>10}{'captions':>10}",
            *(f"{name:<32}{images:>10,}{captions:>10,}" for name, (images, captions) in self.splits.items()),
        ]
        return "\n".join(lines + ([] if self.skipped is None else [f"What is left out is listed in {self.skipped}."]))


def prepare(
    photos: str | PathLike[str],
    captions: str | PathLike[str],
    output: str | PathLike[str],
    *,
    ids: str = "stem",
    caption_ids: str | None = None,
    splits: Sequence[float] | None = None,
    split_lists: Mapping[str, str | PathLike[str]] | None = None,
    seed: int = 0,
    restart: bool = False,
) -> PreparedCaptions:
    """
    Writes the captions of photos with the photos' ids and with splits, as a .jsonl that every script takes.

    Called again with the same arguments it changes nothing.

    Args:
        photos (`str` or `os.PathLike`): Photos in any form that `extract` takes, or the store that it wrote.
        captions (`str` or `os.PathLike`): A caption file in any layout of `read_captions`.
        output (`str` or `os.PathLike`): The .jsonl to write. Images that are left out are listed beside it, in
            `<name>.skipped.jsonl`.
        ids (`str`, defaults to `"stem"`): Rule by which photos get their ids, the one that `extract` was or will be
            given.
        caption_ids (`str`, *optional*): Rule that renames the images of the captions first, see `image_ids.id_mapping`.
        splits (sequence of `float`, *optional*): Shares of the images for train, val and test, which add up to 1. None
            keeps the splits that the captions have, and draws 0.8, 0.1 and 0.1 where they have none.
        split_lists (`Mapping[str, str]`, *optional*): In place of shares, a file for each split that names its images,
            one a line, by ids or by files. Images that no list names are left out.
        seed (`int`, defaults to 0): Seed of the draw. The place of an image in it depends on its id and the seed alone.
        restart (`bool`, defaults to `False`): Whether to write `output` anew where it holds other prepared captions.

    Raises:
        FileNotFoundError: `photos` or `captions` does not exist.
        ValueError: No id matches, one could mean two photos, an image is in two splits, or `output` holds something
            else; also for the reasons of `read_captions` and `list_photos`.
    """
    path = Path(output)
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"The output {path} must be a .jsonl, which every script takes: name it so.")
    known, source, skipped = _list_ids(Path(photos), ids)
    rows = read_captions(captions, ids=caption_ids)
    images = rows.unique("image_id")
    rule, photo_of = _meet(images, known, captions, photos)

    split_of, drawn = _split(rows, photo_of, splits, split_lists, seed, captions, RULES[rule])
    lines: list[str] = []
    counts: Counter[str] = Counter()
    missing = 0
    for image_id, caption in zip(rows["image_id"], rows["caption"], strict=True):
        photo = photo_of.get(image_id)
        missing += photo is None
        if photo is not None and photo in split_of:
            row = dict(zip(COLUMNS, (photo, caption, split_of[photo]), strict=True))
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            counts[split_of[photo]] += 1

    alone = [image_id for image_id in images if image_id not in photo_of]
    met = set(photo_of.values())
    unused = [image_id for image_id in known if image_id not in met]
    skipped += [(image_id, str(captions), "there is no photo of it") for image_id in alone]
    skipped += [(image_id, source(image_id), "it has no captions") for image_id in unused]
    skipped += [(image_id, source(image_id), "no split names it") for image_id in met if image_id not in split_of]
    list_path = path.with_name(f"{path.stem}.skipped.jsonl")
    found = PreparedCaptions(
        path=path,
        rule=rule,
        join=JoinReport(
            matched=len(photo_of),
            missing=len(alone),
            unused=len(unused),
            missing_captions=missing,
            matched_examples=tuple(list(photo_of.values())[:EXAMPLES]),
            missing_examples=tuple(alone[:EXAMPLES]),
            unused_examples=tuple(unused[:EXAMPLES]),
            things="photos",
        ),
        splits={name: (images, counts[name]) for name, images in _count(split_of.values()).items()},
        drawn=drawn,
        photo_of=photo_of,
        skipped=list_path if skipped else None,
    )
    names = ("image_id", "file", "reason")
    listed = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in skipped]
    _write(path, "".join(lines), list_path, "".join(sorted(listed)), restart, Path(captions))
    if absent := [name for name in SPLITS[:2] if name not in found.splits]:
        logger.warning(f"{path} has no split {' and '.join(absent)}, which training looks for if it is told no other.")
    if alone_in := [name for name, (count, _) in found.splits.items() if count == 1]:
        logger.warning(f"{path} has a single image in {' and '.join(alone_in)}: none that its captions could mismatch.")
    return found


def _list_ids(photos: Path, ids: str) -> tuple[list[str], Callable[[str], str], list[tuple[str | None, str, str]]]:
    """
    Gives the ids of photos or of a store, the key by which ids are looked up, and the files that the listing leaves
    out, with reasons.
    """
    if any((photos / name).exists() for name in (MANIFEST, UNFINISHED)):
        if ids != "stem":
            raise ValueError(f"{photos} is a store, whose images have their ids: leave out ids={ids!r} (--ids).")
        return list(RegionStore(photos)), lambda image_id: str(photos), []
    source = list_photos(photos, **photo_ids(ids), skip_unmapped=True)
    if source.left_out:
        logger.warning(f"{photos}: {in_words(source)}")
    number = {image_id: index for index, image_id in enumerate(source.ids)}
    left_out: list[tuple[str | None, str, str]] = [(None, file, reason) for file, reason in source.left_out]
    return source.ids, lambda image_id: source.name(number[image_id]), left_out


def _meet(
    images: Sequence[str], known: Sequence[str], captions: str | PathLike[str], photos: str | PathLike[str]
) -> tuple[str, dict[str, str]]:
    """
    Finds the rule by which most images of the captions have a photo, and the photo of each. Of rules that are equally
    good, the first wins.
    """
    found = {name: _pairs(images, known, key) for name, key in RULES.items()}
    rule = max(found, key=lambda name: len(found[name][0]))
    pairs, problem = found[rule]
    sides = f"{captions} has images such as {_some(images)}, {photos} has photos such as {_some(known)}"
    remedy = "name the photo of each image with caption_ids (--caption-ids), a .csv of source_id and image_id."
    if not pairs:
        raise ValueError(f"No image of the captions is a photo: {sides}. If some are, {remedy}")
    if problem:
        raise ValueError(f"Ids meet best {RULES_IN_WORDS[rule]}, but {problem}. Mend the names, or {remedy}")
    if rule == "coco" and 2 * len(pairs) < min(len(images), len(known)):
        raise ValueError(
            f"Only {len(pairs):,} of {len(images):,} images and {len(known):,} photos meet {RULES_IN_WORDS[rule]}, "
            f"which may be by chance: {sides}. If they do, {remedy}"
        )
    return rule, pairs


def _pairs(images: Iterable[str], known: Iterable[str], key: Callable[[str], str]) -> tuple[dict[str, str], str]:
    """
    Gives the photo of each image that has one by this key, and, in words, why that is ambiguous (empty where it is
    not).
    """
    photos: dict[str, list[str]] = {}
    for photo in known:
        with suppress(UnmappedId):
            photos.setdefault(key(photo), []).append(photo)
    pairs: dict[str, str] = {}
    image_of: dict[str, str] = {}
    problem = ""
    for image_id in images:
        with suppress(UnmappedId):
            for photo in photos.get(key(image_id), ()):
                if pairs.setdefault(image_id, photo) != photo:
                    problem = f"{image_id!r} could be the photo {pairs[image_id]!r} or {photo!r}"
                if (other := image_of.setdefault(photo, image_id)) != image_id:
                    problem = f"both {other!r} and {image_id!r} of the captions would be the photo {photo!r}"
    return pairs, problem


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3]))


def _split(
    rows: datasets.Dataset,
    photo_of: Mapping[str, str],
    shares: Sequence[float] | None,
    lists: Mapping[str, str | PathLike[str]] | None,
    seed: int,
    captions: str | PathLike[str],
    key: Callable[[str], str],
) -> tuple[dict[str, str], str]:
    """Gives the split of each photo, and the origin of the splits in words."""
    if lists:
        if shares is not None:
            raise ValueError("Give either splits (--splits), to be drawn, or split_lists (--split-list).")
        return _listed(photo_of, lists, key), f"by {len(lists)} lists"
    if shares is not None or "split" not in rows.column_names:
        return _draw(photo_of.values(), SHARES if shares is None else shares, seed), f"drawn with seed {seed}"
    split_of: dict[str, str] = {}
    for image_id, split in zip(rows["image_id"], rows["split"], strict=True):
        if not split:
            raise ValueError(
                f"{captions}: a caption of image {image_id!r} has the split {split!r}; expected a name. Complete the "
                "column, or have splits drawn: splits=(0.8, 0.1, 0.1) (--splits 0.8,0.1,0.1)."
            )
        if image_id in photo_of and (other := split_of.setdefault(photo_of[image_id], split)) != split:
            raise ValueError(
                f"{captions}: image {image_id!r} is in the splits {other!r} and {split!r}; expected one. Mend the "
                "column, or have splits drawn: splits=(0.8, 0.1, 0.1) (--splits 0.8,0.1,0.1)."
            )
    return split_of, "as the captions have them"


def _draw(photos: Iterable[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """
    Draws splits by shares: photos are ordered by a function of their ids and the seed, and cut where the shares end.
    """
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"splits are {tuple(shares)}; expected shares of {', '.join(SPLITS)} that add up to 1.")
    order = sorted(photos, key=lambda photo: hashlib.sha256(f"{seed}:{photo}".encode()).digest())
    ends = [0, *(round(share * len(order)) for share in accumulate(shares))]
    split_of = {
        photo: name for name, begin, end in zip(SPLITS, ends, ends[1:], strict=False) for photo in order[begin:end]
    }
    for name, share in zip(SPLITS, shares, strict=False):
        if share > 0 and name not in split_of.values():
            photos_are = "1 photo is" if len(order) == 1 else f"{len(order)} photos are"
            raise ValueError(
                f"{photos_are} too few: a share of {share:g} leaves none for {name}. Ask for fewer splits, such as "
                "splits=(1, 0, 0) (--splits 1,0,0), which puts all in train."
            )
    return split_of


def _listed(
    photo_of: Mapping[str, str], lists: Mapping[str, str | PathLike[str]], key: Callable[[str], str]
) -> dict[str, str]:
    """Gives the splits by lists, which name images as the captions do or as the photos do, by ids or by files."""
    by_id = {**photo_of, **{photo: photo for photo in photo_of.values()}}
    by_key = {key(photo): photo for photo in photo_of.values()}

    def find(name: str) -> str | None:
        photo = by_id.get(name) or by_id.get(stem(name))
        with suppress(UnmappedId):
            photo = photo or by_key.get(key(name))
        return photo

    split_of: dict[str, str] = {}
    for split, path in lists.items():
        names = read_names(path)
        lost = []
        for name in names:
            if (photo := find(name)) is None:
                lost.append(name)
            elif (other := split_of.setdefault(photo, split)) != split:
                raise ValueError(f"{path}: {name!r} is in the split {other!r}, too; expected one split an image.")
        if len(lost) == len(names):
            raise ValueError(
                f"{path}: none of its {len(names):,} names, such as {_some(names)}, has photo and captions."
            )
        if lost:
            logger.warning(
                f"{path}: {len(lost):,} of {len(names):,} names have no photo or no captions: {_some(lost)}."
            )
    return split_of


def _count(names: Iterable[str]) -> dict[str, int]:
    """Counts how often each name occurs, the usual splits first."""
    counts = Counter(names)
    return {name: counts[name] for name in (*SPLITS, *sorted(counts.keys() - set(SPLITS))) if counts[name]}


def _write(path: Path, content: str, list_path: Path, listed: str, restart: bool, captions: Path) -> None:
    """
    Writes both files, whole or not at all, the captions last. Raises ValueError where an existing file would be lost.
    """
    files = {list_path: listed, path: content}
    if path.exists():
        if path.is_dir() or (captions.exists() and path.samefile(captions)):
            raise ValueError(f"{path} is a folder, or the captions themselves: name another file.")
        if path.read_text(encoding="utf-8") == content:
            say_finished(path)
            del files[path]  # photos without captions may have come or gone
        elif not _is_prepared(path):
            raise ValueError(f"{path} exists and holds no prepared captions: name another file.")
        elif not restart:
            raise ValueError(
                f"{path} holds other captions than these arguments give: write it anew with restart=True (--restart), "
                "or name another file."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    for file_path, text in files.items():
        if text:
            with partial_path(file_path).open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                complete(file, file_path)
        else:
            file_path.unlink(missing_ok=True)


def _is_prepared(path: Path) -> bool:
    with path.open(encoding="utf-8") as file, suppress(ValueError):
        return tuple(json.loads(file.readline())) == COLUMNS
    return False

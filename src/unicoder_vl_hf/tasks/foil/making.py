"""Makes foils that guessing cannot tell: balanced in their words, and filtered by scorers that see no image.

A word is as often the false one as it is the true one, and so is each pair of words: knowing words alone helps nobody.
What is left is told by the words around, which scorers learn on foils of the training split; of the others, those stay
that they tell apart least.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import datasets
import numpy as np

from ...data.caption_files import select_split
from ...data.captions import join, read_captions
from ...data.foils import Foil, put_word, write_foils
from ...regions.store import RegionStore
from . import nouns
from .text_only import train_text_only

MOST_TOLD = 0.51  # share of the foils of a kind


def noun_foils(captions: datasets.Dataset, store: RegionStore) -> list[Foil]:
    """
    Makes all foils of captions that replace a noun by another of its kind, of a class of COCO that neither a caption
    of the image nor a region names.

    Args:
        captions (`datasets.Dataset`): Rows with `image_id`, `caption` and `split`; all captions of each image.
        store ([`RegionStore`]): The regions, with object ids.

    Raises:
        `ValueError`: the object ids are not of COCO's classes, or an image has none.
    """
    class_of = nouns.class_numbers(store.provenance["class_names"], store.provenance["num_classes"])
    named: dict[str, set[int]] = {}
    for image_id in captions.unique("image_id"):
        ids = store[image_id].object_ids
        if ids is None:
            raise ValueError(
                f"{store.path}, image {image_id!r}: the record has no object_ids, of which foils must not be. Add them "
                "with `unicoder-vl label`."
            )
        named[image_id] = {class_of[number] for number in np.unique(ids).tolist() if number in class_of}
    for row in captions:
        named[row["image_id"]] |= nouns.named_classes(row["caption"])
    alike = nouns.nouns_by_kind()
    return [
        Foil(
            row["image_id"], row["split"], row["caption"],
            put_word(row["caption"], mention.start, mention.end, noun.text),
            mention.noun.text, noun.text, noun.kind,
        )
        for row in captions
        for mention in nouns.mentions(row["caption"])
        for noun in alike[mention.noun.kind, mention.noun.plural]
        if noun.object_class not in named[row["image_id"]]
    ]  # fmt: skip


def couples(foils: Sequence[Foil], ease: np.ndarray) -> np.ndarray:
    """
    Couples each foil that puts word b in the place of a with one of its split that puts a in the place of b, the
    hardest with the hardest; foils without a partner are left over.

    Args:
        foils (sequence of `Foil`): The foils.
        ease (`np.ndarray` of shape `(num_foils,)`): How easily each is told apart; equal ones keep their order.

    Returns:
        `np.ndarray` of shape `(num_couples, 2)`: numbers of foils; the couples with the lowest sum of `ease` first.
    """
    of_words: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for number in np.argsort(ease, kind="stable").tolist():
        foil = foils[number]
        of_words[foil.split, foil.kind, foil.word.lower(), foil.foil_word.lower()].append(number)
    found = [
        couple
        for (split, kind, word, other), numbers in of_words.items()
        if word < other
        for couple in zip(numbers, of_words.get((split, kind, other, word), ()), strict=False)
    ]
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[np.argsort(ease[pairs].sum(axis=1), kind="stable")]


def hard_foils(foils: Sequence[Foil], train: Sequence[Foil], seed: int = 0) -> list[Foil]:
    """
    Chooses foils that scorers without images cannot tell: of each kind the hardest couples.

    Six scorers are trained, which differ in their seed. Two of them say how hard a couple is, the third how many are
    kept: as many as it tells no better than `MOST_TOLD`. The other three decide nothing; their margins, `text_only`,
    show what such scorers tell.

    Args:
        foils (sequence of [`Foil`]): All foils of the splits to evaluate on.
        train (sequence of [`Foil`]): All foils of the split that the scorers are trained on.
        seed (`int`, *optional*, defaults to 0): Seed of the scorers.

    Returns:
        `list[Foil]`: the foils that were chosen, in their order.

    Raises:
        `ValueError`: nothing is left.
    """
    scorers = [train_text_only(train, 6 * seed + number) for number in range(6)]
    known = [foil for foil in foils if scorers[0].knows(foil)]
    margins = np.stack([scorer.margins(known) for scorer in scorers], axis=1)
    pairs = couples(known, (1 / (1 + np.exp(-margins[:, :2]))).mean(axis=1))
    kinds = np.array([known[number].kind for number in pairs[:, 0]])
    kept: list[int] = []
    for kind in np.unique(kinds):
        of_kind = pairs[kinds == kind]
        told = (margins[of_kind, 2] > 0).mean(axis=1).cumsum() / np.arange(1, len(of_kind) + 1)
        kept += of_kind[: (told <= MOST_TOLD).nonzero()[0].max(initial=-1) + 1].ravel().tolist()
    if not kept:
        raise ValueError("Scorers without images tell all foils apart, or no two words replace each other.")
    reported = margins[:, 3:].round(3).astype(float)
    return [replace(known[number], text_only=reported[number].tolist()) for number in sorted(kept)]


def training_foils(foils: Sequence[Foil], seed: int = 0) -> list[Foil]:
    """
    Chooses foils to learn from: all that find a partner, so that no word is more often false than true. Words around
    may still tell them; `unicoder-vl foil` makes foils to be measured by, of other splits.

    Args:
        foils (sequence of [`Foil`]): All foils of the training split.
        seed (`int`, *optional*, defaults to 0): Seed of the couples that are made where several could be.

    Returns:
        `list[Foil]`: the foils that were chosen, in their order.

    Raises:
        `ValueError`: no two words replace each other.
    """
    pairs = couples(foils, np.random.default_rng(seed).random(len(foils)))
    if len(pairs) == 0:
        raise ValueError(
            "No two words of the training captions replace each other: give more captions, or train without foils."
        )
    return [foils[number] for number in sorted(pairs.ravel().tolist())]


def make_foils(
    output: str | PathLike[str],
    captions: str | None = None,
    regions: str | None = None,
    *,
    splits: Sequence[str] = ("val", "test"),
    train_split: str = "train",
    caption_ids: str | None = None,
    seed: int = 0,
    for_training: bool = False,
) -> list[Foil]:
    """
    Makes a file of foils of captions or of the rendered scenes: foils that scorers without images cannot tell, to be
    measured by, or foils to learn from.

    Args:
        output (`str` or `os.PathLike`): The new file, a JSON object a line.
        captions, regions (`str`, *optional*): A caption file in any layout, and the [`RegionStore`] of its images, with
            COCO's classes. By default the foils are of the scenes that `build_scenes` draws.
        splits (sequence of `str`, *optional*): The splits that foils are made of.
        train_split (`str`, *optional*): The split that the scorers without images are trained on.
        caption_ids (`str`, *optional*): Other ids for the captions' images, see `ids` of [`read_captions`].
        seed (`int`, *optional*, defaults to 0): Seed of the scorers, or of the choice `for_training`.
        for_training (`bool`, *optional*, defaults to `False`): Whether to make the [`training_foils`] of `train_split`
            in place of those of `splits`.

    Returns:
        `list[Foil]`: the foils.

    Raises:
        `ValueError`: `output` exists, a split is missing or named as both, the regions have no classes of COCO, or no
        foil is left.
    """
    if Path(output).exists():
        raise ValueError(f"{output} exists already: remove it, or choose another name.")
    if (captions is None) != (regions is None):
        raise ValueError("Give both captions and regions, or neither for the rendered scenes.")
    if for_training:
        splits = ()
    elif train_split in splits:
        raise ValueError(f"{train_split!r} is the split that scorers are trained on: foils of it they know by heart.")
    if captions is None or regions is None:
        from ...scenes.foils import caption_foils, world_foils

        made = caption_foils if for_training else world_foils
        of_split = {split: made(split) for split in (train_split, *splits)}
    else:
        store = RegionStore(regions)
        rows, _ = join(read_captions(captions, ids=caption_ids), store, skip_option=None)
        foils = noun_foils(rows, store)
        of_split = {}
        for split in (train_split, *splits):
            select_split(rows, Path(captions), split)  # which must be there
            of_split[split] = [foil for foil in foils if foil.split == split]
    if for_training:
        chosen = training_foils(of_split[train_split], seed)
    else:
        chosen = hard_foils([foil for split in splits for foil in of_split[split]], of_split[train_split], seed)
    write_foils(output, chosen)
    return chosen

"""Makes foils that guessing cannot tell: balanced in their words, and filtered by scorers that see no image.

A word is as often the false one as it is the true one, and so is each pair of words: knowing words alone helps nobody.
What is left is told by the words around, which scorers learn on foils of the training split; of the others, those stay
that they tell apart least.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import datasets
import numpy as np

from ...data.foils import Foil
from ...regions.store import RegionStore
from . import nouns
from .text_only import train_text_only


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
            row["image_id"], row["split"], row["caption"], nouns.replace(row["caption"], mention, noun),
            mention.noun.text, noun.text, noun.kind,
        )
        for row in captions
        for mention in nouns.mentions(row["caption"])
        for noun in alike[mention.noun.kind, mention.noun.plural]
        if noun.object_class not in named[row["image_id"]]
    ]  # fmt: skip


def couples(foils: Sequence[Foil], ease: np.ndarray) -> np.ndarray:
    """
    Couples each foil that puts word b in the place of a with one that puts a in the place of b, the hardest with the
    hardest; foils without a partner are left over.

    Args:
        foils (sequence of `Foil`): The foils.
        ease (`np.ndarray` of shape `(num_foils,)`): How easily each is told apart; equal ones keep their order.

    Returns:
        `np.ndarray` of shape `(num_couples, 2)`: numbers of foils; the couples with the lowest sum of `ease` first.
    """
    of_words: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number in np.argsort(ease, kind="stable").tolist():
        foil = foils[number]
        of_words[foil.kind, foil.word.lower(), foil.foil_word.lower()].append(number)
    found = [
        couple
        for (kind, word, other), numbers in of_words.items()
        if word < other
        for couple in zip(numbers, of_words.get((kind, other, word), ()), strict=False)
    ]
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[np.argsort(ease[pairs].sum(axis=1), kind="stable")]


def hard_foils(
    foils: Sequence[Foil],
    train: Sequence[Foil],
    filter_seeds: Sequence[int] = (0, 1),
    report_seeds: Sequence[int] = (2, 3, 4),
) -> list[Foil]:
    """
    Chooses foils that scorers without images cannot tell: of each kind the hardest couples, as many as such scorers
    tell apart no more often than a coin would.

    Args:
        foils (sequence of [`Foil`]): All foils of the splits to evaluate on.
        train (sequence of [`Foil`]): All foils of the split that the scorers are trained on.
        filter_seeds (sequence of `int`, *optional*): Seeds of the scorers that choose.
        report_seeds (sequence of `int`, *optional*): Seeds of the scorers whose margins are noted as `text_only`.

    Returns:
        `list[Foil]`: the foils that were chosen, in their order.

    Raises:
        `ValueError`: nothing is left.
    """
    scorers = [train_text_only(train, seed) for seed in (*filter_seeds, *report_seeds)]
    known = [foil for foil in foils if scorers[0].knows(foil)]
    margins = np.stack([scorer.margins(known) for scorer in scorers], axis=1)
    chosen, reported = np.split(margins, [len(filter_seeds)], axis=1)
    pairs = couples(known, (1 / (1 + np.exp(-chosen))).mean(axis=1))
    kinds = np.array([known[number].kind for number in pairs[:, 0]])
    kept: list[int] = []
    for kind in np.unique(kinds):
        of_kind = pairs[kinds == kind]
        told = (chosen[of_kind] > 0).mean(axis=(1, 2)).cumsum() / np.arange(1, len(of_kind) + 1)
        kept += of_kind[: np.flatnonzero(told <= 0.5)[-1] + 1].ravel().tolist() if (told <= 0.5).any() else []
    if not kept:
        raise ValueError("Scorers without images tell all foils apart, or no two words replace each other.")
    return [replace(known[number], text_only=[round(float(m), 3) for m in reported[number]]) for number in sorted(kept)]

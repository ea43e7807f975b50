"""Mines hard negatives: captions and images that the current model wrongly takes for matches.

Scoring N x M of a large split is out of reach for a cross-encoder. So each query (a caption among images, an image
among captions) meets few: the images of a split are dealt at random into sets, within which every caption is scored
with every image; or a first stage proposes what is nearest to the query in the whole split. Of these the best that do
not match are kept. The guards against matches that nobody wrote down are those of sentence-transformers'
`mine_hard_negatives`.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from ... import logging
from ...data.caption_files import encode_column, select_split
from ...data.captions import check_tokens, join, read_captions
from ...data.negatives import NEGATIVE_CAPTIONS, NEGATIVE_IMAGES, MismatchIndex, read_duplicate_groups
from ...files import OutputKind, begun_anew, json_digest, new_folder, remove_folder, say_finished, write_json
from ...processes import start_processes
from ...regions.store import RegionStore
from ...scoring.blocks import JOB, RESULT
from ...scoring.checkpoints import checkpoint_provenance, load_for_store
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import DualEncoder, UnicoderVLDualEncoder
from ...search.index import nearest, store_identity
from ...shares import Share, check_restart

logger = logging.get_logger(__name__)

CAPTION_SCORES, IMAGE_SCORES = "negative_caption_scores", "negative_image_scores"

SETTINGS = "mining.json"  # in the folder of mined captions: what they were mined with
MINED = OutputKind(
    "folder of mined captions",
    last="state.json",
    files=("data-*.arrow", "cache-*.arrow", "dataset_info.json", "state.json", SETTINGS),
    work=(JOB, RESULT, "*.blocks", "*.partial"),
)

SALT = 0x6D696E65  # keeps these draws apart from others that use the same seed


@dataclass(frozen=True)
class MiningRule:
    """
    The rule by which candidates of a query become its negatives. All values are on `s = sigmoid(score)`, in `(0, 1)`: a
    share of the score itself would turn round where it is negative.

    Args:
        num_negatives (`int`, *optional*, defaults to 3):
            The number of negatives of each query, at least 1.
        range_max (`int`, *optional*):
            The number of candidates that are looked at, the best that do not match; by default all.
        max_score, min_score (`float`, *optional*):
            The highest and the lowest `s` of a negative, in `[0, 1]`.
        absolute_margin, relative_margin (`float`, *optional*):
            Bounds of a negative in `[0, 1]`: it is at most `s - absolute_margin` and `s * (1 - relative_margin)`, with
            the LOWEST `s` of the query's matches.
        range_min (`int`, *optional*, defaults to 0):
            The number of remaining candidates that are passed over, the best ones.
        sampling_strategy (`"top"` or `"random"`, *optional*, defaults to `"top"`):
            The negatives that are taken from the remaining candidates: the best, or any.

    Raises:
        `ValueError`: a value is out of its range.
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling_strategy: Literal["top", "random"] = "top"

    def __post_init__(self):
        if self.num_negatives < 1 or self.range_min < 0:
            raise ValueError(
                f"num_negatives={self.num_negatives}, range_min={self.range_min}; expected at least 1 and 0."
            )
        if self.range_max is not None and self.range_max < self.range_min + self.num_negatives:
            raise ValueError(
                f"range_max={self.range_max}; expected at least range_min + num_negatives = "
                f"{self.range_min + self.num_negatives}."
            )
        for name in ("max_score", "min_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}; expected a value in 0..1, as it is compared with sigmoid(score).")
        if self.sampling_strategy not in ("top", "random"):
            raise ValueError(f"sampling_strategy={self.sampling_strategy!r}; expected 'top' or 'random'.")

    def choose(self, scores: np.ndarray, match: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """
        Chooses the candidates that become negatives of one query, the best first; fewer than wanted if the guards leave
        no more.

        Args:
            scores (array of shape `(n,)`): the scores of the candidates, as the model gives them.
            match (boolean array of shape `(n,)`): whether a candidate matches; at least one does.
            codes (integer array of shape `(n,)`): equal for candidates that are the same; the best of them counts.
            rng (`np.random.Generator`): draws for `"random"`.

        Returns:
            Positions of candidates, int64, at most `num_negatives`.
        """
        s = sigmoid(scores)
        lowest = s[match].min()
        order = np.argsort(-scores, kind="stable")
        order = order[~match[order]]
        order = order[np.sort(np.unique(codes[order], return_index=True)[1])][: self.range_max]
        keep = np.ones(len(order), dtype=bool)
        if self.max_score is not None:
            keep &= s[order] <= self.max_score
        if self.min_score is not None:
            keep &= s[order] >= self.min_score
        if self.absolute_margin is not None:
            keep &= s[order] + self.absolute_margin <= lowest
        if self.relative_margin is not None:
            keep &= s[order] <= lowest * (1 - self.relative_margin)
        order = order[keep][self.range_min :]
        if self.sampling_strategy == "random":
            order = order[np.sort(rng.permutation(len(order))[: self.num_negatives])]
        return order[: self.num_negatives]


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Computes the sigmoid in float64, which tells 1 - 1e-16 from 1."""
    return 1 / (1 + np.exp(-np.clip(np.asarray(scores, dtype=np.float64), -500, 500)))


def mine_hard_negatives(
    pairs: datasets.Dataset,
    scorer: ImageTextScorer,
    rule: MiningRule = MiningRule(),
    *,
    images_per_set: int = 100,
    encoder: DualEncoder | None = None,
    candidates: int = 50,
    duplicates: Iterable[Sequence[str]] = (),
    seed: int = 0,
    max_length: int = 44,
    scores_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """
    Adds to each pair the captions that are hard for its image, and the images that are hard for its caption.

    Under `accelerate launch` every process calls it, scores its share, and gets the whole.

    Args:
        pairs (`datasets.Dataset`): rows with `image_id` and `caption`: the whole split.
        scorer ([`ImageTextScorer`]): the scorer of the current model.
        rule ([`MiningRule`], *optional*): the rule by which candidates become negatives.
        images_per_set (`int`, *optional*, defaults to 100): images that are scored with the captions of one another;
            time grows with it, as do the chances of finding what is hard.
        encoder ([`UnicoderVLDualEncoder`] or [`TransformersDualEncoder`], *optional*): a first stage, which replaces
            the sets: each query is scored with what is nearest to it in the whole split.
        candidates (`int`, *optional*, defaults to 50): the number of these, beside the query's own matches.
        duplicates, seed, max_length: the arguments of [`PairsWithNegatives`] and [`ImageTextScorer`].
        scores_dir (`str` or `os.PathLike`, *optional*): the folder in which the scorer keeps scores, to go on from
            there.

    Returns:
        `datasets.Dataset`: `pairs` with the columns `negative_captions`, `negative_image_ids` (lists of
        `num_negatives`), and `negative_caption_scores`, `negative_image_scores` (sigmoid of the score, or `None` for
        one that was drawn at random because too few were found, which is logged). No false negative is among them, as
        in [`PairsWithNegatives`].
    """
    captions = pairs["caption"][:]
    codes, image_of_row = encode_column(pairs, "image_id")
    image_ids, index = codes.to_pylist(), MismatchIndex.from_pairs(pairs, duplicates)
    rows_of_image = np.split(np.argsort(image_of_row, kind="stable"), np.cumsum(np.bincount(image_of_row))[:-1])
    if encoder is None:
        rows_met, images_met = _sets(rows_of_image, images_per_set, seed)
    elif candidates < rule.range_min + rule.num_negatives:
        raise ValueError(
            f"candidates={candidates}; expected at least range_min + num_negatives = "
            f"{rule.range_min + rule.num_negatives}."
        )
    else:
        texts, images = encoder.embed_captions(captions), encoder.embed_images(image_ids)
        near_rows, near_images = nearest(images, texts, candidates)[0], nearest(texts, images, candidates)[0]
        rows_met = [np.union1d(*met) for met in zip(near_rows, rows_of_image, strict=True)]
        images_met = [np.union1d(*met) for met in zip(near_images, image_of_row, strict=True)]

    width = len(image_ids)  # pairs are numbered as in the matrix of all captions and images
    by_image = [rows * width + image for image, rows in enumerate(rows_met)]
    by_row = [row * width + images for row, images in enumerate(images_met)]
    numbers = np.unique(np.concatenate(by_image + by_row))
    scores = scorer.score_pairs(
        captions, image_ids, *np.divmod(numbers, width), max_length=max_length, output_dir=scores_dir
    )
    hardest = functools.partial(_hard_negatives, index, rule, seed)
    firsts = np.array([rows[0] for rows in rows_of_image])  # a row that stands for each image
    hard_captions: list[_Found] = [([], [])] * len(pairs)
    for image, (rows, pairs_met) in enumerate(zip(rows_met, by_image, strict=True)):
        found = hardest(firsts[image], rows, scores[np.searchsorted(numbers, pairs_met)], replace_image=False)
        for row in rows_of_image[image]:
            hard_captions[row] = found
    hard_images = [
        hardest(row, firsts[images], scores[np.searchsorted(numbers, pairs_met)], replace_image=True)
        for row, (images, pairs_met) in enumerate(zip(images_met, by_row, strict=True))
    ]
    shares = []
    for name, hard in (("captions", hard_captions), ("images", hard_images)):
        drawn, wanted = sum(values.count(None) for _, values in hard), len(pairs) * rule.num_negatives
        if drawn:
            shares.append(f"{drawn:,} of {wanted:,} negative {name} ({drawn / wanted:.0%})")
    if shares:
        logger.warning(
            f"{' and '.join(shares)} were not found within the guards, and are drawn at random. "
            f"More {'images_per_set' if encoder is None else 'candidates'} or looser guards find more."
        )
    columns = {
        NEGATIVE_CAPTIONS: [[captions[row] for row in rows] for rows, _ in hard_captions],
        CAPTION_SCORES: [values for _, values in hard_captions],
        NEGATIVE_IMAGES: [[image_ids[image_of_row[row]] for row in rows] for rows, _ in hard_images],
        IMAGE_SCORES: [values for _, values in hard_images],
    }
    kinds = {CAPTION_SCORES: "float64", IMAGE_SCORES: "float64"}
    pairs = pairs.remove_columns([name for name in columns if name in pairs.column_names])
    for name, values in columns.items():
        feature = datasets.List(datasets.Value(kinds.get(name, "string")))
        pairs = pairs.add_column(name, values, feature=feature)
    return pairs


def _sets(
    rows_of_image: Sequence[np.ndarray], images_per_set: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Deals images at random into sets, and gives the rows that each image meets and the images that each row meets."""
    if images_per_set < 2:
        raise ValueError(f"images_per_set={images_per_set}; expected at least 2.")
    order = np.random.default_rng([seed, SALT]).permutation(len(rows_of_image))
    rows_met: dict[int, np.ndarray] = {}
    images_met: dict[int, np.ndarray] = {}
    for images in map(np.sort, np.array_split(order, max(1, round(len(order) / images_per_set)))):
        rows = np.concatenate([rows_of_image[image] for image in images])
        rows_met |= dict.fromkeys(images.tolist(), rows)
        images_met |= dict.fromkeys(rows.tolist(), images)
    return [rows_met[image] for image in sorted(rows_met)], [images_met[row] for row in sorted(images_met)]


_Found = tuple[list[int], list[float | None]]  # rows, and sigmoid(score) of each


def _hard_negatives(
    index: MismatchIndex,
    rule: MiningRule,
    seed: int,
    row: int,
    candidates: np.ndarray,
    scores: np.ndarray,
    *,
    replace_image: bool,
) -> _Found:
    """
    Finds the negatives of one query; those that the rule does not find are drawn at random, and have no value.

    Args:
        row: the query is its caption, for which images are sought (`replace_image`), or the other way round.
        candidates: rows whose images (or captions) were scored with it.
    """
    codes = index.images if replace_image else index.texts
    match = index.makes_match(row, candidates, replace_image)
    rng = np.random.default_rng([seed, int(row), int(replace_image), SALT])
    chosen = rule.choose(scores, match, codes[candidates], rng)
    found, values = candidates[chosen].tolist(), list(sigmoid(scores[chosen]).tolist())
    found += index.draw_distinct(rng, int(row), replace_image, rule.num_negatives - len(found), but=found)
    return found, values + [None] * (len(found) - len(values))


def mine(
    model: str,
    captions: str,
    regions: str,
    output: str,
    *,
    split: str = "train",
    num_negatives: int = 3,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    sampling_strategy: Literal["top", "random"] = "top",
    images_per_set: int = 100,
    candidates: int | None = None,
    duplicates: str | None = None,
    caption_ids: str | None = None,
    seed: int = 0,
    max_length: int = 44,
    skip_missing: bool = False,
    restart: bool = False,
    share: Share | None = None,
) -> datasets.Dataset:
    """
    Mines one split of a caption file, and writes ALL its splits as a dataset folder that `read_captions` and
    `run_retrieval.py --captions` read; the other splits have no negatives. A call that was stopped goes on when it is
    repeated; what is finished stays as it is. With `candidates` the checkpoint's own first stage proposes
    them. The other arguments are those of [`MiningRule`] and [`mine_hard_negatives`].

    Args:
        model (`str`): a Unicoder-VL checkpoint with its processor.
        captions (`str`): a caption file in any layout, or a folder of `datasets`. Without a column `split` all
            of it is mined, which is logged.
        regions (`str`): a [`RegionStore`].
        output (`str`): the folder, a new one or that of the same call.
        caption_ids (`str`, *optional*): other ids for the captions' images, see `ids` of [`read_captions`].
        restart (`bool`, *optional*, defaults to `False`): whether an earlier call's output is replaced.
        share ([`Share`], *optional*): the share of the pairs that is scored here, or the one that gathers what shares
            scored and mines. By default all that is left is scored.

    Raises:
        `ValueError`: `output` holds something else, a value is out of range, captions have no regions (unless
            `skip_missing`), or a share is to begin anew.
        `FinishedShare`, `MissingShares`: the share is scored, or shares that are to be gathered are not.
    """
    check_restart(restart, share)
    rule = MiningRule(
        num_negatives=num_negatives,
        range_min=range_min,
        range_max=range_max,
        max_score=max_score,
        min_score=min_score,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        sampling_strategy=sampling_strategy,
    )
    state, target = start_processes(), Path(output)
    scores_dir = target.with_name(f"{target.name}.scores")
    with ExitStack() as stack:
        if state.is_main_process:
            if target.resolve() == Path(captions).resolve():
                raise ValueError(f"{target} holds the captions to be mined: name another folder for what is mined.")
            if target.exists() and not _is_mined(target):
                raise ValueError(f"{target} exists and holds no mined captions: name another folder.")
            stack.enter_context(begun_anew(target, restart, MINED, scores_dir))
        state.wait_for_everyone()  # until what is to be removed is gone
        store = RegionStore(regions)
        table, report = join(read_captions(captions, ids=caption_ids), store, skip_missing=skip_missing)
        logger.warning(f"{captions} with {store}:\n{report}")
        pairs, rest = table, table.select([])
        if "split" in table.column_names:
            pairs = select_split(table, captions, split)
            rest = table.select([row for row, name in enumerate(table["split"]) if name != split])
        else:
            logger.warning(f"{captions} has no column 'split': all of it is mined.")

        loaded, processor = load_for_store(model, store)
        check_tokens(pairs, processor.tokenizer, captions)
        encoder = None if candidates is None else UnicoderVLDualEncoder(loaded, processor, store, model, max_length)
        groups = [] if duplicates is None else read_duplicate_groups(duplicates)
        settings = {
            "model": checkpoint_provenance(model, loaded),
            "first_stage": None if encoder is None else encoder.identity(),
            "captions": json_digest([table["image_id"][:], table["caption"][:]]),
            "splits": json_digest(table["split"][:]) if "split" in table.column_names else None,
            "regions": store_identity(store),
            "split": split,
            **asdict(rule),
            "images_per_set": images_per_set if candidates is None else None,
            "candidates": candidates,
            "duplicates": json_digest(groups),
            "seed": seed,
            "max_length": max_length,
        }
        if target.exists():
            _check_settings(target, settings)
            if state.is_main_process:
                say_finished(target)
                remove_folder(scores_dir)  # left by a kill at the end
            return datasets.load_from_disk(str(target))
        state.wait_for_everyone()  # until all of them have seen that there is no output
        mined = mine_hard_negatives(
            pairs,
            ImageTextScorer(loaded, processor, store, share=share),
            rule,
            images_per_set=images_per_set,
            encoder=encoder,
            candidates=candidates or 0,
            duplicates=groups,
            seed=seed,
            max_length=max_length,
            scores_dir=scores_dir,
        )
        if len(rest):
            for name, feature in mined.features.items():
                if name not in rest.column_names:
                    rest = rest.add_column(name, [[]] * len(rest), feature=feature)
            mined = datasets.concatenate_datasets([mined, rest])
        if state.is_main_process:
            with new_folder(target) as folder:
                mined.save_to_disk(str(folder))
                write_json(folder / SETTINGS, settings)
        state.wait_for_everyone()
        if state.is_main_process:
            remove_folder(scores_dir)
    return datasets.load_from_disk(str(target))


def _is_mined(folder: Path) -> bool:
    """Tells the captions that `mine` wrote from any other folder."""
    info = folder / "dataset_info.json"
    return info.exists() and CAPTION_SCORES in json.loads(info.read_text(encoding="utf-8"))["features"]


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Checks that captions were mined with these settings, else raises ValueError."""
    remedy = "begin anew with restart=True (--restart), or name another folder."
    if not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} does not tell how its captions were mined: {remedy}")
    before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    before.setdefault("splits", settings["splits"])  # earlier versions did not note them
    for name, value in settings.items():
        if _without_name(before.get(name)) != _without_name(value):
            raise ValueError(f"{folder} was mined with {name}={before.get(name)!r}, not {value!r}: {remedy}")


def _without_name(value: Any) -> Any:
    """Leaves out the name: a checkpoint or a store may have been moved, and its content tells it from others."""
    return {key: of for key, of in value.items() if key != "name"} if isinstance(value, dict) else value

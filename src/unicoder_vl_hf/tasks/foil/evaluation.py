"""Evaluates a checkpoint on foils: its matching head, its first stage, and its head on the regions of other images."""

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ... import logging
from ...data.foils import Foil, read_foils
from ...files import make_folder, write_json
from ...records_unicoder_vl import RegionRecord
from ...regions.shuffled import ShuffledStore
from ...regions.store import RegionStore
from ...scoring.checkpoints import checkpoint_provenance, load_config, load_for_store
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import UnicoderVLDualEncoder
from .margins import by_matching_head, by_similarity, foil_margins
from .metrics import CROSS_ENCODER, FIRST_STAGE, FoilAccuracy, FoilGain, foil_results

logger = logging.get_logger(__name__)

SHUFFLED, TEXT_ONLY = "shuffled regions", "text only"
NUM_SHUFFLES = 3


def evaluate_foils(
    model: str | PathLike[str] | Sequence[str | PathLike[str]],
    foils: str | PathLike[str],
    regions: str,
    *,
    split: str | None = None,
    output: str | PathLike[str] | None = None,
) -> dict[str, dict[str, FoilAccuracy] | dict[str, FoilGain]]:
    """
    Measures how often a checkpoint prefers captions to their foils. A query bank, which is for a search among many
    images, rests.

    Args:
        model (`str` or `os.PathLike`, or a sequence of these): A checkpoint of pre-training or retrieval, with its
            processor; or several, such as those of three seeds: each pair counts with its mean over them.
        foils (`str` or `os.PathLike`): A file of `unicoder-vl foil`.
        regions (`str`): The [`RegionStore`] of the images.
        split (`str`, *optional*): The split whose foils are taken, by default all.
        output (`str` or `os.PathLike`, *optional*): A JSON file for the figures.

    Returns:
        `dict`: for `"cross-encoder"`, `"first stage"` (if all models have a trained one), `"shuffled regions"` (the
        matching head, each image with the regions of another) and `"text only"` (the scorers without images that the
        file tells of): the [`FoilAccuracy`] of `"all"` foils and of each kind, a `dict[str, FoilAccuracy]`; for
        `"above first stage"` the [`FoilGain`] of the cross-encoder over the first stage likewise.

    Raises:
        `ValueError`: the file has no such split, there is no model, or one scores no pairs or does not fit the regions.
        `KeyError`: the store lacks an image.
    """
    chosen = [foil for foil in read_foils(foils) if split in (None, foil.split)]
    if not chosen:
        raise ValueError(f"{foils} has no foils of the split {split!r}.")
    names = [str(name) for name in ([model] if isinstance(model, (str, PathLike)) else model)]
    if not names:
        raise ValueError("model is an empty list, expected at least one checkpoint.")
    for name in names:  # before the first is measured
        load_config(name)
    texts = [foil.text_only for foil in chosen if foil.text_only]
    if len(texts) == len(chosen) and len({len(margins) for margins in texts}) > 1:
        raise ValueError(f"{foils}: text_only has several lengths; expected the same scorers for each foil.")
    if output is not None:
        make_folder(Path(output).absolute().parent)
    store = RegionStore(regions)
    runs, provenance = zip(*(_margins_of(name, chosen, store) for name in names), strict=True)
    known = [scorer for scorer in runs[0] if all(scorer in run for run in runs)]
    margins = {scorer: np.column_stack([run[scorer] for run in runs]) for scorer in known}
    if len(texts) == len(chosen):
        margins[TEXT_ONLY] = np.array(texts)
    results = foil_results(margins, [foil.kind for foil in chosen], [foil.image_id for foil in chosen])
    if output is not None:
        values: dict[str, Any] = {"foils": str(foils), "split": split, "regions": regions}
        values["checkpoint"] = provenance[0] if isinstance(model, (str, PathLike)) else list(provenance)
        values["results"] = {
            name: {kind: dataclasses.asdict(accuracy) for kind, accuracy in of_scorer.items()}
            for name, of_scorer in results.items()
        }
        write_json(Path(output), values)
    return results


def _margins_of(name: str, foils: Sequence[Foil], store: RegionStore) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Computes the margins of a checkpoint's scorers, of each shuffle apart, and collects its provenance."""
    model, processor = load_for_store(name, store)
    provenance = checkpoint_provenance(name, model)
    if model.config.query_bank_size is not None:
        logger.warning(f"{name}: the query bank, which is for a search among many images, rests.")
        model.remove_query_bank()

    def head(records: Mapping[str, RegionRecord]) -> np.ndarray:
        return foil_margins(foils, by_matching_head(ImageTextScorer(model, processor, records)))

    margins = {CROSS_ENCODER: head(store)}
    if model.config.first_stage_trained:
        encoder = UnicoderVLDualEncoder(model, processor, store, name)
        margins[FIRST_STAGE] = foil_margins(foils, by_similarity(encoder.embed_captions, encoder.embed_images))
    ids = [foil.image_id for foil in foils]
    margins[SHUFFLED] = np.stack([head(ShuffledStore(store, ids, seed)) for seed in range(NUM_SHUFFLES)], axis=1)
    return margins, provenance


def foil_table(results: Mapping[str, Mapping[str, FoilAccuracy] | Mapping[str, FoilGain]]) -> str:
    """Makes a table of accuracies in percent with their intervals: a line for each kind, a column for each scorer."""
    first = next(iter(results.values()))
    lines = [f"{'':12}{'pairs':>7}" + "".join(f"{name:>25}" for name in results)]
    for kind, accuracy in first.items():
        cells = "".join(f"{of_scorer[kind]!s:>25}" for of_scorer in results.values())
        lines.append(f"{kind:12}{accuracy.num_foils:>7,}{cells}")
    return "\n".join(lines)

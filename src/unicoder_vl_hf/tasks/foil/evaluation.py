"""Evaluates a checkpoint on foils: its matching head, its first stage, and its head on the regions of other images."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...data.foils import read_foils
from ...files import write_json
from ...records_unicoder_vl import RegionRecord
from ...regions.shuffled import ShuffledStore
from ...regions.store import RegionStore
from ...scoring.checkpoints import checkpoint_provenance, load_for_store
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import UnicoderVLDualEncoder
from .margins import by_matching_head, by_similarity, foil_margins
from .metrics import FoilAccuracy, accuracies_by_kind

CROSS_ENCODER, FIRST_STAGE, SHUFFLED, TEXT_ONLY = "cross-encoder", "first stage", "shuffled regions", "text only"
NUM_SHUFFLES = 3


def evaluate_foils(
    model: str,
    foils: str | PathLike[str],
    regions: str,
    *,
    split: str | None = None,
    output: str | PathLike[str] | None = None,
) -> dict[str, dict[str, FoilAccuracy]]:
    """
    Measures how often a checkpoint prefers captions to their foils.

    Args:
        model (`str`): A checkpoint of pre-training or retrieval, with its processor.
        foils (`str` or `os.PathLike`): A file of `unicoder-vl foil`.
        regions (`str`): The [`RegionStore`] of the images.
        split (`str`, *optional*): The split whose foils are taken, by default all.
        output (`str` or `os.PathLike`, *optional*): A JSON file for the figures.

    Returns:
        `dict[str, dict[str, FoilAccuracy]]`: for `"cross-encoder"`, `"first stage"` (if the model has a trained one),
        `"shuffled regions"` (the matching head, each image with the regions of another) and `"text only"` (the scorers
        without images that the file tells of): the accuracy of `"all"` foils and of each kind.

    Raises:
        `ValueError`: the file has no such split, the checkpoint scores no pairs or does not fit the regions.
        `KeyError`: the store lacks an image.
    """
    chosen = [foil for foil in read_foils(foils) if split in (None, foil.split)]
    if not chosen:
        raise ValueError(f"{foils} has no foils of the split {split!r}.")
    store = RegionStore(regions)
    scoring, processor = load_for_store(model, store)

    def head(records: Mapping[str, RegionRecord]) -> np.ndarray:
        return foil_margins(chosen, by_matching_head(ImageTextScorer(scoring, processor, records)))

    margins = {CROSS_ENCODER: head(store)}
    if scoring.config.first_stage_trained:
        encoder = UnicoderVLDualEncoder(scoring, processor, store, model)
        margins[FIRST_STAGE] = foil_margins(chosen, by_similarity(encoder.embed_captions, encoder.embed_images))
    ids = [foil.image_id for foil in chosen]
    margins[SHUFFLED] = np.stack([head(ShuffledStore(store, ids, seed)) for seed in range(NUM_SHUFFLES)], axis=1)
    if all(foil.text_only for foil in chosen):
        margins[TEXT_ONLY] = np.array([foil.text_only for foil in chosen])
    kinds = [foil.kind for foil in chosen]
    results = {name: accuracies_by_kind(of_scorer, kinds, ids) for name, of_scorer in margins.items()}
    if output is not None:
        values: dict[str, Any] = {"foils": str(foils), "split": split, "regions": regions}
        values["checkpoint"] = checkpoint_provenance(model, scoring)
        values["results"] = {
            name: {kind: dataclasses.asdict(accuracy) for kind, accuracy in of_scorer.items()}
            for name, of_scorer in results.items()
        }
        write_json(Path(output), values)
    return results


def foil_table(results: Mapping[str, Mapping[str, FoilAccuracy]]) -> str:
    """Makes a table of accuracies in percent with their intervals: a line for each kind, a column for each scorer."""
    first = next(iter(results.values()))
    lines = [f"{'':12}{'pairs':>7}" + "".join(f"{name:>22}" for name in results)]
    for kind, accuracy in first.items():
        cells = "".join(f"{of_scorer[kind]!s:>22}" for of_scorer in results.values())
        lines.append(f"{kind:12}{accuracy.num_foils:>7,}{cells}")
    return "\n".join(lines)

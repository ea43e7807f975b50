"""Calibrates a checkpoint on validation pairs: each caption with its image, and one mismatch of each pair."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ... import logging
from ...data.caption_files import select_split
from ...data.captions import check_tokens, join, read_captions
from ...data.negatives import PairsWithMismatches
from ...files import write_json
from ...regions.store import RegionStore
from ...scoring.calibration import Calibration
from ...scoring.checkpoints import load_for_store, scoring_digest
from ...scoring.scorer import ImageTextScorer, distinct

logger = logging.get_logger(__name__)


def calibrate(
    model: str,
    captions: str,
    regions: str,
    *,
    split: str = "val",
    caption_ids: str | None = None,
    seed: int = 0,
    max_length: int = 44,
    skip_missing: bool = False,
) -> Calibration:
    """
    Measures what the scores of a checkpoint mean, and writes it into the checkpoint's config.json as `calibration`, for
    [`ImageTextScorer.match`]. Pairs that were trained on would flatter it: give a split that was not.

    Args:
        model (`str`): The folder of a checkpoint of pre-training or retrieval, with its processor.
        captions (`str`): A caption file in any layout.
        regions (`str`): A [`RegionStore`].
        split (`str`, *optional*, defaults to `"val"`): The split to measure on.
        caption_ids (`str`, *optional*): Other ids for the captions' images, see `ids` of [`read_captions`].
        seed (`int`, *optional*, defaults to 0): The seed of the mismatches.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption.
        skip_missing (`bool`, *optional*, defaults to `False`): Whether captions without regions are left out.

    Raises:
        `ValueError`: the checkpoint is no folder or has no trained matching head, there is no such split, a caption has
            no regions (unless `skip_missing`), or matches do not score higher than mismatches.
    """
    config = Path(model, "config.json")
    if not config.is_file():
        raise ValueError(f"{model} is no folder of a checkpoint, which could be written to: download it first.")
    store = RegionStore(regions)
    rows = select_split(read_captions(captions, ids=caption_ids), Path(captions), split)
    table, report = join(rows, store, skip_missing=skip_missing)
    logger.warning(f"{captions} with {store}:\n{report}")
    loaded, processor = load_for_store(model, store)
    check_tokens(table, processor.tokenizer, captions)
    pairs = PairsWithMismatches(table, seed=seed).make_rows(range(len(table)))
    texts, caption_index = distinct([row[name] for name in ("caption", "mismatch_caption") for row in pairs])
    images, image_index = distinct([row[name] for name in ("image_id", "mismatch_image_id") for row in pairs])
    scorer = ImageTextScorer(loaded, processor, store)
    scores = scorer.score_pairs(texts, images, caption_index, image_index, max_length=max_length)
    matches = np.arange(len(scores)) < len(pairs)
    calibration = Calibration.fit(scores, matches, scoring_digest(loaded))
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"calibration": asdict(calibration)})
    return calibration

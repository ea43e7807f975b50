"""Explains the score of an image and a caption on the photo itself, for `unicoder-vl explain` and the app."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..processing_unicoder_vl import RegionInput
from ..records_unicoder_vl import RegionRecord
from ..regions.photos import decode_photo, upright
from ..scoring.explanation import Explanation, explain
from ..scoring.scorer import ImageTextScorer
from .encoders import Photos

if TYPE_CHECKING:
    from PIL import Image


def explain_on_photo(
    scorer: ImageTextScorer, image: RegionInput, caption: str, photos: Photos | None = None, *, title: str | None = None
) -> tuple[Explanation, str]:
    """
    Explains the score of a caption with an image, see [`explain`], and shows it on the photo.

    Args:
        scorer ([`ImageTextScorer`]): The scorer.
        image (`str`, `os.PathLike`, `RegionRecord` or `PIL.Image.Image`): The image, as [`ImageTextScorer.score`] takes
            it.
        caption (`str`): The caption.
        photos ([`Photos`], *optional*): The photos of the store; without them a stored image is a blank page.
        title (`str`, *optional*): Heading. With it the HTML is a page, else a fragment for a page.

    Returns:
        The explanation, and the HTML.

    Raises:
        `ValueError`: as `score`, or the regions have no boxes.
        `KeyError`: a name that is neither an image id of the store nor a file, or a photo that `photos` lacks.
    """
    (found,) = scorer.processor.find_regions([image], scorer.store)
    photo: Image.Image | None = None
    class_names = (scorer.processor.feature_extractor.region_provenance or {}).get("class_names")
    if isinstance(found, str):
        assert scorer.store is not None
        found = scorer.store[found]
        photo = None if photos is None else photos.of(found)
        class_names = getattr(scorer.store, "provenance", {}).get("class_names")
    elif isinstance(image, str | os.PathLike) and not os.fspath(image).endswith(".npz"):
        photo = decode_photo(Path(image).read_bytes())[0]
    elif not isinstance(image, str | os.PathLike | RegionRecord | Mapping):
        photo = upright(image.copy())[0]
    explanation = explain(scorer.model, scorer.processor, found, caption)
    probability = None
    if scorer.model.config.calibration is not None:
        probability = float(scorer.calibration.probabilities(np.array(explanation.score)))
    return explanation, explanation.html(photo, class_names or None, title=title, probability=probability)

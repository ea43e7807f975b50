"""Aligns new region embeddings with the words of a BERT, by a regression that takes seconds.

A projection drawn at random says nothing to the layers of a BERT, which then have to learn what a region is while they
learn everything else. Here each region begins as the word that its image's captions lead one to expect of it: the
features predict, by least squares with a ridge, the mean word embedding of the captions. Not in the paper.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from .. import logging
from ..data.caption_files import encode_column
from ..modeling_unicoder_vl import UnicoderVLPreTrainedModel
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from .arguments import DataArguments
from .setup import CaptionedRegions, is_unicoder_vl

logger = logging.get_logger(__name__)

RIDGES = (0.01, 0.1, 1.0, 10.0)  # of the features' mean variance
FOLDS = 5
BATCH = 256  # images at a time
WITHOUT = "Leave it out: --align_regions False."


def align_if_asked(
    arguments: DataArguments, model: UnicoderVLPreTrainedModel, processor: UnicoderVLProcessor, data: CaptionedRegions
) -> None:
    """
    Aligns the regions of a run's model with the words of its training captions, if `--align_regions` asks for it, and
    the model comes from a BERT: new weights have no words yet, and the regions of a Unicoder-VL are trained.
    """
    if arguments.align_regions and arguments.base_model is not None and not is_unicoder_vl(arguments.base_model):
        align_regions(model, processor, data.store, data.train)


def align_regions(
    model: UnicoderVLPreTrainedModel,
    processor: UnicoderVLProcessor,
    store: Mapping[str, RegionRecord],
    pairs: datasets.Dataset,
    max_images: int = 10_000,
) -> float:
    """
    Sets the projection of region features so that a region embeds as the word that its image's captions lead one to
    expect: the least-squares prediction, from the feature alone, of the mean of the captions' word embeddings, weighted
    by how rare a word is. The ridge is the one that predicts best for images that were left out, a fifth at a time. The
    predictions get the standard deviation of the word embeddings.

    Args:
        model ([`UnicoderVLPreTrainedModel`]): A model whose word embeddings are trained and whose region embeddings
            are new, on the CPU. Its projection is changed in place.
        processor ([`UnicoderVLProcessor`]): The processor that makes its inputs.
        store (`Mapping[str, RegionRecord]`): The regions of every image.
        pairs (`datasets.Dataset`): Rows with `image_id` and `caption`, of the training split.
        max_images (`int`, *optional*, defaults to 10,000): At most so many images, drawn evenly, are read.

    Returns:
        `float`: the share, at most 1, of the variance of the mean word embeddings that a region explains in images
        that were left out.

    Raises:
        `ValueError`: there are fewer than five images, or the features or the captions' words do not vary.
    """
    names, image_of_row = encode_column(pairs, "image_id")
    chosen = np.arange(len(names))[:: max(1, -(-len(names) // max_images))]
    if len(chosen) < FOLDS:
        raise ValueError(
            f"Regions are aligned with the captions of at least {FOLDS} images; there are {len(chosen)}. {WITHOUT}"
        )
    embeddings: Any = model.base_model.embeddings
    words = embeddings.word_embeddings.weight.detach().double().numpy()
    targets, used = _mean_words(words, processor, pairs, image_of_row, chosen)
    if np.allclose(targets, targets[0]):
        raise ValueError(f"Regions cannot be aligned with words: all images have the same ones. {WITHOUT}")

    projection = embeddings.region_embeddings.feature_projection
    shown = names.take(chosen).to_pylist()
    products, with_target, squares = _products(processor, store, shown, targets, projection.in_features)
    totals = products.sum(0), with_target.sum(0)
    if np.trace(_covariance(totals[0])) <= 0:
        raise ValueError(f"Regions cannot be aligned with words: the features of the images are all equal. {WITHOUT}")
    errors = np.zeros(len(RIDGES) + 1)  # the last one of a prediction by the mean alone
    for held_out in zip(products, with_target, squares, strict=True):
        others = totals[0] - held_out[0], totals[1] - held_out[1]
        errors += [_error(_fit(*others, ridge), *held_out) for ridge in (*RIDGES, np.inf)]
    best = int(errors[:-1].argmin())
    explained = 1 - errors[best] / errors[-1]
    fitted = _fit(*totals, RIDGES[best])  # (D + 1, hidden_size)
    weight, mean = fitted[:-1], totals[1][-1] / totals[0][-1, -1]
    weight *= words[used].std() / np.sqrt((weight * (_covariance(totals[0]) @ weight)).sum(0).mean())
    with torch.no_grad():
        projection.weight.copy_(torch.from_numpy(weight.T))
        projection.bias.copy_(torch.from_numpy(mean - totals[0][-1, :-1] / totals[0][-1, -1] @ weight))
    logger.warning(
        f"Region embeddings begin as the words that captions of {len(chosen):,} images lead one to expect; of "
        f"images left out a region explains {100 * explained:.1f} % of their variance."
    )
    return float(explained)


def _mean_words(
    words: np.ndarray,
    processor: UnicoderVLProcessor,
    pairs: datasets.Dataset,
    image_of_row: np.ndarray,
    chosen: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Averages the embeddings of the words of each chosen image's captions, weighted by the logarithm of one over the
    share of the captions that have the word, `(len(chosen), hidden_size)`. Also gives the ids of all words.
    """
    rows = np.flatnonzero(np.isin(image_of_row, chosen))
    captions = pairs.select(rows)["caption"]
    tokens = processor.tokenizer(list(captions), add_special_tokens=False, truncation=True, max_length=512)["input_ids"]
    caption_of_token = np.repeat(np.arange(len(rows)), [len(ids) for ids in tokens])
    ids = np.concatenate([np.array(each, dtype=np.int64) for each in tokens])
    once = np.unique(np.stack((caption_of_token, ids)), axis=1)[1]
    rarity = np.log(len(rows) / np.bincount(once, minlength=len(words)).clip(min=1))
    image_of_token = np.searchsorted(chosen, image_of_row[rows])[caption_of_token]
    counted = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack((image_of_token, ids))),
        torch.from_numpy(rarity[ids]),
        (len(chosen), len(words)),
        check_invariants=True,
    )
    total = torch.from_numpy(np.bincount(image_of_token, rarity[ids], len(chosen)).clip(min=1e-12))
    return ((counted @ torch.from_numpy(words)) / total[:, None]).numpy(), np.unique(ids)


def _products(
    processor: UnicoderVLProcessor,
    store: Mapping[str, RegionRecord],
    image_ids: Sequence[str],
    targets: np.ndarray,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Sums, over the regions of each fold of images, the products of (feature, 1) with itself, `(FOLDS, D + 1, D + 1)`,
    and with the image's target, `(FOLDS, D + 1, hidden_size)`, and the squares of the targets, `(FOLDS,)`.
    """
    size, squares = (FOLDS, width + 1), np.zeros(FOLDS)
    products, with_target = np.zeros((*size, size[1])), np.zeros((*size, targets.shape[1]))
    for start in logging.tqdm(range(0, len(image_ids), BATCH), desc="Aligning regions", unit="batch", leave=False):
        records = [store[image_id] for image_id in image_ids[start : start + BATCH]]
        batch = processor.feature_extractor(records, return_tensors="np")
        features = np.pad(batch["region_features"].astype(np.float64), ((0, 0), (0, 0), (0, 1)), constant_values=1)
        features *= batch["region_attention_mask"][..., None]
        target = targets[start : start + BATCH]
        for fold in range(FOLDS):
            mine = slice((fold - start) % FOLDS, None, FOLDS)
            flat = features[mine].reshape(-1, size[1])
            products[fold] += flat.T @ flat
            with_target[fold] += features[mine].sum(1).T @ target[mine]
            squares[fold] += (features[mine, :, -1].sum(1) * (target[mine] ** 2).sum(1)).sum()
    return products, with_target, squares


def _covariance(products: np.ndarray) -> np.ndarray:
    """Computes the covariance of features, `(D, D)`, of the sum of the products of (feature, 1) with itself."""
    mean = products[-1, :-1] / products[-1, -1]
    return products[:-1, :-1] / products[-1, -1] - np.outer(mean, mean)


def _fit(products: np.ndarray, with_target: np.ndarray, ridge: float) -> np.ndarray:
    """Fits the target by least squares, `(D + 1, hidden_size)`, the constant last; an infinite ridge gives the mean."""
    mean, target = products[-1, :-1] / products[-1, -1], with_target[-1] / products[-1, -1]
    weight = np.zeros((len(mean), len(target)))
    if np.isfinite(ridge):
        covariance = _covariance(products)
        shared = with_target[:-1] / products[-1, -1] - np.outer(mean, target)
        ridge *= np.trace(covariance) / len(covariance)
        weight = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), shared)
    return np.vstack((weight, target - mean @ weight))


def _error(fitted: np.ndarray, products: np.ndarray, with_target: np.ndarray, squares: float) -> float:
    """Computes the sum of squared errors of a fit on regions of which these products are."""
    return float(squares - 2 * (fitted * with_target).sum() + (fitted * (products @ fitted)).sum())

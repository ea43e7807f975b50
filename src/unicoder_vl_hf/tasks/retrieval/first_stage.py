"""Trains the first stage of a search alone, with the encoder frozen, in minutes.

The encoder passes over each caption and each image once; only the two projections and the temperature are then
trained, on its states, by the symmetric contrastive loss. Scores of pairs stay what they were. Training encoder and
first stage together is `run_retrieval.py --contrastive_weight`.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn

from ... import logging
from ...data.caption_files import encode_column, select_split
from ...data.captions import check_tokens, join, read_captions
from ...data.negatives import MismatchIndex, read_duplicate_groups
from ...data.rows import natural
from ...files import new_folder
from ...modeling_unicoder_vl import UnicoderVLFirstStage, UnicoderVLForImageTextRetrieval
from ...processes import start_processes
from ...processing_unicoder_vl import UnicoderVLProcessor
from ...regions.store import RegionStore
from ...runs.model_card import FIRST_STAGE, TrainingRun, write_model_card
from ...scoring.checkpoints import load_for_scoring
from ...scoring.scorer import ImageTextScorer
from ...search.encoders import UnicoderVLDualEncoder, image_states, text_states
from .losses import contrastive_loss
from .metrics import retrieval_metrics, with_recall_sum
from .two_stage_report import describe_weight, measure_similarity_weight

logger = logging.get_logger(__name__)

SALT = 0x66737467  # keeps these shuffles apart from other draws of the same seed


class EncodedPairs:
    """
    Encodes the pairs of a split by the frozen encoder, and gives batches of their states.

    Args:
        model, processor, store: The model, its processor, and the regions of every image.
        pairs (`datasets.Dataset`): Rows with `image_id` and `caption`.
        duplicates (iterable of sequences of `str`, *optional*): Groups of images that show the same.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption.
    """

    def __init__(
        self,
        model: UnicoderVLForImageTextRetrieval,
        processor: UnicoderVLProcessor,
        store: RegionStore,
        pairs: datasets.Dataset,
        duplicates: Iterable[Sequence[str]] = (),
        max_length: int = 44,
    ):
        image_ids, self.image_of_row = encode_column(pairs, "image_id")
        captions, self.caption_of_row = encode_column(pairs, "caption")
        self.index = MismatchIndex.from_pairs(pairs, duplicates)
        self.texts = text_states(model, processor, captions.to_pylist(), max_length)
        self.images = image_states(model, processor, image_ids.to_pylist(), store)

    def __len__(self) -> int:
        return len(self.image_of_row)

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gives the states of B rows' captions and images, `(B, hidden_size)`, and their mismatches, `(B, B)`."""
        known = self.index.belongs(self.index.texts[rows][:, None], self.index.images[rows])
        return self.texts[self.caption_of_row[rows]], self.images[self.image_of_row[rows]], torch.from_numpy(~known)

    @torch.inference_mode()
    def recalls(self, first_stage: UnicoderVLFirstStage) -> dict[str, float]:
        """Measures the retrieval of all pairs, see [`retrieval_metrics`], and `recall_sum`."""
        texts = first_stage.embed_text(self.texts)[self.caption_of_row]
        scores = (texts @ first_stage.embed_image(self.images).T).numpy()
        return with_recall_sum(retrieval_metrics(scores, self.image_of_row))


def fit_first_stage(
    first_stage: UnicoderVLFirstStage,
    train: EncodedPairs,
    validation: EncodedPairs,
    *,
    epochs: int = 20,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.3,
    seed: int = 0,
) -> dict[str, float]:
    """
    Trains a first stage in place, and keeps the weights of the epoch with the highest sum of recalls on validation
    pairs.

    Args:
        first_stage ([`UnicoderVLFirstStage`]): The first stage, on the CPU, in float32.
        train, validation ([`EncodedPairs`]): The pairs of two splits.
        epochs (`int`, *optional*, defaults to 20): Passes over the pairs, in which the learning rate falls to 0.
        batch_size (`int`, *optional*, defaults to 512): Pairs that are negatives of one another.
        learning_rate, weight_decay (`float`, *optional*): Values of AdamW.
        dropout (`float`, *optional*, defaults to 0.3): Dropout of the encoder's states.
        seed (`int`, *optional*, defaults to 0): Seed of shuffles and dropout.

    Returns:
        `dict[str, float]`: the metrics of that epoch.
    """
    projections = [first_stage.text_projection.weight, first_stage.image_projection.weight]
    others = [parameter for parameter in first_stage.parameters() if all(parameter is not p for p in projections)]
    optimizer = torch.optim.AdamW(
        [{"params": projections, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
    )
    steps = epochs * math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best: dict[str, float] = {"recall_sum": -1.0}
    weights = copy.deepcopy(first_stage.state_dict())
    torch.manual_seed(seed)
    with logging.tqdm(total=epochs, desc="First stage", unit="epoch") as progress:
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch, SALT]).permutation(len(train))
            for start in range(0, len(order), batch_size):
                texts, images, mismatches = train.batch(order[start : start + batch_size])
                texts, images = (nn.functional.dropout(states, dropout) for states in (texts, images))
                logits = first_stage.logits(first_stage.embed_text(texts), first_stage.embed_image(images))
                loss = contrastive_loss(logits, mismatches)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            metrics = validation.recalls(first_stage)
            if metrics["recall_sum"] > best["recall_sum"]:
                best, weights = metrics, copy.deepcopy(first_stage.state_dict())
            progress.set_postfix(loss=f"{loss.item():.3f}", recall_sum=f"{metrics['recall_sum']:.3f}")
            progress.update()
    first_stage.load_state_dict(weights)
    return best


def train_first_stage(
    model: str,
    captions: str,
    regions: str,
    output: str,
    *,
    split: str = "train",
    validation_split: str = "val",
    projection_dim: int = 256,
    epochs: int = 20,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    duplicates: str | None = None,
    caption_ids: str | None = None,
    seed: int = 0,
    max_length: int = 44,
    skip_missing: bool = False,
) -> dict[str, float]:
    """
    Trains a first stage for a checkpoint in one process, and writes a new checkpoint with it, its processor and its
    card. The encoder and the scores of pairs do not change. The weight with which a search adds the similarity to a
    score is measured on the validation split, logged and saved, too.

    Args:
        model (`str`): A checkpoint of pre-training or retrieval, with its processor. A first stage that it has is
            replaced.
        captions (`str`): A caption file in any layout, with both splits.
        regions (`str`): A [`RegionStore`].
        output (`str`): The folder of the new checkpoint, which must not exist.
        split, validation_split (`str`, *optional*, default to `"train"` and `"val"`): The splits to train on, and to
            choose the best epoch and the weight of the similarity by.
        projection_dim (`int`, *optional*, defaults to 256): Width of the embeddings.
        epochs, batch_size, learning_rate, seed: The arguments of [`fit_first_stage`].
        duplicates (`str`, *optional*): A file of images that show the same, see [`read_duplicate_groups`].
        caption_ids (`str`, *optional*): Other ids for the captions' images, see `ids` of [`read_captions`].
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption.
        skip_missing (`bool`, *optional*, defaults to `False`): Whether captions without regions are left out.

    Returns:
        `dict[str, float]`: the metrics of the first stage on the validation split.

    Raises:
        `ValueError`: `output` exists, there are several processes, the checkpoint has no matching head, or one that
        reads its first stage, or a caption has no regions (unless `skip_missing`).
    """
    natural("seed", seed)
    for name, value in (("projection_dim", projection_dim), ("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    target, path = Path(output), Path(captions)
    if target.exists():
        raise ValueError(f"{target} exists: name another folder for the checkpoint.")
    if start_processes().num_processes > 1:
        raise ValueError("The first stage alone is trained by one process: start it without a launcher.")
    store = RegionStore(regions)
    table, report = join(read_captions(path, ids=caption_ids), store, skip_missing=skip_missing)
    logger.warning(f"{captions} with {store}:\n{report}")
    splits = select_split(table, path, split), select_split(table, path, validation_split)
    groups = [] if duplicates is None else read_duplicate_groups(duplicates)

    torch.manual_seed(seed)
    trained, processor = load_for_scoring(model)
    if trained.config.matching_head != "unicoder_vl":
        raise ValueError(
            f"{model} scores pairs by its first stage, too (matching_head={trained.config.matching_head!r}): another "
            "one would change its scores. Its own was trained along."
        )
    check_tokens(table, processor.tokenizer, path)
    processor.feature_extractor.check_provenance(store.provenance)
    trained.config.projection_dim = projection_dim
    trained.first_stage = UnicoderVLFirstStage(trained.config, projection_dim)
    for module in trained.first_stage.modules():
        trained._init_weights(module)
    nn.Module.to(trained, start_processes().device)
    train, validation = (EncodedPairs(trained, processor, store, pairs, groups, max_length) for pairs in splits)
    nn.Module.to(trained, "cpu")
    metrics = fit_first_stage(
        trained.first_stage,
        train,
        validation,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    trained.config.first_stage_trained = True
    nn.Module.to(trained, start_processes().device)
    encoder = UnicoderVLDualEncoder(trained, processor, store, target, max_length)
    scorer = ImageTextScorer(trained, processor, store)
    search = describe_weight(measure_similarity_weight(encoder, scorer, splits[1], max_length))
    logger.warning(search)

    with new_folder(target) as folder:
        trained.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_model_card(
        target,
        trained_by=FIRST_STAGE,
        base_model=model,
        data_name=path.stem,
        provenance=processor.feature_extractor.region_provenance,
        metrics={f"first_stage_{name}": value for name, value in metrics.items()},
        search=search,
        training=TrainingRun(
            steps=epochs * math.ceil(len(train) / batch_size),
            epochs=epochs,
            batch_size=min(batch_size, len(train)),
            learning_rate=learning_rate,
            seed=seed,
            mixed_precision="no",
        ),
    )
    return metrics

"""A few rendered scenes, and a small model that was trained for seconds to find each of them by its captions."""

import json
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from unicoder_vl_hf import (
    RegionStore,
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.scenes.world import CLASS_NAMES, FEATURE_DIM, build_scenes, scene_tokenizer

NUM_IMAGES, STEPS = 10, 100


def build(folder: Path) -> Path:
    """Makes `world` with `captions.jsonl`, `regions` and `photos`, and `model`."""
    world = build_scenes(folder / "world", num_train=NUM_IMAGES, num_val=1, num_test=1, captions_per_image=2)
    store, rows = RegionStore(world / "regions"), captions(world)
    tokenizer = scene_tokenizer()
    config = UnicoderVLConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, region_feature_dim=FEATURE_DIM, num_region_classes=len(CLASS_NAMES),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = UnicoderVLForImageTextRetrieval(config)
    processor = UnicoderVLProcessor(
        UnicoderVLFeatureExtractor(feature_dim=FEATURE_DIM, region_provenance=store.provenance), tokenizer
    )
    train(model, processor(text=[text for _, text in rows], return_tensors="pt"), rows, processor, store)
    model.config.first_stage_trained = True
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def captions(world: Path) -> list[tuple[str, str]]:
    """Image and text of the captions of the scenes that the model knows."""
    rows = map(json.loads, (world / "captions.jsonl").read_text().splitlines())
    return [(row["image_id"], row["caption"]) for row in rows if row["split"] == "train"]


def train(model, text, rows, processor, store) -> None:
    """Every caption meets every image in each step, in both stages."""
    names = list(dict.fromkeys(name for name, _ in rows))
    images = torch.tensor([names.index(name) for name, _ in rows])
    batch = {**text, **processor(regions=names, store=store, return_tensors="pt")}
    pairs = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(names)))
    matches = (images[pairs[:, 0]] == pairs[:, 1]).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        out = model(
            **batch, caption_index=pairs[:, 0], image_index=pairs[:, 1],
            first_stage_captions=torch.arange(len(rows)), first_stage_images=torch.arange(len(names)),
        )  # fmt: skip
        matching = binary_cross_entropy_with_logits(out.scores, matches, pos_weight=torch.tensor(len(names) - 1.0))
        loss = matching + cross_entropy(out.first_stage_logits, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

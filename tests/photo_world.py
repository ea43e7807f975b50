"""Photos, a detector with its weights on disk, the store that it makes of them, and a checkpoint trained on that."""

from pathlib import Path

import tiny
import torch
from photos import SIZES, photo
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.regions import extract

CAPTIONS = ["a dog runs on the grass .", "a cat sleeps .", "the dog sleeps on a cat ."]
IDS = [f"photo_{number}" for number in range(len(SIZES))]
FEATURE_DIM = 12


def save_encoder(folder: Path, seed: int = 0) -> str:
    """A small encoder of random weights, as the name of a grid detector."""
    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, FEATURE_DIM], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"grid:{folder}"


def build(folder: Path) -> Path:
    """Makes `photos`, `encoder`, `store` and `model` in the folder."""
    (folder / "photos").mkdir(parents=True)
    for seed, (name, size) in enumerate(zip(IDS, SIZES, strict=True)):
        photo(*size, seed=seed).save(folder / "photos" / f"{name}.png")
    detector = save_encoder(folder / "encoder")
    options = {"grid_size": 2, "image_size": 32}
    store = extract(folder / "photos", folder / "store", detector, num_workers=0, **options)
    tiny.model(UnicoderVLForImageTextRetrieval, region_feature_dim=FEATURE_DIM).save_pretrained(folder / "model")
    tiny.processor(feature_dim=FEATURE_DIM, region_provenance=store.provenance).save_pretrained(folder / "model")
    return folder

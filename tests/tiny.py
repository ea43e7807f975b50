"""A tiny model, processor and input, for the tests of saving, loading and pushing."""

import numpy as np
import torch
from transformers import BertTokenizer

from unicoder_vl_hf import RegionRecord, UnicoderVLConfig, UnicoderVLFeatureExtractor, UnicoderVLProcessor

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat runs sleeps on the grass .".split()
FEATURE_DIM = 6


def config(**changes) -> UnicoderVLConfig:
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "region_feature_dim": FEATURE_DIM,
        "num_region_classes": 5,
        "initializer_range": 0.3,  # so that outputs of different weights differ plainly
    }
    return UnicoderVLConfig(**{**sizes, **changes})


def model(model_class, seed: int = 1, **changes):
    torch.manual_seed(seed)
    return model_class(config(**changes)).eval()


def processor(**extractor_arguments) -> UnicoderVLProcessor:
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return UnicoderVLProcessor(UnicoderVLFeatureExtractor(**extractor_arguments), tokenizer)


def region_arrays(image_id: str = "photo", num_regions: int = 3, dtype=np.float32) -> dict:
    """The fields of a record, a function of its image id and size."""
    rng = np.random.default_rng([num_regions, *image_id.encode()])
    corners = rng.random((num_regions, 2, 2)) * (640, 480)
    return {
        "image_id": image_id,
        "image_width": 640,
        "image_height": 480,
        "boxes": np.sort(corners, axis=1).reshape(num_regions, 4).astype(np.float32),
        "features": rng.standard_normal((num_regions, FEATURE_DIM)).astype(dtype),
    }


def record(image_id: str = "photo", num_regions: int = 3, dtype=np.float32) -> RegionRecord:
    return RegionRecord(**region_arrays(image_id, num_regions, dtype))


# A batch whose rows differ in length

TEXT_LENGTHS, NUM_REGIONS = [3, 7, 5, 7], [4, 1, 2, 4]


def lengths_mask(lengths, left=False):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return (mask.flip(1) if left else mask).long()


def padded_batch(left=False):
    generator = torch.Generator().manual_seed(0)
    size = (len(TEXT_LENGTHS), max(TEXT_LENGTHS))
    regions = (len(NUM_REGIONS), max(NUM_REGIONS))
    return {
        "input_ids": torch.randint(5, len(WORDS), size, generator=generator),
        "attention_mask": lengths_mask(TEXT_LENGTHS, left),
        "region_features": torch.randn(*regions, FEATURE_DIM, generator=generator),
        "region_locations": torch.rand(*regions, 5, generator=generator),
        "region_attention_mask": lengths_mask(NUM_REGIONS),
    }


def pretraining_batch():
    batch = padded_batch()
    labels = torch.where(batch["attention_mask"].bool() & (torch.arange(7) % 3 == 1), batch["input_ids"], -100)
    region_labels = torch.where(batch["region_attention_mask"].bool(), torch.arange(4) % 5, -100)
    return batch | {
        "labels": labels,
        "region_labels": region_labels,
        "matching_labels": torch.tensor([1, 0, 1, -100]),
    }

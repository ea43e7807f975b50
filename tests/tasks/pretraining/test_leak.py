"""
Does masking tell the label? A model that sees how a row was masked and nothing else must guess.

Of a collated row it keeps the regions and every [CLS], [SEP] and [MASK]; all other tokens become [PAD], still attended.
The captions have one length. Whatever then tells matches from mismatches on held-out images is a leak.
"""

import dataclasses
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLPreTraining,
    RegionRecord,
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.data.negatives import PairsWithMismatches
from unicoder_vl_hf.scenes.world import scene_tokenizer

NUM_IMAGES, NUM_HELD_OUT, FEATURE_DIM = 1200, 600, 8
COLOURS, SHAPES = ("red", "green", "blue", "white"), ("circle", "square", "star", "cross", "ring")


@pytest.fixture(scope="module")
def world():
    """Images of six random regions, each with a caption of eight tokens."""
    rng = np.random.default_rng(0)
    store, rows = {}, []
    for index in range(NUM_IMAGES + NUM_HELD_OUT):
        image_id = f"{index:04d}"
        corners = rng.random((6, 2, 2)).astype(np.float32)
        store[image_id] = RegionRecord(
            image_id=image_id,
            image_width=1,
            image_height=1,
            boxes=np.sort(corners, axis=1).reshape(6, 4),
            features=rng.standard_normal((6, FEATURE_DIM)).astype(np.float32),
            object_ids=rng.integers(len(SHAPES), size=6),
        )
        words = [str(word) for colour in range(2) for word in (rng.choice(COLOURS), rng.choice(SHAPES))]
        rows.append({"image_id": image_id, "caption": "there is a {} {} and {} {}".format(*words)})
    return store, rows


@dataclass
class MaskedInMatchesOnly(DataCollatorForUnicoderVLPreTraining):
    """The defect that the test is for."""

    tokens: bool = True

    def __call__(self, rows):
        batch = super().__call__(rows)
        tasks = {"mlm_probability": 0.0} if self.tokens else {"moc_probability": 0.0}
        plain = dataclasses.replace(self.unwrapped(), **tasks)(rows)
        names = ("input_ids", "labels") if self.tokens else ("region_features", "masked_regions", "region_labels")
        for name in names:
            batch[name] = torch.where(
                (batch["matching_labels"] == 1).view(-1, *[1] * (batch[name].ndim - 1)), batch[name], plain[name]
            )
        return batch

    def unwrapped(self):
        fields = dataclasses.fields(DataCollatorForUnicoderVLPreTraining)
        return DataCollatorForUnicoderVLPreTraining(**{field.name: getattr(self, field.name) for field in fields})


def accuracy_on_masks(world, collator_class, **options) -> float:
    """Accuracy of matching on held-out images, by a model trained on nothing but the masks."""
    store, rows = world
    tokenizer = scene_tokenizer()
    collator = collator_class(UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer), store, **options)
    kept = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id])
    torch.manual_seed(0)
    model = UnicoderVLForPreTraining(
        UnicoderVLConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            region_feature_dim=FEATURE_DIM,
            num_region_classes=len(SHAPES),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )

    def batches(pairs, **loading):
        for batch in DataLoader(pairs, collate_fn=collator, generator=torch.Generator().manual_seed(0), **loading):
            ids = batch["input_ids"]
            assert ids.shape[1] == 10 and batch["attention_mask"].all()  # one length, which tells nothing
            batch["input_ids"] = torch.where(torch.isin(ids, kept), ids, tokenizer.pad_token_id)
            del batch["labels"], batch["region_labels"]
            yield batch

    def split(start, stop):
        return PairsWithMismatches(datasets.Dataset.from_list(rows[start:stop]), seed=0)

    train, held_out = split(0, NUM_IMAGES), split(NUM_IMAGES, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for epoch in range(5):
        train.set_epoch(epoch)
        for batch in batches(train, batch_size=32, shuffle=True):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = [
            (model(**batch).scores > 0) == (batch["matching_labels"] == 1)
            for batch in batches(Subset(held_out, range(NUM_HELD_OUT)), batch_size=100)
        ]
    return torch.cat(right).double().mean().item()


STANDARD_ERROR = (0.25 / (2 * NUM_HELD_OUT)) ** 0.5


def test_masks_do_not_tell_the_label(world):
    # The paper's probabilities make few masks; more of them leak more, if they do.
    for probability in (0.15, 0.4):
        accuracy = accuracy_on_masks(
            world,
            DataCollatorForUnicoderVLPreTraining,
            mlm_probability=probability,
            moc_probability=probability,
        )
        assert abs(accuracy - 0.5) < 3 * STANDARD_ERROR


@pytest.mark.parametrize("tokens", [True, False])
def test_masking_matches_only_is_found_out(world, tokens):
    """At least one token and one region is masked in every match: nearly all rows give themselves away."""
    assert accuracy_on_masks(world, MaskedInMatchesOnly, tokens=tokens) > 0.8

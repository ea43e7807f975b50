"""What a retrieval model learned by heart: its losses and choices on the training split, beside the validation split.

    python benchmarks/train_and_validation.py MODEL CAPTIONS REGIONS

Both splits are asked alike: 20 batches of 64 pairs drawn at random, nothing hidden, no dropout. The first stage chooses
among 64; the matching head has to prefer a match to the 1, and to the 5, mismatches that the first stage likes best.
"""

import sys

import numpy as np
import torch

from unicoder_vl_hf import DataCollatorForUnicoderVLRetrieval, RegionStore
from unicoder_vl_hf.data import PairsWithNegatives, read_captions
from unicoder_vl_hf.scoring.checkpoints import load_for_store
from unicoder_vl_hf.tasks.retrieval.losses import contrastive_loss, hard_negatives

BATCHES, SIZE, HARD = 20, 64, 5


@torch.inference_mode()
def measure(model, collator, rows):
    """Measures a batch: contrastive loss, first stage's choices of image and text, head's against 1 and against 5."""
    batch = collator(rows)
    mismatches = batch.pop("mismatches")
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "group_ids", "hardness")}
    captions, images = batch["caption_index"], batch["image_index"]
    outputs = model(**inputs, first_stage_captions=captions, first_stage_images=images)
    logits, scores = outputs.first_stage_logits, outputs.scores
    others = logits.masked_fill(~mismatches, -torch.inf)
    own = logits.diagonal()
    _, caption, image, label = hard_negatives(logits, mismatches, HARD)
    hard = model(**(inputs | {"caption_index": captions[caption], "image_index": images[image]})).scores
    hard = hard.masked_fill(label < 0, -torch.inf).view(2, len(rows), HARD)
    choices = [own > others.amax(1), own > others.amax(0), scores > hard[:, :, 0], scores > hard.amax(2)]
    return [contrastive_loss(logits, mismatches).item()] + [choice.float().mean().item() for choice in choices]


def main(model_name, captions, regions):
    """Prints a line for each split."""
    store = RegionStore(regions)
    model, processor = load_for_store(model_name, store)
    collator = DataCollatorForUnicoderVLRetrieval(processor, store, contrastive=True)
    print("split   contrastive loss   first stage: image  text   head: beats 1, beats 5")
    for split in ("train", "val"):
        pairs = PairsWithNegatives(read_captions(captions, split=split), seed=0, num_captions=0, num_images=0)
        rows = np.random.default_rng(1).permutation(len(pairs))[: BATCHES * SIZE].reshape(BATCHES, SIZE)
        found = np.mean([measure(model.eval(), collator, [pairs[int(row)] for row in of]) for of in rows], axis=0)
        print(f"{split:7} {found[0]:16.3f}" + "".join(f"{100 * share:14.1f}" for share in found[1:]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

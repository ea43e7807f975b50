"""
The losses of retrieval in a plain loop, as a script of two_processes.py: `main([path])` writes to `<path>-<rank>` the
gradients of each loss on two batches, which one process takes one after another and two share.
"""

import datasets
import tiny
import torch
from accelerate import Accelerator

from unicoder_vl_hf import DataCollatorForUnicoderVLRetrieval, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.data.negatives import PairsWithNegatives
from unicoder_vl_hf.tasks.retrieval.losses import (
    BinaryMatchingLoss,
    ContrastiveLoss,
    GroupSoftmaxLoss,
    HardestNegativeLoss,
    HardNegativeLoss,
    SumOfNegativesLoss,
    TwoStageLoss,
)

CAPTIONS = ["a dog runs .", "a cat sleeps", "the dog on the grass", "a cat runs on the grass ."]
LOSSES = [HardestNegativeLoss(0.5), SumOfNegativesLoss(), GroupSoftmaxLoss(), BinaryMatchingLoss(), ContrastiveLoss()]
LOSSES += [TwoStageLoss(SumOfNegativesLoss(), 0.5), HardNegativeLoss(GroupSoftmaxLoss())]


def main(arguments: list[str]):
    accelerator = Accelerator(cpu=True)
    table = datasets.Dataset.from_dict({"image_id": list("abcd"), "caption": CAPTIONS})
    pairs = PairsWithNegatives(table, seed=0, num_captions=1, num_images=1)
    store = {name: tiny.record(name, number) for name, number in zip("abcd", (3, 2, 5, 4), strict=True)}
    collator = DataCollatorForUnicoderVLRetrieval(tiny.processor(), store, contrastive=True)
    halves = [collator([pairs[row] for row in rows]) for rows in ((0, 1), (2, 3))]
    mine = halves[accelerator.process_index :: accelerator.num_processes]

    found = {}
    for loss in LOSSES:
        contrastive = not isinstance(
            loss, HardestNegativeLoss | SumOfNegativesLoss | GroupSoftmaxLoss | BinaryMatchingLoss
        )
        torch.manual_seed(1)
        plain = UnicoderVLForImageTextRetrieval(tiny.config(projection_dim=4 if contrastive else None)).eval()
        model = accelerator.prepare(plain)
        for batch in mine:
            accelerator.backward(loss(model, batch) / len(mine))
        found[repr(loss)] = {name: parameter.grad for name, parameter in plain.named_parameters()}
    torch.save(found, f"{arguments[0]}-{accelerator.process_index}")

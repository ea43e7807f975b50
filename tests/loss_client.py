"""
The losses of retrieval in a plain loop, as a script of two_processes.py: `main([path])` writes to `<path>-<rank>` the
gradients of each loss on two batches, which one process takes one after another and two share: as accelerate wraps a
model, and as Trainer does, which has DistributedDataParallel look for parameters that no output depends on.
"""

import datasets
import tiny
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

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

TEXT_LAYERS = {"num_text_layers": 1, "matching_head": "similarity"}


def main(arguments: list[str]):
    (path,) = arguments
    table = datasets.Dataset.from_dict({"image_id": list("abcd"), "caption": CAPTIONS})
    pairs = PairsWithNegatives(table, seed=0, num_captions=1, num_images=1)
    store = {name: tiny.record(name, number) for name, number in zip("abcd", (3, 2, 5, 4), strict=True)}
    collator = DataCollatorForUnicoderVLRetrieval(tiny.processor(), store, contrastive=True)
    halves = [collator([pairs[row] for row in rows]) for rows in ((0, 1), (2, 3))]

    found = {}
    for looks_for_unused in (False, True):
        wrapping = DistributedDataParallelKwargs(find_unused_parameters=looks_for_unused)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[wrapping])
        mine = halves[accelerator.process_index :: accelerator.num_processes]
        for loss, config in [*((each, {}) for each in LOSSES), *((each, TEXT_LAYERS) for each in LOSSES[-2:])]:
            projection_dim = 4 if isinstance(loss, ContrastiveLoss | TwoStageLoss) else None
            torch.manual_seed(1)
            plain = UnicoderVLForImageTextRetrieval(tiny.config(projection_dim=projection_dim, **config)).eval()
            model = accelerator.prepare(plain)
            for batch in mine:
                accelerator.backward(loss(model, batch) / len(mine))
            gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
            found[f"{loss}, {config}, {looks_for_unused=}"] = gradients
    torch.save(found, f"{path}-{accelerator.process_index}")

"""Pre-trains Unicoder-VL in one file that can be read from top to bottom, and changed: a loop of Accelerate.

    accelerate launch examples/pretraining_loop.py --captions captions.jsonl --regions regions --output_dir runs/mine

Follows the paper's section Pre-training: from BERT, on masked language modelling, masked object classification and
visual-linguistic matching; 192 pairs a step, 10 epochs, AdamW at 1e-4 after a linear warm-up. `captions.jsonl` has an
object {"image_id", "caption", "split"} a line, `regions` is what `unicoder-vl extract` or `convert` writes.
run_pretraining.py is the same training with an exact resume, a log, checks of the data and a model card.
"""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLPreTraining,
    RegionStore,
    UnicoderVLFeatureExtractor,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.data import PairsWithMismatches, join, read_captions
from unicoder_vl_hf.tasks.pretraining import evaluate_pretraining


def main(argv: list[str] | None = None) -> None:
    """Pre-trains with the options of `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(description="Pre-trains Unicoder-VL; the defaults are the paper's.")
    parser.add_argument("--captions", required=True, help="caption file with the splits train and val")
    parser.add_argument("--regions", required=True, help="folder of a region store")
    parser.add_argument("--output_dir", required=True, help="folder for the model and its processor")
    parser.add_argument("--bert", default="google-bert/bert-base-uncased", help="BERT to start from")
    parser.add_argument("--num_epochs", type=int, default=10, help="passes over the training pairs")
    parser.add_argument("--batch_size", type=int, default=48, help="pairs of a micro-batch in each process")
    parser.add_argument("--micro_batches", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="peak of the learning rate")
    args = parser.parse_args(argv)
    accelerator = Accelerator(gradient_accumulation_steps=args.micro_batches)
    set_seed(0)

    # 1. Data. Captions meet their regions by image_id. In each epoch every pair gets another mismatch: its image with
    # the caption of another, or its caption with the image of another.
    store = RegionStore(args.regions)
    captions, report = join(read_captions(args.captions, split="train"), store)
    accelerator.print(report)
    train = PairsWithMismatches(captions, seed=0)
    held_out, _ = join(read_captions(args.captions, split="val"), store)
    validation = PairsWithMismatches(held_out, seed=0, fixed_epoch=0)  # the same mismatches and masks each time

    # 2. Model and processor. BERT gives the text side; what embeds regions, and the heads for them, are new. The
    # processor remembers what kind of regions the model is trained on.
    num_classes = store.provenance["num_classes"]
    if num_classes is None:
        raise ValueError(f"{args.regions} does not say how many object classes its detector knows.")
    model = UnicoderVLForPreTraining.from_bert(
        args.bert, region_feature_dim=store.feature_dim, num_region_classes=num_classes
    )
    processor = UnicoderVLProcessor(
        UnicoderVLFeatureExtractor(max_regions=100, feature_dim=store.feature_dim, region_provenance=store.provenance),
        AutoTokenizer.from_pretrained(args.bert),
    )

    # 3. Collator. It fetches the regions, hides 15 % of the tokens and of the regions, and makes a match and a mismatch
    # of each pair. What is hidden follows from the seed, the epoch and the row, whoever makes the batch.
    collator = DataCollatorForUnicoderVLPreTraining(
        processor, store, seed=0, mlm_probability=0.15, moc_probability=0.15, num_region_classes=num_classes
    )
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True, collate_fn=collator)

    # 4. Optimiser and schedule. AdamW without weight decay is the paper's Adam.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    num_steps = args.num_epochs * math.ceil(len(loader) / args.micro_batches)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(0.1 * num_steps), num_steps)

    # 5. Loop. The model returns its loss: the mean over all rows of matching, and of both masked losses where the pair
    # is a match.
    model.train()
    for epoch in range(args.num_epochs):
        loader.set_epoch(epoch)  # another order
        train.set_epoch(epoch)  # other mismatches and masks
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
        metrics = evaluate_pretraining(model, validation, collator, accelerator)
        measured = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        accelerator.print(f"epoch {epoch + 1}: loss {outputs.loss.item():.3f} at its end; validation: {measured}")

    # 6. The model with its processor is a checkpoint as any other: scores of captions with images can be had from it.
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()

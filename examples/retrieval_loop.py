"""Fine-tunes Unicoder-VL for image-text retrieval in one file that can be read from top to bottom: with Trainer.

    accelerate launch examples/retrieval_loop.py --model runs/mine --captions captions.jsonl --regions regions \
        --output_dir runs/mine-retrieval

Follows the paper's section Image-Text Retrieval: each pair of a caption and its image forms a group with 3 captions and
3 images that do not match, and the score of the pair is to exceed those of the hardest of each by a margin.
`captions.jsonl` has an object {"image_id", "caption", "split"} a line, `regions` is what `unicoder-vl extract` or
`convert` writes. run_retrieval.py is the same training with an exact resume, other losses, a first stage of search and
a model card.
"""

import argparse

from transformers import Trainer, TrainingArguments, set_seed

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLRetrieval,
    ImageTextScorer,
    RegionStore,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLProcessor,
    retrieval_metrics,
)
from unicoder_vl_hf.data import PairsWithNegatives, join, read_captions
from unicoder_vl_hf.runs import EpochOfData


def main(argv: list[str] | None = None) -> None:
    """Fine-tunes and evaluates with the options of `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tunes Unicoder-VL for retrieval; the defaults are the paper's.")
    parser.add_argument("--model", required=True, help="pre-trained Unicoder-VL to start from")
    parser.add_argument("--captions", required=True, help="caption file with the splits train and val")
    parser.add_argument("--regions", required=True, help="folder of a region store")
    parser.add_argument("--output_dir", required=True, help="folder for the model and its processor")
    parser.add_argument("--num_epochs", type=int, default=10, help="passes over the training pairs")
    parser.add_argument("--batch_size", type=int, default=48, help="groups of a micro-batch in each process")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="peak of the learning rate")
    args = parser.parse_args(argv)
    set_seed(0)

    # 1. Data. Captions meet their regions by image_id. Each pair gets its negatives, others in each epoch; never a
    # caption of the same image, nor one with the same text.
    store = RegionStore(args.regions)
    captions, report = join(read_captions(args.captions, split="train"), store)
    print(report)
    train = PairsWithNegatives(captions, seed=0, num_captions=3, num_images=3)

    # 2. Model and processor, both of the pre-trained checkpoint. Its matching head scores pairs already: score =
    # logit of a match - logit of a mismatch. The processor warns if these regions are of another kind than its own.
    model = UnicoderVLForImageTextRetrieval.from_pretrained(args.model, triplet_margin=0.2)
    processor = UnicoderVLProcessor.from_pretrained(args.model)
    processor.feature_extractor.check_provenance(store.provenance)

    # 3. Collator. It makes the pairs of each group: `labels` (1 is the match) and `group_ids` tell them apart, and
    # `caption_index` and `image_index` let pairs share captions and images, which are embedded once.
    collator = DataCollatorForUnicoderVLRetrieval(processor, store)

    # 4. Loss, arguments and trainer. Given `labels` and `group_ids`, the model returns the paper's triplet loss of each
    # group, on p = sigmoid(score), with the margin above:
    #     max(0, margin - p(match) + max p(caption negatives)) + max(0, margin - p(match) + max p(image negatives))
    # The epoch has to be told to the data, whose negatives follow from it.
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=4,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,  # a share of all steps
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        data_collator=collator,
        callbacks=[EpochOfData()],
    )
    trainer.train()

    # 5. The model with its processor is a checkpoint: `unicoder-vl index` and ImageTextScorer take it.
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output_dir)

    # 6. Evaluation: every caption of the validation split with every image, ranked both ways. All processes share it.
    held_out, _ = join(read_captions(args.captions, split="val"), store)
    image_ids = held_out.unique("image_id")
    scores = ImageTextScorer(model, processor, store).score(held_out["caption"][:], image_ids)
    metrics = retrieval_metrics(scores, [image_ids.index(image_id) for image_id in held_out["image_id"]])
    if trainer.is_world_process_zero():
        for name, value in metrics.items():
            print(f"{name:32}{value:8.3f}")


if __name__ == "__main__":
    main()

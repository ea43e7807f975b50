"""Fine-tunes Unicoder-VL for visual commonsense reasoning in one file, to be read from top to bottom: with Trainer.

    accelerate launch examples/vcr_loop.py --model runs/mine --annotations vcr1annots --images vcr1images \
        --regions vcr-regions --output_dir runs/mine-vcr

Follows the paper's section of that name: a question has four answers (Q->A), and its right answer four rationales
(QA->R); each choice gets a score, and cross-entropy wants the right one to be the highest. One model learns both.
`annotations` and `images` are the folders that VCR's archives unpack to, `regions` is what `unicoder-vl extract` or
`convert` writes. run_vcr.py is the same training with an exact resume, options and a model card.
"""

import argparse
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLMultipleChoice,
    RegionStore,
    UnicoderVLForMultipleChoice,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.tasks.vcr import VCRExamples, read_vcr, vcr_metrics


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Measures the share of examples whose right choice has the highest score, in `[0, 1]`."""
    return {"accuracy": float(np.mean(np.argmax(predicted.predictions, axis=1) == predicted.label_ids))}


def main(argv: list[str] | None = None) -> None:
    """Fine-tunes and evaluates with the options of `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tunes Unicoder-VL for VCR; the defaults are the paper's.")
    parser.add_argument("--model", required=True, help="pre-trained Unicoder-VL to start from")
    parser.add_argument("--annotations", required=True, help="folder of train.jsonl and val.jsonl")
    parser.add_argument("--images", required=True, help="folder that metadata_fn starts from")
    parser.add_argument("--regions", required=True, help="folder of a region store")
    parser.add_argument("--output_dir", required=True, help="folder for the model and its processor")
    parser.add_argument("--num_epochs", type=int, default=20, help="passes over the training examples")
    parser.add_argument("--batch_size", type=int, default=12, help="examples of a micro-batch in each process")
    parser.add_argument("--max_length", type=int, default=156, help="most tokens of a choice; longer ones are cut")
    parser.add_argument("--learning_rate", type=float, default=3e-5, help="peak of the learning rate")
    args = parser.parse_args(argv)
    set_seed(0)

    # 1. Data. A row is a question; an example is a question with its four answers ("qa"), or a question with its right
    # answer and four rationales ("qar").
    store, folder = RegionStore(args.regions), Path(args.annotations)
    train_rows, rows = (
        read_vcr(folder / f"{split}.jsonl", metadata_dir=args.images, store=store) for split in ("train", "val")
    )
    train: ConcatDataset = ConcatDataset([VCRExamples(train_rows, "qa"), VCRExamples(train_rows, "qar")])
    validation = {"qa": VCRExamples(rows, "qa"), "qar": VCRExamples(rows, "qar")}

    # 2. Model and processor of the pre-trained checkpoint; the head that scores a choice is new. The processor warns if
    # these regions are of another kind than its own.
    model = UnicoderVLForMultipleChoice.from_pretrained(args.model)
    processor = UnicoderVLProcessor.from_pretrained(args.model)
    processor.feature_extractor.check_provenance(store.provenance)

    # 3. Collator. The four choices of an example share the regions of its image. The first of these are the objects
    # that the annotators drew, so that "[person1]" in a text points at one of them.
    collator = DataCollatorForUnicoderVLMultipleChoice(processor, store, max_length=args.max_length)

    # 4. Arguments and trainer. The loss, cross-entropy over the four scores, comes from the model.
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=4,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,  # a share of all steps
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        compute_metrics=accuracy,
    )
    trainer.train()

    # 5. The model with its processor is a checkpoint: evaluate_vcr.py writes the leaderboard's file with it.
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output_dir)

    # 6. Evaluation. Q->AR counts a question when both of its choices are right.
    answers, rationales = (trainer.predict(validation[task]).predictions for task in ("qa", "qar"))
    metrics = vcr_metrics(answers, rationales, rows["answer_label"][:], rows["rationale_label"][:])
    if trainer.is_world_process_zero():
        for name, value in metrics.items():
            print(f"{name:20}{value:8.3f}")


if __name__ == "__main__":
    main()

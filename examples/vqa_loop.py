"""Fine-tunes Unicoder-VL for questions about images in one file, to be read from top to bottom: with Trainer.

    accelerate launch examples/vqa_loop.py --model runs/mine --regions coco-regions --output_dir runs/mine-vqa \
        --questions v2_OpenEnded_mscoco_train2014_questions.json --annotations v2_mscoco_train2014_annotations.json \
        --validation_questions v2_OpenEnded_mscoco_val2014_questions.json \
        --validation_annotations v2_mscoco_val2014_annotations.json

Follows UNITER: frequent answers are classes, each learned from soft labels, the accuracy that the official evaluation
would give it. `regions` is what `unicoder-vl extract` or `convert` writes. run_vqa.py is the same training with an
exact resume, options and a model card.
"""

import argparse

import numpy as np
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLQuestionAnswering,
    RegionStore,
    UnicoderVLForQuestionAnswering,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.data import join
from unicoder_vl_hf.tasks.vqa import AnswerVocabulary, read_questions


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Averages the accuracy of the answer with the highest logit: it is that answer's soft label."""
    chosen = np.argmax(predicted.predictions, axis=1)
    return {"accuracy": float(np.take_along_axis(np.asarray(predicted.label_ids), chosen[:, None], axis=1).mean())}


def main(argv: list[str] | None = None) -> None:
    """Fine-tunes and evaluates with the options of `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(description="Fine-tunes Unicoder-VL for questions, near UNITER's way.")
    parser.add_argument("--model", required=True, help="pre-trained Unicoder-VL to start from")
    parser.add_argument("--questions", required=True, help="training questions, of VQA, OK-VQA or GQA")
    parser.add_argument("--annotations", help="their answers; none for GQA")
    parser.add_argument("--validation_questions", required=True, help="validation questions")
    parser.add_argument("--validation_annotations", help="their answers; none for GQA")
    parser.add_argument("--regions", required=True, help="folder of a region store")
    parser.add_argument("--output_dir", required=True, help="folder for the model and its processor")
    parser.add_argument("--min_occurrences", type=int, default=9, help="questions that an answer must be the answer of")
    parser.add_argument("--num_epochs", type=int, default=7, help="passes over the training questions")
    parser.add_argument("--batch_size", type=int, default=96, help="questions of a batch in each process")
    parser.add_argument("--learning_rate", type=float, default=8e-5, help="peak of the learning rate")
    args = parser.parse_args(argv)
    set_seed(0)

    # 1. Data. A row is a question; those whose image has no regions would be an error. The answers to choose among are
    # those that are frequent in training.
    store = RegionStore(args.regions)
    train, _ = join(read_questions(args.questions, args.annotations), store, texts="questions")
    validation, _ = join(
        read_questions(args.validation_questions, args.validation_annotations), store, texts="questions"
    )
    vocabulary = AnswerVocabulary.build(train, args.min_occurrences)

    # 2. Model and processor of the pre-trained checkpoint; the head of answers is new, and they are in the config. The
    # processor warns if these regions are of another kind than its own.
    answers = dict(enumerate(vocabulary.answers))
    labels = {answer: label for label, answer in answers.items()}
    model = UnicoderVLForQuestionAnswering.from_pretrained(args.model, id2label=answers, label2id=labels)
    processor = UnicoderVLProcessor.from_pretrained(args.model)
    processor.feature_extractor.check_provenance(store.provenance)

    # 3. Collator. Questions about one image share it; the labels are soft.
    collator = DataCollatorForUnicoderVLQuestionAnswering(processor, store, vocabulary)

    # 4. Arguments and trainer. The loss, binary cross-entropy summed over the answers, comes from the model.
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,  # a share of all steps
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=20,
        remove_unused_columns=False,
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

    # 5. The model with its processor is a checkpoint: evaluate_vqa.py measures it, `unicoder-vl ask` asks it.
    trainer.save_model()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output_dir)
        print(f"accuracy {metrics['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()

"""Evaluates a pre-trained checkpoint: the three tasks, and zero-shot image-text retrieval, each beside chance.

    python -m unicoder_vl_hf.scripts.evaluate_pretraining --model runs/flickr8k \
        --captions dataset_flickr8k.json --regions runs/flickr8k/_data/regions --num_retrieval_images 200

`--shuffle_regions` gives every image the regions of another. A model that reads the regions falls to chance in
matching and retrieval; one that stays above chance took its answers from the captions alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image
from transformers import AutoModelForPreTraining, AutoProcessor

from ..data.captions import check_tokens
from ..data.negatives import PairsWithMismatches
from ..errors import run_script
from ..modeling_unicoder_vl import UnicoderVLForPreTraining
from ..pictures import blank_page, write_hidden_regions
from ..processes import Computing, new_accelerator, start_processes
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from ..regions.shuffled import ShuffledStore
from ..regions.store import RegionStore
from ..runs.arguments import option, parse_evaluation
from ..runs.evaluation import EvaluationArguments, evaluation_dtype, evenly, write_metrics
from ..runs.setup import in_words, is_unicoder_vl
from ..search.encoders import Photos
from ..tasks.pretraining.collator import DataCollatorForUnicoderVLPreTraining
from ..tasks.pretraining.evaluation import (
    evaluate_pretraining,
    metrics_table,
    pretraining_chance,
)
from ..tasks.pretraining.hidden_regions import predict_hidden_regions
from ..tasks.retrieval.zero_shot import zero_shot_retrieval

IMAGES_SHOWN, REGIONS_SHOWN = 10, 6  # of the gallery; of each of its images


@dataclass(kw_only=True)
class PretrainingEvaluationArguments(EvaluationArguments):
    """Names a pre-trained checkpoint and the data it is measured on, and says which tasks are measured, and how."""

    num_images: int | None = option(
        None, "Images to take, the first of the split, with all their captions. Default: all."
    )
    num_retrieval_images: int | None = option(
        None, "Images for retrieval, the first of the split: the cost grows with their square. Default: all."
    )
    shuffle_regions: bool = option(False, "Gives every image the regions of another.")
    moc: bool = option(True, "Measures masked object classification, too; --no_moc for regions without classes.")
    seed: int = option(0, "Seed of the masks, the mismatches and the shuffling.")
    output: str | None = option(None, "JSON file that the metrics are written to.")
    gallery: str | None = option(
        None, "HTML file of regions of some images, each hidden in turn, and the classes that the model takes them for."
    )
    photos: str | None = option(None, "Photos for the gallery: folder, .tar, or dataset. Default: blank pages.")
    photo_ids: str = option("stem", "Source of the photos' ids, as --ids of `extract`.")


def main(argv: list[str] | None = None):
    """
    Evaluates a pre-trained checkpoint with the options of `argv`, by default those of the command line.

    Prints the metrics beside chance, and writes them to `--output`.

    Raises:
        `ValueError`: `--model` is no Unicoder-VL, its tokenizer does not fit it, or a caption has no token.
    """
    args = parse_evaluation(PretrainingEvaluationArguments, argv)
    store, captions = args.open_data()
    kept = set(captions.unique("image_id")[: args.num_images])
    captions = captions.select([row for row, image_id in enumerate(captions["image_id"]) if image_id in kept])
    if not is_unicoder_vl(args.model):
        raise ValueError(f"--model {args.model} is no Unicoder-VL: expected a checkpoint of run_pretraining.py.")
    model = AutoModelForPreTraining.from_pretrained(args.model)
    processor = AutoProcessor.from_pretrained(args.model)
    processor.check_model(model)
    check_tokens(captions, processor.tokenizer, args.captions)
    processor.set_store(store)
    model.config.padding_free = True
    computing = Computing.choose(args.mixed_precision, start_processes().device.type, model.config.hidden_size)
    accelerator = new_accelerator(computing)
    model = accelerator.prepare(model)
    regions = ShuffledStore(store, captions["image_id"], args.seed) if args.shuffle_regions else store

    collator = DataCollatorForUnicoderVLPreTraining(
        processor, regions, seed=args.seed, moc_probability=0.15 if args.moc else 0.0
    )
    pairs = PairsWithMismatches(captions, seed=args.seed, fixed_epoch=0)
    metrics = evaluate_pretraining(model, pairs, collator, accelerator)
    is_main = accelerator.is_main_process
    if is_main:
        print(f"The tasks of pre-training, {in_words(captions)}")
        print(metrics_table(metrics, pretraining_chance(metrics)))
    if is_main and args.gallery is not None:
        draw_gallery(args, accelerator.unwrap_model(model), processor, store, captions)
        print(f"Hidden regions: {args.gallery}")

    dtype = evaluation_dtype(args.mixed_precision, accelerator.unwrap_model(model))
    retrieval = zero_shot_retrieval(
        accelerator.unwrap_model(model), processor, regions, captions, args.num_retrieval_images, dtype
    )
    if is_main:
        print(f"\nZero-shot retrieval, {len(retrieval.captions):,} captions of {len(retrieval.image_ids):,} images")
        print(metrics_table(retrieval.metrics, retrieval.chance))
        write_metrics(args, metrics | retrieval.metrics)


def draw_gallery(
    args: PretrainingEvaluationArguments,
    model: UnicoderVLForPreTraining,
    processor: UnicoderVLProcessor,
    store: RegionStore,
    captions: datasets.Dataset,
) -> None:
    """
    Writes a gallery of the surest regions of a few images, drawn evenly, each hidden from the model in turn.

    Raises:
        `ValueError`: the regions have no classes or no boxes, or a photo is not that of its record.
        `KeyError`: an image has no photo.
    """
    assert args.gallery is not None
    photos = None if args.photos is None else Photos(args.photos, args.photo_ids)
    caption_of = dict(zip(captions["image_id"], captions["caption"], strict=True))
    known_ids = list(caption_of)
    image_ids = [known_ids[place] for place in evenly(len(known_ids), IMAGES_SHOWN)]

    def items() -> Iterator[tuple[str, Image.Image, RegionRecord, Sequence[int], np.ndarray]]:
        for image_id in image_ids:
            record, caption = store[image_id], caption_of[image_id]
            if record.object_ids is None:
                raise ValueError(f"--gallery: the regions of {image_id!r} have no classes that could be predicted.")
            seen, probabilities = predict_hidden_regions(model, processor, record, caption)
            scores = np.zeros(len(seen)) if record.object_scores is None else record.object_scores[seen]
            known = [place for place in np.argsort(-scores, kind="stable") if record.object_ids[seen[place]] >= 0]
            known = known[:REGIONS_SHOWN]
            page = blank_page(record) if photos is None else photos.of(record)
            yield caption, page, record, seen[known].tolist(), probabilities[known]

    write_hidden_regions(
        args.gallery,
        items(),
        store.provenance.get("class_names") or None,
        intro="Each covered region was hidden from the model alone, which knew its place, the other regions and the "
        "caption. Beneath it is the class that the model took it for, in a frame where the detector says the same.",
    )


if __name__ == "__main__":
    run_script(main)

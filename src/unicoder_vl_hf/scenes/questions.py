"""
Visual commonsense reasoning on the rendered scenes: questions that can be answered only by the objects they refer to.

A scene shows two kinds of shape, one of each in every quarter of the picture, and the four of a kind differ in colour.
The right answer therefore depends on which object is referred to, and the words ("circle") never tell:

    what colour is [3] ?        [3] is red .                        its colour, or that of another of its kind
    what colours are [1, 3] ?   blue and red .                      of four pairs, each sharing one with two others

The rationale says the colour of an object of the other kind, which it refers to itself.

From the text alone, the regions without the references, or the references without the regions, every choice is equally
likely: one in four guesses is right.

The files are VCR's own. As in `world.py` everything is a pure function of (seed, split, index).
"""

import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .world import (
    COLOURS,
    HEIGHT,
    SHAPE_WORDS,
    WIDTH,
    Scene,
    SceneObject,
    build_once,
    check_split,
    draw_scenes,
    generator_of,
    in_random_order,
    place,
    write_lines,
)

FORMS = ("colour", "colours")
# A finished folder must have this version: raise it with every change of the pictures or questions.
_WORLD = 1

Tokens = list[str | list[int]]


def sample_vcr_scene(index: int, split: str = "train", seed: int = 0) -> Scene:
    """
    Draws scene number `index` of a split, independent of all others; its objects are in random order. Raises ValueError
    on an unknown split.
    """
    check_split(split)
    image_id = f"vcr-{split}-{index:05d}"
    rng = generator_of(seed, image_id, "scene")
    kinds = rng.choice(list(SHAPE_WORDS), size=2, replace=False).tolist()
    colours = [rng.choice(list(COLOURS), size=4, replace=False).tolist() for _ in kinds]
    objects = []
    for quarter, (left, top) in enumerate(product((0, WIDTH // 2), (0, HEIGHT // 2))):
        boxes = place(rng, ["small", "small"], WIDTH // 2, HEIGHT // 2)
        for kind, (x1, y1, x2, y2), of_kind in zip(kinds, boxes, colours, strict=True):
            box = (left + x1, top + y1, left + x2, top + y2)
            objects.append(SceneObject(kind, of_kind[quarter], "small", box))
    return in_random_order(rng, image_id, objects, seed)


def scene_questions(scene: Scene) -> list[dict[str, Any]]:
    """Asks a question of each form about a scene of [`sample_vcr_scene`], in VCR's fields."""
    rng = generator_of(scene.seed, scene.image_id, "questions")
    return [_question(rng, scene, form) for form in FORMS]


def _question(rng: np.random.Generator, scene: Scene, form: str) -> dict[str, Any]:
    """Asks a question of one form. The right choices come first, until they are shuffled."""
    meant = int(rng.integers(len(scene.objects)))
    kind = scene.objects[meant].shape
    order = rng.permutation(len(scene.objects)).tolist()
    alike = [meant, *(i for i in order if scene.objects[i].shape == kind and i != meant)]
    others = [i for i in order if scene.objects[i].shape != kind]
    if form == "colour":
        question: Tokens = ["what", "colour", "is", [meant], "?"]
        answers = _colours(scene, alike)
    else:
        # Pairs along the sides of a square of the four objects: each shares an object with two others.
        pairs = [sorted(pair) for pair in zip(alike, [*alike[1:], meant], strict=True)]
        question = ["what", "colours", "are", pairs[0], "?"]
        answers = [[scene.objects[i].colour, "and", scene.objects[j].colour, "."] for i, j in pairs]
    item: dict[str, Any] = {"question": question}
    for name, choices in (("answer", answers), ("rationale", _colours(scene, others))):
        order = rng.permutation(len(choices)).tolist()
        item |= {f"{name}_choices": [choices[i] for i in order], f"{name}_label": order.index(0)}
    return item


def _colours(scene: Scene, objects: Sequence[int]) -> list[Tokens]:
    """
    Gives a statement for each of `objects`: that the first one has its own colour (the right one), or that of another.
    """
    return [[[objects[0]], "is", scene.objects[i].colour, "."] for i in objects]


def build_vcr_scenes(
    folder: str | os.PathLike, num_train: int = 2000, num_val: int = 400, num_test: int = 50, seed: int = 0
) -> Path:
    """
    Draws a world of questions to disk, in the layout of VCR.

        {train,val,test}.jsonl      the questions, two a scene; those of the test split have no labels
        images/{image_id}.png       the pictures
        images/{image_id}.json      the boxes of the objects
        regions/                    a `RegionStore` of what a detector would find, of all splits
        scenes.json                 the arguments of this function

    The folder appears whole, is kept, replaced or refused as that of [`build_scenes`] is.

    Args:
        folder (`str` or `os.PathLike`): The folder to write.
        num_train, num_val, num_test (`int`): Number of scenes of each split.
        seed (`int`): Seed of the world; another seed gives another world of the same kind.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The folder holds something that this function did not write.
    """
    return build_once(folder, {"vcr_world": _WORLD, "seed": seed}, (num_train, num_val, num_test), _write_world)


def _write_world(folder: Path, counts: dict[str, int], seed: int) -> None:
    drawn = draw_scenes(folder, counts, seed, lambda *place: (sample_vcr_scene(*place), None))
    for split, scenes in drawn.items():
        for scene, _ in scenes:
            (folder / "images" / f"{scene.image_id}.json").write_text(json.dumps(_metadata(scene)))
        asked = [(scene, item) for scene, _ in scenes for item in scene_questions(scene)]
        items = (_annotation(scene, item, f"{split}-{number}") for number, (scene, item) in enumerate(asked))
        write_lines(folder / f"{split}.jsonl", items)


def _metadata(scene: Scene) -> dict[str, Any]:
    return {
        "boxes": [[*thing.box, 1.0] for thing in scene.objects],
        "names": [thing.shape for thing in scene.objects],
        "width": scene.width,
        "height": scene.height,
    }


def _annotation(scene: Scene, item: dict[str, Any], annot_id: str) -> dict[str, Any]:
    if annot_id.startswith("test"):
        item = {name: value for name, value in item.items() if not name.endswith("_label")}
    return {
        "annot_id": annot_id,
        "img_id": scene.image_id,
        "img_fn": f"{scene.image_id}.png",
        "metadata_fn": f"{scene.image_id}.json",
        "movie": "scenes",
        "objects": [thing.shape for thing in scene.objects],
        **item,
    }

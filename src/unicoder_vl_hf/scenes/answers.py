"""
Questions with short answers about rendered scenes, in the files of VQA: three or four a scene, one of each form.

    colour      what colour is the star ?              one of eight: there is one star
    count       how many hearts are there ?            0 to 3
    existence   is there a red ring ?                  yes or no; its colour and its shape are both there either way
    number      are there more hearts than rings ?     yes or no; not asked where they are as many

No text tells its answer: colours, shapes and numbers are drawn evenly and independently, so that each question has its
answers equally often, over all scenes. Who sees no scene, or another one, is right as often as who guesses among the
answers of the form, `CHANCE`.

Left out on purpose: how things lie to each other, which a model of the size that learns these in minutes does not learn
in that time.

As in `world.py` everything is a pure function of (seed, split, index).
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .world import (
    COLOURS,
    SHAPE_WORDS,
    Scene,
    SceneObject,
    build_once,
    draw_scenes,
    generator_of,
    in_random_order,
    numbered_id,
    place,
    plural,
)

CHANCE = {"colour": 1 / len(COLOURS), "count": 1 / 4, "existence": 1 / 2, "number": 1 / 2}
_ANSWER_TYPES = {"colour": "other", "count": "number"}  # of VQA; all others are "yes/no"
_NUM_ANNOTATORS = 10  # all of one mind
# A finished folder must have this version: raise it with every change of the pictures or questions.
_WORLD = 1


def sample_asked_scene(index: int, split: str = "train", seed: int = 0) -> tuple[Scene, dict[str, tuple[str, str]]]:
    """
    Draws scene number `index` of a split, independent of all others, and asks about it. Raises ValueError on an unknown
    split.

    Returns:
        The scene, whose image id is a number, as in VQA, and a question with its answer by form.
    """
    image_id = numbered_id(index, split)
    rng = generator_of(seed, image_id, "scene")
    first, second, *singles = rng.permutation(list(SHAPE_WORDS))[:4].tolist()
    counts = rng.integers(0, 4, size=2).tolist()
    shapes = [first] * counts[0] + [second] * counts[1] + singles
    colours = rng.choice(list(COLOURS), size=len(shapes)).tolist()
    boxes = place(rng, ["small"] * len(shapes))
    things = [
        SceneObject(shape, colour, "small", box) for shape, colour, box in zip(shapes, colours, boxes, strict=True)
    ]
    asked = {
        "colour": (f"what colour is the {singles[0]} ?", things[-2].colour),
        "count": (f"how many {plural(first)} are there ?", str(counts[0])),
        "existence": _existence(rng, things),
    }
    if counts[0] != counts[1]:
        question = f"are there more {plural(first)} than {plural(second)} ?"
        asked["number"] = (question, _yes(counts[0] > counts[1]))
    return in_random_order(rng, image_id, things, seed), asked


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _existence(rng: np.random.Generator, things: list[SceneObject]) -> tuple[str, str]:
    pairs = [(thing.colour, thing.shape) for thing in things]
    holds = bool(rng.integers(2))
    colours, shapes = (sorted(set(names)) for names in zip(*pairs, strict=True))
    absent = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in pairs]
    if not absent:  # all are of one colour
        absent = [(colour, shape) for colour in COLOURS for shape in shapes if (colour, shape) not in pairs]
    options = pairs if holds else absent
    colour, shape = options[int(rng.integers(len(options)))]
    article = "an" if colour[0] in "aeiou" else "a"
    return f"is there {article} {colour} {shape} ?", _yes(holds)


def build_vqa_scenes(
    folder: str | os.PathLike, num_train: int = 4000, num_val: int = 400, num_test: int = 50, seed: int = 0
) -> Path:
    """
    Draws a world of questions to disk, in the layout of VQA.

        {train,val,test}_questions.json     the questions, three or four a scene
        {train,val}_annotations.json        their answers, each of ten annotators
        images/{image_id}.png               the pictures
        regions/                            a `RegionStore` of what a detector would find, of all splits
        scenes.json                         the arguments of this function

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
    return build_once(folder, {"vqa_world": _WORLD, "seed": seed}, (num_train, num_val, num_test), _write_world)


def _write_world(folder: Path, counts: dict[str, int], seed: int) -> None:
    for split, scenes in draw_scenes(folder, counts, seed, sample_asked_scene).items():
        asked = [(scene, form, *pair) for scene, of_scene in scenes for form, pair in of_scene.items()]
        questions, annotations = [], []
        for number, (scene, form, question, answer) in enumerate(asked, 1):
            ids = {"image_id": int(scene.image_id), "question_id": number}
            questions.append({**ids, "question": question})
            annotations.append({**ids, **_annotation(form, answer)})
        _write(folder / f"{split}_questions.json", questions=questions)
        if split != "test":
            _write(folder / f"{split}_annotations.json", annotations=annotations)


def _annotation(form: str, answer: str) -> dict[str, Any]:
    given = [{"answer": answer, "answer_id": number} for number in range(1, _NUM_ANNOTATORS + 1)]
    answer_type = _ANSWER_TYPES.get(form, "yes/no")
    return {"question_type": form, "answer_type": answer_type, "multiple_choice_answer": answer, "answers": given}


def _write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")

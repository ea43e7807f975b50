"""
Expressions that name one object of a rendered scene, in the files of RefCOCO: up to five a scene, one of each form.

    alone       the cross                     there is one
    colour      the red star                  there is another star, and something else is red
    size        the large star                there is a small star, and something else is large
    place       the ring on the left          there is another ring, to its right
    relation    the star left of the cross    there is another star, which lies otherwise to the cross

A scene has two stars, two rings and a cross, say, so that who does not read, or reads another expression, is right
about as often as who takes one of the five objects at random. None of its objects is of `HELD_OUT`: a model may begin
with these expressions, and be asked of the test scenes of `world.py` afterwards.

As in `world.py` everything is a pure function of (seed, split, index).
"""

import json
import os
from pathlib import Path
from typing import Any

from .world import (
    COLOURS,
    HELD_OUT,
    RELATION_WORDS,
    SHAPE_WORDS,
    Scene,
    SceneObject,
    _separation,
    build_once,
    draw_scenes,
    generator_of,
    in_random_order,
    numbered_id,
    place,
)

FORMS = ("alone", "colour", "size", "place", "relation")
_PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
# A finished folder must have this version: raise it with every change of the pictures or expressions.
_WORLD = 2


def sample_referred_scene(
    index: int, split: str = "train", seed: int = 0
) -> tuple[Scene, dict[str, tuple[str, SceneObject]]]:
    """
    Draws scene number `index` of a split, independent of all others, and names objects of it. Raises ValueError on an
    unknown split.

    Returns:
        The scene, whose image id is a number, as in COCO, and an expression with the object that it names by form.
    """
    image_id = numbered_id(index, split)
    rng = generator_of(seed, image_id, "referred scene")
    held_out = True
    while held_out:
        first, second, single = rng.permutation(list(SHAPE_WORDS))[:3].tolist()
        one, other, third = rng.permutation(list(COLOURS))[:3].tolist()
        kinds = [(first, one), (first, other), (second, one), (second, other), (single, third)]
        held_out = any((colour, shape) in HELD_OUT for shape, colour in kinds)
    sizes = [*rng.permutation(["small", "large"]), *rng.permutation(["small", "large"]), "small"]
    boxes = place(rng, sizes)
    things = [
        SceneObject(shape, colour, str(size), box)
        for (shape, colour), size, box in zip(kinds, sizes, boxes, strict=True)
    ]
    twins = [things[:2], things[2:4]]
    rng.shuffle(twins)
    named = {"alone": (f"the {single}", things[4])}
    for form, (target, _) in zip(("colour", "size"), twins, strict=True):
        named[form] = (f"the {getattr(target, form)} {target.shape}", target)
    target, twin = twins[int(rng.integers(2))][:: int(rng.choice([1, -1]))]
    named["place"] = (f"the {target.shape} {_PLACES[_separation(target.box, twin.box)[0]]}", target)
    for target, twin in (pair[::side] for pair in twins for side in (1, -1)):
        relation, of_twin = (_separation(thing.box, things[4].box)[0] for thing in (target, twin))
        if relation != of_twin:
            named["relation"] = (f"the {target.shape} {RELATION_WORDS[relation][0]} the {single}", target)
    return in_random_order(rng, image_id, things, seed), named


def build_grounding_scenes(
    folder: str | os.PathLike, num_train: int = 4000, num_val: int = 400, num_test: int = 50, seed: int = 0
) -> Path:
    """
    Draws a world of expressions to disk, in the layout of RefCOCO, but for its pickle, which is a json.

        refs.json                   the expressions, up to five a scene, of the splits train, val and test
        instances.json              the sizes of the pictures, and the boxes of the objects
        images/{image_id}.png       the pictures
        regions/                    a `RegionStore` of what a detector would find, of all splits
        scenes.json                 the arguments of this function

    The folder appears whole, is kept, replaced or refused as that of [`build_scenes`] is. Arguments and errors are
    those of [`build_vqa_scenes`].
    """
    return build_once(folder, {"grounding_world": _WORLD, "seed": seed}, (num_train, num_val, num_test), _write_world)


def _write_world(folder: Path, counts: dict[str, int], seed: int) -> None:
    refs: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    drawn = draw_scenes(folder, counts, seed, sample_referred_scene)
    for split, scene, named in ((split, *each) for split, scenes in drawn.items() for each in scenes):
        number = int(scene.image_id)
        images.append({"id": number, "width": scene.width, "height": scene.height, "file_name": f"{number}.png"})
        ids = {}
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            ids[thing.box] = len(annotations)
            annotations.append({"id": len(annotations), "image_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        for form, (text, thing) in named.items():
            sentences = [{"sent_id": len(refs), "sent": text, "raw": text, "tokens": text.split()}]
            of_ref = {"ref_id": len(refs), "ann_id": ids[thing.box], "image_id": number, "form": form}
            refs.append({**of_ref, "split": split, "sentences": sentences})
    (folder / "refs.json").write_text(json.dumps(refs), encoding="utf-8")
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")

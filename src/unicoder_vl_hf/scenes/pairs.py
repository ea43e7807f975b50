"""
Sentences about two rendered scenes, in the file of NLVR2: up to two a pair, one of each form.

    both     there is a star in both                               or in one of them alone
    more     there are more hearts on the left than on the right   or fewer

Shapes, numbers and sides are drawn evenly and independently, so that each sentence is true as often as false, over all
pairs: who sees no scenes, or others, is right one time in two. The scenes are of the kind of `answers.py`, and as there
everything is a pure function of (seed, split, index).

Left out on purpose: what one output of either photo cannot tell by a sum, such as whether exactly one of them shows a
star.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from .answers import sample_asked_scene
from .world import SHAPE_WORDS, Scene, build_once, draw_scenes, generator_of, plural, write_lines

_SPLITS = {"train": "train", "val": "dev", "test": "test1"}  # as NLVR2 calls them
# A finished folder must have this version: raise it with every change of the pictures or sentences.
_WORLD = 1


def sample_pair(index: int, split: str = "train", seed: int = 0) -> tuple[tuple[Scene, Scene], list[tuple[str, bool]]]:
    """Draws pair number `index` of a split, independent of all others, and sentences, each with whether it is true."""
    scenes = tuple(_scene(2 * index + side, split, seed) for side in (0, 1))
    rng = generator_of(seed, scenes[0].image_id, "pair")
    left, right = (Counter(thing.shape for thing in scene.objects) for scene in scenes)
    shapes = [shape for shape in rng.permutation(list(SHAPE_WORDS)).tolist() if left[shape] or right[shape]]
    both = [shape for shape in shapes if left[shape] and right[shape]]
    one = [shape for shape in shapes if not (left[shape] and right[shape])]
    differing = [shape for shape in shapes if left[shape] != right[shape]]
    sentences = []
    if both and one:  # else the sentence could be only true, or only false
        holds = bool(rng.integers(2))
        sentences.append((f"there is a {(both if holds else one)[0]} in both", holds))
    if differing:
        shape, sides = differing[0], rng.permutation(["left", "right"]).tolist()
        holds = (left[shape] > right[shape]) == (sides[0] == "left")
        sentences.append((f"there are more {plural(shape)} on the {sides[0]} than on the {sides[1]}", holds))
    return (scenes[0], scenes[1]), sentences


def _scene(number: int, split: str, seed: int) -> Scene:
    """Draws the left scene of a pair, of an even number, or the right one."""
    scene, _ = sample_asked_scene(number, split, seed)
    return replace(scene, image_id=f"{_SPLITS[split]}-{number // 2}-0-img{number % 2}")


def build_nlvr2_scenes(
    folder: str | os.PathLike, num_train: int = 3000, num_val: int = 300, num_test: int = 50, seed: int = 0
) -> Path:
    """
    Draws a world of pairs to disk, in the layout of NLVR2.

        {train,dev,test1}.json      the sentences, up to two a pair, one json a line
        images/{image_id}.png       the pictures
        regions/                    a `RegionStore` of what a detector would find, of all splits
        scenes.json                 the arguments of this function

    The folder appears whole, is kept, replaced or refused as that of [`build_scenes`] is. `num_train` and the others
    count pairs; arguments and errors are else those of [`build_vqa_scenes`].
    """
    return build_once(
        folder, {"nlvr2_world": _WORLD, "seed": seed}, (num_train, num_val, num_test), _write_world, unit="pairs"
    )


def _write_world(folder: Path, counts: dict[str, int], seed: int) -> None:
    num_scenes = {split: 2 * count for split, count in counts.items()}
    draw_scenes(folder, num_scenes, seed, lambda *place: (_scene(*place), None))
    for split, count in counts.items():
        items = (
            {"identifier": f"{_SPLITS[split]}-{pair}-0-{place}", "sentence": sentence, "label": str(holds)}
            for pair in range(count)
            for place, (sentence, holds) in enumerate(sample_pair(pair, split, seed)[1])
        )
        write_lines(folder / f"{_SPLITS[split]}.json", items)

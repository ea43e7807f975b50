"""
Hypotheses about rendered scenes, in the file of SNLI-VE: three a scene, one that follows from it, one that contradicts
it, and one of which it says nothing.

    entailment       the star is red       there is one star, and it is
    contradiction    the star is red       there is one star, of another colour
    neutral          the star is red       there is no star; something red is there

Each text has the three labels equally often, over all scenes: who sees no scene, or another one, is right one time in
three. The scenes are those of `answers.py`, and as there everything is a pure function of (seed, split, index).
"""

import os
from collections import Counter
from pathlib import Path

from .answers import sample_asked_scene
from .world import COLOURS, SHAPE_WORDS, Scene, build_once, draw_scenes, generator_of, write_lines

# A finished folder must have this version: raise it with every change of the pictures or hypotheses.
_WORLD = 1


def sample_hypotheses(index: int, split: str = "train", seed: int = 0) -> tuple[Scene, dict[str, str]]:
    """
    Draws scene number `index` of a split, as [`sample_asked_scene`] does, and a hypothesis about it of each label.
    """
    scene, _ = sample_asked_scene(index, split, seed)
    rng = generator_of(seed, scene.image_id, "hypotheses")
    counts = Counter(thing.shape for thing in scene.objects)
    single = [thing for thing in scene.objects if counts[thing.shape] == 1]
    colours = sorted({thing.colour for thing in scene.objects})
    true, false = (single[int(rng.integers(len(single)))] for _ in range(2))
    others = [colour for colour in colours if colour != false.colour]
    others = others or [colour for colour in COLOURS if colour != false.colour]
    absent = [shape for shape in SHAPE_WORDS if shape not in counts]
    return scene, {
        "entailment": f"the {true.shape} is {true.colour}",
        "contradiction": f"the {false.shape} is {rng.choice(others)}",
        "neutral": f"the {rng.choice(absent)} is {rng.choice(colours)}",
    }


def build_entailment_scenes(
    folder: str | os.PathLike, num_train: int = 4000, num_val: int = 400, num_test: int = 50, seed: int = 0
) -> Path:
    """
    Draws a world of hypotheses to disk, in the layout of SNLI-VE.

        {train,val,test}.jsonl      the hypotheses, three a scene
        images/{image_id}.png       the pictures
        regions/                    a `RegionStore` of what a detector would find, of all splits
        scenes.json                 the arguments of this function

    The folder appears whole, is kept, replaced or refused as that of [`build_scenes`] is. Arguments and errors are
    those of [`build_vqa_scenes`].
    """
    return build_once(folder, {"entailment_world": _WORLD, "seed": seed}, (num_train, num_val, num_test), _write_world)


def _write_world(folder: Path, counts: dict[str, int], seed: int) -> None:
    for split, scenes in draw_scenes(folder, counts, seed, sample_hypotheses).items():
        texts = [(scene.image_id, *each) for scene, hypotheses in scenes for each in hypotheses.items()]
        items = (
            {"Flickr30K_ID": name, "pairID": f"{name}#{label}", "gold_label": label, "sentence2": text}
            for name, label, text in texts
        )
        write_lines(folder / f"{split}.jsonl", items)

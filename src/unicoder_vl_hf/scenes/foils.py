"""
Foils of the rendered scenes: captions of which a colour, a shape, a size, a relation or a count is made false.

As everything of a scene they are a function of (seed, split, index). What is put in is false of the scene: no object of
the shape has the colour, the size is the other one, the relation its opposite, the count one more or less.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ..data.foils import Foil, put_word
from .world import (
    COLOUR_WORDS,
    HELD_OUT,
    NUM_SCENES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Scene,
    _say,
    counted_shape,
    generator_of,
    sample_scene,
    say_count,
    scene_captions,
)

_OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above", "small": "large", "large": "small"}


def _ids(table: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Gives the id of each word of a table."""
    return {word: name for name, words in table.items() for word in words}


_COLOURS, _SHAPES, _SIZES, _RELATIONS = (
    _ids(table) for table in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, RELATION_WORDS)
)


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_NAME = re.compile(rf"(?:(?P<size>{_any(_SIZES)}) )?(?P<colour>{_any(_COLOURS)}) (?P<shape>{_any(_SHAPES)})")
_RELATION = re.compile(rf"\b(?P<relation>{_any(_RELATIONS)}) an? ")

# Of the training scenes a third will do to train scorers without images.
_NUM_SCENES = NUM_SCENES | {"train": 1000}


def world_foils(split: str) -> list[Foil]:
    """Makes the foils of the scenes of a split. Raises ValueError on an unknown split."""
    return [foil for n in range(_NUM_SCENES.get(split, 1)) for foil in scene_foils(sample_scene(n, split))]


def caption_foils(split: str) -> list[Foil]:
    """
    Makes the foils of the captions that `build_scenes` writes, which do not count, of all scenes of a split. Those of
    the training split name no pair of `HELD_OUT`, of which they would teach that it is never true. Raises ValueError on
    an unknown split.
    """
    without = HELD_OUT if split == "train" else frozenset()
    scenes = (sample_scene(n, split) for n in range(NUM_SCENES.get(split, 1)))
    foils = (foil for scene in scenes for foil in scene_foils(scene, without))
    return [foil for foil in foils if foil.kind != "count"]


def scene_foils(scene: Scene, without: frozenset[tuple[str, str]] = frozenset()) -> list[Foil]:
    """
    Makes foils of the captions of a scene, and of one that counts: for each caption one of each kind. None names a pair
    of colour and shape of `without`.
    """
    rng = generator_of(scene.seed, scene.image_id, "foils")
    found = []
    for caption in scene_captions(scene):
        options = [option for match in _NAME.finditer(caption) for option in _of_name(rng, match, scene, without)]
        for match in _RELATION.finditer(caption):
            relation = _RELATIONS[match["relation"]]
            number = RELATION_WORDS[relation].index(match["relation"])
            options.append(("relation", match, RELATION_WORDS[_OPPOSITES[relation]][number]))
        for kind in ("colour", "shape", "size", "relation"):
            of_kind = [option for option in options if option[0] == kind]
            if of_kind:
                _, match, word = of_kind[int(rng.integers(len(of_kind)))]
                foil = put_word(caption, *match.span(kind), word)
                found.append((caption, foil, match[kind], word, kind))
    count, shape = counted_shape(scene)
    other = count + 1 if count == 1 or rng.random() < 0.3 else count - 1
    found.append((say_count(count, shape), say_count(other, shape), str(count), str(other), "count"))
    return [Foil(scene.image_id, scene.image_id.split("-")[0], *values) for values in found]


def _of_name(
    rng: np.random.Generator, match: re.Match[str], scene: Scene, without: frozenset[tuple[str, str]]
) -> Iterator[tuple[str, re.Match[str], str]]:
    """Gives what else the name of an object could say, no pair of `without`, all of it false: kind, match and word."""
    pairs = {(thing.colour, thing.shape) for thing in scene.objects} | without
    colour, shape = _COLOURS[match["colour"]], _SHAPES[match["shape"]]
    for other in COLOUR_WORDS:
        if (other, shape) not in pairs:
            yield "colour", match, _say(rng, COLOUR_WORDS[other])
    for other in SHAPE_WORDS:
        if (colour, other) not in pairs:
            yield "shape", match, _say(rng, SHAPE_WORDS[other])
    if match["size"] is not None:
        yield "size", match, _say(rng, SIZE_WORDS[_OPPOSITES[_SIZES[match["size"]]]])

"""
A small rendered world, so that training, retrieval and tests run where nothing can be downloaded.

A scene is a picture of three or four shapes on one of four grounds. Each shape has a colour, a size and a place.
Captions name some of the shapes, say how they lie to each other, and use synonyms. Regions come from the boxes of the
drawing, jittered as a detector's would be, plus the ground as a whole; their features are pooled pixels, never labels.
Object classes are the shapes and the grounds.

Everything is a pure function of (seed, split, index): scene 7 is the same whether or not scene 6 was ever drawn.

The split asks for composition. `HELD_OUT` holds 8 of the 64 (colour, shape) pairs, one for each colour and one for each
shape. No training or validation scene shows such a pair, every test scene shows at least one. So each colour and each
shape is seen in training, in 7 of its 8 pairs.

Left out on purpose: occlusion, perspective, and whatever else would call for a convolutional network.
"""

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import BertTokenizer

from .. import logging
from ..data.preparation import SPLITS
from ..records_unicoder_vl import RegionRecord
from ..regions.store import RegionStoreWriter

try:
    from PIL import Image, ImageDraw
except ImportError as error:
    raise ImportError("Scenes are drawn with Pillow: pip install '.[demo]' in a checkout of unicoder-vl-hf.") from error

logger = logging.get_logger(__name__)

WIDTH, HEIGHT = 192, 144

# The first name of each thing is its id, the others are the synonyms that captions may use.
COLOURS = {
    "red": (214, 45, 45),
    "orange": (240, 136, 30),
    "yellow": (246, 214, 48),
    "green": (34, 139, 66),
    "blue": (38, 84, 204),
    "purple": (136, 58, 168),
    "white": (250, 250, 250),
    "black": (36, 36, 40),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"red": ("red", "crimson"), "purple": ("purple", "violet")}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
}
GROUNDS = {"grass": (188, 222, 160), "sand": (238, 220, 178), "water": (170, 212, 236), "snow": (232, 236, 242)}
GROUND_WORDS = {
    "grass": ("grass", "lawn"),
    "sand": ("sand", "beach"),
    "water": ("water", "lake"),
    "snow": ("snow", "ice"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SIDES = {"small": (28, 36), "large": (46, 58)}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLACE_WORDS = {
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "middle": ("in the middle", "in the centre"),
}
GLUE_WORDS = ("a", "an", "the", "and", "there", "is", "on", ",", ".")
QUESTION_WORDS = ("what", "colour", "colours", "are", "?", ";")  # see questions.py

CLASS_NAMES = (*SHAPE_WORDS, *GROUNDS)
HELD_OUT = frozenset(
    (colour, shape) for colour, shape in zip(COLOURS, [*SHAPE_WORDS][3:] + [*SHAPE_WORDS][:3], strict=True)
)

_GRID = 8
FEATURE_DIM = _GRID * _GRID * 4
FEATURE_DESCRIPTION = (
    f"pooled pixels: {_GRID} x {_GRID} cells of the box, mean red, green, blue as (v / 255 - 0.5) / 0.25, "
    "then edge strength as (e - 0.1) / 0.1"
)
_SUPERSAMPLING = 3
Beside = TypeVar("Beside")
_INK = (48, 44, 52)
# A finished folder must have this version: raise it with every change of the pictures, captions or features.
_WORLD = 1


@dataclass(frozen=True)
class SceneObject:
    """A shape of a scene. `box` is tight: (x1, y1, x2, y2) in pixels, outline included."""

    shape: str
    colour: str
    size: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """
    The ground and the objects of a picture. `seed` and `image_id` decide everything random about its picture, regions
    and captions.
    """

    image_id: str
    ground: str
    objects: tuple[SceneObject, ...]
    seed: int = 0
    width: int = WIDTH
    height: int = HEIGHT


def generator_of(seed: int, image_id: str, purpose: str) -> np.random.Generator:
    """Makes the random generator of one purpose, such as "picture", for a scene."""
    return np.random.default_rng(list(f"{seed}/{image_id}/{purpose}".encode()))


def sample_scene(index: int, split: str = "train", seed: int = 0) -> Scene:
    """Draws scene number `index` of a split, independent of all others. Raises ValueError on an unknown split."""
    check_split(split)
    image_id = f"{split}-{index:05d}"
    rng = generator_of(seed, image_id, "scene")
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPE_WORDS]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    if split == "test":
        # The first held-out pair of the random order comes first; the rest may be any pairs.
        pairs.insert(0, pairs.pop(next(i for i, pair in enumerate(pairs) if pair in HELD_OUT)))
    else:
        pairs = [pair for pair in pairs if pair not in HELD_OUT]
    count = int(rng.integers(3, 5))
    sizes = [str(size) for size in rng.choice(list(SIDES), size=count)]
    boxes = place(rng, sizes)
    objects = [
        SceneObject(shape, colour, size, box) for (colour, shape), size, box in zip(pairs, sizes, boxes, strict=False)
    ]
    return Scene(image_id, str(rng.choice(list(GROUNDS))), tuple(objects), seed)


def numbered_id(index: int, split: str) -> str:
    """Gives the image id of scene number `index` of a split as a number. Raises ValueError on an unknown split."""
    check_split(split)
    return str(1_000_000 * (1 + SPLITS.index(split)) + index)


def check_split(split: str) -> None:
    """Raises ValueError on an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}.")


def in_random_order(rng: np.random.Generator, image_id: str, things: Sequence[SceneObject], seed: int) -> Scene:
    """Makes a scene of things in random order, on a random ground."""
    order = rng.permutation(len(things)).tolist()
    return Scene(image_id, str(rng.choice(list(GROUNDS))), tuple(things[i] for i in order), seed)


def place(
    rng: np.random.Generator, sizes: Sequence[str], width: int = WIDTH, height: int = HEIGHT, gap: int = 5
) -> list[tuple[int, int, int, int]]:
    """Places boxes that keep `gap` pixels from each other and from the border; starts over when a box finds no room."""
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for size in sizes:
            for _ in range(30):
                side = int(rng.integers(SIDES[size][0], SIDES[size][1] + 1))
                x, y = int(rng.integers(gap, width - gap - side + 1)), int(rng.integers(gap, height - gap - side + 1))
                box = (x, y, x + side, y + side)
                if all(_separation(box, other)[1] >= gap for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(sizes):
            return boxes


def _separation(box: Sequence[float], other: Sequence[float]) -> tuple[str, float]:
    """
    Gives how `box` lies to `other` along the axis that separates them best, and the pixels between them (< 0: they
    overlap).
    """
    gaps = {
        "left": other[0] - box[2],
        "right": box[0] - other[2],
        "above": other[1] - box[3],
        "below": box[1] - other[3],
    }
    relation = max(gaps, key=lambda name: gaps[name])
    return relation, gaps[relation]


# Pictures

_Loop = list[tuple[float, float]]


def _round(radius: float = 0.5, steps: int = 48) -> _Loop:
    angles = [2 * math.pi * step / steps for step in range(steps + 1)]
    return [(0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)) for angle in angles]


def _fill_unit_square(points: _Loop) -> _Loop:
    xs, ys = zip(*points, strict=True)
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


def _star() -> _Loop:
    corners = [(0.5 if step % 2 == 0 else 0.2, math.pi * (step / 5 - 0.5)) for step in range(11)]
    return _fill_unit_square([(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners])


def _heart() -> _Loop:
    angles = [2 * math.pi * step / 48 for step in range(49)]
    curve = [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in angles
    ]
    return _fill_unit_square(curve)


def _cross(arm: float = 0.32) -> _Loop:
    a, b = arm, 1 - arm
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a), (a, 0)]


# Closed loops in the unit square; a second loop is a hole.
_LOOPS: dict[str, list[_Loop]] = {
    "circle": [_round()],
    "square": [[(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]],
    "triangle": [[(0.5, 0), (1, 1), (0, 1), (0.5, 0)]],
    "star": [_star()],
    "cross": [_cross()],
    "ring": [_round(), _round(0.24)[::-1]],
    "heart": [_heart()],
    "diamond": [[(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5), (0.5, 0)]],
}


def render_scene(scene: Scene) -> Image.Image:
    """Draws a scene as an RGB picture of `scene.width` x `scene.height` pixels."""
    rng = generator_of(scene.seed, scene.image_id, "picture")
    scale = _SUPERSAMPLING
    size = (scene.width * scale, scene.height * scale)
    image = Image.new("RGB", size, _tinted(rng, GROUNDS[scene.ground], 6))
    draw = ImageDraw.Draw(image)
    _draw_ground(draw, rng, scene.ground, size)
    inset = (
        2  # half the width of an outline, which so stays inside the box; Pillow counts the last pixel in, hence the 1
    )
    for thing in scene.objects:
        x1, y1, x2, y2 = (edge * scale for edge in thing.box)
        origin, side = (x1 + inset, y1 + inset), (x2 - x1 - 2 * inset - 1, y2 - y1 - 2 * inset - 1)
        loops = [[(origin[0] + x * side[0], origin[1] + y * side[1]) for x, y in loop] for loop in _LOOPS[thing.shape]]
        # One polygon through all loops and back to the first: the area between two loops is inside.
        draw.polygon([p for loop in loops for p in loop] + loops[0][:1], fill=_tinted(rng, COLOURS[thing.colour], 8))
        for loop in loops:
            draw.line([*loop, loop[1]], fill=_INK, width=2 * inset, joint="curve")
    return image.reduce(scale)


def _tinted(rng: np.random.Generator, colour: tuple[int, int, int], spread: int) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.add(colour, rng.integers(-spread, spread + 1, 3)), 0, 255))


def _draw_ground(draw: ImageDraw.ImageDraw, rng: np.random.Generator, ground: str, size: tuple[int, int]) -> None:
    """Draws a light texture: blades on grass, grains on sand, ripples on water, flakes on snow."""
    for x, y, shade in zip(rng.uniform(0, size[0], 70), rng.uniform(0, size[1], 70), rng.integers(-26, -8, 70)):  # noqa: B905
        colour = tuple(int(value + shade) for value in GROUNDS[ground])
        if ground == "grass":
            draw.line([(x, y), (x + shade / 4, y - 16)], fill=colour, width=3)
        elif ground == "sand":
            draw.ellipse([x, y, x + 4, y + 4], fill=colour)
        elif ground == "water":
            draw.arc([x, y, x + 36, y + 13], 200, 340, fill=colour, width=3)
        else:
            draw.ellipse([x, y, x + 9, y + 9], fill="white" if shade % 2 else colour)


# Regions


def pool_pixels(image: Image.Image, boxes: np.ndarray) -> np.ndarray:
    """
    Gives the features of boxes: their pixels on a coarse grid, see `FEATURE_DESCRIPTION`.

    Args:
        image (`PIL.Image.Image`): An RGB picture.
        boxes (`np.ndarray` of shape `(num_boxes, 4)`): x1 y1 x2 y2 in pixels.

    Returns:
        `np.ndarray` of shape `(num_boxes, FEATURE_DIM)`, float32.
    """
    fine = 2 * _GRID
    crops = [
        np.asarray(image.resize((fine, fine), Image.Resampling.BILINEAR, box=tuple(box))) for box in boxes.tolist()
    ]
    pixels = np.stack(crops).astype(np.float32) / 255
    steps = np.pad(np.abs(np.diff(pixels, axis=1)), ((0, 0), (0, 1), (0, 0), (0, 0)))
    steps += np.pad(np.abs(np.diff(pixels, axis=2)), ((0, 0), (0, 0), (0, 1), (0, 0)))
    edges = steps.max(axis=-1, keepdims=True)
    channels = np.concatenate([(pixels - 0.5) / 0.25, (edges - 0.1) / 0.1], axis=-1)
    cells = channels.reshape(len(channels), _GRID, 2, _GRID, 2, 4).mean(axis=(2, 4))
    return np.ascontiguousarray(cells.transpose(0, 3, 1, 2)).reshape(len(cells), FEATURE_DIM)


def scene_regions(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Gives boxes `(n, 4)` in pixels, object classes `(n,)` and scores `(n,)` as a detector would: each side off by up to
    6 %, best first.

    The score is the overlap with the tight box (intersection over union, 0 to 1), so the order does not tell what is
    where.
    """
    rng = generator_of(scene.seed, scene.image_id, "regions")
    tight = np.array([(0, 0, scene.width, scene.height), *(thing.box for thing in scene.objects)], dtype=np.float32)
    classes = np.array([CLASS_NAMES.index(name) for name in (scene.ground, *(thing.shape for thing in scene.objects))])
    sides = np.tile(tight[:, 2:] - tight[:, :2], 2)
    limits = np.array([scene.width, scene.height] * 2, dtype=np.float32)
    boxes = np.clip(tight + sides * rng.uniform(-0.06, 0.06, tight.shape), 0, limits).astype(np.float32)
    shared = np.prod(np.minimum(boxes, tight)[:, 2:] - np.maximum(boxes, tight)[:, :2], axis=1)
    areas = [np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, tight)]
    scores = shared / (areas[0] + areas[1] - shared)
    order = np.argsort(-scores, kind="stable")
    return boxes[order], classes[order], scores[order].astype(np.float32)


def scene_record(scene: Scene, image: Image.Image | None = None) -> RegionRecord:
    """Makes the record of the regions of a scene, with features from `image` (rendered when None)."""
    boxes, object_ids, object_scores = scene_regions(scene)
    return RegionRecord(
        image_id=scene.image_id,
        image_width=scene.width,
        image_height=scene.height,
        boxes=boxes,
        features=pool_pixels(image or render_scene(scene), boxes),
        object_ids=object_ids,
        object_scores=object_scores,
    )


# Captions


def scene_captions(scene: Scene, count: int = 5) -> list[str]:
    """Writes `count` true captions of a scene, each of another form until all forms were used. Needs three objects."""
    rng = generator_of(scene.seed, scene.image_id, "captions")
    forms = [_listing, _on_ground, _related, _twice_related, _placed]
    captions = []
    for number in range(count):
        if number % len(forms) == 0:
            order = rng.permutation(len(forms))
        things = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:3]]
        captions.append(forms[order[number % len(forms)]](rng, things, scene))
    return captions


def _say(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Gives the first word most of the time, a synonym otherwise."""
    return words[0] if rng.random() < 0.6 else words[int(rng.integers(len(words)))]


def _name(rng: np.random.Generator, thing: SceneObject) -> str:
    words = [_say(rng, COLOUR_WORDS[thing.colour]), _say(rng, SHAPE_WORDS[thing.shape])]
    if rng.random() < 0.3:
        words.insert(0, _say(rng, SIZE_WORDS[thing.size]))
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _relation(rng: np.random.Generator, thing: SceneObject, other: SceneObject) -> str:
    return _say(rng, RELATION_WORDS[_separation(thing.box, other.box)[0]])


def _position(rng: np.random.Generator, thing: SceneObject, scene: Scene) -> str:
    """Names a third of the picture that holds the centre of `thing`."""
    x, y = (thing.box[0] + thing.box[2]) / 2 / scene.width, (thing.box[1] + thing.box[3]) / 2 / scene.height
    true = {"left": x < 1 / 3, "right": x > 2 / 3, "top": y < 1 / 3, "bottom": y > 2 / 3}
    places = [name for name, holds in true.items() if holds] or ["middle"]
    return _say(rng, PLACE_WORDS[places[int(rng.integers(len(places)))]])


def _listing(rng: np.random.Generator, things: Sequence[SceneObject], scene: Scene) -> str:
    a, b, c = (_name(rng, thing) for thing in things)
    return f"{a}, {b} and {c}"


def _on_ground(rng: np.random.Generator, things: Sequence[SceneObject], scene: Scene) -> str:
    a, b, c = (_name(rng, thing) for thing in things)
    return f"on the {_say(rng, GROUND_WORDS[scene.ground])} there is {a}, {b} and {c}"


def _related(rng: np.random.Generator, things: Sequence[SceneObject], scene: Scene) -> str:
    a, b = (_name(rng, thing) for thing in things[:2])
    return f"{a} {_relation(rng, *things[:2])} {b} on the {_say(rng, GROUND_WORDS[scene.ground])}"


def _twice_related(rng: np.random.Generator, things: Sequence[SceneObject], scene: Scene) -> str:
    a, b, c = (_name(rng, thing) for thing in things)
    return f"{a} {_relation(rng, things[0], things[1])} {b} and {_relation(rng, things[0], things[2])} {c}"


def _placed(rng: np.random.Generator, things: Sequence[SceneObject], scene: Scene) -> str:
    a, b = (f"{_name(rng, thing)} {_position(rng, thing, scene)}" for thing in things[:2])
    return f"{a} and {b}"


def counted_shape(scene: Scene) -> tuple[int, str]:
    """Draws a shape of a scene, more often one of several objects: how many objects have it, and a word for it."""
    rng = generator_of(scene.seed, scene.image_id, "count")
    counts = Counter(thing.shape for thing in scene.objects)
    several = [shape for shape in counts if counts[shape] > 1]
    shapes = several if several and rng.random() < 0.7 else list(counts)
    shape = shapes[int(rng.integers(len(shapes)))]
    return counts[shape], _say(rng, SHAPE_WORDS[shape])


def say_count(count: int, shape: str) -> str:
    """Says that there are so many of a shape. The words are pieces of the vocabulary: digits, and plurals with ##s."""
    return f"there is {count} {shape}" if count == 1 else f"there are {count} {plural(shape)}"


def plural(shape: str) -> str:
    """Gives the plural of a word for a shape."""
    return f"{shape}es" if shape[-1] in "sx" else f"{shape}s"


def scene_tokenizer() -> BertTokenizer:
    """Makes a BERT WordPiece tokenizer whose vocabulary is the words of this world, and letters for all others."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, GROUND_WORDS, SIZE_WORDS, RELATION_WORDS, PLACE_WORDS)
    phrases = [phrase for table in tables for names in table.values() for phrase in names]
    words = dict.fromkeys([word for phrase in phrases for word in phrase.split()] + list(GLUE_WORDS))
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters, *(f"##{c}" for c in characters)]
    pieces += QUESTION_WORDS  # last, so that a checkpoint of the captions alone keeps its ids
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))})


# How many scenes `build_scenes` draws, unless it is told otherwise.
NUM_SCENES = {"train": 3000, "val": 200, "test": 150}


def build_scenes(
    folder: str | os.PathLike,
    num_train: int = NUM_SCENES["train"],
    num_val: int = NUM_SCENES["val"],
    num_test: int = NUM_SCENES["test"],
    captions_per_image: int = 5,
    seed: int = 0,
    counting: bool = False,
) -> Path:
    """
    Draws a world to disk, with everything that training and retrieval read.

        photos/{image_id}.png   the pictures
        regions/                a `RegionStore` of all splits
        captions.jsonl          one caption a line: image_id, caption, split ("train", "val" or "test")
        scenes.json             the arguments of this function

    The folder appears whole or not at all. One that was built with the same arguments is left as it is, one built with
    others is replaced, and a folder that holds anything else is refused.

    Args:
        folder (`str` or `os.PathLike`): The folder to write.
        num_train, num_val, num_test (`int`): Number of scenes of each split.
        captions_per_image (`int`): Number of captions of each scene.
        seed (`int`): Seed of the world; another seed gives another world of the same kind.
        counting (`bool`): Whether training scenes have a further caption, of [`say_count`] and [`counted_shape`]. In a
            search it would be a poor query, so that the other splits have none.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The folder holds something that this function did not write.
    """
    settings = {"captions_per_image": captions_per_image} | ({"counting": True} if counting else {})

    def write(folder: Path, counts: dict[str, int], seed: int) -> None:
        _write_world(folder, counts, seed, captions_per_image, counting)

    return build_once(folder, {"world": _WORLD, "seed": seed, **settings}, (num_train, num_val, num_test), write)


def build_once(
    folder: str | os.PathLike,
    settings: dict[str, Any],
    numbers: tuple[int, int, int],
    write: Callable[[Path, dict[str, int], int], None],
    unit: str = "scenes",
) -> Path:
    """
    Has `write` fill a new folder, which is kept, replaced or refused as [`build_scenes`] says. It is given the folder,
    the number of units of each split, and the seed among the settings; all are written into the folder as scenes.json.
    """
    folder, counts = Path(folder).absolute(), dict(zip(SPLITS, numbers, strict=True))
    arguments = {**settings, unit: counts}
    if _arguments_of(folder) == arguments:
        logger.info(f"{folder} holds these scenes already.")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        built = Path(partial, folder.name)
        write(built, counts, settings["seed"])
        (built / "scenes.json").write_text(json.dumps(arguments, indent=2) + "\n")
        # Another process may have built the same meanwhile.
        if _arguments_of(folder) != arguments:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(built, folder)
    return folder


def _arguments_of(folder: Path) -> dict | None:
    """Reads the arguments that the scenes in `folder` were built with; None if there is nothing yet."""
    try:
        return json.loads((folder / "scenes.json").read_text())
    except FileNotFoundError:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files, but no scenes: name a folder that is new or empty.") from None
        return None


def _write_world(folder: Path, counts: dict[str, int], seed: int, captions_per_image: int, counting: bool) -> None:
    items = []
    drawn = draw_scenes(folder, counts, seed, lambda *place: (sample_scene(*place), None), pictures="photos")
    for split, scenes in drawn.items():
        for scene, _ in scenes:
            counted = [say_count(*counted_shape(scene))] if counting and split == "train" else []
            captions = scene_captions(scene, captions_per_image) + counted
            items += [{"image_id": scene.image_id, "caption": caption, "split": split} for caption in captions]
    write_lines(folder / "captions.jsonl", items)


def draw_scenes(
    folder: Path,
    counts: Mapping[str, int],
    seed: int,
    sample: Callable[[int, str, int], tuple[Scene, Beside]],
    pictures: str = "images",
) -> dict[str, list[tuple[Scene, Beside]]]:
    """
    Draws scenes of each split to disk, `{pictures}/{image_id}.png` and a `RegionStore` `regions/` of all, and gives, by
    split, each with what `sample(index, split, seed)` gave beside it.
    """
    (folder / pictures).mkdir(parents=True)
    drawn: dict[str, list[tuple[Scene, Beside]]] = {split: [] for split in counts}
    numbers = [(index, split) for split, count in counts.items() for index in range(count)]
    with scene_store_writer(folder / "regions") as writer:
        for index, split in logging.tqdm(numbers, desc="Drawing scenes", unit="scene"):
            scene, beside = sample(index, split, seed)
            image = render_scene(scene)
            image.save(folder / pictures / f"{scene.image_id}.png", compress_level=1)
            writer.write(scene_record(scene, image))
            drawn[split].append((scene, beside))
    return drawn


def write_lines(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Writes objects as JSON, one a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def scene_store_writer(path: Path) -> RegionStoreWriter:
    """Makes the writer of a store of scenes, with its provenance."""
    return RegionStoreWriter(
        path,
        detector="scenes: drawing boxes",
        detector_revision=FEATURE_DESCRIPTION,
        box_type="jittered drawing boxes",
        class_names=CLASS_NAMES,
        source_format="scenes",
    )

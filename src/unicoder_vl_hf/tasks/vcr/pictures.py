"""
Draws a question of VCR and the choices of a model as a PNG: the photo with the objects that are spoken of, and the
choices with their probabilities. The functions take plain data, as those of `pictures.py` do.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.masking import IGNORED
from ...pictures import PALETTE, Image, draw_boxes, new_figure
from .data import Segment, referenced_objects

RIGHT, WRONG = PALETTE[2], "#9aa3b2"
_WRAP = 58


def draw_question(
    path: str | os.PathLike,
    photo: Image.Image,
    row: Mapping[str, Any],
    answer_probabilities: Sequence[float] | np.ndarray,
    rationale_probabilities: Sequence[float] | np.ndarray | None = None,
) -> Path:
    """
    Draws a question as VCR shows it: objects are numbered from 1, and only those that a text refers to have a box.

    Args:
        path (`str` or `os.PathLike`): The PNG to write.
        photo (`PIL.Image.Image`): The photo in any size: boxes are scaled to it.
        row (`Mapping`): The question as [`read_vcr`] gives it, with boxes.
        answer_probabilities (sequence of 4 `float`): Probabilities of the answers.
        rationale_probabilities (sequence of 4 `float`, *optional*): Probabilities of the rationales after the right
            answer.

    Returns:
        `Path`: The file.
    """
    groups = {"answer": answer_probabilities}
    if rationale_probabilities is not None:
        groups["rationale"] = rationale_probabilities
    figure = new_figure(12, 1.2 + 2.7 * len(groups))
    grid = figure.add_gridspec(len(groups), 2)
    axes = figure.add_subplot(grid[:, 0])
    axes.imshow(np.asarray(_draw_objects(photo, row, groups)))
    axes.set_axis_off()
    figure.suptitle("\n".join(textwrap.wrap(spell(row["question"], row["objects"]), 2 * _WRAP)), fontweight="bold")
    for index, (name, probabilities) in enumerate(groups.items()):
        texts = [spell(choice, row["objects"]) for choice in row[f"{name}_choices"]]
        panel = figure.add_subplot(grid[index, 1])
        _draw_choices(panel, name, texts, np.asarray(probabilities), row[f"{name}_label"])
    figure.savefig(path, dpi=110)
    return Path(path)


def spell(segment: Segment, objects: Sequence[str]) -> str:
    """Spells a segment as VCR prints it: `[person1] and [dog3]`."""
    words = [
        token if isinstance(token, str) else " and ".join(f"[{objects[index]}{index + 1}]" for index in token)
        for token in segment
    ]
    text = " ".join(words)
    for mark in (".", ",", "?", "!"):
        text = text.replace(f" {mark}", mark)
    return text


def _draw_objects(photo: Image.Image, row: Mapping[str, Any], groups: Mapping[str, Any]) -> Image.Image:
    texts = [[row["question"]], *(row[f"{name}_choices"] for name in groups)]
    shown = sorted(referenced_objects(texts))
    if not shown:
        return photo
    size = (row["image_width"], row["image_height"]) if row["image_width"] else photo.size
    labels = [f"{row['objects'][index]}{index + 1}" for index in shown]
    return draw_boxes(photo, [row["boxes"][index] for index in shown], size, labels)


def _draw_choices(axes: Any, name: str, texts: Sequence[str], probabilities: np.ndarray, label: int) -> None:
    """Draws a bar a choice beneath its text; the right one is green, the chosen one bold."""
    at, chosen = np.arange(len(texts)), int(probabilities.argmax())
    axes.barh(at, probabilities, height=0.3, color=[RIGHT if index == label else WRONG for index in at])
    for index, (text, probability) in enumerate(zip(texts, probabilities, strict=True)):
        weight = "bold" if index == chosen else "normal"
        axes.text(0, index - 0.2, "\n".join(textwrap.wrap(text, _WRAP)), va="bottom", fontsize=9, fontweight=weight)
        beside = probability < 0.85  # else there is no room
        axes.text(
            probability + (0.01 if beside else -0.01), index, f"{100 * probability:.1f} %", va="center", fontsize=9,
            fontweight=weight, ha="left" if beside else "right", color="black" if beside else "white",
        )  # fmt: skip
    verdicts = {IGNORED: name, chosen: f"{name}: right"}
    axes.set_title(verdicts.get(label, f"{name}: wrong"), loc="left", fontsize=10)
    axes.set(xlim=(0, 1), ylim=(len(texts) - 0.6, -0.9))
    axes.set_axis_off()

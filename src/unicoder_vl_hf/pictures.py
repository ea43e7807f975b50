"""
Pictures of what a model did: training curves (PNG), regions drawn on a photo, and a gallery of retrieval (HTML).

All are plain functions over plain data: rows of a log, a record, a list of queries. They know no model and no store.
Pillow and matplotlib are the extra `unicoder-vl-hf[demo]`. Left out: anything that moves or needs a server.
"""

import base64
import io
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import ArrayLike

from .extras import optional_import
from .records_unicoder_vl import RegionRecord

try:
    from PIL import Image, ImageColor, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("Pictures need Pillow: pip install '.[demo]' in a checkout of unicoder-vl-hf.") from error

# Colours of Okabe and Ito, which most kinds of colour vision tell apart; dark enough for white text and thin lines.
PALETTE = ("#0072b2", "#d55e00", "#007a5a", "#a8437f", "#5b4ea3", "#8a6100", "#00748c", "#b3262e")
LABELLED = 3  # regions that are named as those that raised a score
_LEAST = 1e-12  # relevance that is none
_SMALL = 240  # width of the picture of a word, in pixels
_EVAL = "eval_"
_MAJORITY = "_majority_accuracy"
_MEAN_LOSS = "train_loss"  # of the whole run, in the last row of the log
_SHARES = ("accuracy", "auc", "recall@1", "recall@5", "recall@10")  # endings of names of shares, 0 to 1, more is better


def training_curves(
    log: str | os.PathLike | Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    chance: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """
    Draws a training log: losses over steps on the left, accuracies and recalls on the right, validation as points.

    Args:
        log (`str`, `os.PathLike` or iterable of `dict`):
            Rows, or a jsonl file of rows, as `Trainer.state.log_history` has them: each has a `step`; names that end
            with `loss`, `accuracy`, `auc` or `recall@1`, 5, 10 are drawn, those that begin with `eval_` as validation.
        path (`str` or `os.PathLike`): The PNG file to write.
        chance (`dict`, *optional*): Value that guessing reaches, by name without `eval_`, for example
            `{"matching_accuracy": 0.5}`; drawn as a dotted line. Where the log itself has `moc_majority_accuracy`, that
            is the line for `moc_accuracy`, and likewise for every other name.
        title (`str`, *optional*): Heading of the picture.

    Returns:
        `Path`: `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: No row has a `step` and something to draw.
    """
    if isinstance(log, str | os.PathLike):
        log = [json.loads(line) for line in Path(log).read_text().splitlines() if line.strip()]
    rows = list(log)
    losses, accuracies = _series(rows, ("loss",)), _series(rows, _SHARES)
    majorities = [name for name in accuracies if name.endswith(_MAJORITY)]
    baselines = {name.removeprefix(_EVAL).replace(_MAJORITY, "_accuracy"): accuracies.pop(name) for name in majorities}
    chance = {name: float(values[-1]) for name, (_, values) in baselines.items()} | dict(chance or {})
    panels = [panel for panel in (("loss", losses), ("accuracy or recall", accuracies)) if panel[1]]
    if not panels:
        raise ValueError(f"{len(rows)} log rows hold no step with a loss, accuracy or recall: is this a training log?")

    figure = new_figure(6.4 * len(panels), 4.8)
    colours = _colours([*losses, *accuracies])
    for axes, (label, series) in zip(np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels, strict=True):
        for name in dict.fromkeys(name.removeprefix(_EVAL) for name in series):
            _draw_series(axes, series, name, colours[name])
            if name in chance:
                axes.axhline(chance[name], color=colours[name], linestyle=":", linewidth=1.2)
                axes.annotate(
                    f"chance {chance[name]:.2f}", (1, chance[name]), xycoords=("axes fraction", "data"),
                    color=colours[name], fontsize=8, ha="right", va="bottom",
                )  # fmt: skip
        axes.set(xlabel="step", ylabel=label, ylim=(0, None) if label == "loss" else (0, 1.02))
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
    return Path(path)


def dot_chart(rows: Mapping[str, Sequence[float]], path: str | os.PathLike, *, label: str) -> Path:
    """
    Draws a row for each name, from the top down, with a dot for each of its values and a line at their mean.

    Args:
        rows (`Mapping[str, Sequence[float]]`): Values of each name, such as one a seed.
        path (`str` or `os.PathLike`): The PNG file to write.
        label (`str`): The quantity, in words.

    Returns:
        `Path`: `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(8.0, 1.4 + 0.45 * len(rows))
    axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        axes.plot(values, [place] * len(values), "o", color=PALETTE[0], alpha=0.7, markeredgecolor="white")
        axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=PALETTE[1], linewidth=2)
    axes.set(xlabel=label, yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=130)
    return Path(path)


def draw_answers(
    path: str | os.PathLike,
    photo: Image.Image,
    text: str,
    answers: Sequence[tuple[str, float]],
    right: str | None = None,
) -> Path:
    """
    Draws a text about a photo, such as a question, beside the photo, and a bar for each answer to it.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        photo (`PIL.Image.Image`): The photo in any size.
        text (`str`): The text.
        answers (sequence of `(str, float)`): Answers with their probabilities, in `[0, 1]`, from the top down.
        right (`str`, *optional*): The right answer, whose bar is green; below the bars it is named where none is it.

    Returns:
        `Path`: `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(9.0, 3.6)
    figure.suptitle("\n".join(textwrap.wrap(text, 80)), fontweight="bold")
    shown, axes = figure.subplots(1, 2)
    shown.imshow(np.asarray(photo))
    shown.set_axis_off()
    names, values = zip(*answers, strict=True)
    colours = [PALETTE[2] if name == right else PALETTE[0] for name in names]
    bars = axes.barh(range(len(names)), values, color=colours)
    axes.bar_label(bars, [f"{100 * value:.1f} %" for value in values], padding=3, fontsize=9)
    axes.set(xlim=(0, 1.2), xticks=[], yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    if right is not None and right not in names:
        axes.set_xlabel(f"right: {right}", loc="left")
    figure.savefig(path, dpi=110)
    return Path(path)


def new_figure(width: float, height: float) -> Any:
    """Makes an empty figure of so many inches. Raises ImportError if matplotlib is missing."""
    optional_import("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], endings: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gives `(steps, values)` for every name in the rows that ends with one of `endings`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.endswith(endings) and name != _MEAN_LOSS and "step" in row and value is not None:
                found.setdefault(name, []).append((row["step"], value))
    return {name: tuple(np.array(sorted(points), dtype=float).T) for name, points in found.items()}


def _draw_series(axes: Any, series: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str, colour: str) -> None:
    label = name.replace("_", " ")
    if name in series:
        steps, values = series[name]
        window = max(1, len(values) // 25)
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values, window), color=colour, linewidth=1.6, label=label)
    if _EVAL + name in series:
        style = {"linestyle": "--", "linewidth": 0.8} if name in series else {"linewidth": 1.6}
        axes.plot(
            *series[_EVAL + name], color=colour, marker="o", markersize=4.5, markeredgecolor="white",
            label=f"{label}, validation", **style,
        )  # fmt: skip


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Gives the mean over `window` values around each value (fewer at the ends)."""
    sums, at = np.cumsum(np.concatenate([[0.0], values])), np.arange(len(values))
    starts, ends = np.maximum(0, at - window // 2), np.minimum(len(values), at + window // 2 + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Gives a colour for each name without `eval_`; the loss and the accuracy of one task share theirs."""
    colours: dict[str, str] = {}
    for name in dict.fromkeys(name.removeprefix(_EVAL) for name in names):
        partner = name.replace("accuracy", "loss")
        colours[name] = colours[partner] if partner in colours else PALETTE[len(set(colours.values())) % len(PALETTE)]
    return colours


def draw_regions(
    image: Image.Image,
    record: RegionRecord,
    *,
    class_names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    max_regions: int | None = None,
    min_width: int = 640,
) -> Image.Image:
    """
    Draws the boxes of a record on its photo, each with its index, class and score; cells of a grid with their index.

    Args:
        image (`PIL.Image.Image`): The photo, of any size: boxes are scaled to it.
        record (`RegionRecord`): Regions of the photo.
        class_names (sequence of `str`, *optional*): Name of each object id; without them, the id is shown.
        labels (sequence of `str`, *optional*): A text for each box, in place of index, class and score.
        max_regions (`int`, *optional*): Number of regions to draw, the best by score (the first, where there are no
            scores).
        min_width (`int`, defaults to 640): Narrower photos are enlarged to it, so that the labels can be read.

    Returns:
        `PIL.Image.Image`: A new RGB picture.

    Raises:
        ValueError: The record has no boxes.
    """
    canvas, boxes = _enlarged(image, record, min_width)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(12, canvas.width / 45))
    order = np.arange(len(boxes))
    if record.object_scores is not None:
        order = np.argsort(-record.object_scores, kind="stable")
    shown = sorted(order[:max_regions].tolist())
    cells = [shown[place] for place in _grid_cells(boxes[shown])] if labels is None else []
    line = max(2, canvas.width // 200)
    for index in sorted(shown, key=lambda index: index not in cells):  # other boxes lie above the cells
        colour, width = (PALETTE[0], 1) if index in cells else (PALETTE[index % len(PALETTE)], line)
        draw.rectangle(_inside(boxes[index], canvas.size), outline=colour, width=width)
    for index in cells:
        _number_cell(draw, boxes[index], str(index))
    taken: list[tuple[float, float, float, float]] = []
    for index in shown:
        if index in cells:
            continue
        label = _region_label(record, index, class_names) if labels is None else labels[index]
        _write_label(canvas, label, boxes[index], PALETTE[index % len(PALETTE)], font, taken)
    return canvas


def draw_boxes(image: Image.Image, boxes: ArrayLike, size: tuple[int, int], labels: Sequence[str]) -> Image.Image:
    """Draws boxes, in pixels of an image of that size, on its photo, each with its label, and cut off at its border."""
    inside = np.clip(boxes, 0, [*size, *size]).astype(np.float32)
    record = RegionRecord(
        "boxes", features=np.zeros((len(labels), 1)), boxes=inside, image_width=size[0], image_height=size[1]
    )
    return draw_regions(image, record, labels=labels)


def _enlarged(image: Image.Image, record: RegionRecord, min_width: int) -> tuple[Image.Image, np.ndarray]:
    """Gives a copy of a photo, at least so wide, and the boxes in it. Raises ValueError if the record has none."""
    if record.boxes is None:
        raise ValueError(
            f"Image {record.image_id!r}: boxes is None, so there is nothing to draw: give a record with boxes."
        )
    scale = max(1.0, min_width / image.width)
    size = round(image.width * scale), round(image.height * scale)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS), record.locations()[:, :4] * (size * 2)


def blank_page(record: RegionRecord) -> Image.Image:
    """Makes a white picture in the size of a record's image, or 640 x 480 where that is unknown."""
    return Image.new("RGB", (record.image_width or 640, record.image_height or 480), "white")


def draw_relevance(
    image: Image.Image,
    record: RegionRecord,
    relevance: np.ndarray,
    *,
    most: float | None = None,
    numbered: Sequence[int] = (),
    min_width: int = 640,
) -> Image.Image:
    """
    Draws how relevant the regions of a photo are: what no relevant one covers is faded to grey, what one covers keeps
    the more of its colours, and the more of an outline, the more relevant it is.

    Args:
        image (`PIL.Image.Image`): The photo, of any size: boxes are scaled to it.
        record (`RegionRecord`): Regions of the photo.
        relevance (`np.ndarray` of shape `(n,)`): Relevance of each region, at least 0.
        most (`float`, *optional*): The relevance that is drawn in full; defaults to the largest of `relevance`. Colours
            go by the square root of the relevance over `most`, so that weak ones show.
        numbered (sequence of `int`, *optional*): Indices of regions that are drawn in a corner of their boxes.
        min_width (`int`, defaults to 640): Narrower photos are enlarged to it.

    Returns:
        `PIL.Image.Image`: A new RGB picture.

    Raises:
        ValueError: The record has no boxes.
    """
    canvas, boxes = _enlarged(image, record, min_width)
    strengths = _strengths(relevance, most)
    heat = np.zeros((canvas.height, canvas.width), dtype=np.float32)
    outlines = Image.new("RGBA", canvas.size)
    draw, line = ImageDraw.Draw(outlines), max(2, canvas.width // 200)
    for index in np.argsort(strengths).tolist():  # the strongest last, on top
        x1, y1, x2, y2 = map(int, _inside(boxes[index], canvas.size))
        heat[y1 : y2 + 1, x1 : x2 + 1] = strengths[index]
        colour = (*ImageColor.getrgb(PALETTE[1]), round(255 * strengths[index]))
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
    faded = Image.blend(canvas.convert("L").convert("RGB"), Image.new("RGB", canvas.size, "white"), 0.72)
    drawn = Image.composite(canvas, faded, Image.fromarray(np.rint(255 * heat).astype(np.uint8)))
    drawn.paste(outlines, mask=outlines)
    font = ImageFont.load_default(size=20 * canvas.width / min_width)  # pages show the picture in about that width
    taken: list[tuple[float, float, float, float]] = []
    for index in numbered:
        _write_label(drawn, str(index), boxes[index], PALETTE[1], font, taken)
    return drawn


def _strengths(relevance: np.ndarray, most: float | None = None) -> np.ndarray:
    """Gives the strengths, 0 to 1, in which relevances are drawn."""
    most = max(float(np.max(relevance)) if most is None else most, _LEAST)
    return np.sqrt(np.clip(np.asarray(relevance, dtype=np.float32) / most, 0, 1))


def explanation_html(
    image: Image.Image,
    record: RegionRecord,
    caption: str,
    words: Sequence[str],
    word_relevance: np.ndarray,
    region_relevance: np.ndarray,
    relevance_to_words: np.ndarray,
    *,
    score: str,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> str:
    """
    Shows which regions mattered for each word and for the score, as HTML that needs no other file.

    Args:
        image (`PIL.Image.Image`): The photo, of any size: boxes are scaled to it.
        record (`RegionRecord`): Its R regions.
        caption (`str`): The caption.
        words (sequence of `str`): Its W words, in their order.
        word_relevance (`np.ndarray` of shape `(W,)`), region_relevance (`np.ndarray` of shape `(R,)`): Relevance for
            the score.
        relevance_to_words (`np.ndarray` of shape `(W, R)`): Relevance of each region for each word.
        score (`str`): The score, in words.
        class_names (sequence of `str`, *optional*): Name of each object id.
        title (`str`, *optional*): Heading. With it the HTML is a page, else a fragment for a page.

    Returns:
        `str`: The HTML.

    Raises:
        ValueError: The record has no boxes.
    """
    strongest = np.argsort(-region_relevance, kind="stable")[:LABELLED]
    strongest = strongest[region_relevance[strongest] > 0].tolist()
    shares = region_relevance / max(float(region_relevance.sum()), _LEAST)
    most = max(float(relevance_to_words.max(initial=0.0)), _LEAST)

    def named(indices: Iterable[int], values: np.ndarray) -> list[tuple[int, str, str]]:
        return [(index, _region_name(record, index, class_names), f"{values[index]:.0%}") for index in indices]

    shown, end = [], 0
    for word, strength, row in zip(words, _strengths(word_relevance), relevance_to_words, strict=True):
        start, best = caption.index(word, end), int(row.argmax())
        linked = [best] if row[best] >= most / 100 else []
        picture = draw_relevance(image, record, row, most=most, numbered=linked, min_width=_SMALL)
        facts = {"text": word, "before": caption[end:start], "strength": strength}
        shown.append(facts | {"picture": _data_url(picture, _SMALL), "regions": named(linked, row / most)})
        end = start + len(word)
    return _fill(
        "explanation.html" if title is None else "explanation_page.html",
        title=title,
        intro="",
        colour=PALETTE[1],
        words=shown,
        score=score,
        whole=_data_url(draw_relevance(image, record, region_relevance, numbered=strongest), 640),
        regions=named(strongest, shares),
        note=(
            "Gradient x attention (Chefer et al., 2021): what raised this score, never what lowered it. Words are "
            "shaded, and regions keep their colours, as far as they did. A region has its number in the pictures, too. "
            "Beneath the first one: shares of all regions. Beneath a word: its strongest region, in percent of the "
            "strongest link of a word and a region."
        ),
    )


def draw_hidden(image: Image.Image, record: RegionRecord, index: int, min_width: int = 320) -> Image.Image:
    """Draws a photo, enlarged to `min_width`, on which a region is covered. Raises ValueError if it has no box."""
    canvas, boxes = _enlarged(image, record, min_width)
    draw, box = ImageDraw.Draw(canvas), _inside(boxes[index], canvas.size)
    draw.rectangle(box, fill="#c8cdd6", outline=PALETTE[1], width=max(2, canvas.width // 150))
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    size = max(8.0, min(box[2] - box[0], box[3] - box[1]) / 2)
    draw.text(middle, "?", fill="white", font=ImageFont.load_default(size=size), anchor="mm")
    return canvas


def write_hidden_regions(
    path: str | os.PathLike,
    items: Iterable[tuple[str, Image.Image, RegionRecord, Sequence[int], np.ndarray]],
    class_names: Sequence[str] | None = None,
    *,
    title: str = "Hidden regions",
    intro: str = "",
) -> Path:
    """
    Writes an HTML file of regions that were hidden from a model, each covered on its photo, with the class that it was
    taken for, framed if that is the detector's.

    Args:
        path (`str` or `os.PathLike`): The HTML file to write.
        items (iterable of tuples): Caption, photo, record, the indices of R regions with a class, and the probabilities
            `(R, num_classes)` of their classes.
        class_names (sequence of `str`, *optional*): Name of each class; without them, its number is shown.
        title, intro (`str`): Heading of the page, and a sentence or two beneath it; plain text.

    Returns:
        `Path`: `path`.

    Raises:
        ValueError: A record has no boxes.
    """

    def region(image: Image.Image, record: RegionRecord, index: int, of_classes: np.ndarray) -> dict[str, Any]:
        assert record.object_ids is not None
        classes = int(of_classes.argmax()), int(record.object_ids[index])
        guess, truth = (class_names[at] if class_names else f"class {at}" for at in classes)
        picture = _data_url(draw_hidden(image, record, index), 320)
        return {"index": index, "picture": picture, "guess": guess, "truth": truth, "probability": of_classes.max()}

    sections = (
        (caption, [region(image, record, *each) for each in zip(indices, probabilities, strict=True)])
        for caption, image, record, indices, probabilities in items
    )
    Path(path).write_text(_fill("hidden_regions.html", title=title, intro=intro, items=sections), encoding="utf-8")
    return Path(path)


def _region_name(record: RegionRecord, index: int, class_names: Sequence[str] | None) -> str:
    """Names a region by its class, if it has one."""
    object_id = -1 if record.object_ids is None else int(record.object_ids[index])
    return class_names[object_id] if class_names and object_id >= 0 else "region"


def _grid_cells(boxes: np.ndarray) -> list[int]:
    """
    Gives the indices of boxes that form a grid: at least nine of one size, side by side. Labels like those of other
    boxes would hide them all.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    size = np.median(sizes, axis=0)
    cells = np.flatnonzero((abs(sizes - size) <= 1.5).all(axis=1))
    extent = boxes[cells, 2:].max(axis=0) - boxes[cells, :2].min(axis=0) if len(cells) else size
    covers = 0.9 <= len(cells) * size.prod() / max(extent.prod(), 1.0) <= 1.1
    return cells.tolist() if len(cells) >= 9 and covers else []


def _number_cell(draw: ImageDraw.ImageDraw, box: np.ndarray, text: str) -> None:
    """Writes a number into the middle of a cell, where there is room to read it."""
    width, height = box[2:] - box[:2]
    size = min(14.0, width / 2.5, height / 1.5)
    if size >= 12:
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        font = ImageFont.load_default(size=size)
        draw.text(middle, text, fill="white", font=font, anchor="mm", stroke_width=1, stroke_fill="black")


def _inside(box: np.ndarray, size: tuple[int, int]) -> tuple[float, ...]:
    """Gives `box` with its last row and column inside the picture, and never inverted."""
    x1, y1, x2, y2 = np.clip(np.rint(box), 0, [size[0] - 1, size[1] - 1] * 2).tolist()
    return x1, y1, max(x1, x2), max(y1, y2)


def _region_label(record: RegionRecord, index: int, class_names: Sequence[str] | None) -> str:
    parts = [str(index)]
    if record.object_ids is not None and (object_id := int(record.object_ids[index])) >= 0:
        parts.append(class_names[object_id] if class_names else f"class {object_id}")
    if record.object_scores is not None:
        parts.append(f"{record.object_scores[index]:.2f}")
    return " ".join(parts)


def _write_label(
    canvas: Image.Image,
    text: str,
    box: np.ndarray,
    colour: str,
    font: Any,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Writes a label for a box, white on its colour, where no label of `taken` is, and adds its place to these."""
    draw = ImageDraw.Draw(canvas)
    place = _free_place(draw.textbbox((0, 0), text, font=font), box, canvas.size, taken)
    taken.append(place)
    draw.rectangle(place, fill=colour)
    draw.text((place[0] + 3, (place[1] + place[3]) / 2), text, fill="white", font=font, anchor="lm")


def _free_place(
    text: tuple[float, float, float, float], box: np.ndarray, size: tuple[int, int], taken: Sequence[tuple[float, ...]]
) -> tuple[float, float, float, float]:
    """
    Finds a place for a label: above its box, else inside, else below, else further down; over another label if need be.
    """
    width, height = text[2] + 6, text[3] + 4
    left = float(np.clip(box[0], 0, max(0, size[0] - width)))
    tops = [box[1] - height, box[1], box[3], *np.arange(box[1], size[1], height)]
    places = [(left, top, left + width, top + height) for top in np.clip(tops, 0, size[1] - height).tolist()]
    free = (
        place
        for place in places
        if not any(place[0] < t[2] and t[0] < place[2] and place[1] < t[3] and t[1] < place[3] for t in taken)
    )
    return next(free, places[0])


@dataclass(frozen=True)
class GalleryItem:
    """
    A caption and the images that scored best for it.

    Args:
        caption (`str`): The query.
        image_id (`str`, *optional*): The right image; without it, nothing is marked.
        score (`float`): Score of the right image; higher = better match.
        rank (`int`): Rank of the right image, from 1; a wrong image of the same score ranks before it. 0 if the right
            image is not among the candidates that were scored.
        best (tuple of `(image_id, score)`): The best images, best first.
        notes (`dict[str, str]`): A note for some image ids, shown beneath the image, such as the parts of its score.
    """

    caption: str
    image_id: str | None = None
    score: float = float("nan")
    rank: int = 0
    best: tuple[tuple[str, float], ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def from_hits(
        cls,
        caption: str,
        image_id: str,
        hits: Sequence[tuple[str, float]],
        top_k: int = 5,
        notes: Mapping[str, str] | None = None,
    ) -> Self:
        """Makes an item from the candidates of a search, `(image_id, score)` with the best first, and notes on them."""
        found = {name: (score, rank) for rank, (name, score) in enumerate(hits, start=1)}
        score, rank = found.get(image_id, (float("nan"), 0))
        return cls(caption, image_id, score, rank, tuple(hits[:top_k]), notes or {})

    @property
    def verdict(self) -> str:
        """The place of the right image, in words."""
        words = {0: "right image not among the candidates", 1: "found first"}
        return words.get(self.rank, f"right image at rank {self.rank}")

    @property
    def shown(self) -> list[tuple[int, str, float]]:
        """Rank, image_id and score of each picture: of the best, then of the right one; rank 0 if never scored."""
        shown = [(rank, image_id, score) for rank, (image_id, score) in enumerate(self.best, start=1)]
        if self.image_id is not None and all(image_id != self.image_id for image_id, _ in self.best):
            shown.append((self.rank, self.image_id, self.score))
        return shown

    def figure_class(self, image_id: str, rank: int) -> str:
        """Names how a picture is marked: found, wrong, right, or right but beyond the best."""
        if self.image_id is None:
            return "found"
        if image_id != self.image_id:
            return "wrong"
        return "right" if 0 < rank <= len(self.best) else "right beyond"


def write_gallery(
    path: str | os.PathLike,
    items: Iterable[GalleryItem],
    picture: Callable[[str], Image.Image | Sequence[Image.Image]],
    *,
    title: str = "Image retrieval",
    intro: str = "",
    results: Mapping[str, Mapping[str, float]] | None = None,
    picture_width: int = 320,
) -> Path:
    """
    Writes one HTML file that needs no other: each caption with its best images, the right one marked.

    Args:
        path (`str` or `os.PathLike`): The HTML file to write.
        items (iterable of `GalleryItem`): The queries, in the order of the page.
        picture (callable): Gives the picture of an image_id, for example
            `lambda image_id: Image.open(f"photos/{image_id}.jpg")`; or several, which are shown one above the other.
        title, intro (`str`): Heading of the page, and a sentence or two beneath it; plain text.
        results (`dict`, *optional*): Recalls of each model and of chance, named as `retrieval_metrics` names them;
            other metrics among them are left out.
        picture_width (`int`, defaults to 320): Wider pictures are embedded at this width.

    Returns:
        `Path`: `path`.
    """
    encoded: dict[str, list[str]] = {}

    def sources(image_id: str) -> list[str]:
        if image_id not in encoded:
            found = picture(image_id)
            pictures = [found] if isinstance(found, Image.Image) else found
            encoded[image_id] = [_data_url(each, picture_width) for each in pictures]
        return encoded[image_id]

    shares = results or {}
    recalls = dict.fromkeys(name for metrics in shares.values() for name in metrics if "recall@" in name)
    facts = {"title": title, "intro": intro, "results": shares, "recalls": recalls}
    Path(path).write_text(_fill("gallery.html", **facts, items=items, sources=sources), encoding="utf-8")
    return Path(path)


def _fill(template: str, **values: Any) -> str:
    """Fills a template of this folder; values are escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values)


def _data_url(image: Image.Image, width: int) -> str:
    """Gives a picture as a `data:` URL: PNG for a small one, which keeps drawings sharp; JPEG for a photo."""
    buffer = io.BytesIO()
    if image.width <= width and image.format != "JPEG":
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.convert("RGB")
        image.thumbnail((width, 2 * width))
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""Curves, regions and galleries, read back: pixels where they must be, and pages as a browser would parse them."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image, ImageColor, ImageDraw, ImageFont

from unicoder_vl_hf import pictures
from unicoder_vl_hf.feature_extraction_unicoder_vl import RegionRecord
from unicoder_vl_hf.pictures import PALETTE, GalleryItem, draw_regions, draw_relevance, training_curves, write_gallery


def has_colour(image, colour):
    return bool((np.asarray(image.convert("RGB")) == ImageColor.getrgb(colour)).all(axis=-1).any())


LOG = [
    {"step": 10, "loss": 4.0, "matching_loss": 0.7, "learning_rate": 1e-4},
    {"step": 20, "loss": 2.0, "matching_loss": 0.6, "learning_rate": 2e-4},
    {"step": 20, "eval_loss": 2.5, "eval_matching_accuracy": 0.8, "eval_runtime": 3.0},
    {"train_runtime": 100.0, "train_loss": 3.0},
]


def test_series_are_the_rows_with_a_step():
    series = pictures._series([LOG[1], LOG[0], *LOG[2:]], ("loss",))
    assert {name: [values.tolist() for values in points] for name, points in series.items()} == {
        "loss": [[10, 20], [4, 2]],
        "matching_loss": [[10, 20], [0.7, 0.6]],
        "eval_loss": [[20], [2.5]],
    }


def test_smoothing_is_a_mean_around_each_value():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_array_equal(pictures._smooth(values, 1), values)
    np.testing.assert_array_equal(pictures._smooth(values, 3), [1.5, 3, 3, 3])


def test_a_task_has_one_colour_in_both_panels():
    colours = pictures._colours(["loss", "moc_loss", "eval_moc_loss", "eval_moc_accuracy", "eval_matching_auc"])
    assert colours == {
        "loss": PALETTE[0],
        "moc_loss": PALETTE[1],
        "moc_accuracy": PALETTE[1],
        "matching_auc": PALETTE[2],
    }


def test_curves_are_drawn_from_rows_and_from_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    training_curves(LOG, tmp_path / "rows.png", title="A title")
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, LOG)) + "\n")
    training_curves(tmp_path / "log.jsonl", tmp_path / "file.png", title="A title")
    rows, file = (Image.open(tmp_path / name) for name in ("rows.png", "file.png"))
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(file))
    assert rows.width > 1500
    # Loss, and matching with the accuracy on the right.
    half = rows.width // 2
    left, right = rows.crop((0, 0, half, rows.height)), rows.crop((half, 0, rows.width, rows.height))
    drawn = [[has_colour(panel, colour) for colour in PALETTE[:3]] for panel in (left, right)]
    assert drawn == [[True, True, False], [False, True, False]]
    training_curves(LOG[:1], tmp_path / "losses.png", title="A title")
    assert Image.open(tmp_path / "losses.png").width == rows.width // 2


def test_chance_is_a_line_across_the_panel(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for chance in (None, {"matching_accuracy": 0.5}, {"moc_accuracy": 0.5}):
        training_curves(LOG, tmp_path / "curves.png", chance=chance)
        drawn.append(np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int))
    rows_changed = (drawn[0] != drawn[1]).any(axis=-1).sum(axis=1)
    assert rows_changed.max() > 200
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_the_majority_class_of_the_log_is_the_chance_of_its_accuracy(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "eval_moc_accuracy": 0.5 + step / 100} for step in (10, 20)]
    training_curves(rows, tmp_path / "given.png", chance={"moc_accuracy": 0.25})
    logged = [row | {"eval_moc_majority_accuracy": 0.25} for row in rows]
    training_curves(logged, tmp_path / "logged.png")
    given, found = (np.asarray(Image.open(tmp_path / name)) for name in ("given.png", "logged.png"))
    np.testing.assert_array_equal(given, found)


def test_recalls_are_drawn_beside_the_loss(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": 10, "loss": 1.0}, {"step": 10, "eval_image_retrieval_recall@5": 0.5, "eval_mean_rank": 3.0}]
    rows.append({"step": 10, "train_loss": 2.0})  # Trainer's mean over the run is no curve
    training_curves(rows, tmp_path / "both.png")
    picture = Image.open(tmp_path / "both.png")
    right = picture.crop((picture.width // 2, 0, picture.width, picture.height))
    assert [has_colour(right, colour) for colour in PALETTE[:3]] == [False, True, False]


def test_a_log_without_curves_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="1 log rows"):
        training_curves([{"step": 1, "learning_rate": 1.0}], tmp_path / "x.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install .\.\[demo\]. in a checkout"):
        training_curves(LOG, tmp_path / "x.png")


def record(**changes):
    fields = {
        "image_id": "photo",
        "image_width": 200,
        "image_height": 100,
        "boxes": np.array([[20, 40, 100, 80], [120, 50, 180, 90]], np.float32),
        "features": np.zeros((2, 4), np.float32),
        "object_ids": np.array([1, -1]),
        "object_scores": np.array([0.25, 0.5], np.float32),
    }
    return RegionRecord(**fields | changes)


def test_boxes_are_drawn_at_their_pixels():
    photo = Image.new("RGB", (200, 100))
    drawn = draw_regions(photo, record(), class_names=["cat", "dog"], min_width=200)
    assert drawn.size == (200, 100)
    for (x1, _, x2, y2), colour in zip(record().boxes.astype(int).tolist(), PALETTE, strict=False):
        on_border = [(x1, y2 - 5), (x2, y2 - 5), ((x1 + x2) // 2, y2)]
        assert {drawn.getpixel(place) for place in on_border} == {ImageColor.getrgb(colour)}
        assert drawn.getpixel(((x1 + x2) // 2, y2 - 10)) == (0, 0, 0)
    assert not np.asarray(photo).any()


def test_boxes_follow_the_size_of_the_photo_and_fractions_are_the_same():
    photo = Image.new("L", (400, 200))
    drawn = draw_regions(photo, record(), min_width=800)
    assert drawn.size == (800, 400)
    assert drawn.getpixel((400, 300)) == ImageColor.getrgb(PALETTE[0])
    fractions = record(image_width=None, image_height=None, boxes=record().boxes / [200, 100, 200, 100])
    np.testing.assert_array_equal(np.asarray(draw_regions(photo, fractions, min_width=800)), np.asarray(drawn))


def test_only_the_best_regions_are_drawn():
    drawn = draw_regions(Image.new("RGB", (200, 100)), record(), max_regions=1)
    assert has_colour(drawn, PALETTE[1]) and not has_colour(drawn, PALETTE[0])
    first = draw_regions(Image.new("RGB", (200, 100)), record(object_scores=None), max_regions=1)
    assert has_colour(first, PALETTE[0]) and not has_colour(first, PALETTE[1])


def test_labels_say_what_is_known():
    assert pictures._region_label(record(), 0, ["cat", "dog"]) == "0 dog 0.25"
    assert pictures._region_label(record(), 1, ["cat", "dog"]) == "1 0.50"
    assert pictures._region_label(record(object_scores=None), 0, None) == "0 class 1"
    assert pictures._region_label(record(object_scores=None, object_ids=None), 1, None) == "1"


def test_labels_of_equal_boxes_do_not_cover_each_other():
    taken = []
    for _ in range(6):
        taken.append(pictures._free_place((0, 0, 50, 10), np.array([150, 5, 199, 95]), (200, 100), taken))
    for number, (x1, y1, x2, y2) in enumerate(taken):
        assert x1 >= 0 and y1 >= 0 and x2 <= 200 and y2 <= 100
        assert all(x2 <= u1 or u2 <= x1 or y2 <= v1 or v2 <= y1 for u1, v1, u2, v2 in taken[:number])


@pytest.mark.parametrize("size, numbered", [(5, True), (40, False)])
def test_cells_of_a_grid_are_numbered_where_there_is_room(size, numbered):
    boxes = np.array([(x, y, x + 1, y + 1) for y in range(size) for x in range(size)]) * 800 / size
    grid = RegionRecord("photo", image_width=800, image_height=800, boxes=boxes, features=np.zeros((size**2, 1)))
    drawn = draw_regions(Image.new("RGB", (800, 800)), grid)
    inside = np.array([drawn.crop((x1 + 2, y1 + 2, x2 - 2, y2 - 2)) for x1, y1, x2, y2 in boxes])
    assert ((inside > 200).any(axis=(1, 2, 3)) == numbered).all()
    assert drawn.getpixel((800 // size, 400 // size)) == ImageColor.getrgb(PALETTE[0])
    assert not has_colour(drawn, PALETTE[1])


def test_the_number_of_a_region_is_at_its_box():
    """In two records whose boxes are in another order, the same box has another number above its corner."""
    for index, boxes in ((0, record().boxes), (1, record().boxes[::-1])):
        without, drawn = (
            draw_relevance(
                Image.new("RGB", (200, 100)), record(boxes=boxes), np.ones(2), numbered=numbered, min_width=800
            )
            for numbered in ([], [index])
        )
        y, x = np.nonzero((np.asarray(without) != np.asarray(drawn)).any(axis=-1))
        assert (x.min(), y.max()) == (80, 159)
        number = drawn.crop((x.min(), y.min(), x.max() + 1, y.max() + 1))
        expected = Image.new("RGB", number.size, PALETTE[1])
        font = ImageFont.load_default(size=20)
        ImageDraw.Draw(expected).text((3, expected.height / 2), str(index), "white", font, "lm")
        assert np.abs(np.subtract(number, expected, dtype=int)).mean() < 8


def test_boxes_of_one_size_that_lie_apart_are_no_grid():
    apart = np.array([(x, y, x + 10, y + 10) for y in (0, 30, 60) for x in (0, 50, 100)])
    touching = np.array([(x, y, x + 10, y + 10) for y in (0, 10, 20) for x in (50, 60, 70)])
    assert pictures._grid_cells(apart) == []
    assert pictures._grid_cells(np.array([[0, 0, 200, 100], *touching])) == list(range(1, 10))
    assert pictures._grid_cells(touching[:8]) == []


def test_boxes_at_the_border_and_of_no_size_are_drawn():
    boxes = np.array([[0, 0, 200, 100], [200, 100, 200, 100]], np.float32)
    drawn = draw_regions(Image.new("RGB", (200, 100)), record(boxes=boxes), min_width=1)
    assert drawn.getpixel((199, 50)) == ImageColor.getrgb(PALETTE[0])


def test_a_record_without_boxes_is_refused():
    with pytest.raises(ValueError, match="Image 'photo': boxes is None"):
        draw_regions(Image.new("RGB", (10, 10)), record(boxes=None))


class Page(HTMLParser):
    """
    Sections of a gallery: caption, verdict, and (classes, picture, text) of each figure; cells of the table. Of an
    explanation, which has no sections: its pictures, and what is bold beneath them.
    """

    def __init__(self, path):
        super().__init__()
        self.sections, self.cells, self.links, self.path = [], [], [], []
        self.pictures, self.captions = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag == "section":
            self.sections.append({"caption": "", "verdict": "", "figures": []})
        elif tag == "figure" and self.sections:
            self.sections[-1]["figures"].append({"class": attributes["class"].split(), "text": "", "pictures": []})
        elif tag == "img":
            data = attributes["src"].partition(";base64,")[2]
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
            if self.sections:
                figure = self.sections[-1]["figures"][-1]
                figure["pictures"].append(self.pictures[-1])
                figure.setdefault("picture", self.pictures[-1])
        if tag not in ("img", "meta"):
            self.path.append(tag)

    def handle_endtag(self, tag):
        assert self.path.pop() == tag

    def handle_data(self, data):
        if "figcaption" in self.path and not self.sections:
            self.captions += [data] if self.path[-1] == "b" else []
        elif "figcaption" in self.path:
            self.sections[-1]["figures"][-1]["text"] += data
        elif "section" in self.path and self.path[-1] in ("h2", "p"):
            self.sections[-1]["caption" if self.path[-1] == "h2" else "verdict"] += data
        elif self.path[-1:] in (["td"], ["th"]):
            self.cells.append(data)


COLOURS = {"a": (200, 0, 0), "b": (0, 200, 0), "c": (0, 0, 200)}


def plain(image_id):
    return Image.new("RGB", (30, 20), COLOURS[image_id])


def test_a_gallery_marks_the_right_image_and_says_its_rank(tmp_path):
    hits = [("a", 2.0), ("b", 0.5), ("c", -1.0)]
    items = [
        GalleryItem.from_hits('a "red" <b> & more', "a", hits, top_k=2),
        GalleryItem.from_hits("blue", "c", hits, top_k=2),
    ]
    metrics = {"image_retrieval_recall@1": 0.5, "text_retrieval_recall@5": 1.0, "image_retrieval_median_rank": 2.0}
    results = {"fine-tuned": metrics, "chance": {"image_retrieval_recall@1": 1 / 3}}
    page = Page(write_gallery(tmp_path / "gallery.html", items, plain, results=results))
    assert page.path == []
    first, second = page.sections
    assert (first["caption"], first["verdict"]) == ('a "red" <b> & more', "found first")
    assert (second["caption"], second["verdict"]) == ("blue", "right image at rank 3")
    assert [figure["class"] for figure in first["figures"]] == [["right"], ["wrong"]]
    # The right image is not among the best two: it follows them, marked and with its rank.
    assert [figure["class"] for figure in second["figures"]] == [["wrong"], ["wrong"], ["right", "beyond"]]
    assert [figure["text"].split() for figure in second["figures"]] == [
        ["1", "+2.00", "a"],
        ["2", "+0.50", "b"],
        ["3", "-1.00", "right", "image"],
    ]
    assert [figure["picture"].getpixel((0, 0)) for figure in second["figures"]] == [COLOURS[i] for i in "abc"]
    assert page.cells == [
        "image retrieval R@1", "text retrieval R@5", "fine-tuned", "50.0 %", "100.0 %", "chance", "33.3 %"
    ]  # fmt: skip


def test_a_gallery_of_a_search_says_what_was_not_among_the_candidates(tmp_path):
    hits = [("b", 3.0), ("a", 1.0)]
    items = [GalleryItem.from_hits("x", image_id, hits, top_k=1) for image_id in "abc"]
    assert [(item.rank, item.best) for item in items] == [(rank, (("b", 3.0),)) for rank in (2, 1, 0)]
    assert items[0].score == 1.0
    second, first, lost = Page(write_gallery(tmp_path / "gallery.html", items, plain)).sections
    assert (second["verdict"], first["verdict"]) == ("right image at rank 2", "found first")
    assert lost["verdict"] == "right image not among the candidates"
    assert [figure["class"] for figure in lost["figures"]] == [["wrong"], ["right", "beyond"]]
    assert lost["figures"][1]["text"] == "right image"


def test_a_figure_may_have_several_pictures_and_a_note(tmp_path):
    items = [GalleryItem.from_hits("x", "b", [("a", 1.0), ("b", 0.5)], notes={"b": "score <1>, similarity 2"})]
    page = Page(write_gallery(tmp_path / "gallery.html", items, lambda image_id: [plain("c"), plain(image_id)]))
    first, second = page.sections[0]["figures"]
    assert [picture.getpixel((0, 0)) for picture in second["pictures"]] == [COLOURS["c"], COLOURS["b"]]
    assert first["text"].split() == ["1", "+1.00", "a"]
    assert second["text"] == "2 +0.50 right image score <1>, similarity 2" and page.path == []


def test_a_gallery_needs_no_other_file(tmp_path):
    path = write_gallery(tmp_path / "g.html", [GalleryItem.from_hits("x", "a", [("c", 3), ("b", 2), ("a", 1)])], plain)
    assert all(link.startswith("data:") for link in Page(path).links)
    assert not re.search(r"https?:|<script|url\(|@import", path.read_text())


def test_photos_are_embedded_at_the_width_asked_for(tmp_path):
    asked = []

    def photo(image_id):
        asked.append(image_id)
        return Image.new("RGBA", (1000, 500), (10, 120, 200, 255))

    items = [GalleryItem.from_hits("x", "a", [("c", 3), ("b", 2), ("a", 1)])] * 2
    path = write_gallery(tmp_path / "g.html", items, photo, picture_width=200)
    data = re.findall(r"data:image/jpeg;base64,([^\"]+)", path.read_text())
    assert {Image.open(io.BytesIO(base64.b64decode(each))).size for each in data} == {(200, 100)}
    assert sorted(asked) == ["a", "b", "c"]


@pytest.mark.parametrize("right", [None, "2", "7"])
def test_answers_are_drawn_beside_the_photo(right, tmp_path):
    answers = [("2", 0.8), ("3", 0.15), ("many", 0.001)]
    path = pictures.draw_answers(tmp_path / "x.png", Image.new("RGB", (60, 40)), "how many dogs ?", answers, right)
    drawn = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    green, blue = (tuple(bytes.fromhex(pictures.PALETTE[place][1:])) for place in (2, 0))
    counts = [(drawn == colour).all(axis=1).sum() for colour in (green, blue)]
    assert (counts[0] > 1000) == (right == "2") and counts[1] > 100

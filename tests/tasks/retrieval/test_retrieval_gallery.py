"""The gallery of a search on photos: what it shows, and that it may do without the photos."""

import dataclasses
import io

import numpy as np
import places
import pytest
import small_world
import tiny
from test_pictures import Page

from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.pictures import GalleryItem


@pytest.fixture
def script():
    return places.script("retrieval_gallery")


def item(name, rank, score=float("nan"), others=()):
    best = [("x", other) for other in others] + ([(name, score)] if rank else [])
    return GalleryItem(name, name, score, rank, tuple(best))


def test_a_quarter_is_the_best_and_one_the_worst_of_what_chance_left(script):
    items = [
        item("clear", 1, 5.0, [1.0]), item("close", 1, 5.0, [4.0]), item("second", 2, 3.0, [4.0]),
        item("lost", 0, others=[9.0]), item("fortieth", 40, 0.0, [2.0]), item("third", 3, 1.0, [2.0]),
    ]  # fmt: skip
    names = [[each.caption for each in part] for part in script.choose(items, 4, seed=0)]
    drawn = np.random.default_rng(0).permutation(6)
    assert names[0] == [items[row].caption for row in sorted(drawn[:2])]
    order = ["clear", "close", "second", "third", "fortieth", "lost"]
    rest = [name for name in order if name not in names[0]]
    assert names[1:] == [rest[:1], rest[-1:]]
    shown = [each.caption for part in script.choose(items, 20, seed=1) for each in part]
    assert sorted(shown) == sorted(order)  # few items: each once


def test_with_photos_and_without(script, tmp_path, capsys):
    world = small_world.build(tmp_path)
    model, captions, regions = small_world.save_retrieval(
        tmp_path / "model", world, projection_dim=8, first_stage_trained=True, similarity_weight=30
    )
    words = ["--model", model, "--captions", captions, "--regions", regions]
    words += ["--output", str(tmp_path / "gallery.html"), "--asked", "8", "--shown", "4", "--candidates", "3"]
    script.main(words)
    page = Page(tmp_path / "gallery.html")
    assert len(page.sections) == 4 and capsys.readouterr().out.endswith("gallery.html: 4 captions.\n")
    asked = set(read_captions(captions, split="test")["caption"])
    assert {section["caption"] for section in page.sections} <= asked
    for section in page.sections:
        assert len(section["figures"]) == 3 + ("beyond" in section["figures"][-1]["class"])
        for figure in section["figures"]:
            picture, buffer = figure["picture"], io.BytesIO()
            picture.save(buffer, "PNG", optimize=True)
            assert picture.size == (240, 180) and len(buffer.getvalue()) < 4000
            assert picture.convert("RGB").getcolors(16) is not None  # boxes on a blank page
    text = (tmp_path / "gallery.html").read_text()
    assert "they are ordered by score + 30 similarity, the weight that was measured on validation captions." in text
    assert "as the boxes of their 8 surest regions, if these have scores." in text
    rank, total, _, *parts = page.sections[0]["figures"][0]["text"].split()
    score, similarity = float(parts[-3].strip(",")), float(parts[-1])
    assert rank == "1" and float(total) == pytest.approx(score + 30 * similarity, abs=0.03)
    script.main([*words, "--photos", str(world / "photos"), "--similarity_weight", "0"])
    assert "ordered by score, the weight that was asked for. The best five are shown, whole." in (
        (tmp_path / "gallery.html").read_text()
    )
    figure = Page(tmp_path / "gallery.html").sections[0]["figures"][0]
    assert figure["picture"].size == (192, 144)


def test_cells_of_a_grid_are_not_drawn(script):
    record = tiny.record()  # whose regions have no scores
    assert script.diagram(record, None, 8).getcolors() == [(240 * 180, (255, 255, 255))]
    scored = dataclasses.replace(record, object_scores=np.array([0.5, 0.9, 0.1]))
    assert len(script.diagram(scored, None, 8).getcolors()) > 1

"""Pictures of VCR's questions: the objects that are spoken of, and texts as VCR prints them."""

import numpy as np
from PIL import Image, ImageColor

from unicoder_vl_hf.pictures import PALETTE
from unicoder_vl_hf.tasks.vcr.pictures import RIGHT, _draw_objects, draw_question, spell

ROW = {
    "image_id": "photo",
    "objects": ["person", "dog", "person"],
    "boxes": [[10, 20, 60, 90], [100, 100, 150, 150], [300, 40, 420, 400]],
    "image_width": 400,
    "image_height": 300,
    "question": ["Why", "do", [0, 2], "smile", "?"],
    "answer_choices": [[[2], "is", "glad", "."], ["No", "one", "smiles", "."], ["A", "joke", "."], ["A", "cat", "."]],
    "rationale_choices": [[[1], "barks", "."]] * 4,
    "answer_label": 0,
    "rationale_label": 1,
}


def test_texts_count_objects_from_one():
    assert spell(ROW["question"], ROW["objects"]) == "Why do [person1] and [person3] smile?"
    assert spell([[1], "'", "s", "bone", ",", "eh", "."], ROW["objects"]) == "[dog2] ' s bone, eh."


def outlined(row, names, photo=(800, 600)):
    """Which boxes of a photo of twice the size have an outline: the colour of the middle of their left sides."""
    picture = np.asarray(_draw_objects(Image.new("RGB", photo, "white"), row, names))
    return ["#" + bytes(picture[round(y1 + min(y2, 300)), 2 * x1 + 1]).hex() for x1, y1, _, y2 in row["boxes"]]


def test_what_is_referred_to_has_a_box_and_nothing_else():
    assert outlined(ROW, ["answer"]) == [PALETTE[0], "#ffffff", PALETTE[1]]
    assert outlined(ROW, ["answer", "rationale"]) == list(PALETTE[:3])
    plain = ROW | {"question": ["Why", "?"], "answer_choices": [["No", "."]] * 4}
    assert outlined(plain, ["answer"]) == ["#ffffff"] * 3


def test_the_picture_of_a_question(tmp_path):
    photo = Image.new("RGB", (400, 300), "white")
    path = draw_question(tmp_path / "q.png", photo, ROW, [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4])
    whole, answers = Image.open(path), Image.open(draw_question(tmp_path / "a.png", photo, ROW, np.full(4, 0.25)))
    assert whole.width == answers.width and whole.height > answers.height


def test_a_bar_of_all_ends_at_the_border(tmp_path):
    path = draw_question(tmp_path / "q.png", Image.new("RGB", (400, 300), "white"), ROW, [1, 0, 0, 0])
    picture = np.asarray(Image.open(path).convert("RGB"))
    (green,) = np.flatnonzero((picture == ImageColor.getrgb(RIGHT)).all(axis=-1).any(axis=0))[-1:] / picture.shape[1]
    assert 0.98 < green < 1

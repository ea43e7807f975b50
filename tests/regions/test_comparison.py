"""Two stores of the same images, region by region."""

import numpy as np
import pytest

from unicoder_vl_hf import RegionRecord
from unicoder_vl_hf.regions.comparison import box_iou, compare_stores, match_boxes


def record(image_id, boxes, features, object_ids=None, size=(200, 100)):
    width, height = size or (None, None)
    return RegionRecord(
        image_id,
        image_width=width,
        image_height=height,
        boxes=boxes,
        features=np.asarray(features, np.float32),
        object_ids=object_ids,
    )


BOXES = [[0, 0, 100, 40], [100, 0, 200, 40], [0, 50, 50, 100]]


def test_iou_by_hand():
    a = np.array([[0, 0, 2, 4], [5, 5, 5, 9]])
    b = np.array([[1, 0, 3, 4], [0, 0, 2, 4], [5, 5, 5, 9]])
    np.testing.assert_allclose(box_iou(a, b), [[4 / 12, 1, 0], [0, 0, 0]])


def test_each_box_matches_once_best_first():
    iou = np.array([[0.9, 0.8, 0.0], [0.85, 0.3, 0.0]])
    # Row 0 takes column 0 although row 1 would have done better with it; row 1 is left with 0.3.
    assert [pair.tolist() for pair in match_boxes(iou, 0.5)] == [[0], [0]]
    assert [pair.tolist() for pair in match_boxes(iou, 0.25)] == [[0, 1], [0, 1]]
    assert [pair.tolist() for pair in match_boxes(np.zeros((2, 2)), 0.0)] == [[], []]


def test_row_order_and_size_of_photo_mean_nothing():
    a = {"x": record("x", BOXES, [[1, 0], [0, 1], [1, 1]], [3, 4, 5])}
    fractions = np.array(BOXES)[::-1] / [200, 100, 200, 100]
    b = {"x": record("x", fractions, [[2, 2], [0, 3], [1, 0]], [5, 4, 3], size=None)}
    found = compare_stores(a, b)
    assert (found.images, found.matched, found.unmatched_in_a, found.unmatched_in_b) == (1, 3, 0, 0)
    np.testing.assert_allclose(found.ious, 1, rtol=1e-6)
    np.testing.assert_allclose(found.cosines, 1, rtol=1e-6)
    assert found.same_class.tolist() == [True, True, True]


def test_two_photos_of_one_name_are_not_compared():
    a = {name: record(name, BOXES[:1], [[1, 0]]) for name in ("resized", "other")}
    b = {
        "resized": record("resized", [[0, 0, 66, 26]], [[1, 0]], size=(133, 66)),  # 66.5, cut
        "other": record("other", BOXES[:1], [[0, 1]], size=(200, 150)),
    }
    found = compare_stores(a, b)
    assert (found.images, found.matched, found.other_photos) == (2, 1, ["other"]) and found.cosines.tolist() == [1]
    assert "other photos  1 images, such as other, which were not compared" in str(found)


def test_what_differs_is_counted():
    a = {
        "x": record("x", BOXES, [[1, 0], [0, 1], [1, 1]], [3, 4, -1]),
        "y": record("y", BOXES[:1], [[1, 0]]),
        "a": record("a", BOXES[:1], [[1, 0]]),
        "z": record("z", None, [[1, 0]]),
    }
    b = {
        "x": record("x", [[0, 0, 100, 40], [0, 50, 50, 100], [150, 50, 200, 100]], [[0, 1], [1, 1], [1, 1]], [4, 5, 6]),
        "y": record("y", BOXES[:1], [[-1, 0]]),
        "z": record("z", BOXES[:1], [[1, 0]]),
    }
    found = compare_stores(a, b)
    assert (found.images, found.only_in_a, found.only_in_b, found.without_boxes) == (3, 1, 0, 1)
    assert (found.matched, found.unmatched_in_a, found.unmatched_in_b) == (3, 1, 1)
    np.testing.assert_allclose(found.cosines, [0, 1, -1], atol=1e-6)
    assert found.worst == [("y", pytest.approx(-1)), ("x", pytest.approx(0.5))]
    # The region without a class in A is not asked for its class.
    assert found.same_class.tolist() == [False]
    assert "1 ids in B are those of A +1: is background counted in one?" in str(found)
    assert "y (-1.000)" in str(found)
    assert "3 matched; without a match 1 in A, 1 in B" in str(found)
    assert "could not be compared" not in str(found)


def test_other_widths_have_no_cosine():
    a, b = {"x": record("x", BOXES, np.ones((3, 2)))}, {"x": record("x", BOXES, np.ones((3, 4)))}
    found = compare_stores(a, b)
    assert len(found.cosines) == 0 and "differ in width" in str(found)
    assert "object class  could not be compared: no matched region has one in both" in str(found)


def test_stores_that_do_not_meet():
    a, b = {"x": record("x", BOXES, np.ones((3, 2)))}, {"COCO_x": record("COCO_x", BOXES, np.ones((3, 2)))}
    with pytest.raises(ValueError, match=r"No image is in both: A's ids are like \['x'\], B's like \['COCO_x'\]"):
        compare_stores(a, b)

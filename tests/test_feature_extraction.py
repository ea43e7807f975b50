"""`RegionRecord` and `UnicoderVLFeatureExtractor`: hand-worked values, and loops as the independent reference."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from unicoder_vl_hf import records_unicoder_vl
from unicoder_vl_hf.feature_extraction_unicoder_vl import RegionRecord, UnicoderVLFeatureExtractor, is_region_record


@pytest.fixture
def log(caplog):
    """What is logged, with warnings that are given once given anew."""
    transformers_logging.warning_once.cache_clear()
    records_unicoder_vl._warn_once.cache_clear()
    return caplog


def record(**changes) -> RegionRecord:
    """Two regions of a 640 x 480 image, asymmetric in every way."""
    values = {
        "image_id": "photo",
        "image_width": 640,
        "image_height": 480,
        "boxes": [[64, 120, 320, 360], [0, 24, 640, 480]],
        "features": np.array([[1, 2, 3], [4, 5, 6]], np.float16),
        "object_ids": [7, -1],
        "object_scores": [0.25, 0.75],
        "attribute_ids": [3, 0],
        "attribute_scores": [0.5, 1],
        "class_probabilities": np.full((2, 8), 0.125, np.float16),
    }
    return RegionRecord(**{**values, **changes})


def random_record(image_id: str, n: int, width: int = 5, scores: bool = True, seed: int = 0) -> RegionRecord:
    rng = np.random.default_rng([seed, n])
    corners = rng.random((n, 2, 2)) * (300, 200)
    return RegionRecord(
        image_id,
        image_width=300,
        image_height=200,
        boxes=np.sort(corners, axis=1).reshape(n, 4),
        features=rng.standard_normal((n, width)).astype(np.float32),
        # One decimal, so that there are ties.
        object_scores=rng.random(n).round(1) if scores else None,
    )


def test_locations_of_pixels_are_the_papers():
    # 64/640, 120/480, 320/640, 360/480, (240 * 256) / (640 * 480)
    expected = [[0.1, 0.25, 0.5, 0.75, 0.2], [0, 0.05, 1, 1, 0.95]]
    locations = record().locations()
    assert locations.dtype == np.float32
    np.testing.assert_allclose(locations, expected, rtol=0, atol=1e-7)


def test_locations_of_fractions_need_no_size():
    boxes = [[0.1, 0.25, 0.5, 0.75], [0, 0.05, 1, 1]]
    locations = record(image_width=None, image_height=None, boxes=boxes).locations()
    np.testing.assert_allclose(locations, [[0.1, 0.25, 0.5, 0.75, 0.2], [0, 0.05, 1, 1, 0.95]], rtol=0, atol=1e-7)


def test_unknown_boxes_give_zeros_and_one_warning(log):
    without = record(boxes=None)
    assert np.array_equal(without.locations(), np.zeros((2, 5), np.float32))
    without.locations()
    assert log.text.count("have no boxes") == 1


def test_values_are_coerced_and_features_keep_their_dtype():
    made = record()
    dtypes = {name: value.dtype for name, value in made.to_dict().items() if isinstance(value, np.ndarray)}
    assert dtypes == {
        "boxes": np.float32,
        "features": np.float16,
        "object_ids": np.int64,
        "object_scores": np.float32,
        "attribute_ids": np.int64,
        "attribute_scores": np.float32,
        "class_probabilities": np.float16,
    }
    assert record(features=[[1, 2], [3, 4]]).features.dtype == np.float32
    assert record(features=np.ones((2, 2))).features.dtype == np.float32
    assert record(object_ids=np.array([7.0, -1.0])).object_ids.tolist() == [7, -1]
    sized = record(image_width=np.int64(640), image_height=480.0)
    assert (type(sized.image_width), type(sized.image_height)) == (int, int)
    assert type(record(image_id=np.str_("photo")).image_id) is str
    assert len(made) == made.num_regions == 2


def test_a_pixel_outside_and_a_flat_box_pass():
    record(boxes=[[-1, -1, 641, 481], [5, 5, 5, 9]])
    record(image_width=None, image_height=None, boxes=[[-0.005, 0, 1.005, 1], [0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("field", "changes", "says"),
    [
        ("image_id", {"image_id": 12}, "12"),
        ("image_id", {"image_id": ""}, "at least one character"),
        ("image_width", {"image_width": 0}, "is 0"),
        ("image_height", {"image_height": -480}, "is -480"),
        ("image_width", {"image_width": float("nan")}, "nan"),
        ("image_height", {"image_height": 480.5}, "480.5"),
        ("image_width", {"image_width": "640"}, "'640'"),
        ("image_height", {"image_height": None}, "both"),
        ("features", {"features": [1.0, 2.0]}, r"\(2,\)"),
        ("features", {"features": np.zeros((0, 3))}, "n >= 1"),
        ("features", {"features": np.zeros((2, 0))}, "n >= 1"),
        ("features", {"features": [[1, 2], [3]]}, "equal length"),
        ("features", {"features": [["a"], ["b"]]}, "numbers"),
        ("features", {"features": [[1, 2], [3, float("nan")]]}, r"\[1, 1\] = nan"),
        ("features", {"features": [[1, 2], [float("inf"), 1]]}, r"\[1, 0\] = inf"),
        ("features", {"features": [[1e39, 2], [1, 1]]}, "inf"),
        ("features", {"features": np.array([[1, 2], [3, np.nan]], np.float16)}, r"\[1, 1\] = nan"),
        ("features", {"features": np.array([[1, 2], [-np.inf, 65504]], np.float16)}, r"\[1, 0\] = -inf"),
        ("boxes", {"boxes": [[0, 0, 1, 1]]}, r"expected \(2, 4\)"),
        ("boxes", {"boxes": [[0, 0, 1], [0, 0, 1]]}, r"expected \(2, 4\)"),
        ("boxes", {"boxes": [[0, 0, 1, 1], [9, 5, 8, 6]]}, r"\[1\] = \[9.0, 5.0, 8.0, 6.0\] is inverted"),
        ("boxes", {"boxes": [[0, 0, 1, 1], [8, 6, 9, 5]]}, "inverted"),
        ("boxes", {"boxes": [[0, 0, 1, float("nan")], [0, 0, 1, 1]]}, "nan"),
        ("boxes", {"boxes": [[0, 0, 1, 1], [0, 0, 641.5, 1]]}, "RESIZED"),
        ("boxes", {"boxes": [[0, -1.5, 1, 1], [0, 0, 1, 1]]}, "is outside"),
        ("boxes", {"boxes": [[0, 0, 1, 1], [0, 0, 470, 630]]}, "swapped"),
        ("boxes", {"image_width": None, "image_height": None}, "pixels"),
        ("object_ids", {"object_ids": [1]}, r"\(1,\)"),
        ("object_ids", {"object_ids": [1, -2]}, "-2"),
        ("object_ids", {"object_ids": [1, 1.5]}, "1.5"),
        ("object_ids", {"object_ids": [1, float("nan")]}, "nan"),
        ("object_ids", {"object_ids": [1, 8]}, "below 8"),
        ("attribute_ids", {"attribute_ids": [True, False]}, "bool"),
        ("object_scores", {"object_scores": [0.5, 1.5]}, "1.5"),
        ("object_scores", {"object_scores": [-0.5, 1]}, "-0.5"),
        ("attribute_scores", {"attribute_scores": [float("nan"), 1]}, "nan"),
        ("attribute_scores", {"attribute_scores": [[1], [1]]}, r"\(2, 1\)"),
        ("class_probabilities", {"class_probabilities": [[0.5], [30]]}, "30"),
        ("class_probabilities", {"class_probabilities": [0.5, 0.5]}, "any"),
    ],
)
def test_malformed_fields_are_named(field, changes, says):
    with pytest.raises(ValueError, match=says) as error:
        record(**changes)
    assert field in str(error.value)
    if field != "image_id":
        assert "'photo'" in str(error.value)


def test_replace_checks_again():
    with pytest.raises(ValueError, match="object_ids"):
        dataclasses.replace(record(), object_ids=[0])


@pytest.mark.parametrize(
    "given", [record(), RegionRecord("ß/2", features=np.ones((1, 2), np.float32))], ids=["full", "bare"]
)
def test_save_and_load_are_exact(given, tmp_path):
    given.save(tmp_path / "record.bin")
    assert [file.name for file in tmp_path.iterdir()] == ["record.bin"]
    with np.load(tmp_path / "record.bin", allow_pickle=False) as arrays:
        assert set(arrays) == set(given.to_dict())
    loaded = RegionRecord.load(tmp_path / "record.bin")
    for name, value in vars(given).items():
        found = getattr(loaded, name)
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype
            assert np.array_equal(found, value)
        else:
            assert found == value
            assert type(found) is type(value)


def test_save_replaces_the_file_instead_of_writing_into_it(tmp_path):
    path = tmp_path / "record.npz"
    record().save(path)
    before = path.read_bytes()
    with path.open("rb") as reader:  # of the old file, while the new one is written
        record(image_id="other").save(path)
        assert reader.read() == before
    assert RegionRecord.load(path).image_id == "other"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.npz"
    record().save(path)
    before = path.read_bytes()

    def half_a_file(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        record(image_id="other").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_load_names_the_file_and_never_unpickles(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, image_id=np.array("x"), features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"evil\.npz"):
        RegionRecord.load(path)
    for content in (b"", b"PK\x03\x04 cut short", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"evil\.npz"):
            RegionRecord.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"evil\.npz"):
        RegionRecord.load(path)
    with pytest.raises(FileNotFoundError):
        RegionRecord.load(tmp_path / "nothing.npz")


def test_from_dict_refuses_unknown_and_missing_keys():
    assert RegionRecord.from_dict({"image_id": "a", "features": [[1.0]], "boxes": None}).num_regions == 1
    with pytest.raises(ValueError, match=r"'a': unknown keys \['bbox', 'x'\]"):
        RegionRecord.from_dict({"image_id": "a", "features": [[1.0]], "bbox": 1, "x": 2})
    with pytest.raises(ValueError, match=r"\['features'\] must be given"):
        RegionRecord.from_dict({"image_id": "a"})
    with pytest.raises(ValueError, match=r"\['image_id'\] must be given"):
        RegionRecord.from_dict({"features": [[1.0]]})


def slow_select(record: RegionRecord, most: int, threshold: float | None, least: int) -> list[int]:
    """The rule in loops: rank by score, earlier rows first; cut; restore the order of the record."""
    if record.object_scores is None:
        return list(range(min(most, record.num_regions)))
    ranked = sorted(range(record.num_regions), key=lambda row: (-record.object_scores[row], row))
    kept = []
    for rank, row in enumerate(ranked):
        passes = threshold is None or record.object_scores[row] > np.float32(threshold) or rank < least
        if passes and len(kept) < most:
            kept.append(row)
    return sorted(kept)


@pytest.mark.parametrize("most", [1, 4, 100])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("least", [1, 3, 10])
@pytest.mark.parametrize("scores", [True, False])
def test_select_and_batch_equal_a_loop(most, threshold, least, scores):
    extractor = UnicoderVLFeatureExtractor(max_regions=most, score_threshold=threshold, min_regions=least)
    records = [random_record(f"image {n}", n, scores=scores) for n in (6, 1, 12)]
    batch = extractor(records, return_tensors="np", return_kept_indices=True)
    kept = [slow_select(record, most, threshold, least) for record in records]
    longest = max(map(len, kept))
    assert batch["region_features"].shape == (3, longest, 5)
    for row, (record, rows) in enumerate(zip(records, kept, strict=True)):
        assert extractor.select(record).tolist() == rows
        locations = record.locations()
        for column in range(longest):
            real = column < len(rows)
            assert batch["region_attention_mask"][row, column] == real
            assert batch["kept_indices"][row, column] == (rows[column] if real else -1)
            features = record.features[rows[column]] if real else np.zeros(5)
            assert np.array_equal(batch["region_features"][row, column], features)
            expected = locations[rows[column]] if real else np.zeros(5)
            assert np.array_equal(batch["region_locations"][row, column], expected)


def test_ties_keep_the_earlier_row_and_the_order_of_the_record():
    scores = [0.1, 0.9, 0.5, 0.5, 0.5, 0.95]
    given = RegionRecord("tie", features=np.arange(6.0)[:, None], object_scores=scores)
    assert UnicoderVLFeatureExtractor(max_regions=4).select(given).tolist() == [1, 2, 3, 5]
    # Above the threshold, not at it; then filled up to min_regions.
    at = UnicoderVLFeatureExtractor(score_threshold=0.5, min_regions=1)
    assert at.select(given).tolist() == [1, 5]
    assert UnicoderVLFeatureExtractor(score_threshold=0.5, min_regions=3).select(given).tolist() == [1, 2, 5]


def test_no_scores_keeps_the_first_with_a_warning(log):
    given = random_record("bare", 5, scores=False)
    extractor = UnicoderVLFeatureExtractor(max_regions=3)
    assert extractor.select(given).tolist() == [0, 1, 2]
    extractor.select(given)
    assert log.text.count("no object_scores") == 1


def test_few_regions_without_scores_are_no_reason_to_warn(log):
    UnicoderVLFeatureExtractor().select(random_record("bare", 5, scores=False))
    assert not log.text


def test_tensors_and_dtypes():
    extractor = UnicoderVLFeatureExtractor()
    half = record()
    batch = extractor([half, half])
    assert list(batch) == extractor.model_input_names
    assert {name: value.dtype for name, value in batch.items()} == {
        "region_features": torch.float16,
        "region_locations": torch.float32,
        "region_attention_mask": torch.int64,
    }
    assert extractor(half)["region_features"].shape == (1, 2, 3)
    mixed = extractor([half, dataclasses.replace(half, features=half.features.astype(np.float32))])
    assert mixed["region_features"].dtype == torch.float32
    assert torch.equal(mixed["region_features"][0], mixed["region_features"][1])


def test_a_batch_shares_no_memory_with_its_records():
    given = record()
    batch = UnicoderVLFeatureExtractor()(given)
    batch["region_features"].zero_()
    assert given.features.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_errors_of_a_batch_name_the_image():
    extractor = UnicoderVLFeatureExtractor()
    with pytest.raises(ValueError, match=r"'wide': features have width 6, expected 5, that of image 'first'"):
        extractor([random_record("first", 2), random_record("wide", 2, width=6)])
    with pytest.raises(ValueError, match=r"'first': features have width 5, expected 2048"):
        UnicoderVLFeatureExtractor(feature_dim=2048)([random_record("first", 2)])
    with pytest.raises(ValueError, match="empty"):
        extractor([])
    with pytest.raises(ValueError, match=r"records\[1\] is a dict"):
        extractor([record(), {"features": 1}])


def test_features_are_scaled_and_padding_is_not():
    records = [
        RegionRecord("a", features=np.array([[1, 2], [3, 4]], np.float16)),
        RegionRecord("b", features=np.array([[5, 6]], np.float16)),
    ]
    extractor = UnicoderVLFeatureExtractor(feature_mean=[1, 4], feature_std=2)
    features = extractor(records, return_tensors="np")["region_features"]
    assert features.dtype == np.float32
    assert features.tolist() == [[[0, -1], [1, 0]], [[2, 1], [0, 0]]]
    assert records[0].features.tolist() == [[1, 2], [3, 4]]
    only = UnicoderVLFeatureExtractor(feature_std=2)(records, return_tensors="np")["region_features"]
    assert only.tolist() == [[[0.5, 1], [1.5, 2]], [[2.5, 3], [0, 0]]]
    with pytest.raises(ValueError, match="feature_mean has length 3, but the features have width 2"):
        UnicoderVLFeatureExtractor(feature_mean=[1, 4, 0])(records)


@pytest.mark.parametrize(
    "options",
    [
        {"max_regions": 0},
        {"min_regions": 0},
        {"score_threshold": 1.5},
        {"score_threshold": -1},
        {"feature_dim": 0},
        {"feature_std": 0.0},
        {"feature_std": float("nan")},
        {"feature_mean": [0.0, float("inf")]},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        UnicoderVLFeatureExtractor(**options)


def test_save_pretrained_round_trip(tmp_path):
    options = {
        "max_regions": 36,
        "score_threshold": 0.2,
        "min_regions": 12,
        "feature_dim": 256,
        "feature_mean": [0.25, -0.125],
        "feature_std": 0.5,
        "region_provenance": {"detector": "vg", "thresholds": {"score": 0.2}, "class_names": ["a", "b"]},
    }
    UnicoderVLFeatureExtractor(**options).save_pretrained(tmp_path)
    loaded = UnicoderVLFeatureExtractor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options


def test_another_provenance_is_said_aloud(log):
    trained = {"detector": "vg", "feature_dim": 2048, "dtype": "float16", "package_version": "0.1"}
    extractor = UnicoderVLFeatureExtractor(region_provenance=trained)
    assert extractor.check_provenance({**trained, "dtype": "float32", "package_version": "0.2"})
    assert UnicoderVLFeatureExtractor().check_provenance({"detector": "anything"})
    assert not log.text
    assert not extractor.check_provenance({**trained, "detector": "detr"})
    assert "detector 'vg' in training, 'detr' here" in log.text


@pytest.mark.parametrize("unknown", [{}, {"box_type": None}])
def test_what_one_side_does_not_know_is_no_difference(unknown, log):
    one, other = {"detector": "vg", **unknown}, {"detector": "vg", "box_type": "regressed"}
    assert UnicoderVLFeatureExtractor(region_provenance=one).check_provenance(other)
    assert UnicoderVLFeatureExtractor(region_provenance=other).check_provenance(one)
    assert not log.text
    assert not UnicoderVLFeatureExtractor(region_provenance=other).check_provenance({"box_type": "proposal"})
    assert "box_type 'regressed' in training, 'proposal' here" in log.text


def test_records_of_another_copy_of_the_class_pass():
    """A checkpoint's remote code and the installed package each have a class of this name."""
    other = type("RegionRecord", (), dict(vars(RegionRecord)))
    given = other("photo", features=[[1.0, 2.0]])
    assert is_region_record(given)
    assert UnicoderVLFeatureExtractor()(given)["region_features"].tolist() == [[[1, 2]]]
    assert not is_region_record({"image_id": "photo"})

"""Regions of photos at hand: those that an extraction stores, by the detector that the provenance names."""

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import photo_world
import pytest
from photo_world import IDS
from PIL import Image

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.regions import RegionFinder, load_detector


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return photo_world.build(tmp_path_factory.mktemp("finding"))


@pytest.fixture(scope="module")
def store(world) -> RegionStore:
    return RegionStore(world / "store")


def files(world: Path) -> list[Path]:
    return [world / "photos" / f"{name}.png" for name in IDS]


def assert_same(found, stored):
    assert len(found) == len(stored)
    for record, other in zip(found, stored, strict=True):
        assert record.features.dtype == other.features.dtype
        np.testing.assert_array_equal(record.features, other.features)
        np.testing.assert_array_equal(record.boxes, other.boxes)
        assert (record.image_width, record.image_height) == (other.image_width, other.image_height)


def test_the_store_knows_the_options_of_its_detector(store, world):
    assert store.provenance["detector"] == f"grid:{world / 'encoder'}"
    assert store.provenance["detector_options"] == {"grid_size": 2, "image_size": 32}


def test_files_and_open_photos_give_what_the_store_holds(world, store):
    """By the provenance alone: to the bit, since features are rounded as the store's are."""
    finder = RegionFinder(trained_on=store.provenance, device="cpu")
    stored = [store[name] for name in IDS]
    found = finder([str(path) for path in files(world)])
    assert_same(found, stored)
    assert [record.image_id for record in found] == [str(path) for path in files(world)]
    opened = [Image.open(path) for path in files(world)]
    assert_same(finder(opened), stored)
    assert_same(finder([image.copy() for image in opened]), stored)
    assert [record.image_id for record in finder([image.copy() for image in opened[:2]])] == ["photo 1", "photo 2"]
    assert_same(RegionFinder(f"grid:{world / 'encoder'}", trained_on=store.provenance, device="cpu")(opened), stored)


def test_the_detector_is_loaded_once_and_not_before_a_photo(world, store, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "unicoder_vl_hf.regions.finding.load_detector",
        lambda name, **options: loaded.append((name, options)) or load_detector(name, **options),
    )
    finder = RegionFinder(trained_on=store.provenance, device="cpu")
    assert not loaded
    finder(files(world)[:1])
    finder(files(world)[1:3])
    assert loaded == [(f"grid:{world / 'encoder'}", {"device": "cpu", "grid_size": 2, "image_size": 32})]
    copied = pickle.loads(pickle.dumps(finder))
    assert copied._loaded is None and finder._loaded is not None


def test_a_photo_lies_as_its_exif_says(world, store):
    """An open photo and its file are turned alike, and the open one stays as it was."""
    path = world / "lying.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(files(world)[0]).save(path, exif=exif, quality=95)
    finder = RegionFinder(trained_on=store.provenance, device="cpu")
    opened = Image.open(path)
    (of_file,), (of_image,) = finder([path]), finder([opened])
    assert (of_file.image_width, of_file.image_height) == (80, 120)
    assert_same([of_image], [of_file])
    assert opened.size == (120, 80)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": None}, "come from no detector, so those of a photo cannot be found: name the detector"),
        ({"detector": "scenes: drawing boxes"}, "come from 'scenes: drawing boxes', which is not loaded unasked"),
        ({"detector": "os:system"}, "come from 'os:system', which is not loaded unasked"),
        (
            {"detector": "grid:/nowhere/encoder"},
            "There is no /nowhere/encoder.*is the detector of the regions.*name it",
        ),
        ({"detector_revision": "sha256:0"}, "is not what it was in training: detector_revision 'sha256:0' in training"),
        ({"box_type": "given"}, "box_type 'given' in training, 'grid' here"),
        ({"detector_options": {"grid_size": 3, "image_size": 32}}, "thresholds .*'grid_size': 2.* in training"),
        ({"detector_options": {"size": 3}}, "have no option size"),
    ],
)
def test_a_detector_that_is_not_to_be_had_is_told(world, store, change, message):
    finder = RegionFinder(trained_on=store.provenance | change, device="cpu")
    with pytest.raises((ValueError, OSError), match=message):
        finder(files(world))


def test_another_detector_is_warned_of_and_the_same_elsewhere_is_not(world, store, caplog, tmp_path):
    shutil.copytree(world / "encoder", tmp_path / "moved")
    options = {"grid_size": 2, "image_size": 32}
    finder = RegionFinder(f"grid:{tmp_path / 'moved'}", trained_on=store.provenance, device="cpu", **options)
    assert_same(finder(files(world)), [store[name] for name in IDS])
    assert not caplog.messages
    other = photo_world.save_encoder(tmp_path / "other", seed=1)
    RegionFinder(other, trained_on=store.provenance, device="cpu", **options)(files(world)[:1])
    assert "The detector is not that of the training: detector 'grid:" in caplog.text


def test_detectors_without_their_weights_or_of_another_kind_are_named(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bare", "cut"):
        shutil.copytree(world / "encoder", name)
    whole = Path("cut", "model.safetensors").read_bytes()
    Path("cut", "model.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("bare", "model.safetensors").unlink()
    for detector, options, message in (
        ("grid:bare", {}, "grid:bare cannot be loaded from this folder: .*no file named model.safetensors"),
        ("grid:cut", {}, "grid:cut cannot be loaded: Error while deserializing"),
        (f"transformers:{world / 'encoder'}", {}, "encoder cannot be loaded: Unrecognized configuration class"),
        (f"visual-genome:{world / 'encoder'}", {}, r"encoder must hold config\.yaml"),
        (f"grid:{world / 'encoder'}", {"grid_size": "x"}, "with the options {'grid_size': 'x'}: '<' not supported"),
        ("torchvision:fasterrcnn_resnet50_fpn", {"weights": "none.pth"}, r"weights is 'none\.pth', neither a file nor"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            RegionFinder(detector, device="cpu", **options)(files(world)[:1])


def test_bad_photos_are_named(world, store, tmp_path, recwarn):
    finder = RegionFinder(trained_on=store.provenance, device="cpu")
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(ValueError, match=r"text\.jpg is no photo that can be read: its 8 bytes"):
        finder([files(world)[0], tmp_path / "text.jpg"])
    with pytest.raises(FileNotFoundError, match="absent"):
        finder([tmp_path / "absent.jpg"])
    with pytest.raises(ValueError, match="photo 1 is no photo that can be read: its pixels are fractions"):
        finder([Image.new("F", (8, 8))])
    Image.new("1", (1 << 16, 8192)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png .*65536 x 8192 pixels, more than 500000000"):
        finder([tmp_path / "huge.png"])
    assert not [each for each in recwarn if "DecompressionBomb" in each.category.__name__]
    for name, data, message in (
        ("empty.jpg", b"", "its 0 bytes are no image"),
        ("cut.png", files(world)[0].read_bytes()[:300], "truncated"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is no photo that can be read: .*{message}"):
            finder([tmp_path / name])


def test_what_was_found_is_kept_by_its_content(world, store, tmp_path, monkeypatch):
    """The same photo under another name is not detected in twice, and needs no detector; the cache is a store."""
    options = {"trained_on": store.provenance, "device": "cpu", "cache": tmp_path / "cache"}
    photos, stored = files(world), [store[name] for name in IDS]
    shutil.copy(photos[0], tmp_path / "copy.png")
    assert_same(RegionFinder(**options)([photos[0], photos[0], tmp_path / "copy.png"]), [stored[0]] * 3)
    cached = RegionStore(tmp_path / "cache")
    digest = hashlib.sha256(photos[0].read_bytes()).hexdigest()
    assert list(cached) == [digest] and cached.provenance == store.provenance
    loaded = []
    monkeypatch.setattr(
        "unicoder_vl_hf.regions.finding.load_detector",
        lambda name, **more: loaded.append(name) or load_detector(name, **more),
    )
    (found,) = RegionFinder(**options)([tmp_path / "copy.png"])
    assert_same([found], stored[:1])
    assert found.image_id == str(tmp_path / "copy.png") and not loaded
    assert_same(RegionFinder(**options)([photos[1], photos[0], photos[2]]), [stored[1], stored[0], stored[2]])
    opened = [Image.open(path) for path in photos[:2]]
    for _ in range(2):
        found = RegionFinder(**options)([opened[0], opened[1].copy()])
        assert_same(found, stored[:2])
        assert [record.image_id for record in found] == [str(photos[0]), "photo 2"]
    assert len(RegionStore(tmp_path / "cache")) == 5 and len(loaded) == 2  # three files and two opened photos
    # A detector that is named is loaded, since its weights may have changed; its folder may have moved.
    shutil.copytree(world / "encoder", tmp_path / "moved")
    named = options | {"grid_size": 2, "image_size": 32}
    assert_same(RegionFinder(f"grid:{tmp_path / 'moved'}", **named)(photos[2:4]), stored[2:4])
    assert len(RegionStore(tmp_path / "cache")) == 6
    other = photo_world.save_encoder(tmp_path / "other", seed=1)
    for finder, message in (
        (RegionFinder(**options | {"cache": world / "store"}), "store is no cache .* it has the image 'photo_0'"),
        (RegionFinder(other, **named), r"cache is no cache of this detector: detector 'grid:.* here.* there.*--cache"),
        (
            RegionFinder(**options | {"trained_on": store.provenance | {"dtype": "float32"}}),
            "dtype 'float32' here, 'float16' there",
        ),
        (RegionFinder(**options | {"trained_on": None}), "come from no detector"),
    ):
        with pytest.raises(ValueError, match=message):
            finder(photos[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_exact(world, store, tmp_path, dtype):
    trained_on = store.provenance | {"dtype": dtype}
    found, kept = (RegionFinder(trained_on=trained_on, device="cpu", cache=tmp_path)(files(world)[:2]) for _ in "12")
    assert_same(kept, found)
    assert_same(RegionFinder(trained_on=trained_on, device="cpu")(files(world)[:2]), found)


def test_a_bad_photo_costs_none_before_it(world, store, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    finder = RegionFinder(trained_on=store.provenance, device="cpu", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"text\.jpg is no photo that can be read"):
        finder([tmp_path / "text.jpg"])
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"text\.jpg is no photo that can be read"):
        finder([*files(world)[:2], tmp_path / "text.jpg", files(world)[3]])
    assert len(RegionStore(tmp_path / "cache")) == 2
    with pytest.raises(ValueError, match="photo 1 is no photo that can be read: its pixels are fractions"):
        finder([Image.new("F", (8, 8))])


class Colours:
    """A detector of somebody's: the mean colour of a photo."""

    def __init__(self, *, device, precision, scale=1.0):
        self.scale = scale
        self.provenance = {"detector_revision": "1", "thresholds": {"scale": scale}}

    def prepare(self, image):
        return np.asarray(image).mean((0, 1)), image.size

    def __call__(self, prepared, image_ids, boxes=None):
        from unicoder_vl_hf import RegionRecord

        return [
            RegionRecord(name, image_width=width, image_height=height, features=self.scale * colour[None])
            for name, (colour, (width, height)) in zip(image_ids, prepared, strict=True)
        ]


def test_a_class_of_anybodys_is_a_detector(world, tmp_path):
    from unicoder_vl_hf.regions import extract

    name = "test_finding:Colours"
    store = extract(world / "photos", tmp_path / "store", name, num_workers=0, scale=0.5)
    assert store.provenance["detector"] == name and store.provenance["detector_options"] == {"scale": 0.5}
    with pytest.raises(ValueError, match="which is not loaded unasked"):  # a checkpoint runs no code by itself
        RegionFinder(trained_on=store.provenance)(files(world)[:1])
    found = RegionFinder(name, trained_on=store.provenance)(files(world))
    np.testing.assert_array_equal(found[0].features, store[IDS[0]].features)
    with pytest.raises(ValueError, match="have no option size"):
        load_detector(name, size=1)
    for other, message in (
        ("os:system", "is no detector: it takes no device and no precision, see docs/own_detector"),
        ("json:dumps", "json:dumps cannot be loaded with the options {}: dumps.. missing"),
        ("collections:Counter", "is no detector: it lacks __call__ and prepare and provenance"),
    ):
        with pytest.raises(ValueError, match=message):
            load_detector(other)
    with pytest.raises(ValueError, match="the module test_finding has no Grey"):
        load_detector("test_finding:Grey")
    with pytest.raises(ValueError, match=r"MODULE:CLASS with a module that Python can import"):
        load_detector("no.module:Grey")

"""From photos of every kind to a store, with a detector that sees colours: what it says can be checked by hand."""

import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from extract_client import ColourDetector
from photos import SIZES, as_tables, as_tar, photo
from PIL import Image
from two_processes import Processes

from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.data.image_ids import id_mapping
from unicoder_vl_hf.regions import editing, remove_images, validate
from unicoder_vl_hf.regions.detectors.torchvision_models import TorchvisionDetector
from unicoder_vl_hf.regions.extraction import extract
from unicoder_vl_hf.regions.photos import HIDDEN, MAX_PIXELS, decode_photo
from unicoder_vl_hf.shares import FinishedShare, MissingShares, Share

RED, GREEN, BLUE, GREY, WHITE = (230, 30, 40), (30, 200, 60), (30, 50, 220), (120, 120, 120), (255, 255, 255)
QUARTERS = (RED, GREEN, BLUE, GREY)  # in reading order


def quarters(width: int = 120, height: int = 80, colours=QUARTERS) -> Image.Image:
    pixels = np.array(colours, np.uint8).reshape(2, 2, 3)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def save_photos(folder: Path, count: int, prefix: str = "photo") -> Path:
    """Photos of several shapes."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        photo(*SIZES[number % len(SIZES)], seed=number).save(folder / f"{prefix}_{number:03d}.png")
    return folder


def run(photos, output, detector=None, **options) -> RegionStore:
    return extract(photos, output, detector or ColourDetector(), **{"num_workers": 0, **options})


def skipped(store: RegionStore) -> dict[str, str]:
    path = store.path / "skipped.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(set(row) == {"image_id", "file", "reason"} for row in rows)
    return {row["image_id"]: row["reason"] for row in rows}


def assert_same(found: RegionStore, expected: RegionStore, tolerance: float = 0.0) -> None:
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    for image_id, record in expected.items():
        other = found[image_id]
        np.testing.assert_allclose(other.boxes, record.boxes, atol=tolerance)
        np.testing.assert_allclose(other.features, record.features, rtol=tolerance, atol=tolerance)
        assert (other.image_width, other.image_height) == (record.image_width, record.image_height)
        if record.object_ids is not None:
            np.testing.assert_array_equal(other.object_ids, record.object_ids)


def odd_photos() -> dict[str, tuple[bytes, object]]:
    """File name → content, and the colours of the quarters or the reason why it is skipped."""
    image = quarters()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned clockwise to stand upright
    lying = quarters(80, 120, (GREEN, GREY, RED, BLUE))  # `image`, turned the other way
    transparent = image.convert("RGBA")
    transparent.paste((255, 0, 255, 0), (60, 40, 120, 80))
    deep = np.array([[10000, 65535], [0, 30000]], np.uint16).repeat(40, 0).repeat(60, 1)
    greys = [(value // 257,) * 3 for value in (10000, 65535, 0, 30000)]
    jpeg = encode(image, "JPEG", quality=95)
    bomb = bytearray(encode(Image.new("1", (1, 1)), "PNG"))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    return {
        "plain.jpg": (jpeg, QUARTERS),
        "progressive.JPEG": (encode(image, "JPEG", quality=95, progressive=True), QUARTERS),
        "cmyk.jpg": (encode(image.convert("CMYK"), "JPEG", quality=95), QUARTERS),
        "sixteen_bits.png": (encode(Image.fromarray(deep), "PNG"), greys),
        "sixteen_bits_tiff.tif": (encode(Image.fromarray(deep), "TIFF"), greys),
        "grey.png": (encode(image.convert("L"), "PNG"), [(value,) * 3 for value in (91, 133, 63, 120)]),
        "one_bit.png": (encode(quarters(colours=(WHITE, (0,) * 3, (0,) * 3, WHITE)).convert("1"), "PNG"), None),
        "palette.png": (encode(image.quantize(8), "PNG"), QUARTERS),
        "palette_transparent.gif": (encode(transparent, "GIF"), (*QUARTERS[:3], WHITE)),
        "alpha.png": (encode(transparent, "PNG"), (*QUARTERS[:3], WHITE)),
        "alpha_webp.webp": (encode(transparent, "WEBP", lossless=True), (*QUARTERS[:3], WHITE)),
        "rotated.jpg": (encode(lying, "JPEG", quality=95, exif=rotated), QUARTERS),
        "rotated_png.png": (encode(lying, "PNG", exif=rotated), QUARTERS),
        "rotated_tiff.tif": (encode(lying, "TIFF", exif=rotated), QUARTERS),
        "animated.gif": (encode(image, "GIF", save_all=True, append_images=[quarters(colours=(GREY,) * 4)]), QUARTERS),
        "one_pixel.png": (encode(Image.new("RGB", (1, 1), RED), "PNG"), (RED,) * 4),
        "one_row.png": (encode(Image.new("RGB", (5000, 1), RED), "PNG"), (RED,) * 4),
        "truncated.jpg": (jpeg[: len(jpeg) * 2 // 3], "truncated"),
        "truncated_png.png": (encode(photo(120, 80), "PNG")[:2000], "truncated|broken"),
        "empty.jpg": (b"", "no image of a known format"),
        "text.jpg": (b"This is no photo.", "no image of a known format"),
        "bomb.png": (bytes(bomb), "40000 x 40000 pixels|decompression bomb"),
        "fractions.tif": (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "fractions of unknown range"),
    }


@pytest.fixture(scope="module")
def odd_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "photos").mkdir()
    for name, (content, _) in odd_photos().items():
        (folder / "photos" / name).write_bytes(content)
    (folder / "photos" / "readme.txt").write_text("No photo, and not meant as one.")
    return run(folder / "photos", folder / "store", num_workers=1, batch_size=4, precision="no")


@pytest.mark.parametrize("name", list(odd_photos()))
def test_odd_photos(odd_store, name):
    image_id, expected = Path(name).stem, odd_photos()[name][1]
    if isinstance(expected, str):
        assert image_id not in odd_store
        assert any(word in skipped(odd_store)[image_id] for word in expected.split("|"))
        return
    record = odd_store[image_id]
    size = {"one_pixel": (1, 1), "one_row": (5000, 1)}.get(image_id, (120, 80))
    assert (record.image_width, record.image_height) == size
    np.testing.assert_allclose(record.boxes[1], [0, 0, size[0] / 2, size[1] / 2])
    if expected is not None:
        # JPEG and a palette change colours a little, a conversion from CMYK no more here.
        np.testing.assert_allclose(record.features[1:] * 255, expected, atol=6)


def test_no_other_file_is_skipped_or_taken(odd_store):
    reasons = {Path(name).stem for name, (_, expected) in odd_photos().items() if isinstance(expected, str)}
    found = skipped(odd_store)
    assert found.pop(None) == ".txt is no suffix of photos"
    assert set(found) == reasons
    assert set(odd_store) == {Path(name).stem for name in odd_photos()} - reasons


def test_a_photo_of_100_megapixels_is_decoded_smaller(tmp_path):
    (tmp_path / "photos").mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    big = quarters(8000, 12500, (GREEN, GREY, RED, BLUE)).convert("RGB")
    big.save(tmp_path / "photos" / "big.jpg", quality=50, exif=rotated)
    quarters(8000, 6000).save(tmp_path / "photos" / "png.png", compress_level=1)
    limit = Image.MAX_IMAGE_PIXELS
    decoded, size = decode_photo((tmp_path / "photos" / "big.jpg").read_bytes())
    assert (size, decoded.size) == ((12500, 8000), (6250, 4000))
    decoded, size = decode_photo((tmp_path / "photos" / "png.png").read_bytes())
    assert (size, decoded.size) == ((8000, 6000), (4000, 3000))
    assert limit == Image.MAX_IMAGE_PIXELS < MAX_PIXELS
    given = {"big": [[0, 0, 6250, 4000], [6250.5, 4000.25, 12500, 8000]], "png": [[4000, 0, 8000, 3000]]}
    store = run(tmp_path / "photos", tmp_path / "store")
    pooled = run(tmp_path / "photos", tmp_path / "given", boxes=given)
    for image_id, width, height in (("big", 12500, 8000), ("png", 8000, 6000)):
        record = store[image_id]
        assert (record.image_width, record.image_height) == (width, height)
        np.testing.assert_allclose(record.boxes[4], [width / 2, height / 2, width, height])
        np.testing.assert_allclose(record.features[1:] * 255, QUARTERS, atol=6)
        assert (pooled[image_id].image_width, pooled[image_id].image_height) == (width, height)
        np.testing.assert_array_equal(pooled[image_id].boxes, np.float32(given[image_id]))
    np.testing.assert_allclose(pooled["big"].features * 255, [RED, GREY], atol=6)
    np.testing.assert_allclose(pooled["png"].features * 255, [GREEN], atol=6)


# Sources


def test_ids_are_stems_or_paths(tmp_path):
    for name in ("b/2.jpg", "a/1.jpg", "a/deep/3.x.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        quarters().save(tmp_path / "photos" / name)
    assert list(run(tmp_path / "photos", tmp_path / "stems")) == ["1", "3.x", "2"]
    assert list(run(tmp_path / "photos", tmp_path / "paths", ids="path")) == ["a/1.jpg", "a/deep/3.x.png", "b/2.jpg"]
    assert list(run(tmp_path / "photos/a/1.jpg", tmp_path / "one")) == ["1"]
    with pytest.raises(ValueError, match="ids is 'name', expected one of 'stem', 'path', 'key'"):
        run(tmp_path / "photos", tmp_path / "other", ids="name")


def test_duplicate_ids_are_an_error_before_any_work(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        quarters().save(tmp_path / name)
    # The detector does not exist: it is not even looked for.
    with pytest.raises(
        ValueError, match=r"a/1\.jpg and .*b/1\.jpg both have the id '1': with ids='path' \(--ids path\)"
    ):
        extract(tmp_path, tmp_path / "store", "transformers:/nowhere")
    assert not list(tmp_path.glob("store*"))


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# As VCR's own names, which hold time codes.
WITH_POINTS = ("1_A_00.23.57.935-00.24.00.783@0", "1_A_00.23.57.935-00.24.00.783@1", "xY_z@3")


def save_photos_with_points(folder: Path) -> Path:
    for place, name in zip(("lsmdc_1", "lsmdc_1", "movieclips_B"), WITH_POINTS, strict=True):
        (folder / place).mkdir(parents=True, exist_ok=True)
        quarters().save(folder / place / f"{name}.jpg")
    return folder


@pytest.mark.parametrize("top", ["vcr1images", "."])
def test_names_with_points_have_the_same_ids_in_folder_and_tar(tmp_path, top):
    photos = save_photos_with_points(tmp_path / "vcr1images")
    with tarfile.open(tmp_path / "vcr1images.tar", "w") as archive:
        archive.add(photos, arcname=top)
    from unicoder_vl_hf.search.encoders import Photos

    for number, source in enumerate((photos, tmp_path / "vcr1images.tar")):
        store = run(source, tmp_path / f"store_{number}")
        assert sorted(store) == sorted(WITH_POINTS)
        assert skipped(store) == {}
        opened = Photos(source)
        assert sorted(opened.source.ids) == sorted(WITH_POINTS)
        assert opened(WITH_POINTS[1]).size == (120, 80)
    paths = [f"lsmdc_1/{WITH_POINTS[0]}.jpg", f"lsmdc_1/{WITH_POINTS[1]}.jpg", f"movieclips_B/{WITH_POINTS[2]}.jpg"]
    assert Photos(photos, ids="path").source.ids == paths
    inside = [path if top == "." else f"{top}/{path}" for path in paths]
    assert sorted(Photos(tmp_path / "vcr1images.tar", ids="path").source.ids) == inside
    with pytest.raises(KeyError, match=r"has no photo 'a'; its ids are like .*--photo-ids path"):
        Photos(photos)("a")


def test_what_a_listing_leaves_out_is_said_and_listed(tmp_path, caplog):
    photos = save_photos_with_points(tmp_path / "photos")
    for name in (".thumbnails/a.jpg", "b.heic", "c.tar.gz", "notes", "._xY_z@3.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    with tarfile.open(photos / "more.tar", "w") as archive:
        for name, kind, content in (
            ("d/e.png", tarfile.REGTYPE, encode(quarters(), "PNG")),
            ("d/._e.png", tarfile.REGTYPE, b"x"),
            ("d/e.json", tarfile.REGTYPE, b"{}"),
            ("d/f.png", tarfile.LNKTYPE, b""),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, "d/e.png"
            archive.addfile(member, io.BytesIO(content))
    store = run(photos, tmp_path / "store")
    assert sorted(store) == sorted((*WITH_POINTS, "e"))
    rows = [json.loads(line) for line in (store.path / "skipped.jsonl").read_text().splitlines()]
    assert {row["file"].removeprefix(f"{photos}/"): row["reason"] for row in rows} == {
        ".thumbnails": HIDDEN,
        "._xY_z@3.jpg": HIDDEN,
        "b.heic": ".heic is no suffix of photos",
        "c.tar.gz": ".gz is a compressed archive; only a .tar without compression is read",
        "link": "a link to a folder, which is not followed",
        "more.tar:d/._e.png": HIDDEN,
        "more.tar:d/e.json": ".json is no suffix of photos",
        "more.tar:d/f.png": "a link, or no plain file, in a .tar",
        "notes": "no suffix is no suffix of photos",
    }
    assert all(row["image_id"] is None for row in rows)
    assert f"{photos}: 4 photos. Left out: 3 ({HIDDEN}), 1 (" in caplog.text
    (photos / "notes").unlink()  # the list is of what is there
    run(photos, tmp_path / "store")
    assert "notes" not in (store.path / "skipped.jsonl").read_text()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none holds no photo: .* Left out: 1 \(\.heic is no suffix of photos\)\."):
        run(tmp_path / "none", tmp_path / "nothing")


def test_a_list_of_photos(tmp_path):
    photos = save_photos_with_points(tmp_path / "photos")
    names = [f"photos/lsmdc_1/{WITH_POINTS[1]}.jpg", f"{photos}/movieclips_B/{WITH_POINTS[2]}.jpg"]
    (tmp_path / "list.txt").write_text("\ufeff" + names[0] + " \r\n\n" + names[1])
    assert list(run(tmp_path / "list.txt", tmp_path / "store")) == list(WITH_POINTS[1:])
    assert list(run(tmp_path / "list.txt", tmp_path / "paths", ids="path")) == names
    (tmp_path / "list.txt").write_text("photos/a.jpg\n")
    with pytest.raises(ValueError, match=r"list\.txt .* whose name 'photos/a\.jpg' is of no file: .*photos/a\.jpg\."):
        run(tmp_path / "list.txt", tmp_path / "none")


def test_ids_by_a_rule(tmp_path):
    for name in ("train2014/COCO_train2014_000000000285.jpg", "val2014/000000000007.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        quarters().save(tmp_path / "photos" / name)
    photos = tmp_path / "photos"
    assert list(run(photos, tmp_path / "coco", rename=id_mapping("coco"))) == ["285", "7"]
    table = tmp_path / "ids.csv"
    table.write_text("source_id,image_id\ntrain2014/COCO_train2014_000000000285.jpg,dog\n000000000007,cat\n")
    rename = id_mapping(str(table))
    assert list(run(photos, tmp_path / "csv", rename=rename)) == ["dog", "cat"]
    quarters().save(photos / "new.png")
    with pytest.raises(ValueError, match=r"'new' is not in .*ids\.csv.* Neither is .*new\.png.*--skip-unmapped"):
        run(photos, tmp_path / "none", rename=rename)
    store = run(photos, tmp_path / "skipping", rename=rename, skip_unmapped=True)
    assert list(store) == ["dog", "cat"]
    assert skipped(store) == {None: "its id is not mapped"}
    table.write_text("source_id,image_id\n000000000007,cat\n000000000007.png,dog\n")
    with pytest.raises(ValueError, match=r"gives the photo val2014/000000000007\.png several ids: 'dog' .* and 'cat'"):
        run(photos, tmp_path / "none", rename=id_mapping(str(table)), skip_unmapped=True)
    table = datasets.Dataset.from_dict({"image_id": ["COCO_9", None], "image": [encode(quarters(), "PNG")] * 2})
    assert list(run(table.select([0]), tmp_path / "table", rename=id_mapping("coco"))) == ["9"]
    with pytest.raises(ValueError, match="column 'image_id' holds None in row 1; expected an id"):
        run(table, tmp_path / "none")


def test_a_tar_whose_photos_went_by_keys_goes_on(tmp_path, caplog):
    """As they did when `stem` meant the key in a .tar, with its folder."""
    content = encode(quarters(), "PNG")
    path = write_tar(tmp_path / "photos.tar", {f"photos/{number}.png": content for number in range(5)})
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "store", StoppedAt("photos/2"), device="cpu", ids="key")
    for _ in range(2):  # when it is unfinished, and when it is finished
        assert sorted(run(path, tmp_path / "store")) == [f"photos/{number}" for number in range(5)]
        assert "was begun with ids='key' (--ids key), and goes on so" in caplog.text
        caplog.clear()


def test_others_photos_or_other_ids_are_no_going_on(tmp_path):
    photos = save_photos_with_points(tmp_path / "photos")
    run(photos, tmp_path / "store")
    with pytest.raises(ValueError, match=r"store was begun with images such as '1_A.*none of these photos, such as"):
        run(photos, tmp_path / "store", ids="path")


def test_a_webdataset(tmp_path):
    other = quarters(colours=(GREY, BLUE, GREEN, RED))
    members = {
        "0001.jpg": encode(quarters(), "JPEG", quality=95),
        "0001.json": b"{}",
        "0002.PNG": encode(other, "PNG"),
        "0002.mask.png": encode(other, "PNG"),  # its extension is mask.png
        "more/0001.jpg": encode(other, "JPEG", quality=95),
        "more/broken.jpg": b"no photo",
    }
    path = write_tar(tmp_path / "00000.tar", members)
    with pytest.raises(ValueError, match=r"0001\.jpg and .*more/0001\.jpg both have the id '0001'"):
        run(path, tmp_path / "none")
    store = run(path, tmp_path / "store", num_workers=1, ids="key")
    assert set(store) == {"0001", "0002", "more/0001"}
    np.testing.assert_allclose(store["0001"].features[1:] * 255, QUARTERS, atol=6)
    np.testing.assert_allclose(store["more/0001"].features[1:] * 255, QUARTERS[::-1], atol=6)
    assert set(skipped(store)) == {"more/broken", None}
    assert "0002.mask.png" in (store.path / "skipped.jsonl").read_text()
    assert f"{path}:more/broken.jpg" in (store.path / "skipped.jsonl").read_text()
    # Several in a folder are one source.
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/00000.tar", {"0001.jpg": members["0001.jpg"]})
    write_tar(tmp_path / "shards/00001.tar", {"0002.jpg": members["0001.jpg"]})
    assert list(run(tmp_path / "shards", tmp_path / "two")) == ["0001", "0002"]
    write_tar(tmp_path / "shards/00001.tar", {"0001.png": members["0002.PNG"]})
    with pytest.raises(ValueError, match=r"00000\.tar:0001\.jpg and .*00001\.tar:0001\.png both have the id '0001'"):
        run(tmp_path / "shards", tmp_path / "three")
    write_tar(tmp_path / "packed.tar", members, mode="w:gz")
    with pytest.raises(ValueError, match=r"packed\.tar is no \.tar file without compression"):
        run(tmp_path / "packed.tar", tmp_path / "four")


def test_a_column_of_images(tmp_path):
    table = datasets.Dataset.from_dict(
        {"number": [7, 8, 9], "picture": [quarters(), {"bytes": b"no photo", "path": None}, quarters(60, 90)]},
        features=datasets.Features({"number": datasets.Value("int64"), "picture": datasets.Image()}),
    )
    table.save_to_disk(tmp_path / "folder")
    table.to_parquet(tmp_path / "table.parquet")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    columns = {"image_column": "picture", "id_column": "number"}
    sources = {"memory": table, "disk": tmp_path / "folder", "parquet": tmp_path / "table.parquet"}
    for name, source in sources.items():
        store = run(source, tmp_path / name, num_workers=1, **columns)
        assert set(store) == {"7", "9"}
        assert list(skipped(store)) == ["8"]
        assert (store["9"].image_width, store["9"].image_height) == (60, 90)
        np.testing.assert_allclose(store["7"].features[1:] * 255, QUARTERS, atol=1)
    assert list(run(tmp_path / "splits", tmp_path / "split", split="test", **columns)) == ["7"]
    with pytest.raises(ValueError, match=r"has the splits .*'train', 'test'.*name one"):
        run(tmp_path / "splits", tmp_path / "none", **columns)
    with pytest.raises(ValueError, match=r"has no column \['image_id'\], but \['number', 'picture'\]"):
        run(table, tmp_path / "none", image_column="picture")


def test_nothing_to_extract(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "store")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="holds no photo"):
        run(tmp_path / "photos", tmp_path / "store")
    with pytest.raises(ValueError, match=r"--remove\) leaves out every photo of .*all"):
        run(save_photos(tmp_path / "all", 2), tmp_path / "store", remove=["photo_000", "photo_001"])
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"None of 1 photos gave regions; .* of .*a\.jpg: its 8 bytes are no image"):
        run(tmp_path / "photos", tmp_path / "store")


# Given boxes


def test_given_boxes(tmp_path, caplog):
    (tmp_path / "photos").mkdir()
    for name in ("a", "b", "c", "d", "e"):
        quarters().save(tmp_path / "photos" / f"{name}.png")
    boxes = {
        "a": [[60, 40, 120, 80, 0.9], [0, 0, 60, 40, 0.8]],  # as in VCR, with scores
        "b": [[0, 40, 60, 80]],
        "c": [[0, 0, 121.5, 80]],
        "d": [],
    }
    lines = [json.dumps({"image_id": name, "boxes": rows}) for name, rows in boxes.items()]
    (tmp_path / "boxes.jsonl").write_text(
        "\ufeff" + "\n\n".join([*lines, '{"image_id": "z", "boxes": [[0, 0, 1, 1]]}'])
    )
    np.savez(tmp_path / "boxes.npz", **{name: np.array(rows, np.float64) for name, rows in boxes.items()})
    for number, given in enumerate((boxes, tmp_path / "boxes.jsonl", str(tmp_path / "boxes.npz"))):
        store = run(tmp_path / "photos", tmp_path / f"store_{number}", boxes=given, num_workers=number % 2)
        assert list(store) == ["a", "b"]
        np.testing.assert_array_equal(store["a"].boxes, [[60, 40, 120, 80], [0, 0, 60, 40]])
        np.testing.assert_allclose(store["a"].features * 255, [GREY, RED], atol=1)
        np.testing.assert_allclose(store["b"].features * 255, [BLUE], atol=1)
        assert store.provenance["box_type"] == "given"
        reasons = skipped(store)
        assert "[0.0, 0.0, 121.5, 80.0] is outside" in reasons["c"]
        assert "expected (n, 4)" in reasons["d"]
        assert "no boxes are given" in reasons["e"]
    assert caplog.text.count("Boxes are given for 1 images that are no photos, such as 'z'") == 1
    (tmp_path / "boxes.jsonl").write_text('{"image_id": "a"}')
    with pytest.raises(ValueError, match=r"boxes\.jsonl, line 1: expected image_id and boxes"):
        run(tmp_path / "photos", tmp_path / "store", boxes=tmp_path / "boxes.jsonl")
    numbers = [{"image_id": number, "boxes": [[0, 0, 60, 40]]} for number in (7, 7)]
    quarters().save(tmp_path / "photos" / "7.png")
    (tmp_path / "boxes.jsonl").write_text(json.dumps(numbers[0]))
    assert list(run(tmp_path / "photos", tmp_path / "numbers", boxes=tmp_path / "boxes.jsonl")) == ["7"]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, numbers)))
    with pytest.raises(ValueError, match=r"boxes\.jsonl, line 2: the boxes of image 7 are in line 1 already"):
        run(tmp_path / "photos", tmp_path / "store", boxes=tmp_path / "boxes.jsonl")
    with pytest.raises(ValueError, match=r"boxes has the key 7, a int; expected image ids, as text"):
        run(tmp_path / "photos", tmp_path / "store", boxes={"a": boxes["a"], 7: boxes["b"]})
    (tmp_path / "boxes.npz").write_bytes((tmp_path / "boxes.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"boxes\.npz is damaged or no \.npz of numbers"):
        run(tmp_path / "photos", tmp_path / "store", boxes=tmp_path / "boxes.npz")
    with pytest.raises(ValueError, match=r"boxes\.txt holds no boxes"):
        run(tmp_path / "photos", tmp_path / "store", boxes=tmp_path / "boxes.txt")


# Failures


class Choosy(ColourDetector):
    """Fails at whole batches in which one of `hated` is."""

    def __init__(self, *hated: str):
        super().__init__()
        self.hated = hated

    def __call__(self, prepared, image_ids, boxes=None):
        if set(self.hated) & set(image_ids):
            raise RuntimeError("out of memory")
        return super().__call__(prepared, image_ids, boxes)


def test_a_photo_that_a_detector_fails_at_costs_no_other(tmp_path):
    photos = save_photos(tmp_path / "photos", 10)
    store = run(photos, tmp_path / "store", Choosy("photo_003", "photo_004"), batch_size=5)
    assert skipped(store) == dict.fromkeys(("photo_003", "photo_004"), "RuntimeError: out of memory")
    assert len(store) == 8


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_detector_that_fails_at_all_photos_ends_the_run(tmp_path, batch_size):
    all_of_them = Choosy(*(f"photo_{number:03d}" for number in range(20)))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(save_photos(tmp_path / "photos", 20), tmp_path / "store", all_of_them, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"None of 6 photos gave .*photo_000\.png: RuntimeError: out of memory"):
        run(save_photos(tmp_path / "few", 6), tmp_path / "none", all_of_them, batch_size=batch_size)


def test_what_was_extracted_before_a_detector_fails_is_kept(tmp_path):
    photos = save_photos(tmp_path / "photos", 20)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(photos, tmp_path / "store", Choosy(*(f"photo_{number:03d}" for number in range(5, 20))))
    run(photos, tmp_path / "store", ColourDetector(tmp_path / "computed-0"))
    assert len(computed(tmp_path / "computed")) == 15
    assert_same(RegionStore(tmp_path / "store"), run(photos, tmp_path / "undisturbed"))


def test_a_finished_store_may_leave_nothing_but_photos_that_a_detector_fails_at(tmp_path):
    photos = save_photos(tmp_path / "photos", 20)
    odd = Choosy(*(f"photo_{number:03d}" for number in range(20) if number % 2))
    for _ in range(2):
        assert len(skipped(run(photos, tmp_path / "store", odd))) == 10


def test_photos_that_failed_before_a_stop_are_no_fault_of_the_detector(tmp_path):
    """Without the photos between them, which are done, the failures would follow one another."""

    class Odd(StoppedAt):
        def __call__(self, prepared, image_ids, boxes=None):
            if int(image_ids[0][-1]) % 2 == 0:
                raise RuntimeError("out of memory")
            return super().__call__(prepared, image_ids, boxes)

    photos = save_photos(tmp_path / "photos", 40)
    whole = run(photos, tmp_path / "whole", Odd("none"))
    for stop in ("photo_029", "photo_033"):  # the second stop must not forget what the first had listed
        with pytest.raises(KeyboardInterrupt):
            run(photos, tmp_path / "store", Odd(stop))
    store = run(photos, tmp_path / "store", Odd("none"))
    assert bits(store) == bits(whole) and len(skipped(store)) == 20
    assert (store.path / "skipped.jsonl").read_text() == (whole.path / "skipped.jsonl").read_text()
    # New photos of a finished store count, as those of a new one do.
    save_photos(photos, 10, prefix="new")
    broken = Choosy(*(f"{prefix}_{number:03d}" for prefix in ("new", "photo") for number in range(40)))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(photos, tmp_path / "store", broken, add=True)


def test_a_share_tries_again_what_it_skipped(tmp_path):
    photos, odd = save_photos(tmp_path / "photos", 40), Choosy(*(f"photo_{number:03d}" for number in range(0, 40, 2)))
    for _ in range(2):
        shared(photos, tmp_path / "store", Share(0, 2), Share(1, 2), detector=odd)
    store = run(photos, tmp_path / "store", odd, share=Share(None, 2))
    assert bits(store) == bits(run(photos, tmp_path / "whole", odd)) and len(skipped(store)) == 20


def test_names_that_are_no_text_and_rows_without_a_photo_cost_no_other(tmp_path):
    photos = save_photos(tmp_path / "photos", 2)
    try:
        quarters().save(os.fsencode(photos) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    store = run(photos, tmp_path / "store")
    assert list(store) == ["photo_000", "photo_001"] and "caf\udce9" not in store
    assert "is no text" in skipped(store)["caf\udce9"]
    assert len(run(photos, tmp_path / "store")) == 2  # it is tried again
    rows = {"image_id": ["a", "b"], "image": [{"bytes": encode(quarters(), "PNG"), "path": None}, None]}
    features = datasets.Features(image_id=datasets.Value("string"), image=datasets.Image())
    store = run(datasets.Dataset.from_dict(rows, features=features), tmp_path / "rows")
    assert list(store) == ["a"] and list(skipped(store)) == ["b"]


def test_a_store_behind_a_link(tmp_path):
    photos, (link, real) = save_photos(tmp_path / "photos", 4), (tmp_path / "link", tmp_path / "elsewhere" / "real")
    real.mkdir(parents=True)
    link.symlink_to(real)
    run(photos, link)
    assert len(run(photos, link, dtype="float32", restart=True)) == 4
    assert sorted(run(photos, link, dtype="float32", remove=["photo_001"])) == ["photo_000", "photo_002", "photo_003"]
    assert sorted(remove_images(link, ["photo_000"])) == ["photo_002", "photo_003"]
    assert link.is_symlink() and sorted(RegionStore(real)) == ["photo_002", "photo_003"]
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_features_too_large_for_float16(tmp_path):
    class Large(ColourDetector):
        def __call__(self, prepared, image_ids, boxes=None):
            records = super().__call__(prepared, image_ids, boxes)
            for record in records:
                record.features *= 1e6 if record.image_id == "photo_001" else 1
            return records

    photos = save_photos(tmp_path / "photos", 3)
    store = run(photos, tmp_path / "store", Large())
    assert list(skipped(store)) == ["photo_001"]
    assert "dtype='float32'" in skipped(store)["photo_001"]
    assert len(run(photos, tmp_path / "wide", Large(), dtype="float32")) == 3


# The same store, however it comes about


def test_batches_and_workers_change_nothing(tmp_path):
    from test_torchvision_models import tiny_model

    photos = save_photos(tmp_path / "photos", 12)
    model = tiny_model()
    stores = [
        run(
            photos,
            tmp_path / f"store_{batch_size}",
            TorchvisionDetector(model, device=torch.device("cpu"), max_regions=20),
            batch_size=batch_size,
            num_workers=num_workers,
            dtype="float32",
        )
        for batch_size, num_workers in ((1, 0), (5, 2))
    ]
    assert_same(stores[1], stores[0], tolerance=1e-3)


def launch(folder: Path, count: int, **call) -> Processes:
    return Processes(folder, [{"script": "extract_client", "arguments": call}], count)


def computed(path: Path) -> Counter:
    return Counter(line for file in path.parent.glob(f"{path.name}-*") for line in file.read_text().split())


def test_two_processes_share_the_photos(tmp_path):
    photos = save_photos(tmp_path / "photos", 13)
    (photos / "broken_a.jpg").write_bytes(b"no photo")
    (photos / "broken_b.jpg").write_bytes(b"no photo")
    processes = launch(tmp_path, 2, photos=photos, output=tmp_path / "two", computed=tmp_path / "ids", num_workers=1)
    output = processes.output(timeout=150)
    assert processes.returncode == 0, output
    assert output.count("world size 2") == 2
    shares = [(tmp_path / f"ids-{rank}").read_text().split() for rank in (0, 1)]
    assert not set(shares[0]) & set(shares[1])
    assert min(map(len, shares)) >= 6
    two, one = RegionStore(tmp_path / "two"), run(photos, tmp_path / "one")
    assert_same(two, one)
    assert skipped(two) == skipped(one)
    assert set(skipped(two)) == {"broken_a", "broken_b"}
    assert not (tmp_path / "two.parts").exists()


def test_goes_on_after_kill(tmp_path):
    photos = save_photos(tmp_path / "photos", 30)
    (photos / "broken.jpg").write_bytes(b"no photo")
    options = {"photos": photos, "output": tmp_path / "store", "batch_size": 2, "num_workers": 1, "shard_size": 400}
    process = launch(tmp_path, 1, computed=tmp_path / "first", delay=0.1, **options)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("store.parts/*/regions-*.safetensors"))) < 3:
            assert process.returncode is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()  # with its reader
    assert not (tmp_path / "store").exists()
    store = run(detector=ColourDetector(tmp_path / "second-0"), **options)
    assert_same(store, run(photos, tmp_path / "undisturbed"))
    first, second = computed(tmp_path / "first"), computed(tmp_path / "second")
    assert 30 > len(first) >= 6
    assert set(first | second) == set(store)
    assert max((first + second).values()) <= 2
    # Only what had not become a shard, a few photos, was computed again.
    assert len(first & second) <= 4
    assert not (tmp_path / "store.parts").exists()


class Stopped(ColourDetector):
    """Is told to stop in its ninth call. Its readers are told before, twice, as Ctrl-C tells all processes."""

    calls = 0

    def __call__(self, prepared, image_ids, boxes=None):
        self.calls += 1
        if self.calls in (1, 2):
            for reader in multiprocessing.active_children():
                os.kill(reader.pid, signal.SIGINT)
        if self.calls == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(prepared, image_ids, boxes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_told_to_stop_it_loses_nothing(tmp_path, num_workers):
    photos = save_photos(tmp_path / "photos", 40)
    options = {"batch_size": 3, "num_workers": num_workers}
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        run(photos, tmp_path / "store", Stopped(tmp_path / "first-0"), **options)
    # As if a process with nothing to show had been killed, too.
    (tmp_path / "store.parts/part-00000-00001").mkdir()
    (tmp_path / "store.parts/part-00000-00001/regions-00000.safetensors.partial").write_bytes(b"torn")
    with pytest.raises(ValueError, match="was begun with dtype='float16', not 'float32'"):
        run(photos, tmp_path / "store", dtype="float32")
    run(photos, tmp_path / "store", ColourDetector(tmp_path / "second-0"), **options)
    assert_same(RegionStore(tmp_path / "store"), run(photos, tmp_path / "undisturbed"))
    first, second = computed(tmp_path / "first"), computed(tmp_path / "second")
    assert 25 <= len(first) <= 27
    assert len(first & second) <= 2  # the rest of the batch in which it was told


class StoppedAt(ColourDetector):
    """Is told to stop while it computes a certain photo."""

    def __init__(self, image_id: str, *arguments):
        super().__init__(*arguments)
        self.image_id = image_id

    def __call__(self, prepared, image_ids, boxes=None):
        if self.image_id in image_ids:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(prepared, image_ids, boxes)


def test_on_a_cpu_a_stop_is_heard_within_a_photo_and_the_bar_moves_by_photo(tmp_path, monkeypatch):
    events = []

    class Told(StoppedAt):
        def __call__(self, prepared, image_ids, boxes=None):
            events.extend(image_ids)
            return super().__call__(prepared, image_ids, boxes)

    def bar(items, **options):
        assert options["total"] == 12
        for item in items:
            events.append("bar")
            yield item

    monkeypatch.setattr("unicoder_vl_hf.regions.extraction.logging.tqdm", bar)
    photos = save_photos(tmp_path / "photos", 12)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        run(photos, tmp_path / "store", Told("photo_004"), device="cpu", num_workers=2)
    assert events == [event for number in range(5) for event in (f"photo_{number:03d}", "bar")]
    monkeypatch.undo()
    run(photos, tmp_path / "store", ColourDetector(tmp_path / "computed-0"), device="cpu")
    assert sorted(computed(tmp_path / "computed")) == [f"photo_{number:03d}" for number in range(5, 12)]


def test_resumed_it_gives_the_same_bits(tmp_path):
    """A batch of other photos may round otherwise: on a CPU a photo is a batch."""
    from test_torchvision_models import tiny_model

    photos, model = save_photos(tmp_path / "photos", 12), tiny_model()

    class Stopped(TorchvisionDetector):
        def __call__(self, prepared, image_ids, boxes=None):
            if "photo_003" in image_ids:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(prepared, image_ids, boxes)

    options = {"device": "cpu", "dtype": "float32"}
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "store", Stopped(model, device=torch.device("cpu")), **options)
    for name in ("store", "undisturbed"):
        run(photos, tmp_path / name, TorchvisionDetector(model, device=torch.device("cpu")), **options)
    assert_same(RegionStore(tmp_path / "store"), RegionStore(tmp_path / "undisturbed"))


def test_a_detector_of_no_family_is_said_before_photos_are_listed(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"The detector is 'yolo:v8', expected FAMILY:NAME"):
        extract(tmp_path / "photos", tmp_path / "store", "yolo:v8")


def test_restart_begins_anew(tmp_path, caplog, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    photos = save_photos(tmp_path / "photos", 4)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "store", StoppedAt("photo_001"), device="cpu")
    with pytest.raises(ValueError, match=r"store is unfinished: 2 images so far in .*store\.parts\. Run the same"):
        RegionStore(tmp_path / "store")
    with pytest.raises(ValueError, match=r"/store was begun with dtype='float16', not 'float32'"):
        run(photos, tmp_path / "store", dtype="float32")
    assert len(run(photos, tmp_path / "store", dtype="float32", restart=True)) == 4
    # What is finished stays until the new one is, and where that is stopped, it goes on without a word of restart.
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "store", StoppedAt("photo_002"), device="cpu", restart=True)
    assert RegionStore(tmp_path / ".store.before-restart").provenance["dtype"] == "float32"
    run(photos, tmp_path / "store", ColourDetector(tmp_path / "computed-0"))
    assert list(computed(tmp_path / "computed")) == ["photo_003"]
    assert RegionStore(tmp_path / "store").provenance["dtype"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["computed-0", "photos", "store"]
    run(photos, tmp_path / "store")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # all is extracted, and then it is stopped
        patched.setattr(editing, "_common_provenance", stopped)
        run(photos, tmp_path / "store", dtype="float32", restart=True)
    assert run(photos, tmp_path / "store", dtype="float32").provenance["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["computed-0", "photos", "store"]
    run(photos, tmp_path / "store", dtype="float32")
    assert f"{tmp_path / 'store'} is finished, and stays as it is" in caplog.text


def test_another_option_of_the_detector_is_named(tmp_path):
    """The option and the store, and not all thresholds of a part of it."""
    photos = save_photos(tmp_path / "photos", 3)
    begun, other = StoppedAt("photo_001"), ColourDetector()
    begun.provenance["thresholds"] = {"score": 0.2, "max_regions": 36}
    other.provenance["thresholds"] = {"score": 0.2, "max_regions": 20}
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "store", begun, device="cpu")
    with pytest.raises(ValueError) as error:
        run(photos, tmp_path / "store", other)
    assert str(error.value).startswith(f"{tmp_path / 'store'} was begun with max_regions=36, not 20: go on with equal")


def test_a_finished_store_is_left_alone(tmp_path):
    photos = save_photos(tmp_path / "photos", 4)
    run(photos, tmp_path / "store")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert len(run(photos, tmp_path / "store", ColourDetector(tmp_path / "computed-0"))) == 4
    assert not computed(tmp_path / "computed")
    with pytest.raises(ValueError, match=r"store was begun with dtype='float16', not 'float32'"):
        run(photos, tmp_path / "store", dtype="float32")
    other = ColourDetector()
    other.provenance["detector"] = "greys"
    with pytest.raises(ValueError, match=r"store was begun with detector='colours', not 'greys'"):
        run(photos, tmp_path / "store", other)
    with pytest.raises(ValueError, match=r"store was begun with box_type='.*', not 'given'"):
        run(photos, tmp_path / "store", boxes={})
    save_photos(photos, 1, prefix="new")
    with pytest.raises(ValueError, match="is finished and lacks 1 of these photos, such as 'new_000'"):
        run(photos, tmp_path / "store")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert not (tmp_path / "store.parts").exists()


def test_a_finished_store_grows_and_shrinks(tmp_path, caplog):
    """What is there is not extracted again; it stays valid until the new is complete, and a stop is gone on from."""
    photos, folder = save_photos(tmp_path / "photos", 3), tmp_path / "store"
    old = {name: record.features.copy() for name, record in run(photos, folder).items()}
    save_photos(photos, 3, prefix="new")
    with pytest.raises(KeyboardInterrupt):
        run(photos, folder, StoppedAt("new_001"), device="cpu", add=True)
    assert sorted(RegionStore(folder)) == sorted(old)
    store = run(photos, folder, ColourDetector(tmp_path / "added"))  # the same command goes on without a word
    names = [f"{prefix}_{number:03d}" for prefix in ("new", "photo") for number in range(3)]
    assert sorted(store) == names and set(computed(tmp_path / "added")) < set(names[:3])
    assert all(np.array_equal(store[name].features, features) for name, features in old.items())
    caplog.clear()
    run(photos, folder, add=True)
    assert f"{folder} is finished, and stays as it is" in caplog.text
    (tmp_path / "other").mkdir()
    photo(*SIZES[0], seed=9).save(tmp_path / "other" / "other.png")  # of another folder alone
    with pytest.raises(ValueError, match="none of these photos"):
        run(tmp_path / "other", folder)
    assert sorted(run(tmp_path / "other", folder, add=True)) == sorted([*names, "other"])

    caplog.clear()
    gone = ["new_000", "photo_002"]
    store = run(photos, folder, ColourDetector(tmp_path / "computed-none"), remove=gone)
    assert sorted(store) == sorted({*names, "other"} - set(gone)) and not computed(tmp_path / "computed-none")
    assert "2 images are taken out of" in caplog.text and "stays as it is" not in caplog.text
    assert not list(validate(folder))
    assert sorted(run(photos, folder, remove=gone)) == sorted(store)  # they stay out
    with pytest.raises(ValueError, match=r"lacks 2 of these photos, such as 'new_000'.*--add.*--remove"):
        run(photos, folder)
    with pytest.raises(ValueError, match=r"names 'nothing', which neither .*store nor the photos have"):
        run(photos, folder, remove=["nothing"])
    with pytest.raises(ValueError, match=r"remove is 'new_000', expected several"):
        run(photos, folder, remove="new_000")
    assert sorted(path.name for path in tmp_path.iterdir() if "store" in path.name) == ["store"]


def test_images_are_taken_out_whole_or_not_at_all(tmp_path, monkeypatch):
    store = run(save_photos(tmp_path / "photos", 4), tmp_path / "store")
    names, before = list(store), {path.name: path.read_bytes() for path in store.path.iterdir()}
    for wrong, error in ((["nothing"], KeyError), (names, ValueError)):
        with pytest.raises(error):
            remove_images(store.path, wrong)

    def killed(folder, new):
        assert len(RegionStore(folder)) == 4 and len(RegionStore(new)) == 3
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(editing, "replace_folder", killed)
        remove_images(store.path, names[:1])
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    store.path.rename(tmp_path / ".store.old")  # killed between the two renames
    assert sorted(remove_images(store.path, names[1:2])) == sorted({*names} - {names[1]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "store"]
    assert before.keys() == {path.name for path in store.path.iterdir()}


def test_skipped_photos_are_tried_again(tmp_path):
    photos = save_photos(tmp_path / "photos", 4)
    for name in ("photo_001", "photo_002"):
        (photos / f"{name}.png").write_bytes(b"no photo")
    assert set(skipped(run(photos, tmp_path / "store"))) == {"photo_001", "photo_002"}
    assert set(skipped(run(photos, tmp_path / "store"))) == {"photo_001", "photo_002"}
    for number, left in ((1, {"photo_002"}), (2, set())):
        photo(*SIZES[number], seed=number).save(photos / f"photo_{number:03d}.png")
        store = run(photos, tmp_path / "store", ColourDetector(tmp_path / f"again-{number}"))
        assert computed(tmp_path / "again") == Counter(f"photo_{done:03d}" for done in range(1, number + 1))
        assert set(skipped(store)) == left
    save_photos(tmp_path / "undamaged", 4)
    assert_same(store, run(tmp_path / "undamaged", tmp_path / "expected"))
    assert not (tmp_path / "store.parts").exists()


def test_one_extraction_a_store(tmp_path):
    photos = save_photos(tmp_path / "photos", 2)

    class Twice(ColourDetector):
        def __call__(self, prepared, image_ids, boxes=None):
            with pytest.raises(ValueError, match=r"store\.parts is being written by another process"):
                run(photos, tmp_path / "store")
            return super().__call__(prepared, image_ids, boxes)

    assert len(run(photos, tmp_path / "store", Twice())) == 2


def test_an_output_that_holds_something_else(tmp_path):
    photos = save_photos(tmp_path / "photos", 2)
    (tmp_path / "file").touch()
    RegionStoreWriter(tmp_path / "begun", detector="other")  # killed
    for name in ("file", "begun"):
        with pytest.raises(ValueError, match=f"{name} is a file, or the beginning of another store"):
            run(photos, tmp_path / name)


def test_options_are_those_of_a_detector_by_name(tmp_path):
    photos = save_photos(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match=r"\['grid_size'\] are options of a detector by name"):
        run(photos, tmp_path / "store", grid_size=3)


# Shares


def shared(photos, output, *shares: Share, **options) -> None:
    for share in shares:
        with pytest.raises(FinishedShare, match=rf"store: {share} is computed.*--gather {share.count} in place of"):
            run(photos, output, share=share, **options)


def bits(store: RegionStore) -> list[tuple]:
    """All that a store holds, in its order."""
    return [
        (record.image_id, record.image_width, record.image_height, record.boxes.tobytes(), record.features.tobytes())
        for record in store.values()
    ]


def test_a_tar_and_tables_give_what_their_folder_gives(tmp_path):
    photos = save_photos(tmp_path / "photos", 13)
    (photos / "photo_005.png").write_bytes(b"no photo")
    whole = bits(run(photos, tmp_path / "whole"))
    for source in (as_tar(photos, tmp_path / "0.tar"), as_tables(photos, tmp_path / "tables")):
        store = run(source, tmp_path / f"{source.stem}-store", num_workers=1)
        assert bits(store) == whole and list(skipped(store)) == ["photo_005"]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_shares_in_any_order_make_the_store_of_one_run(tmp_path, count):
    photos = save_photos(tmp_path / "photos", 13)
    (photos / "photo_005.png").write_bytes(b"no photo")
    (photos / "notes").write_bytes(b"")
    whole = run(photos, tmp_path / "whole")
    every = [Share(index, count) for index in range(count)]
    first, *others = every[::-1]
    shared(photos, tmp_path / "store", *others, *others[:2])
    with pytest.raises(MissingShares) as error:
        run(photos, tmp_path / "store", share=Share(None, count))
    assert error.value.indices == [first.index] and not (tmp_path / "store").exists()
    shared(photos, tmp_path / "store", first)
    store = run(photos, tmp_path / "store", share=Share(None, count))
    assert bits(store) == bits(whole)
    lists = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("store", "whole")]
    assert lists[0] == lists[1] and len(lists[0].splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "store", "whole"]
    shared(photos, tmp_path / "store", first)  # after the end
    assert bits(run(photos, tmp_path / "store", share=Share(None, count))) == bits(whole)
    assert not (tmp_path / "store.parts").exists()


def test_a_share_that_was_stopped_is_missing_and_goes_on(tmp_path):
    photos = save_photos(tmp_path / "photos", 12)
    shared(photos, tmp_path / "store", Share(0, 2))
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "store", StoppedAt("photo_008"), share=Share(1, 2), device="cpu")
    with pytest.raises(MissingShares, match=r"1 of 2 shares: 1\. "):
        run(photos, tmp_path / "store", share=Share(None, 2))
    shared(photos, tmp_path / "store", Share(1, 2), detector=ColourDetector(tmp_path / "computed-0"))
    assert sorted(computed(tmp_path / "computed")) == ["photo_009", "photo_010", "photo_011"]
    assert bits(run(photos, tmp_path / "store", share=Share(None, 2))) == bits(run(photos, tmp_path / "whole"))


def test_shares_of_another_number_or_of_other_settings_are_refused(tmp_path):
    photos = save_photos(tmp_path / "photos", 6)
    shared(photos, tmp_path / "store", Share(0, 2))
    with pytest.raises(ValueError, match=r"part-00000-of-00002 is of a run without shares, or with another number"):
        run(photos, tmp_path / "store", share=Share(0, 3))
    with pytest.raises(ValueError, match=r"/store was begun with dtype='float16', not 'float32'"):
        run(photos, tmp_path / "store", share=Share(0, 2), dtype="float32")
    with pytest.raises(ValueError, match="cannot begin anew for all"):
        run(photos, tmp_path / "store", share=Share(0, 2), restart=True)
    # Without shares the same call computes what is missing.
    assert len(run(photos, tmp_path / "store", ColourDetector(tmp_path / "computed-0"))) == 6
    assert len(computed(tmp_path / "computed")) == 3
    photo(80, 80).save(photos / "new.png")
    with pytest.raises(ValueError, match=r"is finished and lacks 1 of these photos, such as 'new'"):
        run(photos, tmp_path / "store", share=Share(0, 2))
    shared(photos, tmp_path / "store", Share(0, 2), add=True)
    assert len(run(photos, tmp_path / "store", share=Share(None, 2), add=True)) == 7


def test_what_engines_and_shares_do_not_go_with(tmp_path, monkeypatch):
    photos = save_photos(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match="engine is 'spark', expected one of 'local', 'ray'"):
        run(photos, tmp_path / "store", engine="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^This needs ray: pip install '.\[ray\]'"):
        run(photos, tmp_path / "store", engine="ray")
    monkeypatch.setitem(sys.modules, "ray", tarfile)
    with pytest.raises(ValueError, match="--share and --engine ray each share the photos"):
        run(photos, tmp_path / "store", engine="ray", share=Share(0, 2))

"""`unicoder-vl prepare`: ids that meet, splits, the report, and a file that is whole and never lost."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from places import SHARED

from unicoder_vl_hf import RegionRecord
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.preparation import prepare
from unicoder_vl_hf.regions.conversion import write_store

COCO_FREE = SHARED / "data/coco_free"


def make_photos(folder: Path, *names: str) -> Path:
    """`prepare` looks at names alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_captions(path: Path, rows) -> Path:
    text = json.dumps(rows) if isinstance(rows, dict) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def skipped(path: Path) -> dict[str | None, str]:
    return {row["image_id"]: row["reason"] for row in lines(path.with_name(f"{path.stem}.skipped.jsonl"))}


STEM, COCO = "stem, without folders and suffix", "coco, the number at the end"


@pytest.mark.parametrize(
    ("image_id", "rule"),
    [
        ("285", COCO),
        ("COCO_train2014_000000000285.jpg", COCO),
        ("000285", COCO),
        ("train2014\\000000000285.jpg", STEM),
    ],
)
def test_ids_of_captions_become_those_of_photos(tmp_path, image_id, rule):
    photos = make_photos(tmp_path / "photos", "a/000000000285.jpg", "a/000000000785.jpg", "a/notes.md")
    captions = write_captions(tmp_path / "captions.json", {image_id: ["A bear.", "A big bear."], "9": "A dog."})
    found = prepare(photos, captions, tmp_path / "out.jsonl", splits=[1.0])
    bear = {"image_id": "000000000285", "split": "train"}
    assert lines(tmp_path / "out.jsonl") == [bear | {"caption": "A bear."}, bear | {"caption": "A big bear."}]
    assert list(lines(tmp_path / "out.jsonl")[0]) == ["image_id", "caption", "split"]
    assert (found.join.matched, found.join.missing, found.join.unused, found.join.missing_captions) == (1, 1, 1, 1)
    assert skipped(tmp_path / "out.jsonl") == {
        "9": "there is no photo of it",
        "000000000785": "it has no captions",
        None: ".md is no suffix of photos",
    }
    assert str(found).splitlines()[1:] == [
        f"ids by the rule {rule}: {image_id!r} is the photo '000000000285'",
        "images                               count  examples",
        "matched (captions and photos)            1  000000000285",
        "missing (captions, no photos)            1  9",
        "unused (photos, no captions)             1  000000000785",
        "splits, drawn with seed 0           images  captions",
        "train                                    1         2",
        f"What is left out is listed in {tmp_path / 'out.skipped.jsonl'}.",
    ]


def test_equal_ids_need_no_rule(tmp_path):
    names = ["1_A_00.23.57.935-00.24.00.783@0", "285", "000000000285"]
    photos = make_photos(tmp_path / "photos", *(f"{name}.jpg" for name in names))
    rows = [{"image_id": name, "caption": name, "split": "train"} for name in names]
    found = prepare(photos, write_captions(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl")
    assert (found.rule, lines(tmp_path / "out.jsonl"), found.skipped) == ("equal", rows, None)
    assert not (tmp_path / "out.skipped.jsonl").exists()


@pytest.mark.parametrize(
    ("photos", "images", "message"),
    [
        (["285.jpg", "000000000285.jpg"], ["0285"], r"'0285' could be the photo '000000000285' or '285'"),
        (["a_1.jpg"], ["1", "01"], r"both '1' and '01' of the captions would be the photo 'a_1'"),
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], r"both 'x/a\.jpg' and 'y/a\.jpg' of the captions would be the photo 'a'"),
        (["dog.jpg"], ["cat"], r"No image of the captions is a photo: .* such as 'cat', .* photos such as 'dog'"),
        ([f"img_{k}.jpg" for k in range(9)], [str(k) for k in range(8, 20)], r"Only 1 of 12 images and 9 photos meet"),
    ],
)
def test_what_could_mean_two_photos_or_meets_by_chance_is_an_error(tmp_path, photos, images, message):
    captions = write_captions(tmp_path / "a.jsonl", [{"image_id": name, "caption": "a"} for name in images])
    with pytest.raises(ValueError, match=f"{message}.*caption-ids"):
        prepare(make_photos(tmp_path / "photos", *photos), captions, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_a_table_of_ids_says_which_is_which(tmp_path):
    photos = make_photos(tmp_path / "photos", "dog.jpg", "cat.jpg")
    captions = write_captions(tmp_path / "a.jsonl", [{"image_id": k, "caption": str(k)} for k in range(2)])
    (tmp_path / "ids.csv").write_text("source_id,image_id\n0,cat\n1,dog\n")
    prepare(photos, captions, tmp_path / "out.jsonl", caption_ids=str(tmp_path / "ids.csv"), splits=(0.5, 0.5))
    assert [(row["image_id"], row["caption"]) for row in lines(tmp_path / "out.jsonl")] == [("cat", "0"), ("dog", "1")]


def test_ids_of_a_store_and_of_paths(tmp_path):
    paths = ["val/COCO_val2014_000000000007.jpg", "val/COCO_val2014_000000000009.jpg"]
    captions = write_captions(tmp_path / "a.json", {"7": "A dog.", "9": "A cat."})
    write_store((RegionRecord(path, features=np.ones((1, 2))) for path in paths), tmp_path / "store")
    photos = make_photos(tmp_path / "photos", *paths)
    prepare(tmp_path / "store", captions, tmp_path / "store.jsonl", splits=(0.5, 0.5))
    prepare(photos, captions, tmp_path / "paths.jsonl", splits=(0.5, 0.5), ids="path")
    assert [row["image_id"] for row in lines(tmp_path / "store.jsonl")] == paths
    assert lines(tmp_path / "paths.jsonl") == lines(tmp_path / "store.jsonl")
    prepare(photos, captions, tmp_path / "coco.jsonl", splits=(0.5, 0.5), ids="coco")
    assert [row["image_id"] for row in lines(tmp_path / "coco.jsonl")] == ["7", "9"]
    with pytest.raises(ValueError, match=r"store is a store, whose images have their ids: leave out ids='path'"):
        prepare(tmp_path / "store", captions, tmp_path / "none.jsonl", ids="path")


# Splits


@pytest.fixture
def world(tmp_path):
    names = [f"{number:03d}" for number in range(100)]
    photos = make_photos(tmp_path / "photos", *(f"{name}.jpg" for name in names))
    return photos, [{"image_id": name, "caption": f"{name} {k}"} for name in names for k in range(2)]


def test_splits_are_drawn_by_image_as_a_function_of_id_and_seed(tmp_path, world):
    photos, rows = world
    splits = {}
    for name, order, options in (
        ("one", rows, {}),
        ("two", rows[::-1], {"splits": (0.8, 0.1, 0.1)}),
        ("other", rows, {"seed": 1}),
    ):
        captions = write_captions(tmp_path / f"{name}.in.jsonl", order)
        prepare(photos, captions, tmp_path / f"{name}.jsonl", **options)
        found = lines(tmp_path / f"{name}.jsonl")
        assert [row["caption"] for row in found] == [row["caption"] for row in order]
        pairs = {(row["image_id"], row["split"]) for row in found}
        assert len(pairs) == 100  # one split an image
        assert Counter(split for _, split in pairs) == {"train": 80, "val": 10, "test": 10}
        splits[name] = dict(pairs)
    assert splits["one"] == splits["two"]
    assert 10 < sum(splits["one"][name] != split for name, split in splits["other"].items()) < 60


def test_splits_are_kept(tmp_path, world, caplog):
    photos, rows = world
    rows = [row | {"split": "dev" if row["image_id"] < "010" else "train"} for row in rows]
    captions = write_captions(tmp_path / "a.jsonl", rows)
    found = prepare(photos, captions, tmp_path / "out.jsonl")
    assert found.splits == {"train": (90, 180), "dev": (10, 20)} and "as the captions have them" in str(found)
    assert "has no split val, which training looks for" in caplog.text
    assert lines(tmp_path / "out.jsonl") == rows
    assert prepare(photos, captions, tmp_path / "drawn.jsonl", splits=(0.5, 0.5)).splits.keys() == {"train", "val"}
    write_captions(captions, [*rows, rows[0] | {"split": "train"}])
    with pytest.raises(ValueError, match=r"a\.jsonl: image '000' is in the splits 'dev' and 'train'; expected one"):
        prepare(photos, captions, tmp_path / "none.jsonl")
    write_captions(captions, [*rows, rows[0] | {"split": None}])
    with pytest.raises(ValueError, match=r"a\.jsonl: a caption of image '000' has the split None"):
        prepare(photos, captions, tmp_path / "none.jsonl")


def test_splits_by_lists(tmp_path, world):
    photos, rows = world
    captions = write_captions(tmp_path / "a.jsonl", rows)
    (tmp_path / "train.txt").write_text("\ufeff000.jpg \r\n\r\nfolder/001.jpg\r\n2\r\n", newline="")
    (tmp_path / "val.txt").write_text("003\nnowhere.jpg\n")
    lists = {name: tmp_path / f"{name}.txt" for name in ("train", "val")}
    found = prepare(photos, captions, tmp_path / "out.jsonl", split_lists=lists)
    assert found.splits == {"train": (2, 4), "val": (1, 2)}  # 2 is no photo where equal ids meet
    assert {row["image_id"]: row["split"] for row in lines(tmp_path / "out.jsonl")} == {
        "000": "train",
        "001": "train",
        "003": "val",
    }
    assert Counter(skipped(tmp_path / "out.jsonl").values()) == {"no split names it": 97}
    (tmp_path / "val.txt").write_text("003\n000.jpg\n")
    with pytest.raises(ValueError, match=r"val\.txt: '000\.jpg' is in the split 'train', too"):
        prepare(photos, captions, tmp_path / "none.jsonl", split_lists=lists)
    (tmp_path / "val.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"val\.txt: none of its 2 names, such as 'a', 'b', has photo and captions"):
        prepare(photos, captions, tmp_path / "none.jsonl", split_lists=lists)
    with pytest.raises(ValueError, match="Give either splits"):
        prepare(photos, captions, tmp_path / "none.jsonl", split_lists=lists, splits=(1,))


@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.6, -0.1), (0.25,) * 4, ()])
def test_shares_that_are_none(tmp_path, world, shares):
    photos, rows = world
    with pytest.raises(ValueError, match="expected shares of train, val, test that add up to 1"):
        prepare(photos, write_captions(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", splits=shares)


def test_too_few_images_for_a_share(tmp_path, world):
    photos, rows = world
    captions, one = write_captions(tmp_path / "a.jsonl", rows[:6]), write_captions(tmp_path / "b.jsonl", rows[:1])
    with pytest.raises(
        ValueError, match=r"3 photos are too few: a share of 0\.1 leaves none for test\..* \(--splits 1,0,0\)"
    ):
        prepare(photos, captions, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"^1 photo is too few"):
        prepare(photos, one, tmp_path / "out.jsonl")
    assert prepare(photos, captions, tmp_path / "out.jsonl", splits=(1, 0, 0)).splits == {"train": (3, 6)}


# The file


def test_run_again_it_says_that_it_is_done(tmp_path, world, caplog, capsys):
    photos, rows = world
    captions, out = write_captions(tmp_path / "a.jsonl", rows), tmp_path / "deep/out.jsonl"
    command = ["prepare", str(photos), str(captions), str(out)]
    assert main(command) == 0
    before = out.stat()
    report = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == report and f"{out} is finished" in caplog.text
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert main([*command, "--seed", "1"]) == 1
    assert "holds other captions than these arguments give" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert main([*command, "--seed", "1", "--restart"]) == 0
    assert out.stat().st_ino != before.st_ino  # replaced, not written over
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl"]
    assert len(read_captions(out, split="train")) == 160


def test_run_again_the_list_of_what_is_left_out_is_that_of_today(tmp_path, world):
    photos, rows = world
    captions, out = write_captions(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    prepare(photos, captions, out)
    make_photos(photos, "new.jpg")
    for _ in range(2):
        prepare(photos, captions, out)
        assert list(skipped(out)) == ["new"]
    (photos / "new.jpg").unlink()
    prepare(photos, captions, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl", "photos"]


def test_restart_removes_no_other_file(tmp_path, world):
    photos, rows = world
    captions = write_captions(tmp_path / "a.jsonl", rows)
    for path in (captions, write_captions(tmp_path / "mine.jsonl", [{"image_id": "1", "caption": "a"}]), photos):
        with pytest.raises(ValueError, match=r"name (another|it)"):
            prepare(photos, captions, path, restart=True)
    assert len(lines(captions)) == len(rows) and len(lines(tmp_path / "mine.jsonl")) == 1


def test_options_of_the_command(tmp_path, world, capsys):
    photos, rows = world
    captions = write_captions(tmp_path / "a.jsonl", rows)
    (tmp_path / "train.txt").write_text("000\n")
    command = ["prepare", str(photos), str(captions), str(tmp_path / "out.jsonl")]
    assert main([*command, "--split-list", f"train={tmp_path / 'train.txt'}"]) == 0
    assert len(lines(tmp_path / "out.jsonl")) == 2
    assert main([*command, "--split-list", "train.txt"]) == 1
    assert "expected NAME=FILE, each name once" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--splits", "most,some"])
    assert "argument --splits: invalid" in capsys.readouterr().err


def test_it_needs_neither_pytorch_nor_transformers(tmp_path, world):
    photos, rows = world
    captions = write_captions(tmp_path / "a.jsonl", rows)
    code = (
        "import sys\nfrom unicoder_vl_hf.cli import main\n"
        f"assert main(['prepare', {str(photos)!r}, {str(captions)!r}, {str(tmp_path / 'out.jsonl')!r}]) == 0\n"
        "print({'torch', 'transformers', 'PIL'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.endswith("set()\n"), result.stdout + result.stderr


@pytest.mark.skipif(not COCO_FREE.exists(), reason=f"{COCO_FREE} is absent")
def test_coco_free(tmp_path):
    found = prepare(COCO_FREE / "photos", COCO_FREE / "captions.json", tmp_path / "out.jsonl")
    assert (found.rule, found.skipped) == ("coco", None)
    assert found.splits == {"train": (145, 725), "val": (18, 90), "test": (18, 90)}
    assert found.photo_of["285"] == "000000000285"

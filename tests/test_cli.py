"""`unicoder-vl` as a user types it. What the commands do is tested with their rooms."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from foreign_arrays import IMAGES, WRITERS
from PIL import Image

from unicoder_vl_hf import RegionStore, cli
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.regions.extraction import extract
from unicoder_vl_hf.retrieval.mining import mine


@pytest.fixture
def source(tmp_path):
    return WRITERS["lxmert-tsv"](tmp_path)


@pytest.fixture
def store(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "store"), "--source-detector", "vg@abc", "--ids", "coco"]) == 0
    assert f"images={len(IMAGES)}" in capsys.readouterr().out
    return tmp_path / "store"


def test_convert(store):
    found = RegionStore(store)
    assert set(found) == {str(image.number) for image in IMAGES}
    told = found.provenance
    assert (told["detector"], told["detector_revision"], told["detector_declared"]) == ("vg", "abc", True)


def test_errors_are_one_line(store, source, capsys):
    assert main(["convert", str(source), str(store)]) == 1
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("unicoder-vl convert: ") and str(store) in output and "resume" in output
    assert main(["convert", str(source), str(store) + "2", "--source-detector", "vg"]) == 1
    assert "'vg', expected NAME@REVISION" in capsys.readouterr().err
    assert main(["inspect", str(source.parent / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().err
    assert main(["inspect", str(store), "--image-id", "dog"]) == 1
    assert capsys.readouterr().err.count("no image 'dog'") == 1


def test_inspect_draws_on_the_photo(store, source, tmp_path, capsys):
    image = IMAGES[0]
    Image.new("RGB", (image.width, image.height), "white").save(tmp_path / "photo.png")
    drawing = tmp_path / "drawn.png"
    options = ["--image-id", str(image.number), "--photo", str(tmp_path / "photo.png"), "--output", str(drawing)]
    assert main(["inspect", str(store), *options]) == 0
    assert len(np.unique(np.asarray(Image.open(drawing)).reshape(-1, 3), axis=0)) > 2
    output = capsys.readouterr().out
    assert f"images    {len(IMAGES)}\n" in output and "detector             vg" in output
    assert main(["inspect", str(source), "--max-images", "2"]) == 0
    assert "images    2 looked at, there are more" in capsys.readouterr().out


def test_validate_tells_damage_by_its_exit(store, capsys):
    assert main(["validate", str(store)]) == 0
    assert "No problem found." in capsys.readouterr().out
    (shard,) = store.glob("regions-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["validate", str(store)]) == 1
    assert "1 problem" in capsys.readouterr().out


def test_compare_and_merge(store, source, tmp_path, capsys):
    assert main(["compare", str(store), str(store)]) == 0
    assert f"{len(IMAGES)} in both, 0 in A alone" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "other"), "--source-detector", "vg@abc"]) == 0
    assert main(["merge", str(tmp_path / "both"), str(store), str(tmp_path / "other")]) == 0
    assert len(RegionStore(tmp_path / "both")) == 2 * len(IMAGES)


def test_export_round_trip(store, tmp_path):
    assert main(["export", str(store), str(tmp_path / "again.tsv"), "--format", "lxmert-tsv"]) == 0
    assert main(["convert", str(tmp_path / "again.tsv"), str(tmp_path / "again"), "--source-detector", "vg@abc"]) == 0
    again = RegionStore(tmp_path / "again")
    for image_id, record in RegionStore(store).items():
        np.testing.assert_array_equal(again[image_id].features, record.features)
        np.testing.assert_array_equal(again[image_id].boxes, record.boxes)


def test_label_needs_a_detector_that_classifies(store, tmp_path, capsys):
    pytest.importorskip("torchvision")
    arguments = ["label", str(store), str(tmp_path / "labelled"), "--detector"]
    assert main([*arguments, "torchvision:fasterrcnn_mobilenet_v3_large_fpn", "-o", "weights"]) == 1
    assert "'weights', expected NAME=VALUE" in capsys.readouterr().err


def test_commands_pass_on_what_their_functions_take():
    """`extract` and `mine` hand over every option by name."""
    parser = cli._parser()
    extract_args = parser.parse_args(["extract", "photos", "store", "--detector", "grid:x"])
    inspect.signature(extract).bind(output="store", **cli._arguments(extract_args, "store", "option"))
    mine_args = parser.parse_args(["mine", "model", "captions", "regions", "output"])
    passed = inspect.signature(mine).bind(**cli._arguments(mine_args)).arguments
    defaults = {name: value.default for name, value in inspect.signature(mine).parameters.items()}
    assert {name: passed[name] for name in list(passed)[4:]} == {name: defaults[name] for name in list(defaults)[4:]}


def test_help_needs_no_extra_and_loads_no_model():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['lmdb', 'h5py', 'msgpack', 'torchvision', 'PIL'])\n"
        "from unicoder_vl_hf.cli import main\nmain(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert all(f"    {name} " in result.stdout for name in ("extract", "convert", "inspect", "label"))

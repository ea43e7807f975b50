"""`unicoder-vl` as a user types it. What the commands do is tested with their rooms."""

import inspect
import shutil
import subprocess
import sys

import numpy as np
import pytest
from foreign_arrays import IMAGES, WRITERS
from PIL import Image

import unicoder_vl_hf
from unicoder_vl_hf import RegionStore, RegionStoreWriter, cli
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
    for holder in (store, source):
        named = tmp_path / f"{image.number}.png"  # which its name does not show
        shutil.copy(tmp_path / "photo.png", named)
        for photo in (tmp_path / "photo.png", named):
            assert main(["inspect", str(holder), "--photo", str(photo), "--output", str(drawing)]) == 1
            output, error = capsys.readouterr()
            assert output == "" and f"Say with --image-id which image {photo} is a photo of" in error
        Image.new("RGB", (image.width, image.height + 1), "white").save(named)
        image_id = str(image.number) if holder == store else image.name
        words = ["inspect", str(holder), "--image-id", image_id, "--photo", str(named), "--output", str(drawing)]
        assert main(words) == 1
        output, error = capsys.readouterr()
        assert output == "" and f"{named} is not the photo of {image_id!r}: it has {image.width} x " in error
    assert not drawing.exists()
    options = ["--image-id", str(image.number), "--photo", str(tmp_path / "photo.png"), "--output", str(drawing)]
    assert main(["inspect", str(store), *options]) == 0
    assert len(np.unique(np.asarray(Image.open(drawing)).reshape(-1, 3), axis=0)) > 2
    output = capsys.readouterr().out
    assert f"Boxes of '{image.number}' drawn on {tmp_path / 'photo.png'}: {drawing}\n" in output
    assert f"\nrecord: '{image.number}'\n  image_width          {image.width}\n" in output
    assert "RegionRecord(" not in output
    (tmp_path / "text.png").write_text("no picture")
    for wrong, says in (("text.png", "its 10 bytes are no image"), ("none.png", "No such file")):
        assert main(["inspect", str(store), *options[:2], "--photo", str(tmp_path / wrong)]) == 1
        output, error = capsys.readouterr()
        assert output == "" and wrong in error and says in error
    assert main(["inspect", str(store)]) == 0
    output = capsys.readouterr().out
    assert f"images    {len(IMAGES)}\n" in output and "detector             vg" in output
    assert main(["inspect", str(source), "--max-images", "2"]) == 0
    assert "format    lxmert-tsv\nimages    2 looked at, there are more" in capsys.readouterr().out


def test_validate_tells_damage_by_its_exit(store, capsys):
    assert main(["validate", str(store)]) == 0
    assert "No problem found." in capsys.readouterr().out
    (shard,) = store.glob("regions-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["validate", str(store)]) == 1
    assert "\n1 problem.\n" in capsys.readouterr().out


def test_what_is_no_store_is_said(store, source, tmp_path, capsys):
    RegionStoreWriter(tmp_path / "begun", detector="vg")  # killed
    for arguments, says in (
        (["validate", str(source)], f"{source} is a file, expected the folder of a region store."),
        (["compare", str(store), str(source)], f"{source} is a file, expected the folder of a region store."),
        (["validate", str(tmp_path / "none")], "none is no region store: there is no manifest.json."),
        (["compare", str(tmp_path / "none"), str(store)], "none is no region store: there is no manifest.json."),
        (["inspect", str(tmp_path / "begun")], "begun is an unfinished store: its writer is at work or was stopped"),
    ):
        assert main(arguments) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("convert", "stopped. With --resume it goes on."),
        ("mine", "stopped. The same command goes on."),
        ("validate", "stopped."),
    ],
)
def test_stopped_it_says_how_to_go_on(command, says, source, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("unicoder_vl_hf.regions.conversion.convert", stop)
    monkeypatch.setattr("unicoder_vl_hf.regions.validation.validate", stop)
    monkeypatch.setattr("unicoder_vl_hf.retrieval.mining.mine", stop)
    names = {"convert": ("a", "b"), "mine": ("a", "b", "c", "d"), "validate": ("a",)}
    assert main([command, *names[command]]) == 130
    assert capsys.readouterr().err == f"unicoder-vl {command}: {says}\n"


def test_images_without_an_id_may_be_skipped(source, tmp_path, capsys):
    (tmp_path / "ids.csv").write_text(f"source_id,image_id\n{IMAGES[0].name},dog\n")
    arguments = ["convert", str(source), str(tmp_path / "store"), "--ids", str(tmp_path / "ids.csv")]
    assert main(arguments) == 1
    assert "--skip-unmapped" in capsys.readouterr().err
    assert main([*arguments, "--skip-unmapped"]) == 0
    assert list(RegionStore(tmp_path / "store")) == ["dog"]


def test_an_unknown_option_shows_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["search", "a dog", "--modle", "m"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("usage: unicoder-vl search ")
    assert error.endswith("unicoder-vl search: error: unrecognized arguments: --modle m\n")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"unicoder-vl-hf {unicoder_vl_hf.__version__}\n"


def test_compare_and_merge(store, source, tmp_path, capsys):
    assert main(["compare", str(store), str(store)]) == 0
    assert f"{len(IMAGES)} in both, 0 in A alone" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "other"), "--source-detector", "vg@abc"]) == 0
    assert main(["merge", str(store), str(tmp_path / "other"), "--output", str(tmp_path / "both")]) == 0
    assert len(RegionStore(tmp_path / "both")) == 2 * len(IMAGES)


def test_export_round_trip(store, tmp_path):
    assert main(["export", str(store), str(tmp_path / "again.tsv"), "--format", "lxmert-tsv"]) == 0
    assert main(["convert", str(tmp_path / "again.tsv"), str(tmp_path / "again"), "--source-detector", "vg@abc"]) == 0
    again = RegionStore(tmp_path / "again")
    for image_id, record in RegionStore(store).items():
        np.testing.assert_array_equal(again[image_id].features, record.features)
        np.testing.assert_array_equal(again[image_id].boxes, record.boxes)


def test_label_fetches_no_weights_before_it_has_checked_the_store(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("unicoder_vl_hf.regions.labelling.load_detector", lambda name, **options: pytest.fail(name))
    (tmp_path / "plain").mkdir()
    source = WRITERS["scan-npy"](tmp_path / "plain")
    for name, options in {"silent": [], "told": ["--source-detector", "visual-genome:a/b@c"]}.items():
        assert main(["convert", str(source), str(tmp_path / name), *options]) == 0
    capsys.readouterr()
    for labelled, detector, options, says in (
        (store, "visual-genome:a/b", ["-o", "revision"], "'revision', expected NAME=VALUE"),
        (store, "visual-genome:a/b", [], "has object classes already"),
        (tmp_path / "told", "torchvision:x", [], "torchvision:x cannot classify stored features"),
        (tmp_path / "silent", "visual-genome:a/b", [], "does not tell what found its regions"),
        (
            tmp_path / "told",
            "visual-genome:a/x",
            [],
            "holds the features of visual-genome:a/b, not of visual-genome:a/x",
        ),
    ):
        assert main(["label", str(labelled), str(tmp_path / "labelled"), "--detector", detector, *options]) == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "labelled").exists()


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

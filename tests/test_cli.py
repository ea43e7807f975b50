"""`unicoder-vl` as a user types it. What the commands do is tested with their rooms."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_arrays import IMAGES, WRITERS
from PIL import Image

import unicoder_vl_hf
from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.cli import build_parser, main
from unicoder_vl_hf.cli.commands import Result, show
from unicoder_vl_hf.cli.parser import FAMILIES
from unicoder_vl_hf.regions import detectors
from unicoder_vl_hf.regions.extraction import extract


@pytest.fixture
def source(tmp_path):
    return WRITERS["lxmert-tsv"](tmp_path)


@pytest.fixture
def store(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "store"), "--source-detector", "vg@abc", "--ids", "coco"]) == 0
    assert f"  images       {len(IMAGES)}\n" in capsys.readouterr().out
    return tmp_path / "store"


def test_convert(store):
    found = RegionStore(store)
    assert set(found) == {str(image.number) for image in IMAGES}
    told = found.provenance
    assert (told["detector"], told["detector_revision"], told["detector_declared"]) == ("vg", "abc", True)


def test_errors_are_one_line(store, source, capsys):
    assert main(["convert", str(source), str(store)]) == 1
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("unicoder-vl convert: ") and str(store) in output and "--restart" in output
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
    assert (
        f"Boxes of '{image.number}' drawn on {tmp_path / 'photo.png'} (only its size could be compared): {drawing}\n"
        in output
    )
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


def test_the_name_that_was_meant_is_asked_for(store, source, tmp_path, capsys):
    known = str(IMAGES[0].number)
    for holder, image_id, meant in (
        (store, f"000{known}", known),
        (source, IMAGES[0].name[:-1], ""),  # another number
        (source, IMAGES[0].name.lower().replace("_", "-"), IMAGES[0].name),
        (store, f"COCO_val2014_{int(known):012d}.jpg", known),
    ):
        assert main(["inspect", str(holder), "--image-id", image_id]) == 1
        error = capsys.readouterr().err
        assert f"{holder} has no image {image_id!r}; its first is " in error
        assert error.endswith(f". Did you mean {meant!r}?\n" if meant else ".\n"), error
    with pytest.raises(SystemExit):
        main(["extrct", "photos"])
    assert "there is no command 'extrct', only extract, prepare, " in (error := capsys.readouterr().err)
    assert error.endswith(" Did you mean 'extract'?\n")


def test_inspect_counts_repetitions(source, capsys):
    """A file may name an image twice; a store, whose ids differ, has no such line."""
    assert main(["inspect", str(source)]) == 0
    assert "repeated" not in capsys.readouterr().out
    source.write_text(source.read_text() + source.read_text().splitlines()[0] + "\n")
    assert main(["inspect", str(source)]) == 0
    assert f"images    {len(IMAGES) + 1}\nrepeated  1 have the id of an earlier one\n" in capsys.readouterr().out


def test_validate_tells_damage_by_its_exit(store, capsys):
    assert main(["validate", str(store)]) == 0
    assert "No problem found." in capsys.readouterr().out
    (shard,) = store.glob("regions-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["validate", str(store)]) == 1
    assert "\n1 problem.\n" in capsys.readouterr().out
    assert main(["validate", str(store), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["file"] == shard.name and problem["image_ids"]


def test_what_is_no_store_is_said(store, source, tmp_path, capsys):
    RegionStoreWriter(tmp_path / "begun", detector="vg")  # killed
    for arguments, says in (
        (["validate", str(source)], f"{source} is a file, expected the folder of a region store."),
        (["compare", str(store), str(source)], f"{source} is a file, expected the folder of a region store."),
        (["validate", str(tmp_path / "none")], "none is no region store: there is no manifest.json."),
        (["compare", str(tmp_path / "none"), str(store)], "none is no region store: there is no manifest.json."),
        (
            ["inspect", str(tmp_path / "begun")],
            "begun is an unfinished store: the command that writes it is at work",
        ),
    ):
        assert main(arguments) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("merge", "stopped. Run again, it goes on; --restart begins anew."),
        ("mine", "stopped. Run again, it goes on; --restart begins anew."),
        ("validate", "stopped."),
    ],
)
def test_stopped_it_says_how_to_go_on(command, says, source, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("unicoder_vl_hf.regions.editing.merge_stores", stop)
    monkeypatch.setattr("unicoder_vl_hf.regions.validation.validate", stop)
    monkeypatch.setattr("unicoder_vl_hf.tasks.retrieval.mining.mine", stop)
    names = {"merge": ("a", "--output", "b"), "mine": ("a", "b", "c", "d"), "validate": ("a",)}
    assert main([command, *names[command]]) == 130
    assert capsys.readouterr().err == f"unicoder-vl {command}: {says}\n"


def test_images_without_an_id_may_be_skipped(source, tmp_path, capsys):
    (tmp_path / "ids.csv").write_text(f"source_id,image_id\n{IMAGES[0].name},dog\n")
    arguments = ["convert", str(source), str(tmp_path / "store"), "--ids", str(tmp_path / "ids.csv")]
    assert main(arguments) == 1
    assert "--skip-unmapped" in capsys.readouterr().err
    assert main([*arguments, "--skip-unmapped"]) == 0
    assert list(RegionStore(tmp_path / "store")) == ["dog"]


@pytest.mark.parametrize("command", ["search", "explain photo"])  # the second cannot do without
def test_an_unknown_option_shows_the_usage_of_its_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "a dog", "--modle", "m"])
    error, name = capsys.readouterr().err, command.split()[0]
    assert ended.value.code == 2 and error.startswith(f"usage: unicoder-vl {name} ")
    assert error.endswith(f"unicoder-vl {name}: error: there is no option --modle. Did you mean '--model'?\n")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"unicoder-vl-hf {unicoder_vl_hf.__version__}\n"


def test_it_runs_as_a_module(store):
    """As `accelerate launch -m` runs it, with its exit code."""
    for folder, code in ((store, 0), (store / "none", 1)):
        command = [sys.executable, "-m", "unicoder_vl_hf.cli", "validate", str(folder)]
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == code


def test_compare_and_merge(store, source, tmp_path, capsys):
    assert main(["compare", str(store), str(store)]) == 0
    assert f"{len(IMAGES)} in both, 0 in A alone" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "other"), "--source-detector", "vg@abc"]) == 0
    assert main(["merge", str(store), str(tmp_path / "other"), "--output", str(tmp_path / "both")]) == 0
    assert len(RegionStore(tmp_path / "both")) == 2 * len(IMAGES)
    merge = ["merge", str(store), "--output", str(tmp_path / "both")]
    assert main(merge) == 1 and "--restart" in capsys.readouterr().err
    assert main([*merge, "--restart"]) == 0
    assert len(RegionStore(tmp_path / "both")) == len(IMAGES)


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


@pytest.mark.parametrize(
    ("command", "option", "says"),
    [
        ("extract", "precision=no", "precision is an option of its own"),
        ("extract", "batch_size=4", "batch_size is an option of its own"),
        ("extract", "photos=x", "photos is an option of its own"),
        ("extract", "dtype=float32", "dtype is an option of its own"),
        ("extract", "shard_size=4", "no detector has an option shard_size"),
        ("extract", "output=x", "no detector has an option output"),
        ("extract", "name=x", "no detector has an option name"),
        ("extract", "=3", "'=3', expected NAME=VALUE"),
        ("extract", "size=3 size=4", "--option size=4: size is given twice"),
        ("extract", "colour=blue", "have no option colour; their options are ["),
        ("label", "output=x", "output is an option of its own"),
        ("label", "store=x", "store is an option of its own"),
        ("label", "name=x", "no detector has an option name"),
        ("label", "colour=blue", "have no option colour; their options are ["),
    ],
)
def test_an_option_that_is_none_of_the_detector_is_one_line(command, option, says, tmp_path, capsys):
    """`--option` cannot reach what is not the detector's, nor run into it."""
    pytest.importorskip("torchvision")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "plain").mkdir()
    source = WRITERS["scan-npy"](tmp_path / "plain")
    bare = str(tmp_path / "bare")
    assert main(["convert", str(source), bare, "--source-detector", "visual-genome:a/b@c"]) == 0
    arguments = {
        "extract": [str(tmp_path / "photo.png"), str(tmp_path / "store"), "--detector", "grid:none"],
        "label": [bare, str(tmp_path / "labelled"), "--detector", "visual-genome:a/b"],
    }
    capsys.readouterr()
    assert main([command, *arguments[command], *(word for each in option.split() for word in ("-o", each))]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"unicoder-vl {command}: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "store").exists() and not (tmp_path / "labelled").exists()


def test_no_option_of_a_detector_is_an_argument_of_a_command():
    """Else `--option` could not reach it."""
    pytest.importorskip("torchvision")
    parser = build_parser()
    extract_args = parser.parse_args(["extract", "photos", "store", "--detector", "grid:x"])
    label_args = parser.parse_args(["label", "store", "labelled", "--detector", "grid:x"])
    for module in detectors.FAMILIES.values():
        load = importlib.import_module(f"unicoder_vl_hf.regions.detectors.{module}").load
        own = set(inspect.signature(load).parameters) - {"name", "device", "precision"}
        assert not own & (vars(extract_args).keys() | inspect.signature(extract).parameters.keys())
        assert not own & vars(label_args).keys()


def test_no_command_passes_over_an_option():
    for parser in build_parser().get_default("parsers").values():
        module = inspect.getmodule(parser.get_default("command").run)
        read = inspect.getsource(module) + inspect.getsource(importlib.import_module("unicoder_vl_hf.cli.commands"))
        names = {action.dest for action in parser._actions} - {"help", "json"}
        passed_over = {name for name in names if not re.search(rf'args\.{name}\b|"{name}"', read)}
        assert not passed_over, parser.prog


# Command -> the function that it stands for, its words, and options that the function has not by their own name.
FUNCTIONS = {
    "extract": ("regions.extraction.extract", "photos store --detector grid:x", {"option", "share"}),
    "prepare": ("data.preparation.prepare", "photos captions output", {"split_list"}),
    "merge": ("regions.editing.merge_stores", "a --output b", set()),
    "import-checkpoint": ("checkpoints.importing.import_checkpoint", "source output", set()),
    "mine": ("tasks.retrieval.mining.mine", "model captions regions output", {"share"}),
    "train-first-stage": ("tasks.retrieval.first_stage.train_first_stage", "model captions regions output", set()),
    "index": ("search.command.make_index", "store --output output", {"share"}),
    "search": ("search.command.run_search", "", {"option"}),
    "calibrate": ("tasks.retrieval.calibration.calibrate", "model captions seven", set()),
}
# A value of an option that is not its default, by its type; and of some by their names.
VALUES = {int: "7", float: "0.7", None: "seven", "ids": "path", "option": "a=7", "split_list": "a=7", "splits": "1,1,1"}
VALUES |= {"region_type": "1", "share": "0/7", "detector": "grid:seven"}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_a_command_hands_every_option_to_its_function(command, monkeypatch, tmp_path):
    """Without options, the function's own defaults; with all but --gather, which excludes --share, each in place."""
    monkeypatch.chdir(tmp_path)
    for path in ("photos", "captions", "seven"):  # some commands look whether they exist
        (tmp_path / path).touch()
    place, words, other = FUNCTIONS[command]
    module, _, name = f"unicoder_vl_hf.{place}".rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    calls = []

    def called(*arguments, **options):
        calls.append(signature.bind(*arguments, **options).arguments)
        raise ValueError("That is all.")  # what is shown of a result is tested with it

    monkeypatch.setattr(f"{module}.{name}", called)
    bare = [command, *words.split()]
    typed, names = [], []
    for action in build_parser().parse_args(bare).parser._actions:
        if action.option_strings and not action.required and action.dest not in ("help", "json", "gather"):
            value = next((each for each in action.choices or () if each != action.default), None)
            value = value or VALUES.get(action.dest) or VALUES.get(action.type)
            typed += [action.option_strings[-1]] if action.nargs == 0 else [action.option_strings[-1], value]
            names.append(action.dest)
    assert main(bare) == 1 and main([*bare, *typed]) == 1
    short, full = calls
    expected = build_parser().parse_args([*bare, *typed])
    for name in set(names) - other:
        assert short[name] == signature.parameters[name].default, name
        assert full[name] == getattr(expected, name) != short[name], name
    assert full.get("options", {"a": 7}) == {"a": 7} and full.get("split_lists", {"a": "7"}) == {"a": "7"}
    assert short.keys() - other == full.keys() - other - {"options"}


def test_every_command_has_a_name_of_its_own_and_says_how_it_goes_on():
    every = [command for family in FAMILIES for command in family.commands]
    assert len({command.name for command in every}) == len(every)
    for command in every:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser.add_argument)
        assert bool(command.go_on) == ("--restart" in parser._option_string_actions), command.name


def test_help_texts_name_their_noun():
    """None begins with "of the detector": in the list of options, each is read alone."""
    for command in (command for family in FAMILIES for command in family.commands):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser.add_argument)
        for action in parser._actions:
            assert action.help and not action.help.startswith(("of ", "default", "to ", "so ", "where ")), action


def test_help_needs_no_extra_and_loads_no_model():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['lmdb', 'h5py', 'msgpack', 'torchvision', 'PIL'])\n"
        "from unicoder_vl_hf.cli import main\nmain(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert all(f"    {name} " in result.stdout for name in ("extract", "convert", "inspect", "label"))


def measured(path, machine, **content):
    path.write_text(json.dumps({"machine": machine} | content))
    return str(path)


def test_plan_turns_rates_into_hours(tmp_path, capsys):
    rates = {"float32": {"scoring": 10.0, "training": 5.0}}
    bench = measured(tmp_path / "bench.json", {"cpu": "EPYC"}, scale={"size": "base"}, rates=rates)
    gpu = measured(tmp_path / "gpu.json", {"cpu": "Xeon", "gpu": "H100", "size": "base"}, rates={
        "bfloat16": {"scoring": 20_000.0, "training": None}
    })  # fmt: skip
    assert main(["plan", bench, gpu, "--processes", "4"]) == 0
    of_bench, of_gpu = capsys.readouterr().out.split("H100, a GPU, bfloat16: 2e+04 pairs a second")
    assert "EPYC, a core, float32: 10 pairs a second, 5 rows a second" in of_bench
    hours = {line.split(" h  ")[1]: line.split(" h  ")[0].strip() for line in of_bench.splitlines() if " h  " in line}
    assert len(hours) == 9
    assert "20.8" in {hours[job] for job in hours if "in two stages" in job}  # 3M / 10 / 4 / 3600
    assert hours["COCO 5K, the test split scored: 5,000 x 25,000"] == "868.1"  # 125M / 10 / 4 / 3600
    assert hours["Conceptual Captions, the paper's 10 epochs"] == "833.3"  # 60M / 5 / 4 / 3600
    assert "0.4 h  COCO 5K" in of_gpu and "Conceptual" not in of_gpu


def test_results_for_machines(store, tmp_path, capsys):
    def told(*words):
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    images, regions = len(IMAGES), RegionStore(store).num_regions
    merged = told("merge", store, "--output", tmp_path / "merged")
    assert (merged["path"], merged["images"], merged["regions"]) == (str(tmp_path / "merged"), images, regions)
    assert merged["provenance"]["detector"] == "vg"
    inspected = told("inspect", store, "--image-id", IMAGES[0].number)
    assert inspected["images"] == images and inspected["image"]["image_id"] == str(IMAGES[0].number)
    assert inspected["features"] == [{"dim": 16, "dtype": "float16", "images": images}]
    compared = told("compare", store, store)
    assert compared["images"] == images and compared["matched"] == regions
    assert told("export", store, tmp_path / "out", "--format", "parquet")["path"] == str(tmp_path / "out")
    bench = measured(tmp_path / "bench.json", {"cpu": "EPYC"}, rates={"float32": {"scoring": 10.0, "training": 5.0}})
    assert told("plan", bench)[0] | {"job": ""} == {
        "measured": bench, "on": "EPYC, a core", "dtype": "float32", "job": "", "hours": 5e6 / 10 / 3600
    }  # fmt: skip


def test_commands_print_in_one_place():
    """Else `--json` would be none: they return what they found, or yield what is to be known at once."""
    folder = Path(importlib.import_module("unicoder_vl_hf.cli").__file__).parent
    printing = {
        path.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    }
    assert printing == {"commands.py"}


def test_what_goes_on_is_told_at_once_by_a_line(capfd):
    def going_on():
        yield Result("Here.", {"url": "http://here", "images": 3})
        assert capfd.readouterr().out == '{"url": "http://here", "images": 3}\n'
        yield Result("Failed.", {}, code=1)

    assert show(going_on(), as_json=True) == 1


def test_plan_refuses_what_was_not_measured(tmp_path, capsys):
    files = {
        "is of a miniature": measured(tmp_path / "tiny.json", {"cpu": "EPYC", "size": "tiny"}, rates={"float32": {}}),
        "holds no rate yet": measured(tmp_path / "none.json", {"cpu": "EPYC"}),
        "expected the JSON that": str(tmp_path / "text.json"),
    }
    (tmp_path / "text.json").write_text("[]")
    for message, path in files.items():
        assert main(["plan", path]) == 1
        assert f"{path}" in (told := capsys.readouterr().err) and message in told
    assert main(["plan", files["holds no rate yet"], "--processes", "0"]) == 1
    assert "--processes is 0, expected at least 1" in capsys.readouterr().err

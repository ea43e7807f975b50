"""What is imported when: commands begin without PyTorch, and Auto classes know ours whatever came first."""

import ast
import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import vcr_miniature
from checkpoint_matrix import MODELS, OTHERS
from import_orders import ORDERS
from region_stores import make, write_store

import unicoder_vl_hf
from unicoder_vl_hf.regions.formats import lxmert_tsv


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_auto_classes_know_ours_in_every_order_of_imports(part, tmp_path):
    """Also where the checkpoint brings its own code: the package's classes come first."""
    tiny.model(unicoder_vl_hf.UnicoderVLForPreTraining).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    client = Path(__file__).with_name("import_orders.py")
    orders = list(ORDERS)[part::3]
    done = subprocess.run([sys.executable, client, tmp_path, *orders], capture_output=True, text=True, timeout=240)
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert list(found) == orders, done.stderr[-4000:]
    names = {auto: name for auto, (name, _) in MODELS.items()} | OTHERS
    for order, classes in found.items():
        for auto, loaded in classes.items():
            ours = getattr(unicoder_vl_hf, names[auto])
            assert loaded == [f"{ours.__module__}.{ours.__name__}"] * 2, (order, auto)


HEAVY = ("torch", "transformers", "torchvision", "accelerate")
# Commands, each with what must be in its output, and in FOLDER what `world` has made.
LIGHT = {
    "--version": "unicoder-vl-hf ",
    "--help": "usage: unicoder-vl ",
    **{
        f"{command} --help": "usage: unicoder-vl "
        for command in (
            "extract convert export inspect validate compare label merge import-checkpoint mine index search vcr-check "
            "foil foil-accuracy score explain app calibrate serve plan ask vqa-check"
        ).split()
    },
    "serach": "error: there is no command 'serach', only extract, ",
    "search --modle": "error: there is no option --modle. Did you mean '--model'?",
    "search ''": "The sentence is empty",
    "search dog --index FOLDER/none": "none does not exist.",
    "search --image-id 1 --index FOLDER/store --photos FOLDER/none": "none does not exist.",
    "extract FOLDER/none FOLDER/new --detector grid:x": "none does not exist.",
    "extract FOLDER FOLDER/new --detector griid:x": "Did you mean 'grid'?",
    "search dog --detector griid:x": "Did you mean 'grid'?",
    "ask photo.jpg what --model x --detector griid:x": "Did you mean 'grid'?",
    "validate FOLDER/store": "No problem found.",
    "inspect FOLDER/store": "provenance",
    "inspect FOLDER/store --image-id photo_1ü": "record: 'photo_1ü'",
    "inspect FOLDER/features.tsv": "format    lxmert-tsv",
    "compare FOLDER/store FOLDER/store": "10 in both",
    "merge FOLDER/store FOLDER/other --output FOLDER/merged": "images       13",
    "convert FOLDER/features.tsv FOLDER/converted --ids stem": "images       10",
    "convert FOLDER/features.tsv FOLDER/shared --workers 2": "images       10",
    "export FOLDER/sized FOLDER/again.tsv --format lxmert-tsv": "again.tsv written.",
    "export FOLDER/store FOLDER/parquet --format parquet": "parquet written.",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Stores and a file of features; in `traps`, modules that end whoever imports them."""
    folder = tmp_path_factory.mktemp("light")
    write_store(map(make, range(10)), folder / "store")
    write_store(map(make, range(10, 13)), folder / "other")
    size = {"image_width": 300, "image_height": 200}
    sized = [replace(record, **size, boxes=np.zeros((len(record), 4))) for record in map(make, range(10))]
    lxmert_tsv.write(write_store(sized, folder / "sized").values(), folder / "features.tsv")
    (folder / "traps").mkdir()
    for name in (*HEAVY, "datasets"):
        (folder / "traps" / f"{name}.py").write_text("raise SystemExit(f'{__name__} was imported')\n")
    return folder


def run(traps: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A command, for whose processes `traps` come before all other modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(traps), *filter(None, sys.path)))}
    code = (
        "import sys\nfrom unicoder_vl_hf.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as ended:\n    code = ended.code\n"
        f"heavy = sorted(sys.modules.keys() & {set(HEAVY)})\nsys.exit(f'imported {{heavy}}' if heavy else code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", LIGHT)
def test_a_light_command_imports_neither_torch_nor_transformers_nor_datasets(command, world):
    done = run(world / "traps", *shlex.split(command.replace("FOLDER", str(world))))
    assert done.returncode in (0, 1, 2) and LIGHT[command] in done.stdout + done.stderr, done.stdout + done.stderr
    assert "imported" not in done.stderr


def test_checking_a_submission_imports_neither_torch_nor_transformers(world, tmp_path):
    """It reads the questions with datasets."""
    (world / "traps" / "datasets.py").rename(tmp_path / "datasets.py")
    annotations = vcr_miniature.write(tmp_path) / "test.jsonl"
    (tmp_path / "empty.csv").write_text("")
    done = run(world / "traps", "vcr-check", str(tmp_path / "empty.csv"), "--annotations", str(annotations))
    (tmp_path / "datasets.py").rename(world / "traps" / "datasets.py")
    assert done.returncode == 1 and "line 1: the header lacks" in done.stdout, done.stderr


def test_the_traps_are_set(world):
    """Else the tests above would show nothing."""
    done = run(world / "traps", "train-first-stage", "a", "b", "c", "d")
    assert done.returncode == 1 and done.stderr.endswith(" was imported\n")


def test_to_import_the_package_and_a_store_imports_no_torch(world):
    code = f"""
import sys, unicoder_vl_hf
store = unicoder_vl_hf.RegionStore({str(world / "store")!r})
record = store["photo_1ü"]
assert type(record) is unicoder_vl_hf.RegionRecord and dir(unicoder_vl_hf) == sorted(unicoder_vl_hf.__all__)
assert not sys.modules.keys() & {set(HEAVY)}
assert unicoder_vl_hf.__version__
try:
    unicoder_vl_hf.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "No unicoder_vl_hf attribute nothing\n", done.stderr


ROOMS = ["", ".data", ".regions", ".runs", ".scenes", ".scoring", ".search", ".serving", ".tasks"]
ROOMS += [f".tasks.{task}" for task in "entailment foil grounding nlvr2 pretraining retrieval vcr vqa".split()]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_offers_what_it_names(name):
    """Its stub tells type checkers and lazy_loader alike; and nothing by the name of a module, which would hide."""
    room = importlib.import_module(f"unicoder_vl_hf{name}")
    folder = Path(room.__file__).parent
    stub = (folder / "__init__.pyi").read_text()
    typed = [(node.module, alias) for node in ast.parse(stub).body for alias in node.names]
    assert all(alias.asname == alias.name for _, alias in typed), "without `as`, a type checker takes it for private"
    places = {alias.name: module for module, alias in typed}
    assert sorted(places) == dir(room) == room.__all__
    for offered, module in places.items():
        if module is None:  # a room within
            assert getattr(room, offered) is importlib.import_module(f"{room.__name__}.{offered}")
        else:
            assert getattr(room, offered) is getattr(importlib.import_module(f"{room.__name__}.{module}"), offered)
            assert not (folder / offered).exists() and not (folder / f"{offered}.py").exists()
    with pytest.raises(AttributeError, match=f"No {room.__name__} attribute nothing"):
        room.nothing  # noqa: B018


def test_rooms_are_attributes_and_import_no_more_than_what_is_asked_for():
    code = f"""
import sys, unicoder_vl_hf
from unicoder_vl_hf.regions import RegionStore, convert, merge_stores, validate
from unicoder_vl_hf.data import id_mapping, prepare
assert callable(convert) and callable(prepare)
assert unicoder_vl_hf.regions.convert is convert and unicoder_vl_hf.regions.conversion.convert is convert
assert unicoder_vl_hf.tasks.vcr.check_submission and unicoder_vl_hf.search and unicoder_vl_hf.tasks.retrieval
assert not sys.modules.keys() & {set(HEAVY)}, sys.modules.keys() & {set(HEAVY)}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("during", ["numpy", "torch", "transformers"])
def test_ctrl_c_while_a_command_imports_is_one_line(during):
    """The signal comes when the module is looked for; what runs in the background would ignore it."""
    arguments = ["unicoder-vl", "train-first-stage", "model", "captions", "regions", "output"]
    code = f"""
import os, signal, sys
from unicoder_vl_hf.cli import main

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {during!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Stop())
sys.argv = {arguments}
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("unicoder-vl") and ": stopped." in done.stderr and done.stderr.count("\n") == 1

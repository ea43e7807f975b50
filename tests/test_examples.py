"""examples/: short callers of the package's scripts, which end as these do, and loops that can be read."""

import contextlib
import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import places
import pytest
import small_world
from accelerate import Accelerator
from transformers import AutoModelForPreTraining, AutoProcessor
from two_processes import examples_recorded

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.negatives import PairsWithMismatches
from unicoder_vl_hf.scenes.answers import build_vqa_scenes
from unicoder_vl_hf.scenes.questions import build_vcr_scenes
from unicoder_vl_hf.scoring.checkpoints import load_for_store
from unicoder_vl_hf.tasks.pretraining.collator import DataCollatorForUnicoderVLPreTraining
from unicoder_vl_hf.tasks.pretraining.evaluation import evaluate_pretraining
from unicoder_vl_hf.tasks.retrieval.training import evaluate_retrieval
from unicoder_vl_hf.tasks.vcr.collator import DataCollatorForUnicoderVLMultipleChoice
from unicoder_vl_hf.tasks.vcr.data import read_vcr
from unicoder_vl_hf.tasks.vcr.training import evaluate_vcr, load_for_vcr
from unicoder_vl_hf.tasks.vqa import answer_questions, load_for_vqa, read_questions, vqa_metrics
from unicoder_vl_hf.tasks.vqa.training import make_collator

CALLERS = sorted(path for path in places.EXAMPLES.glob("*.py") if not path.stem.endswith("_loop"))


@pytest.fixture(params=CALLERS, ids=lambda path: path.stem)
def caller(request):
    return request.param


def load(path: Path):
    """The file as a module of its own, whatever else has its name."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*words: str | Path, folder: Path, **environment: str):
    """A run of Python in `folder`, in which the package is not."""
    source = str(places.ROOT / "src")
    paths = os.pathsep.join([environment.pop("first", source), source])
    variables = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=240
    )


def test_a_caller_is_the_script_of_the_package(caller, monkeypatch, capsys):
    module = places.script(caller.stem)
    assert module.__name__.startswith("unicoder_vl_hf.") and len(caller.read_text().splitlines()) < 25
    said = []
    for main in (module.main, functools.partial(runpy.run_path, str(caller), run_name="__main__")):
        for word, code in (("--help", 0), ("--bogus", 2)):
            monkeypatch.setattr("sys.argv", [caller.name, word])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == code
            said.append(capsys.readouterr())
    assert said[:2] == said[2:] and said[1].err.startswith(f"{caller.name}: ") and said[1].err.count("\n") == 1


def test_ctrl_c_while_a_caller_imports_ends_in_a_line(caller, tmp_path):
    (tmp_path / "transformers.py").write_text("raise KeyboardInterrupt\n")
    done = python(caller, "--help", folder=tmp_path, first=str(tmp_path))
    assert done.returncode == 130 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{caller.name}: stopped.")


def test_a_script_runs_without_a_checkout(tmp_path):
    done = python("-m", "unicoder_vl_hf.tasks.pretraining.run", "--bogus", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("run.py: ") and done.stderr.count("\n") == 1


def loop(name: str, **options) -> None:
    """The loop of that name, of two passes over the data with a high learning rate."""
    options |= {"num_epochs": 2, "learning_rate": 1e-2}
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    load(places.EXAMPLES / f"{name}_loop.py").main(words)


def passes(examples: Path) -> list[list[int]]:
    """The rows of each epoch that were trained on."""
    rows = [tuple(map(int, line.split())) for line in Path(f"{examples}-0").read_text().splitlines()]
    return [[row for of, row in rows if of == epoch] for epoch in range(max(rows)[0] + 1)]


def said(output: str) -> dict[str, float]:
    """The metrics that a loop prints in the end, a line each."""
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2 and words[0][0].isalpha()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    world = small_world.build(tmp_path_factory.mktemp("loops"))
    return {"captions": world / "captions.jsonl", "regions": world / "regions"}


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    bert = small_world.save_bert(folder / "bert", dropout=0.1)
    printed = (folder / "printed").open("w")
    with examples_recorded(folder / "examples"), printed, contextlib.redirect_stdout(printed):
        loop("pretraining", **data, bert=bert, output_dir=folder / "run", batch_size=8, micro_batches=2)
    return folder / "run"


def assert_trained_for_two_epochs(examples: Path):
    every = list(range(small_world.NUM_TRAIN_PAIRS))
    first, second = passes(examples)
    assert sorted(first) == sorted(second) == every and first != second


def test_the_loop_of_pretraining(pretrained, data):
    assert_trained_for_two_epochs(pretrained.parent / "examples")
    *_, first, second = (pretrained.parent / "printed").read_text().splitlines()
    assert first.startswith("epoch 1: loss ") and second.startswith("epoch 2: loss ")
    measured = re.findall(r"(\w+) ([\d.]+)(?:, |$)", second.split("validation: ")[1])
    store = RegionStore(data["regions"])
    model, processor = (auto.from_pretrained(pretrained) for auto in (AutoModelForPreTraining, AutoProcessor))
    collator = DataCollatorForUnicoderVLPreTraining(processor, store, seed=0)
    pairs = PairsWithMismatches(read_captions(data["captions"], split="val"), seed=0, fixed_epoch=0)
    expected = evaluate_pretraining(model, pairs, collator, Accelerator())
    assert {name: float(value) for name, value in measured} == pytest.approx(expected, abs=1e-3)


def test_the_loop_of_retrieval(pretrained, data, tmp_path, capsys):
    with examples_recorded(tmp_path / "examples"):
        loop("retrieval", **data, model=pretrained, output_dir=tmp_path / "run", batch_size=8)
    assert_trained_for_two_epochs(tmp_path / "examples")
    store = RegionStore(data["regions"])
    model, processor = load_for_store(tmp_path / "run", store)
    expected = evaluate_retrieval(model, processor, store, read_captions(data["captions"], split="val"))
    expected.pop("recall_sum")
    assert said(capsys.readouterr().out) == pytest.approx(expected, abs=1e-3)


def test_the_loop_of_questions(pretrained, tmp_path, capsys):
    world = build_vqa_scenes(tmp_path / "world", num_train=12, num_val=4, num_test=1)
    files = {name: world / f"train_{name}.json" for name in ("questions", "annotations")}
    files |= {f"validation_{name}": world / f"val_{name}.json" for name in ("questions", "annotations")}
    options = {"regions": world / "regions", "min_occurrences": 1, "batch_size": 8}
    loop("vqa", **files, **options, model=pretrained, output_dir=tmp_path / "run")
    printed = said(capsys.readouterr().out)
    store = RegionStore(world / "regions")
    model, processor = load_for_vqa(tmp_path / "run", store)
    rows = read_questions(files["validation_questions"], files["validation_annotations"])
    answers, _ = answer_questions(model, make_collator(model, processor, store), rows)
    assert printed == pytest.approx({"accuracy": vqa_metrics(answers, rows["answers"])["accuracy"]}, abs=1e-3)


def test_the_loop_of_vcr(pretrained, tmp_path, capsys):
    world = build_vcr_scenes(tmp_path / "world", num_train=6, num_val=4, num_test=2)
    where = {"annotations": world, "images": world / "images", "regions": world / "regions"}
    loop("vcr", **where, model=pretrained, output_dir=tmp_path / "run", max_length=64, batch_size=4)
    printed = said(capsys.readouterr().out)
    store = RegionStore(world / "regions")
    model, processor = load_for_vcr(tmp_path / "run", store)
    rows = read_vcr(world / "val.jsonl", metadata_dir=world / "images", store=store)
    collator = DataCollatorForUnicoderVLMultipleChoice(processor, store, max_length=64)
    assert printed == pytest.approx(evaluate_vcr(model, collator, rows), abs=1e-3)

"""The demo: what it trains again and what not, its two processes, Ctrl-C, and all of it on a tiny world."""

import functools
import json
import re
import runpy
import sys
import time

import places
import pytest
import small_demo
from transformers import AutoConfig

from unicoder_vl_hf.processes import StopSignal
from unicoder_vl_hf.runs.checkpoints import CheckpointFolder
from unicoder_vl_hf.scenes import world

NAMES = [f"{direction}_recall@{k}" for direction in ("text_retrieval", "image_retrieval") for k in (1, 5, 10)]


@pytest.fixture
def script():
    return places.script("run_demo")


def finish(folder):
    for name in ("model.safetensors", "README.md"):
        (folder / name).write_text("")


def test_training_begins_goes_on_and_is_not_repeated(script, tmp_path):
    calls = []

    def run(words):
        calls.append(words)
        checkpoint = tmp_path / f"checkpoint-{len(calls)}"
        checkpoint.mkdir()
        (checkpoint / "training_state.json").write_text("{}")
        if len(calls) == 2:
            finish(tmp_path)

    output = ["--output_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        script.train(run, CheckpointFolder(tmp_path), seed=3)
    script.train(run, CheckpointFolder(tmp_path), seed=3)
    script.train(run, CheckpointFolder(tmp_path), seed=3)
    assert calls == [["--seed", "3", *output], ["--seed", "3", *output, "--resume_from_checkpoint", "latest"]]


def until_stopped():
    """Trains until the signal, as both trainings do."""
    with StopSignal() as stop:
        for _ in range(2000):
            if stop.is_set():
                return
            time.sleep(0.01)
    raise AssertionError("nobody said stop")


def python(code):
    return [sys.executable, "-c", code]


# Is told to stop, and leaves a checkpoint, as pre-training does.
STOPS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
print("saved" if signal.sigtimedwait([signal.SIGTERM], 20) else "not told to")
raise SystemExit(130)
"""


def wait_for(log, text):
    while text not in log.read_text():
        time.sleep(0.01)


def test_ctrl_c_ends_in_a_line(script, monkeypatch, tmp_path, capsys):
    """And stops the process that pre-trains, which leaves a checkpoint, too."""
    monkeypatch.setattr(script, "PRETRAINING", python(STOPS))
    monkeypatch.setattr(world, "build_scenes", lambda folder: folder.mkdir(parents=True))
    log = tmp_path / "pretraining.txt"
    monkeypatch.setattr(
        script.run_retrieval, "main", lambda words: wait_for(log, "ready")
    )  # stopped, with a checkpoint
    monkeypatch.setattr("sys.argv", ["examples/run_demo.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(places.EXAMPLES / "run_demo.py"), run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "run_demo.py: stopped. Run again, it goes on.\n"
    assert log.read_text() == "ready\nsaved\n"


def test_a_failure_beside_stops_the_block(script, tmp_path):
    """With a checkpoint, or at its end."""
    log = tmp_path / "pretraining.txt"
    fails = python("import sys; print('first'); sys.exit('demo.py: no room for it')")
    says = r"failed, see .*pretraining.txt: demo.py: no room for it"
    for block in (until_stopped, lambda: None):
        with pytest.raises(ValueError, match=says), script.beside(fails, log):
            block()
    assert log.read_text() == "first\ndemo.py: no room for it\n"
    with (
        pytest.raises(ValueError, match="exit code -9"),
        script.beside(python("import os; os.kill(os.getpid(), 9)"), log),
    ):
        until_stopped()


def test_what_runs_beside_may_be_stopped_alone(script, tmp_path):
    ended = []
    with pytest.raises(KeyboardInterrupt), script.beside(python("import sys; sys.exit(130)"), tmp_path / "log"):
        ended.append("the block")
    assert ended == ["the block"]


def test_a_failing_block_stops_what_runs_beside(script, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(OSError, match="disk"), script.beside(python(STOPS), log):
        wait_for(log, "ready")
        raise OSError("no disk")
    assert log.read_text() == "ready\nsaved\n"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_whole_way(script, monkeypatch, tmp_path, capsys, precision):
    """With a few steps on a few scenes: it learned nothing, and says so; and again, without training."""
    monkeypatch.setattr(world, "build_scenes", functools.partial(world.build_scenes, **small_demo.SIZES))
    monkeypatch.setattr(script, "PRETRAINING", [sys.executable, small_demo.__file__, "--pretraining_alone"])
    arguments = ["--output_dir", str(tmp_path / "demo"), "--candidates", "3", "--num_queries", "2"]
    arguments += ["--max_steps", "2", "--mixed_precision", precision, "--seed", "1"]
    says = re.escape("The model did not learn: image_retrieval_recall@1 of zero-shot is below 62.5 %")
    with pytest.raises(ValueError, match=says):
        script.main(arguments)
    written = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    rows = [script.FIRST_STAGE, script.SCORED, script.BOTH_STAGES]
    assert list(written) == ["pretraining", "zero-shot", *rows, "chance"]
    assert written["chance"]["image_retrieval_recall@1"] == 1 / 8
    output = capsys.readouterr().out
    page = (tmp_path / "demo" / "gallery.html").read_text()
    assert page.count("<section>") == 2 and "The first stage proposes 3 of 8 scenes" in page
    measured = AutoConfig.from_pretrained(tmp_path / "demo" / "retrieval").similarity_weight
    said = f"score + {measured:g} similarity, the weight that was measured on validation captions"
    assert f"these are ordered by {said}. The best five" in page and f"{script.BOTH_STAGES}: {said}\n" in output
    assert f"--index {tmp_path / 'demo' / 'test-scenes.index'} --photos" in output
    table = output.split("all 16 captions (percent)\n")[1].splitlines()
    assert table[5].split() == ["chance", *(f"{100 * written['chance'][name]:.1f}" for name in NAMES)]
    values = [f"{100 * written[script.FIRST_STAGE][name]:.1f}" for name in NAMES]
    assert table[2].split() == [*script.FIRST_STAGE.split(), *values]
    if precision != "no":
        return

    models = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("model.safetensors")}
    with pytest.raises(ValueError, match=says):
        script.main(arguments)
    again = capsys.readouterr().out + (tmp_path / "demo" / "pretraining.txt").read_text()
    assert again.count("was trained before") == 2
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == written
    assert all(path.read_bytes() == weights for path, weights in models.items())

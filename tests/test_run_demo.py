"""The demo: what it trains again and what not, Ctrl-C, and all of it on a tiny world."""

import json
import re
import runpy

import places
import pytest
import torch
from transformers import AutoConfig

from unicoder_vl_hf.runs.checkpoints import CheckpointFolder
from unicoder_vl_hf.scenes import world as scenes

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


def test_ctrl_c_ends_in_a_line(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.run_pretraining, "main", lambda words: None)  # stopped, with a checkpoint
    monkeypatch.setattr("sys.argv", ["examples/run_demo.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(places.EXAMPLES / "run_demo.py"), run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "run_demo.py: stopped. Run again, it goes on.\n"


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": True}], ids=["float32", "bfloat16"])
def test_the_whole_way(script, monkeypatch, tmp_path, capsys, capabilities):
    """With a few steps on a few scenes: it learned nothing, and says so; and again, without training."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)  # of whatever machine this is
    sizes = {"num_train": 40, "num_val": 6, "num_test": 8, "captions_per_image": 2}
    build = scenes.build_scenes
    monkeypatch.setattr(scenes, "build_scenes", lambda folder: build(folder, **sizes))
    for module in (script.run_pretraining, script.run_retrieval):
        monkeypatch.setattr(module, "main", lambda words, run=module.main: run([*words, "--max_steps", "2"]))
    arguments = ["--output_dir", str(tmp_path / "demo"), "--candidates", "3", "--num_queries", "2"]
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

    models = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("model.safetensors")}
    with pytest.raises(ValueError, match=says):
        script.main(arguments)
    assert "was trained before" in capsys.readouterr().out
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == written
    assert all(path.read_bytes() == weights for path, weights in models.items())

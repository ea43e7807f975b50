"""The benchmarks run in miniature: their figures say nothing here, but that both sides do the same work is checked."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from places import ROOT

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/, as a script there finds its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


QUICK = ["scoring-float32", "search-float32", "training-float32", "share-float32"]


def test_rows_of_the_table(benchmark, monkeypatch, tmp_path, capsys):
    """Measured once: the same command goes on with what is missing."""
    table = benchmark("table")
    has = table.has
    monkeypatch.setattr(table, "has", lambda need: need != "amx_bf16" and has(need))
    output = tmp_path / "bench.json"
    command = ["--miniature", "--output", str(output), "--rows"]
    table.main([*command, *QUICK[:2]])
    first = json.loads(output.read_text())
    assert list(first["rows"]) == QUICK[:2]
    capsys.readouterr()
    table.main([*command, *QUICK, "minilm-bfloat16"])
    result, out = json.loads(output.read_text()), capsys.readouterr().out
    assert list(result["rows"]) == QUICK and result["rows"]["scoring-float32"] == first["rows"]["scoring-float32"]
    assert "scoring-float32: " not in out.split("| row |")[0] and "training-float32: " in out
    figures = result["rows"]["training-float32"]["figures"]
    assert figures.keys() == {"random", "sorted"} and set(figures["random"]) == {"min", "median", "max"}
    assert "| training-float32 | random | at least 3.5 |" in out
    assert "Open: minilm-bfloat16" in out and "needs amx_bf16. python benchmarks/table.py --rows minilm-bfloat16" in out
    assert result["rates"]["float32"].keys() == {"scoring", "training"} and result["peak"]["float32"] > 0
    with pytest.raises(ValueError, match="of another machine, version or scale"):
        table.main(["--output", str(output), "--rows", "memory"])


def test_the_row_of_onnx(benchmark, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("transformers", minversion="5.24")
    table, output = benchmark("table"), tmp_path / "bench.json"
    table.main(["--miniature", "--output", str(output), "--rows", "search-onnx"])
    figures = json.loads(output.read_text())["rows"]["search-onnx"]["figures"]
    assert figures.keys() == {"sorted", "padded"} and figures["padded"]["min"] > 0


def test_both_sides_train_on_the_same_rows(benchmark):
    work = benchmark("work")
    job = work.TrainingJob(12)
    batch = job.batch([3, 0, 7])
    same = job.of_rival(batch)
    real = batch["attention_mask"].sum() + batch["region_attention_mask"].sum()
    assert real == same["attention_mask"].sum() + same["visual_attention_mask"].sum() == job.lengths([3, 0, 7]).sum()
    width = batch["input_ids"].shape[1]
    assert torch.equal(same["labels"][:, :width], batch["labels"]) and (same["labels"][:, width:] == -100).all()
    assert torch.equal(batch["labels"][:1, :5], job.batch([3])["labels"][:, :5])  # a row is its own, in any batch
    assert np.array_equal(np.sort(job.sorted_rows()), np.arange(12))


def test_a_row_whose_sides_differ_is_no_row(benchmark, monkeypatch, tmp_path):
    table = benchmark("table")
    score = table.VisualBert.score
    monkeypatch.setattr(table.VisualBert, "score", lambda self, pairs: score(self, pairs[1:]))
    with pytest.raises(RuntimeError, match="do not do the same work: rival of sorted"):
        table.main(["--miniature", "--output", str(tmp_path / "bench.json"), "--rows", "scoring-float32"])
    assert not (tmp_path / "bench.json").exists()


def test_the_memory_of_a_worker_is_its_own(benchmark):
    table = benchmark("table")
    ballast = np.ones(2**26)  # 512 MB here
    assert len(ballast) and table.megabytes() > 512
    found = table.worker("step-ours", table.MINIATURE)
    assert 50 < found["megabytes"] < table.megabytes() - 256


def test_gpu_check_in_miniature(benchmark, monkeypatch, tmp_path, capsys):
    """All stages but the tests, which run here anyway, and the attentions that compile."""
    check = benchmark("gpu_check")
    monkeypatch.setitem(check.STAGES, "tests", lambda *_: {"passed": 0, "skipped": {}, "failed": {}})
    monkeypatch.setattr(check, "flex_attention", lambda *_: sys.modules["no flex here"])
    output = tmp_path / "gpu.json"
    assert check.main(["--device", "cpu", "--tiny", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["scoring"]["bfloat16"]["share_of_peak"] > 0
    training = result["training"]["bfloat16"]
    assert training["packed, SDPA in groups"]["random"]["ratio"] > 0
    assert "does not run" in training["packed, flash-attn"]
    flex = training["packed, flex"]  # which has no backward on a CPU, and dropout of attention's weights nowhere
    assert "dropout" not in flex.get("does not run", "")
    attention = result["attention"]
    assert "does not run" in attention["flash-attn"] and "no flex here" in attention["flex"]["does not run"]
    for way in ("grouped", "grouped, cuDNN", "nested"):
        assert attention[way]["difference"] < 0.02 and attention[way]["first"] > 0
    assert {found["rows"] for found in result["largest"].values()} >= {16}
    took = result["took"]
    capsys.readouterr()
    assert check.main(["--device", "cpu", "--tiny", "--output", str(output)]) == 0  # nothing is left to do
    assert json.loads(output.read_text())["took"] == took
    if not torch.cuda.is_available():
        assert check.main([]) == 1 and "There is no GPU here" in capsys.readouterr().err


def test_tests_that_hang_end_no_check(benchmark):
    check = benchmark("gpu_check")
    found = check.tests(dataclasses.replace(check.TINY, patience_with_tests=0.1), {})
    assert list(found["failed"]) == ["pytest"] and found["passed"] == 0


WITHOUT_DATASETS = """
import sys
import pytest
sys.modules.update(dict.fromkeys(("datasets", "evaluate")))
sys.path.insert(0, "benchmarks")
import gpu_check, proof_gpu
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu", "--co", "tests/test_gpu.py"]))
"""


def test_the_commands_for_a_gpu_need_no_datasets():
    """Which a lent machine may lack: both scripts are imported, and the tests that one of them runs."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_DATASETS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "test_gpu.py::" in done.stdout, done.stdout + done.stderr


def test_the_time_from_a_photo_to_its_scores(benchmark, capsys, monkeypatch):
    """Of one row, with a tiny model in place of the BERT-base."""
    latency = benchmark("photo_latency")

    def small(feature_dim):
        return tiny.model(UnicoderVLForImageTextRetrieval, region_feature_dim=feature_dim), tiny.processor()

    monkeypatch.setattr(latency, "checkpoint", small)
    latency.main("ResNet-50, 448")
    *_, row = capsys.readouterr().out.splitlines()
    title, regions, found, rate, scored = [cell.strip() for cell in row.strip("|").split("|")]
    assert title == "`grid`, ResNet-50, 448 pixels" and regions == "50"
    assert all(float(cell) > 0 for cell in (found, rate, scored))


def test_the_proof_of_relations_leaves_out_what_it_says(benchmark, monkeypatch, tmp_path, capsys):
    """And trains nothing twice. What the scripts themselves do with these options their own tests say."""
    relations, commands = benchmark("relations"), []

    def run(words):
        words = [str(word) for word in words]
        commands.append(" ".join(words).replace(f"{tmp_path}/", ""))
        if "--output_dir" in words:
            Path(words[words.index("--output_dir") + 1], "trainer_state.json").touch()
        elif words[2] == "foil":
            Path(words[3]).touch()
        else:
            recall = dict.fromkeys(relations.RECALLS, 0.5)
            told = {kind: {"accuracy": 0.25} for kind in relations.KINDS}
            report = {"report": {"rows": [{"metrics": recall}] * 2}}
            Path(words[-1]).write_text(json.dumps(report | {"results": {"first stage": told, "cross-encoder": told}}))

    monkeypatch.setattr(relations, "run", run)
    command = ["--output", str(tmp_path / "proof"), "--seeds", "3", "4", "--max_steps", "2"]
    relations.main(command)
    trained = [words for words in commands if "--output_dir" in words and "--seed 3" in words]
    assert [words.split("seed-3/")[1].split()[0] for words in trained] == [
        "expressions", "foils-all", "retrieval-all", "foils-without-expressions", "retrieval-without-expressions",
        "retrieval-without-foils", "two-vectors-alone",
    ]  # fmt: skip
    begins = [words.partition("--model_name_or_path proof/seed-3/")[2].split(" ")[0] for words in trained]
    assert begins == ["", "expressions", "foils-all", "", "foils-without-expressions", "expressions", ""]
    with_foils = ["--foils proof/train_foils.jsonl" in words for words in trained]
    assert with_foils == [False, True, True, True, True, False, False]
    assert all("--max_steps 2" in words for words in trained)
    assert len(commands) == 2 * (len(trained) + 4 * 2) + 2
    table = (tmp_path / "proof" / "relations.md").read_text()
    assert table in capsys.readouterr().out and table.count("| 50.0, 50.0 | 50.0, 50.0 | 25.0, 25.0 |") == 7
    assert (tmp_path / "proof" / "relations.png").exists()
    one = [word for word in command if word != "4"]
    relations.main([*one, "--only", relations.ALL])  # what was measured before stays
    assert (tmp_path / "proof" / "relations.md").read_text() == table
    assert len(commands) == 2 * (len(trained) + 4 * 2) + 2

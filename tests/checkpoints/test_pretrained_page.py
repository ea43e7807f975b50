"""docs/pretrained.md as it is read: three commands against a Hub of random weights, and LoRA on an imported model."""

import io
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import sister_files
import small_world
import torch
import visual_genome_files
import yaml
from hub_stub import HubStub
from PIL import Image
from places import ROOT
from test_docs import blocks

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.checkpoints import import_checkpoint
from unicoder_vl_hf.scenes.world import scene_tokenizer

PAGE = ROOT / "docs" / "pretrained.md"
WORDS = "two dogs in the snow".split()


def packed(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def repositories() -> dict[str, dict[str, bytes]]:
    """A small UNITER and a narrow detector, both with features of full width, and the words of BERT's number."""
    sizes = sister_files.TINY | {"vocab": 28996, "feature_dim": 2048, "classes": visual_genome_files.CLASSES}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [f"Word{number}" for number in range(28996 - len(words))]
    network = visual_genome_files.small_yaml()
    detector = visual_genome_files.frcnn_weights(visual_genome_files.Reference(network))
    return {
        "visualjoyce/transformers4vl-uniter-base": {
            "config.json": json.dumps({"model_type": "uniter", "num_attention_heads": 2}).encode(),
            "pytorch_model.bin": packed(sister_files.uniter(**sizes)),
            "README.md": b"---\nlicense: mit\n---\nUNITER.",
        },
        "google-bert/bert-base-cased": {"vocab.txt": "\n".join(words).encode(), "config.json": b"{}"},
        "unc-nlp/frcnn-vg-finetuned": {
            "config.yaml": yaml.safe_dump(network).encode(),
            "pytorch_model.bin": packed(detector),
        },
    }


@pytest.mark.slow
def test_three_commands_from_photos_to_a_gallery(tmp_path):
    lines = blocks(PAGE, "bash")[0].splitlines()
    assert lines == blocks(ROOT / "README.md", "bash")[1].splitlines()
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(255, size=(90, 120, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    run = "from unicoder_vl_hf.cli import main; sys.exit(any(main(shlex.split(line)[1:]) for line in sys.argv[1:]))"
    with HubStub() as hub:
        hub.repositories |= {name: [files] for name, files in repositories().items()}
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", f"import shlex, sys; {run}", *lines],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert hub.unknown == []
        revision = hub.revision("visualjoyce/transformers4vl-uniter-base")
    report = json.loads((tmp_path / "uniter" / "import_report.json").read_text())
    assert (report["revision"], report["licence"]) == (revision, "mit")
    assert report["tokenizer"] == "google-bert/bert-base-cased"
    assert "not of the kind" not in done.stderr  # these regions are what the model expects
    found = done.stdout.splitlines()
    assert found[-1] == "Gallery: found.html" and (tmp_path / "found.html").exists()
    ranking = [line.split()[-1] for line in found[-3:-1]]
    store = RegionStore(tmp_path / "regions")
    scorer = ImageTextScorer.from_pretrained(tmp_path / "uniter", store, verbose=False)
    tokens = scorer.processor.tokenizer.tokenize(shlex.split(lines[2])[2])
    assert tokens == WORDS
    assert ranking == [name for name, _ in scorer.rank(" ".join(WORDS), ["one", "two"], top_k=2)]


def test_lora_trains_a_few_numbers_and_becomes_a_model_like_any_other(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="needs the extra [lora]")
    world, tokenizer = small_world.build(tmp_path), scene_tokenizer()
    store = RegionStore(world / "regions")
    sizes = {"vocab": len(tokenizer), "feature_dim": store.feature_dim, "classes": store.provenance["num_classes"]}
    source = sister_files.save(sister_files.uniter(**sister_files.TINY | sizes), tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "words")
    import_checkpoint(source, tmp_path / "uniter", tokenizer=str(tmp_path / "words"))
    monkeypatch.chdir(tmp_path)
    for name in ("captions.jsonl", "regions"):
        (tmp_path / name).symlink_to(world / name)
    (block,) = blocks(PAGE, "python")
    names: dict = {}
    exec(compile(block, str(PAGE), "exec"), names)

    captions, images = ["a red circle", "a blue star"], list(store)[:3]
    before, tuned = (
        ImageTextScorer.from_pretrained(name, store, verbose=False).score(captions, images)
        for name in ("uniter", "uniter-tuned")
    )
    assert np.abs(tuned - before).max() > 1e-3
    base = ImageTextScorer.from_pretrained("uniter", store, verbose=False)
    adapted = peft.PeftModel.from_pretrained(base.model, "uniter-lora").merge_and_unload()
    again = ImageTextScorer(adapted, base.processor, store, verbose=False).score(captions, images)
    np.testing.assert_allclose(again, tuned, rtol=0, atol=1e-4)
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, weight in type(adapted).from_pretrained("uniter").state_dict().items()
        if not torch.equal(weight, adapted.state_dict()[name])
    }
    assert changed == {"query", "value", "matching_head"}

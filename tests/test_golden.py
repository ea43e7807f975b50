"""
What users of commit 9bccc44 have on their disks opens, gives what it gave, and goes on where it was stopped. The files
are those of golden/make_golden.py, and are never written anew: an older version wrote them.
"""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import small_world
import test_conversion
import test_extraction
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification
from two_processes import run

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.regions.conversion import convert
from unicoder_vl_hf.regions.validation import validate
from unicoder_vl_hf.runs.arguments import run_identity
from unicoder_vl_hf.scoring.checkpoints import load_for_store
from unicoder_vl_hf.search.command import make_index, run_search
from unicoder_vl_hf.tasks.pretraining.loop import LoopArguments
from unicoder_vl_hf.tasks.pretraining.setup import PretrainingArguments
from unicoder_vl_hf.tasks.retrieval.mining import mine

GOLDEN = Path(__file__).parent / "golden" / "9bccc44"
LOOP = {"max_steps": 6, "train_batch_size": 4, "gradient_accumulation_steps": 1, "max_validation_pairs": 4}
LOOP |= {"mixed_precision": "no", "seed": 5, "learning_rate": 1e-3}
TRAINER = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False}
TRAINER |= {"contrastive_weight": 1, "projection_dim": 8, "max_validation_images": 4, "seed": 5}
TRAINER |= {"learning_rate": 1e-3, "eval_strategy": "no", "save_strategy": "steps", "load_best_model_at_end": False}


@pytest.fixture
def disk(tmp_path):
    """A copy, in which names are the relative ones that they were."""
    shutil.copytree(GOLDEN, tmp_path / "disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "disk")
        yield tmp_path / "disk"


@pytest.fixture
def store(disk):
    return RegionStore("world/regions")


@pytest.fixture
def expected(disk):
    return json.loads((disk / "expected.json").read_text())


def assert_same_weights(folder, other):
    found, expected = load_file(Path(folder) / "model.safetensors"), load_file(Path(other) / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Machines round otherwise; three steps change the weights by 1e-3 each.
        assert (found[name] - value).abs().max() < 1e-4, name


def test_a_store(store):
    assert len(store) == 17 and not list(validate(store.path))
    assert store.provenance["feature_dim"] == store["test-00000"].features.shape[1] == 256


def test_checkpoints_score_as_they_did(store, expected):
    scorer = ImageTextScorer(*load_for_store("retrieval", store), store)
    scores = scorer.score(expected["captions"], list(store))
    np.testing.assert_allclose(scores, np.load("scores.npy"), atol=1e-5)
    assert type(AutoModelForPreTraining.from_pretrained("pretrained")).__name__ == "UnicoderVLForPreTraining"


def test_the_code_that_a_checkpoint_carries_still_runs(store, expected):
    """As it was saved then: without the package this is what computes, with the package it must not get in the way."""
    assert (GOLDEN / "pretrained" / "modeling_unicoder_vl.py").exists()
    model = AutoModelForSequenceClassification.from_pretrained("pretrained", trust_remote_code=True)
    assert model.config.model_type == "unicoder_vl"


def test_an_index(expected):
    make_index("world/regions", "anew", model="retrieval")
    for index in ("index", "anew"):
        found = run_search(
            expected["query"], index=index, model="retrieval", regions="world/regions", top_k=5, candidates=5
        )
        assert {hit.name: hit.score for hit in found.hits} == pytest.approx(dict(expected["hits"]), abs=1e-5)


@pytest.mark.parametrize(
    "script, kind, options", [("run_pretraining", "pretraining", LOOP), ("run_retrieval", "retrieval", TRAINER)]
)
def test_an_unfinished_run(script, kind, options, disk):
    start = {"pretraining": small_world.save_bert(Path("bert"), dropout=0.1), "retrieval": Path("pretrained")}[kind]
    output = Path(f"unfinished_{kind}")
    before = load_file(output / "checkpoint-3" / "model.safetensors")
    arguments = small_world.arguments(Path("world"), start, output, resume_from_checkpoint="latest", **options)
    run(script, arguments)
    finished = {"pretraining": "pretrained", "retrieval": "retrieval"}[kind]
    assert_same_weights(output, finished)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (load_file(output / "model.safetensors")[name] - before[name]).abs().max() > 1e-3


def test_what_makes_a_run_is_what_it_was():
    """No option more, which a resume could then not change, but for those that there were not."""
    state = json.loads((GOLDEN / "unfinished_pretraining" / "checkpoint-3" / "training_state.json").read_text())
    today = run_identity(PretrainingArguments(), LoopArguments(output_dir="x"))
    new = {"caption_ids", "initializer_range", "tokens_per_batch", "streaming", "shuffle_buffer_size", "align_regions"}
    new |= {"num_text_layers", "location_initializer_range"}
    assert today.keys() - state["identity"].keys() == new
    assert state["identity"].keys() - today.keys() == {"train_pairs", "total_steps"}  # facts of the data


def test_unfinished_scores(store, expected, monkeypatch):
    computed, embed = [], ImageTextScorer._compute

    def counting(self, blocks, target, share, state):
        computed.extend(share)
        return embed(self, blocks, target, share, state)

    monkeypatch.setattr(ImageTextScorer, "_compute", counting)
    scorer = ImageTextScorer(*load_for_store("retrieval", store), store, block_pairs=40)
    scores = scorer.score(expected["captions"], list(store), output_dir="unfinished_scores")
    np.testing.assert_allclose(scores, np.load("scores.npy"), atol=1e-5)
    assert computed and not {0, 1, 2} & set(computed)


def test_unfinished_mining(disk, monkeypatch):
    monkeypatch.setattr(ImageTextScorer, "_compute", lambda *_: pytest.fail("scored again"))
    rule = {"num_negatives": 2, "images_per_set": 5, "split": "train"}
    mined = mine("retrieval", "world/captions.jsonl", "world/regions", "unfinished_mining", **rule)
    found, expected = mined.to_dict(), datasets.load_from_disk("mined").to_dict()
    for name, column in expected.items():
        if name.endswith("_scores"):  # sigmoids, which another CPU rounds otherwise
            np.testing.assert_allclose(np.concatenate(found[name]), np.concatenate(column), rtol=1e-6)
        else:
            assert found[name] == column, name
    assert found.keys() == expected.keys()


def test_an_unfinished_conversion(disk):
    kept = (disk / "unfinished_conversion" / "regions-00001.safetensors").read_bytes()
    store = convert("features.tsv", "unfinished_conversion", shard_size=100, resume=True)
    test_conversion.assert_holds(store, range(1, 10))
    assert (store.path / "regions-00001.safetensors").read_bytes() == kept


def test_an_unfinished_extraction(disk):
    detector = test_extraction.ColourDetector(disk / "computed")
    store = test_extraction.run(Path("photos"), Path("unfinished_extraction"), detector, batch_size=1)
    # Another Pillow or NumPy rounds otherwise, by one place of float16.
    test_extraction.assert_same(store, test_extraction.run(Path("photos"), Path("anew")), tolerance=1e-3)
    assert len((disk / "computed").read_text().splitlines()) == 12 - 9

"""benchmarks/proof_gpu.py in miniature, on the CPU: packed inputs, all stages, and going on after the minutes."""

import dataclasses
import importlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import places
import pytest
import small_world
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from unicoder_vl_hf import RegionStore, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.data.foils import write_foils
from unicoder_vl_hf.data.masking import Masking
from unicoder_vl_hf.scenes.foils import scene_foils
from unicoder_vl_hf.scenes.world import sample_scene


@pytest.fixture(scope="module")
def proof():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(places.ROOT / "benchmarks"))
        yield importlib.import_module("proof_gpu")


@pytest.fixture(scope="module")
def packed(proof, tmp_path_factory):
    """A world, a BERT with pieces that no caption has, foils; and the folder of both parts."""
    folder = tmp_path_factory.mktemp("proof")
    world, bert = small_world.build(folder), small_world.save_bert(folder / "bert", dropout=0.0, vocab_size=300)
    foils = [foil for number in range(2) for foil in scene_foils(sample_scene(number, "test"))]
    foils = [dataclasses.replace(foil, text_only=[0.5]) for foil in foils]
    write_foils(folder / "foils.jsonl", foils)
    words = [world / "captions.jsonl", world / "regions", bert, folder / "foils.jsonl", folder / "inputs"]
    assert proof.main(["prepare", *map(str, words)]) == 0
    return folder


def copied(packed, output):
    inputs = output / "inputs"
    inputs.mkdir(parents=True)
    for part in ("1", "2"):
        proof_files = (packed / "inputs" / part).rglob("*")
        for path in proof_files:
            if path.is_file():
                target = inputs / path.relative_to(packed / "inputs" / part)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
    return inputs


def run(proof, output, *more: str) -> int:
    words = ["--device", "cpu", "--output", str(output), "--steps", "3", "--batch-size", "6", "--sizes", "bert", *more]
    return proof.main(words)


def test_packed_inputs_are_the_same(proof, packed, tmp_path):
    inputs = proof.Inputs(copied(packed, tmp_path), "cpu")
    store, extractor = RegionStore(packed / "world" / "regions"), inputs.processor.feature_extractor
    for number, image_id in enumerate(inputs.image_ids):
        record = store[image_id]
        count = len(record)
        scaled = (record.features - extractor.feature_mean) / extractor.feature_std
        assert np.allclose(inputs.regions["region_features"][number, :count], scaled, atol=1e-2)
        assert np.allclose(inputs.regions["region_locations"][number, :count], record.locations())
        assert inputs.object_ids[number].tolist()[:count] == record.object_ids.tolist()
        assert inputs.object_ids[number, count:].tolist() == [-1] * (inputs.object_ids.shape[1] - count)
    full, less = AutoTokenizer.from_pretrained(packed / "bert"), inputs.processor.tokenizer
    assert len(less) < len(full) == 300
    texts = [*inputs.captions, *(foil.foil for foil in inputs.foils)]
    assert [less.tokenize(text) for text in texts] == [full.tokenize(text) for text in texts]
    rows = [less.convert_tokens_to_ids(less.tokenize(text)) for text in texts[:3]]
    before = [full.convert_tokens_to_ids(full.tokenize(text)) for text in texts[:3]]
    weights = [BertModel.from_pretrained(folder).embeddings.word_embeddings.weight.float()
               for folder in (tmp_path / "inputs" / "bert", packed / "bert")]  # fmt: skip
    for ours, theirs in zip(rows, before, strict=True):
        assert torch.allclose(weights[0][ours], weights[1][theirs], atol=1e-3)


def test_a_batch_of_pretraining(proof, packed, tmp_path):
    inputs = proof.Inputs(copied(packed, tmp_path), "cpu")
    rows = inputs.rows["train"][torch.tensor([0, 1, 2, 5])]  # the first two are of one image
    generator = torch.Generator().manual_seed(0)
    batch = proof.pretraining_batch(inputs, rows, generator, Masking(mlm_probability=0.5, moc_probability=0.5))
    assert batch["matching_labels"].tolist() == [1, 1, 1, 1, 0, -100, 0, 0]
    hidden = batch["labels"] != -100
    mask = inputs.processor.tokenizer.mask_token_id
    assert hidden.any() and torch.equal(hidden, batch["input_ids"] == mask)
    whole = torch.where(hidden, batch["labels"], batch["input_ids"])
    assert torch.equal(whole, inputs.text["input_ids"][rows.repeat(2)])
    chosen = batch["region_labels"] != -100
    zero = (batch["region_features"] == 0).all(-1) & (batch["region_attention_mask"] == 1)
    assert chosen.any() and (zero <= chosen).all() and zero.any()
    batch = proof.retrieval_batch(inputs, rows, generator, 0.5)
    assert batch["mismatches"][0].tolist() == [False, False, True, True]
    hidden = batch["input_ids"] == mask
    assert hidden.any() and torch.equal(batch["input_ids"][~hidden], inputs.text["input_ids"][rows][~hidden])
    zero = (batch["region_features"] == 0).all(-1)[batch["region_attention_mask"] == 1]
    assert zero.any() and not zero.all()


def test_the_whole_way_in_two_calls_is_that_in_one(proof, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof, "LOG_EVERY", 1)
    parts = [["--inputs", str(packed / "inputs" / part)] for part in ("1", "2")]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for output in (whole, pieces):
        assert run(proof, output, *parts[0]) == 1
        assert "Part 2 of the inputs is not here yet" in capsys.readouterr().out
    assert run(proof, whole, *parts[1]) == 0

    left = iter([1.0, 1.0, -1.0])  # over after the second step
    monkeypatch.setattr(proof.Plan, "left", lambda plan: next(left, -1.0))
    assert run(proof, pieces, *parts[1]) == 1
    assert "minutes are over in bert, pre-training: run again" in capsys.readouterr().out
    assert (pieces / "bert" / "pre-training.pt").exists()
    monkeypatch.setattr(proof.Plan, "left", lambda plan: 1.0)
    assert run(proof, pieces) == 0
    assert not (pieces / "bert" / "pre-training.pt").exists()

    def losses(output, name):
        rows = map(json.loads, (output / "bert" / f"{name}.jsonl").read_text().splitlines())
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    for name in ("pre-training", "fine-tuning"):
        assert losses(pieces, name) == losses(whole, name) and len(losses(whole, name)) == 3
        assert (pieces / "bert" / f"{name}.png").exists()
    results = [json.loads((output / "proof.json").read_text())["models"]["bert"] for output in (whole, pieces)]
    assert results[0]["exhaustive"]["image_retrieval_recall@5"] == results[1]["exhaustive"]["image_retrieval_recall@5"]
    assert list(results[0]) == proof.stages_of("bert") == [name for name in proof.STAGES if name != "folding"]
    assert results[0]["foils"]["text only"]["all"]["accuracy"] == 1
    table = (pieces / "proof.md").read_text()
    assert "| bert | exhaustive |" in table and "| bert | shuffled regions |" in table
    gain = results[1]["foils"]["above first stage"]["all"]
    assert f"| bert | above first stage | {gain['num_foils']:,} | {100 * gain['gain']:+.1f} | " in table
    assert run(proof, pieces, "--batch-size", "5") == 1
    assert "another machine, version or plan" in capsys.readouterr().err


def test_a_bert_that_reads_words_alone(proof, packed, tmp_path, capsys):
    parts = [["--inputs", str(packed / "inputs" / part)] for part in ("1", "2")]
    assert run(proof, tmp_path, *parts[0]) == 1
    assert run(proof, tmp_path, *parts[1], "--sizes", "words") == 0
    found = json.loads((tmp_path / "proof.json").read_text())["models"]["words"]
    assert list(found) == ["fine-tuning", "folding", "first stage", "exhaustive", "foils"]
    weight = str(found["folding"]["weight"])
    assert found["folding"]["recall_sums"][weight] == max(found["folding"]["recall_sums"].values())
    trained, folded = (
        UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path / "words" / name) for name in ("trained", "fine-tuned")
    )
    depth = BertConfig.from_pretrained(packed / "bert").num_hidden_layers
    assert (folded.config.num_hidden_layers, folded.config.num_text_layers) == (depth + 2, depth)
    assert folded.config.joint_dropout_prob == 0.2 and folded.config.similarity_weight == 0
    inputs = proof.Inputs(tmp_path / "inputs", "cpu")
    captions, image_ids, _ = inputs.test("train")
    assert folded.config.query_bank_size == [len(captions), len(image_ids)] and not folded.config.similarity_in_training
    assert found["folding"]["first stage"] != found["folding"]["first stage and query bank"]
    # Begun again, it keeps the bank and the scores of the call before.
    plan, splits, test = proof.Plan("cpu", 1, 1e9, 6, 3), [], inputs.test
    inputs.test = lambda split="test": splits.append(split) or test(split)
    again = proof.Proof("words", tmp_path / "words", inputs, plan, tmp_path / "inputs" / "bert")
    kept = (tmp_path / "words" / "val-scores" / "scores.npy").stat().st_mtime_ns
    assert again.folding() == found["folding"] | {
        "recall_sums": {int(name): value for name, value in found["folding"]["recall_sums"].items()}
    }
    assert splits == ["val"] and (tmp_path / "words" / "val-scores" / "scores.npy").stat().st_mtime_ns == kept
    scale = trained.first_stage.logit_scale.exp()
    torch.testing.assert_close(
        folded.matching_head.weight, trained.matching_head.weight * scale / (scale + float(weight))
    )
    before = BertModel.from_pretrained(tmp_path / "inputs" / "bert").embeddings.word_embeddings.weight.float()
    aligned = inputs.aligned["weight"]
    moved = [
        (was - now).abs().max().item()
        for was, now in (
            (before, trained.bert.embeddings.word_embeddings.weight),
            (aligned, trained.bert.embeddings.region_embeddings.feature_projection.weight),
        )
    ]
    assert 0 < moved[0] < 2e-6 < moved[1] < 4e-5  # three steps of a hundred that warm up, at rates of 3e-5 and 5e-4


def test_as_many_steps_are_taken_as_fit(proof, monkeypatch, tmp_path):
    """By a clock that goes on by 0.1 s whenever it is read, twice a step: 0.4 of a minute are 120 steps."""
    readings = itertools.count()
    monkeypatch.setattr(proof, "time", SimpleNamespace(perf_counter=lambda: next(readings) / 10))
    monkeypatch.setattr(proof, "LOG_EVERY", 1)
    model, shares, draws = torch.nn.Linear(1, 1), [], set()

    def loss_of(model, rows, generator, done):
        shares.append(done)
        draws.add(torch.rand(1, generator=generator).item())
        return model.weight.square().sum(), {}

    plan = proof.Plan("cpu", minutes=1, deadline=1e9, batch_size=4, steps=None)
    inputs = SimpleNamespace(rows={"train": torch.arange(9)})
    found = proof.train(plan, tmp_path, "pre-training", model, inputs, loss_of, 1e-2)
    assert found["step"] == found["steps"] == len(shares) and 117 <= found["step"] <= 120
    assert shares[2:] == sorted(shares[2:]) and shares[-1] == (found["step"] - 1) / found["step"]
    assert found["pairs"] == 4 * found["step"] and len(draws) == found["step"]  # no step has the masks of another


def test_the_pace_does_not_count_an_earlier_call(proof, monkeypatch, tmp_path):
    """By the same clock: the first call ends before there is a pace."""
    readings = itertools.count()
    monkeypatch.setattr(proof, "time", SimpleNamespace(perf_counter=lambda: next(readings) / 10))
    monkeypatch.setattr(proof, "LOG_EVERY", 10)
    model, inputs = torch.nn.Linear(1, 1), SimpleNamespace(rows={"train": torch.arange(9)})

    def train(deadline):
        plan = proof.Plan("cpu", minutes=1, deadline=deadline, batch_size=4, steps=None)
        loss = lambda model, *_: (model.weight.square().sum(), {})  # noqa: E731
        return proof.train(plan, tmp_path, "pre-training", model, inputs, loss, 1e-2)

    with pytest.raises(proof.OutOfTime):
        train(0.0)
    assert 2390 <= train(1e9)["step"] <= 2400  # 0.1 s are ten steps, and 0.4 of a minute 24 s


def test_a_stage_that_looks_at_no_clock_begins_with_time_enough(proof, monkeypatch):
    def begins(stage, left, minutes=6.5, device="cuda"):
        plan = proof.Plan(device, 5, deadline=left, batch_size=4, steps=None)
        return plan.has_time_for(stage, minutes)

    monkeypatch.setattr(proof, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    assert [begins("exhaustive", left) for left in (121, 119)] == [True, False]
    assert [begins("folding", left) for left in (61, 59)] == [True, False]
    assert begins("exhaustive", 31, minutes=1) and not begins("exhaustive", 29, minutes=1)
    assert [begins("fine-tuning", left) for left in (1, -1)] == [True, False]
    assert [begins("exhaustive", left, device="cpu") for left in (1, -1)] == [True, False]


def test_a_part_that_is_too_large_is_refused(proof, packed, monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "MOST_BYTES", 1000)
    words = [packed / "world" / "captions.jsonl", packed / "world" / "regions", packed / "bert", packed / "foils.jsonl"]
    with pytest.raises(ValueError, match=r"Part 1 has .* bytes, expected at most 1,000"):
        proof.main(["prepare", *map(str, words), str(tmp_path / "inputs")])
    assert not (tmp_path / "inputs").exists()

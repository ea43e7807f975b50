"""examples/evaluate_retrieval.py on a tiny checkpoint, against pair-by-pair forward passes."""

import json

import numpy as np
import places
import pytest
import tiny
import torch
from transformers import BertConfig

from unicoder_vl_hf import (
    RegionStoreWriter,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
)
from unicoder_vl_hf.scoring.checkpoints import checkpoint_provenance, load_for_scoring
from unicoder_vl_hf.tasks.retrieval.metrics import confidence_intervals, rank_queries, retrieval_metrics

IMAGES = ["one", "two", "three"]
CAPTIONS = {"one": ["a dog runs .", "the dog"], "two": ["a cat sleeps on the grass ."], "three": ["cat", "grass", "on"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoints of each class, a store, and captions with a split that is not the test's."""
    folder = tmp_path_factory.mktemp("world")
    pretrained = tiny.model(UnicoderVLForPreTraining)
    processor = tiny.processor()
    pretrained.save_pretrained(folder / "pretrained")
    processor.save_pretrained(folder / "pretrained")
    retrieval = UnicoderVLForImageTextRetrieval.from_pretrained(folder / "pretrained")
    for name, model in (("retrieval", retrieval), ("base", pretrained.bert), ("halved", retrieval)):
        (model.bfloat16() if name == "halved" else model).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    with RegionStoreWriter(folder / "regions", dtype="float32") as writer:
        for number, name in enumerate([*IMAGES, "other"], 1):
            writer.write(tiny.record(name, num_regions=number))
    rows = [{"image_id": i, "caption": text, "split": "test"} for i in IMAGES for text in CAPTIONS[i]]
    rows.insert(0, {"image_id": "other", "caption": "dog", "split": "val"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(world, tmp_path, capsys):
    def run(model, *options):
        output = tmp_path / "output.json"
        script = places.script("evaluate_retrieval")
        paths = {"model": model, "captions": "captions.jsonl", "regions": "regions"}
        arguments = [word for name, path in paths.items() for word in (f"--{name}", str(world / path))]
        script.main([*arguments, "--output", str(output), *options])
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


def scores_pair_by_pair(num_images=3, captions_per_image=9) -> tuple[np.ndarray, list[int]]:
    model, processor = tiny.model(UnicoderVLForPreTraining), tiny.processor()
    records = [tiny.record(name, num_regions=number) for number, name in enumerate(IMAGES, 1)][:num_images]
    pairs = [(text, i) for i in range(num_images) for text in CAPTIONS[IMAGES[i]][:captions_per_image]]
    with torch.no_grad():
        scores = [
            [model(**processor(text=text, regions=record, return_tensors="pt")).scores.item() for record in records]
            for text, _ in pairs
        ]
    return np.array(scores, dtype=np.float32), [i for _, i in pairs]


@pytest.mark.parametrize(
    "model, row", [("pretrained", "zero-shot, float32"), ("retrieval", "retrieval checkpoint, float32")]
)
def test_either_checkpoint_gives_what_pair_by_pair_gives(run, model, row):
    printed, values = run(model)
    scores, image_of_caption = scores_pair_by_pair()
    result = values["results"][row]
    assert result["metrics"] == retrieval_metrics(scores, image_of_caption)
    intervals = confidence_intervals([rank_queries(scores, image_of_caption)])
    assert {name: tuple(bounds) for name, bounds in result["intervals"].items()} == intervals
    assert "Retrieval: 3 images, all 6 captions\n\n| percent" in printed and f"| {row} " in printed
    assert values["test"] == "Retrieval: 3 images, all 6 captions" and values["paper"] == {}
    assert values["checkpoint"]["name"].endswith(model)
    assert values["regions"]["provenance"]["feature_dim"] == tiny.FEATURE_DIM


def test_first_images_and_captions(run):
    _, values = run("pretrained", "--num_images", "2", "--captions_per_image", "1")
    assert values["test"] == "Retrieval: the first 2 images, the first caption of each"
    expected = retrieval_metrics(*scores_pair_by_pair(num_images=2, captions_per_image=1))
    assert values["results"]["zero-shot, float32"]["metrics"] == pytest.approx(expected)


def test_bf16_beside_float32(run, tmp_path):
    _, values = run("pretrained", "--bf16", "--scores_dir", str(tmp_path / "scores"))
    assert list(values["results"]) == ["zero-shot, float32", "zero-shot, bfloat16"]
    scores = {name: np.load(tmp_path / "scores" / f"{name}-0" / "scores.npy") for name in ("float32", "bfloat16")}
    np.testing.assert_allclose(scores["float32"], scores_pair_by_pair()[0], rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(scores["bfloat16"] - scores["float32"]).max() < 0.2
    assert run("pretrained", "--bf16", "--scores_dir", str(tmp_path / "scores"))[1]["results"] == values["results"]


def test_an_image_without_regions_is_never_skipped(run, world, tmp_path):
    more = tmp_path / "captions.jsonl"
    more.write_text(
        (world / "captions.jsonl").read_text() + '{"image_id": "four", "caption": "dog", "split": "test"}\n'
    )
    with pytest.raises(ValueError, match="1 of 4 images with captions") as refused:
        run("pretrained", "--captions", str(more))
    assert "skip" not in str(refused.value)  # which this script cannot


def test_a_part_is_not_reported_as_the_whole(run):
    with pytest.raises(ValueError, match="Flickr30k has 1,000 test images, but the captions have 3"):
        run("pretrained", "--protocol", "flickr30k")


def test_refuses_a_checkpoint_without_its_matching_head(world, tmp_path):
    with pytest.raises(ValueError, match=r"base \(\['UnicoderVLModel'\]\) has no .*: its scores would be random"):
        load_for_scoring(world / "base")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert; expected a checkpoint of Unicoder-VL"):
        load_for_scoring(tmp_path)


def test_scores_in_float32_whatever_was_saved(world):
    model, _ = load_for_scoring(world / "halved")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_provenance_tells_weights_apart(world):
    found = {
        name: checkpoint_provenance(name, load_for_scoring(world / name)[0]) for name in ("pretrained", "retrieval")
    }
    assert found["pretrained"]["saved_by"] == "UnicoderVLForPreTraining"
    assert found["retrieval"]["saved_by"] == "UnicoderVLForImageTextRetrieval"
    digests = {name: of["scoring_weights_sha256"] for name, of in found.items()}
    assert digests["pretrained"] == digests["retrieval"]  # what scoring reads is the same
    model, _ = load_for_scoring(world / "retrieval")
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1e-3
    assert checkpoint_provenance("retrieval", model)["scoring_weights_sha256"] != digests["retrieval"]

"""The commands of foils: made of captions and regions on disk, and told by a checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_world
import torch

from unicoder_vl_hf import ImageTextScorer, RegionStore, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.data.foils import read_foils, write_foils
from unicoder_vl_hf.scenes.foils import scene_foils
from unicoder_vl_hf.scenes.world import sample_scene
from unicoder_vl_hf.search import UnicoderVLDualEncoder
from unicoder_vl_hf.tasks.foil import evaluate_foils, evaluation, metrics, text_only


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world, a checkpoint of random weights with a first stage, and foils of its scenes."""
    folder = tmp_path_factory.mktemp("foils")
    model, _, regions = small_world.save_retrieval(
        folder / "model", small_world.build(folder), spread=0.2, projection_dim=8, first_stage_trained=True
    )
    foils = [foil for split in ("val", "test") for n in range(5) for foil in scene_foils(sample_scene(n, split))]
    foils = [dataclasses.replace(foil, text_only=[-1.0, 1.0]) for foil in foils]
    write_foils(folder / "foils.jsonl", foils)
    return folder, model, regions, foils


def test_accuracies_are_those_of_all_pairs_scored_one_by_one(world):
    folder, model, regions, foils = world
    results = evaluate_foils(model, folder / "foils.jsonl", regions, output=folder / "accuracies.json")
    scorer = ImageTextScorer.from_pretrained(model, regions, verbose=False)
    encoder = UnicoderVLDualEncoder(scorer.model, scorer.processor, RegionStore(regions), model)
    right = {metrics.CROSS_ENCODER: 0, metrics.FIRST_STAGE: 0}
    for foil in foils:
        texts = [foil.caption, foil.foil]
        for name, (true, false) in {
            metrics.CROSS_ENCODER: scorer.score(texts, [foil.image_id])[:, 0],
            metrics.FIRST_STAGE: encoder.embed_captions(texts) @ encoder.embed_images([foil.image_id])[0],
        }.items():
            right[name] += true > false
    for name, count in right.items():
        assert results[name]["all"].accuracy == pytest.approx(count / len(foils))
    gain = results[metrics.GAIN]["all"]
    assert gain.gain == pytest.approx((right[metrics.CROSS_ENCODER] - right[metrics.FIRST_STAGE]) / len(foils))
    assert results[evaluation.TEXT_ONLY]["all"].accuracy == 0.5
    assert list(results) == ["cross-encoder", "first stage", "above first stage", "shuffled regions", "text only"]
    kinds = {"all", "colour", "shape", "size", "relation", "count"}
    assert all(set(of_scorer) == kinds for of_scorer in results.values())
    written = json.loads((folder / "accuracies.json").read_text())
    assert written["results"]["cross-encoder"]["all"] == dataclasses.asdict(results["cross-encoder"]["all"])


def test_what_would_fail_at_the_end_is_said_before(world, tmp_path, monkeypatch):
    _, model, regions, foils = world
    write_foils(tmp_path / "foils.jsonl", [*foils[:-1], dataclasses.replace(foils[-1], text_only=[1.0])])
    monkeypatch.setattr(evaluation, "_margins_of", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="text_only has several lengths"):
        evaluate_foils(model, tmp_path / "foils.jsonl", regions)
    monkeypatch.undo()
    write_foils(tmp_path / "few.jsonl", foils[::6])
    evaluate_foils(model, tmp_path / "few.jsonl", regions, output=tmp_path / "new" / "deep" / "accuracies.json")
    assert (tmp_path / "new" / "deep" / "accuracies.json").exists()


def test_several_models_count_with_their_mean(world, tmp_path, capsys, monkeypatch):
    folder, model, regions, _ = world
    other, *_ = small_world.save_retrieval(tmp_path / "other", Path(regions).parent, spread=0.3, projection_dim=8)
    runs = [evaluate_foils(each, folder / "foils.jsonl", regions) for each in (model, other)]
    assert evaluate_foils(Path(model), folder / "foils.jsonl", regions) == runs[0]
    both = evaluate_foils([model, other], folder / "foils.jsonl", regions, output=tmp_path / "accuracies.json")
    for name in ("cross-encoder", "shuffled regions"):
        for kind, accuracy in both[name].items():
            assert accuracy.accuracy == pytest.approx(np.mean([run[name][kind].accuracy for run in runs]))
            assert accuracy.num_foils == runs[0][name][kind].num_foils
    assert runs[0]["cross-encoder"] != runs[1]["cross-encoder"]
    assert "first stage" not in both and "above first stage" not in both  # which one of them lacks
    written = json.loads((tmp_path / "accuracies.json").read_text())
    assert [each["name"] for each in written["checkpoint"]] == [model, other]
    assert main(["foil-accuracy", model, model, str(folder / "foils.jsonl"), regions]) == 0
    assert "above first stage" in capsys.readouterr().out
    with pytest.raises(ValueError, match="model is an empty list"):
        evaluate_foils([], folder / "foils.jsonl", regions)
    monkeypatch.setattr(evaluation, "load_for_store", None)
    with pytest.raises(ValueError, match=r"There is no .*nowhere"):  # before any is measured
        evaluate_foils([model, str(tmp_path / "nowhere")], folder / "foils.jsonl", regions)


def test_a_query_bank_rests(world, tmp_path, monkeypatch):
    """It is of a search among many images: of captions of one it tells what is false of captions alone."""
    folder, _, regions, foils = world
    fields = {"matching_head": "similarity", "num_text_layers": 1, "projection_dim": 8, "first_stage_trained": True}
    plain, *_ = small_world.save_retrieval(tmp_path / "plain", Path(regions).parent, spread=0.2, **fields)
    banked = shutil.copytree(plain, tmp_path / "banked")
    model = UnicoderVLForImageTextRetrieval.from_pretrained(plain)
    model.set_query_bank(*torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1))
    model.save_pretrained(banked)
    texts, images = [foils[0].caption, foils[0].foil], [foils[0].image_id]
    scores = [ImageTextScorer.from_pretrained(each, regions).score(texts, images) for each in (plain, str(banked))]
    assert abs(scores[0] - scores[1]).max() > 1e-3
    said = []
    monkeypatch.setattr(evaluation.logger, "warning", said.append)
    with_bank, without = (evaluate_foils(str(each), folder / "foils.jsonl", regions) for each in (banked, plain))
    assert with_bank == without
    assert said == [f"{banked}: the query bank, which is for a search among many images, rests."]


def test_shuffled_regions_are_those_of_other_images(world, monkeypatch):
    """A scorer that knows which image it sees is right with its own regions, and with no other's."""
    folder, model, regions, _ = world
    first_feature = {image_id: record.features[0, 0] for image_id, record in RegionStore(regions).items()}

    def knowing(scorer):
        def score(captions, image_ids):
            own = [scorer.store[i].features[0, 0] == first_feature[i] for i in image_ids]
            true = np.arange(len(captions)) < len(captions) // 2
            return np.where(own, 1.0, -1.0) * true

        return score

    monkeypatch.setattr(evaluation, "by_matching_head", knowing)
    results = evaluate_foils(model, folder / "foils.jsonl", regions)
    assert results["cross-encoder"]["all"].accuracy == 1 and results["shuffled regions"]["all"].accuracy == 0


def test_the_command(world, capsys):
    folder, model, regions, _ = world
    assert main(["foil-accuracy", model, str(folder / "foils.jsonl"), regions, "--split", "test"]) == 0
    printed = capsys.readouterr().out
    assert "cross-encoder" in printed and "relation" in printed and "50.0 (50.0 to 50.0)" in printed
    assert main(["foil-accuracy", model, str(folder / "foils.jsonl"), regions, "--split", "none"]) == 1
    assert "no foils of the split 'none'" in capsys.readouterr().err


def test_foils_of_captions_are_made_by_the_command(tmp_path, monkeypatch, capsys):
    """Scenes whose classes are said to be COCO's, and captions that name animals."""
    monkeypatch.setattr(text_only, "BATCH_SIZE", 8)
    world = small_world.build(tmp_path)
    captions, animals = [], ("dog", "cat", "horse")
    for number, line in enumerate((world / "captions.jsonl").read_text().splitlines()):
        row = json.loads(line)
        captions.append(row | {"caption": f"a {animals[number // 2 % 3]} and nothing else of {number % 5} ."})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    words = ["foil", str(tmp_path / "foils.jsonl"), "--captions", str(tmp_path / "captions.jsonl")]
    words += ["--regions", str(world / "regions")]
    assert main(words) == 1
    assert "expected COCO's names among them" in capsys.readouterr().err
    manifest = json.loads((world / "regions/manifest.json").read_text())
    manifest["provenance"] |= {"class_names": None, "num_classes": 80}
    (world / "regions/manifest.json").write_text(json.dumps(manifest))
    assert main(words) == 0
    foils = read_foils(tmp_path / "foils.jsonl")
    assert f"{len(foils)} foils" in capsys.readouterr().out
    assert {foil.split for foil in foils} <= {"val", "test"} and {foil.kind for foil in foils} == {"animal"}
    assert sum(foil.word == "dog" for foil in foils) == sum(foil.foil_word == "dog" for foil in foils)
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    words[1] = str(tmp_path / "train.jsonl")
    assert main([*words, "--for-training"]) == 0
    train = read_foils(tmp_path / "train.jsonl")
    of_captions = len({(foil.image_id, foil.caption) for foil in train})
    assert f"{len(train):,} foils of {of_captions:,} captions to learn from" in capsys.readouterr().out
    assert {foil.split for foil in train} == {"train"}
    assert sum(foil.word == "dog" for foil in train) == sum(foil.foil_word == "dog" for foil in train) > 0
    more = ["foil", str(tmp_path / "more.jsonl")]
    assert main([*more, "--captions", "x"]) == 1
    assert "both captions and regions" in capsys.readouterr().err
    assert main([*more, "--splits", "train"]) == 1
    assert "'train' is the split that scorers are trained on" in capsys.readouterr().err
    assert main([*more, *words[2:], "--splits", "none"]) == 1
    assert "none" in capsys.readouterr().err

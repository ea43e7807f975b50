"""An imported model does all that ours do: it scores, goes on training, gets a first stage, and lives on the Hub."""

import numpy as np
import pytest
import sister_files
import small_world
import torch
from accelerate import Accelerator
from transformers import AutoModelForMultipleChoice, AutoProcessor

from unicoder_vl_hf import ImageTextScorer, RegionStore, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.checkpoints import import_checkpoint
from unicoder_vl_hf.scenes.world import scene_tokenizer
from unicoder_vl_hf.scoring.checkpoints import load_for_scoring
from unicoder_vl_hf.tasks.pretraining.evaluation import evaluate_pretraining
from unicoder_vl_hf.tasks.pretraining.setup import PretrainingArguments, prepare_pretraining
from unicoder_vl_hf.tasks.retrieval.first_stage import train_first_stage
from unicoder_vl_hf.tasks.retrieval.training import RetrievalArguments, prepare_retrieval


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, and beside them `uniter`, a random one of their vocabulary and features, imported."""
    path = small_world.build(tmp_path_factory.mktemp("imported"))
    store, tokenizer = RegionStore(path / "regions"), scene_tokenizer()
    sizes = {"vocab": len(tokenizer), "feature_dim": store.feature_dim, "classes": store.provenance["num_classes"]}
    source = sister_files.save(sister_files.uniter(**sister_files.TINY | sizes), path.parent / "source")
    tokenizer.save_pretrained(path.parent / "words")
    import_checkpoint(source, path.parent / "uniter", tokenizer=str(path.parent / "words"))
    return path


@pytest.fixture
def data(world):
    return {
        "model_name_or_path": str(world.parent / "uniter"),
        "captions": str(world / "captions.jsonl"),
        "regions": str(world / "regions"),
    }


def test_it_scores_without_training(data, caplog):
    scorer = ImageTextScorer.from_pretrained(data["model_name_or_path"], data["regions"], verbose=False)
    assert "box_type 'proposal' in training, 'jittered drawing boxes' here" in caplog.text
    images, captions = list(scorer.store)[:3], ["a red circle", "two blue squares and a star"]
    expected = [
        [
            scorer.model(**scorer.processor(text=caption, regions=image, return_tensors="pt")).scores.item()
            for image in images
        ]
        for caption in captions
    ]
    np.testing.assert_allclose(scorer.score(captions, images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["pretraining", "retrieval"])
def test_it_goes_on_training(task, world, data, tmp_path):
    if task == "pretraining":
        setup = prepare_pretraining(PretrainingArguments(**data), tmp_path, seed=0)
        assert setup.model.config.region_embedding == "uniter"
        batch = setup.collator([setup.train[index] for index in range(4)])
        assert batch["masked_regions"].any()
        loss = setup.model(**batch).loss
    else:
        setup = prepare_retrieval(RetrievalArguments(**data), tmp_path, seed=0)
        batch = setup.collator([setup.train[index] for index in range(4)])
        loss = setup.loss(setup.model, batch) if setup.loss else setup.model(**batch).loss
    loss.backward()
    regions = setup.model.bert.embeddings.region_embeddings
    assert regions.feature_projection.weight.grad.abs().sum() > 0
    assert regions.hidden_feature.grad.any() == (task == "pretraining")


@torch.no_grad()
def test_its_classes_are_evaluated_without_background(data, tmp_path):
    setup = prepare_pretraining(PretrainingArguments(**data), tmp_path, seed=0)
    model = setup.model.eval()
    batch = setup.collator.collate_matches([setup.validation[index] for index in range(len(setup.validation))])
    chosen = batch["region_labels"] != -100
    right = model(**batch).region_logits[..., 1:].argmax(-1)[chosen] == batch["region_labels"][chosen]
    metrics = evaluate_pretraining(model, setup.validation, setup.collator, Accelerator(cpu=True))
    assert metrics["moc_accuracy"] == pytest.approx(right.double().mean().item()) and right.any()


def test_it_gets_a_first_stage(world, data):
    output = world.parent / "first_stage"
    train_first_stage(
        data["model_name_or_path"], data["captions"], data["regions"], str(output), projection_dim=4, epochs=1
    )
    model, _ = load_for_scoring(output)
    assert model.config.first_stage_trained and model.config.region_embedding == "uniter"


def test_it_answers_questions_once_it_learns_to(data):
    model = AutoModelForMultipleChoice.from_pretrained(data["model_name_or_path"])
    processor, store = AutoProcessor.from_pretrained(data["model_name_or_path"]), RegionStore(data["regions"])
    inputs = processor(
        text=["a red circle", "a blue star"], regions=[next(iter(store.values()))] * 2, return_tensors="pt"
    )
    outputs = model(**{name: tensor[None] for name, tensor in inputs.items()}, labels=torch.tensor([1]))
    outputs.loss.backward()
    assert model.bert.embeddings.region_embeddings.location_projection.weight.grad.abs().sum() > 0


def test_a_head_that_it_lacks_is_no_score(world, tmp_path):
    kept = {
        key: tensor
        for key, tensor in sister_files.uniter(**sister_files.TINY).items()
        if key.startswith(("uniter.", "cls."))
    }
    words = sister_files.save_words(tmp_path / "words", [f"w{number}" for number in range(9)] + ["[UNK]"])
    import_checkpoint(sister_files.save(kept, tmp_path / "source"), tmp_path / "out", tokenizer=str(words))
    with pytest.raises(
        ValueError, match=r"has no \['matching_head.bias', 'matching_head.weight'\]: its scores would be"
    ):
        load_for_scoring(tmp_path / "out")


def test_pushed_weights_stay_what_they_are(world, tmp_path):
    model = UnicoderVLForImageTextRetrieval.from_pretrained(world.parent / "uniter")
    model.save_pretrained(tmp_path)
    again = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())

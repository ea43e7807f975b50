"""`write_model_card`: what it names, that its metadata are valid, and that its snippet runs as written."""

import dataclasses
import re
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tiny
import yaml

from unicoder_vl_hf import DataCollatorForUnicoderVLPreTraining, UnicoderVLForPreTraining
from unicoder_vl_hf.data.negatives import PairsWithMismatches
from unicoder_vl_hf.runs.model_card import PRETRAINED, TrainingRun, write_model_card
from unicoder_vl_hf.tasks.pretraining.setup import PretrainingArguments, PretrainingSetup

PROVENANCE = {
    "detector": "Faster R-CNN: ResNet-101",
    "detector_revision": None,
    "box_type": "detected",
    "thresholds": {"score": 0.2},
    "class_names": [f"class {number}" for number in range(1600)],
    "feature_dim": 6,
    "dtype": "float16",
    "package_version": "0.1",
}
RUN = TrainingRun(
    steps=12000, epochs=9.9999, batch_size=192, learning_rate=1e-4, seed=7, mixed_precision="bf16", kept_step=12000
)


def write(folder: Path, **changes) -> huggingface_hub.ModelCard:
    arguments = {
        "data_name": "flickr8k",
        "metrics": {"matching_accuracy": 0.87654321, "mlm_perplexity": 12.0},
        "measured_on": "500 captions of 100 images",
        "provenance": PROVENANCE,
        "base_model": "google-bert/bert-base-uncased",
    }
    path = write_model_card(folder, **{**arguments, **changes})
    assert path == folder / "README.md"
    return huggingface_hub.ModelCard.load(path)


def section(card: huggingface_hub.ModelCard, title: str) -> list[str]:
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip().splitlines()


def test_the_card_names_everything(tmp_path):
    card = write(tmp_path, repo_id="someone/unicoder-vl-flickr8k")
    assert {"unicoder-vl", "vision-language", "image-text-retrieval", "pre-training"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.model_name == "someone/unicoder-vl-flickr8k"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("matching_accuracy", 0.8765),
        ("mlm_perplexity", 12.0),
    ]
    assert {result.dataset_name for result in card.data.eval_results} == {"flickr8k"}
    assert card.text.startswith("\n# someone/unicoder-vl-flickr8k\n")
    assert "- Base model: google-bert/bert-base-uncased\n- Training data: flickr8k\n" in card.text
    assert section(card, "Regions")[2:] == [
        '- detector: "Faster R-CNN: ResNet-101"',
        '- box_type: "detected"',
        '- thresholds: {"score": 0.2}',
        '- class_names: ["class 0", "class 1", "class 2", "class 3", "class 4", …] (1600 in all)',
        "- feature_dim: 6",
    ]
    assert section(card, "Evaluation")[0] == "| metric | validation: 500 captions of 100 images |"
    assert section(card, "Evaluation")[2:] == ["| matching_accuracy | 0.8765 |", "| mlm_perplexity | 12.0000 |"]


@pytest.mark.parametrize(
    "changes, steps, precision",
    [
        ({}, "12,000 of 192 pairs (over all processes)", "bfloat16 (mixed)"),
        ({"kept_step": None, "mixed_precision": "no"}, "12,000 of 192 pairs (over all processes)", "float32"),
        (
            {"kept_step": 8000, "rows": "examples", "mixed_precision": "fp8"},
            "12,000 of 192 examples (over all processes); the model is that of step 8,000, the best on validation",
            "fp8",
        ),
    ],
)
def test_the_card_says_how_the_training_ran(tmp_path, changes, steps, precision):
    assert section(write(tmp_path, training=dataclasses.replace(RUN, **changes)), "Training") == [
        f"- Steps: {steps}",
        "- Epochs: 10",
        "- Learning rate: 0.0001 at its peak",
        "- Seed: 7",
        f"- Precision: {precision}",
    ]


def test_ranks_are_counts(tmp_path):
    metrics = {"image_retrieval_recall@1": 0.5, "text_retrieval_mean_rank": 1234.5678, "eval_x_median_rank": 2.0}
    metrics |= {"image_retrieval_tied_ranks": 1500}
    assert section(write(tmp_path, metrics=metrics), "Evaluation")[2:] == [
        "| image_retrieval_recall@1 | 0.5000 |",
        "| text_retrieval_mean_rank | 1,234.6 |",
        "| eval_x_median_rank | 2.0 |",
        "| image_retrieval_tied_ranks | 1,500 |",
    ]


def test_what_is_unknown_is_said(tmp_path):
    card = write(tmp_path, metrics={}, measured_on=None, provenance=None, base_model=None)
    assert section(card, "Evaluation")[0] == "| metric | validation |"
    assert "- Base model: none, trained from scratch" in card.text
    assert section(card, "Regions")[-1] == "- unknown"
    assert "## Training" not in card.text
    assert section(card, "Evaluation")[-1] == "| not evaluated | |"
    assert card.data.base_model is None and card.data.eval_results is None
    assert "null" not in (tmp_path / "README.md").read_text()


def test_a_card_is_whole_or_not_there(tmp_path, monkeypatch):
    """It is by its card that a run counts as finished."""

    def killed(self, path):
        Path(path).write_text("---")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(huggingface_hub.ModelCard, "save", killed)
        write(tmp_path)
    assert not (tmp_path / "README.md").exists()
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("form", ["absolute", "relative", "gone", "dotted", "windows"])
def test_of_a_local_base_model_the_text_names_the_folder_alone(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    Path("models/bert").mkdir(parents=True)
    name = {
        "absolute": str(tmp_path / "models" / "bert"),
        "relative": "models/bert",  # looks like a repository, but from_pretrained takes the folder
        "gone": "/mnt/models/bert",
        "dotted": "./bert",
        "windows": r"C:\models\bert",
    }[form]
    card = write(tmp_path, base_model=name)
    assert card.data.base_model is None
    assert "- Base model: bert\n" in card.text


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "bert-base-uncased"])
def test_a_repository_is_named_in_the_metadata_too(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert write(tmp_path, base_model=name).data.base_model == name


@pytest.mark.parametrize("trained_by, tag", [(PRETRAINED, "pre-training"), ("fine-tuned for", "fine-tuning")])
def test_the_card_says_how_the_model_was_trained(tmp_path, trained_by, tag):
    card = write(tmp_path, trained_by=trained_by)
    assert f"), {trained_by}, with unicoder-vl-hf.\n" in card.text
    assert tag in card.data.tags


def test_a_setup_says_what_its_card_needs(tmp_path):
    rows = datasets.Dataset.from_dict({"image_id": ["a", "a", "b"], "caption": ["one", "two", "three"]})
    pairs, processor = PairsWithMismatches(rows, seed=0), tiny.processor(region_provenance=PROVENANCE)
    setup = PretrainingSetup(
        model=tiny.model(UnicoderVLForPreTraining),
        processor=processor,
        collator=DataCollatorForUnicoderVLPreTraining(processor, {}),
        train=pairs,
        validation=pairs,
        data_name="flickr8k",
    )
    assert setup.card == {
        "data_name": "flickr8k",
        "provenance": PROVENANCE,
        "trained_by": PRETRAINED,
        "measured_on": "3 captions of 2 images",
        "task": "image-text-retrieval",
    }
    setup.collator, setup.validation = dataclasses.replace(setup.collator, moc_probability=0.0), None
    assert setup.card["trained_by"] == "pre-trained by masked language modelling and visual-linguistic matching"
    assert setup.card["measured_on"] is None
    setup.collator = dataclasses.replace(setup.collator, mlm_probability=0.0)
    assert setup.card["trained_by"] == "pre-trained by visual-linguistic matching"


def test_the_base_model_of_a_run_is_what_it_starts_from():
    real = {"captions": "captions.json", "regions": "regions"}
    assert PretrainingArguments(**real).base_model == "google-bert/bert-base-uncased"
    assert PretrainingArguments(**real, model_name_or_path="bert").base_model == "bert"
    assert PretrainingArguments().base_model is None  # the scenes' model has new weights
    assert PretrainingArguments(model_name_or_path="bert").base_model == "bert"


def test_the_metadata_are_plain_yaml_whatever_the_names(tmp_path):
    data_name = 'captions: "flickr8k" #1 – {train} | 5 %'
    card = write(tmp_path, data_name=data_name, repo_id="someone/x")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n\n#", text, re.DOTALL)[1])
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "someone/x"
    assert result["dataset"]["name"] == data_name
    assert result["metrics"] == [
        {"type": "matching_accuracy", "value": 0.8765},
        {"type": "mlm_perplexity", "value": 12.0},
    ]
    assert f"- Training data: {data_name}\n" in card.text
    assert str(huggingface_hub.ModelCard(text)) == text  # loaded and saved again, as the Hub's tools do: the same


@pytest.mark.parametrize("relative", [False, True])
def test_the_snippet_of_a_folder_runs_as_written(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/one") if relative else tmp_path / "runs" / "one"
    tiny.model(UnicoderVLForPreTraining).save_pretrained(folder)
    tiny.processor(region_provenance=PROVENANCE).save_pretrained(folder)
    card = write(folder)
    assert card.text.startswith("\n# one\n")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    variables: dict = {}
    exec(snippet, variables)
    scores = variables["scores"].tolist()
    assert len(scores) == 2 and scores[0] != scores[1]


def test_the_snippet_of_a_repository_names_it(tmp_path):
    card = write(tmp_path, repo_id="someone/x")
    assert '\nname = "someone/x"\n' in card.text
    assert str(tmp_path) not in card.text

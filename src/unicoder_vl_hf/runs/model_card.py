"""The end of a run: it writes the metrics and the model card, and pushes the model to the Hub."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from string import Template
from typing import Any

import huggingface_hub

from ..files import complete, partial_path
from ..processes import PRECISIONS
from .checkpoints import CARD_FILE


def create_hub_repository(repo_id: str) -> str:
    """Makes the repository if there is none, before a training that is to be pushed, and returns its full name."""
    return huggingface_hub.create_repo(repo_id, exist_ok=True).repo_id


def push_folder(repo_id: str, folder: Path):
    """Uploads the model, processor, card and log of a run, but not its checkpoints, regions and trackers' files."""
    huggingface_hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Upload Unicoder-VL",
        ignore_patterns=["_*", "checkpoint-*", "partial-*", "pretraining/**", "runs/**"],
    )


# The tasks of pre-training, for the card.
_IN_WORDS = {
    "mlm_loss": "masked language modelling",
    "moc_loss": "masked object classification",
    "matching_loss": "visual-linguistic matching",
}


def pretrained_by(losses: Sequence[str], by: str = "pre-trained by") -> str:
    """
    Names the tasks of pre-training in the words of the card, behind `by`.

    Args:
        losses (sequence of `str`): `"mlm_loss"`, `"moc_loss"` or `"matching_loss"`, at least one.
    """
    *others, last = (_IN_WORDS[name] for name in losses)
    return f"{by} {', '.join(others)} and {last}" if others else f"{by} {last}"


PRETRAINED = pretrained_by(tuple(_IN_WORDS))
FIRST_STAGE = "given a first stage of search, trained by a contrastive loss with the encoder frozen"


def finish_run(output_dir: Path, metrics: dict[str, float], *, repo_id: str | None = None, **card: Any):
    """
    Writes `metrics.json` and the model card into the folder of a run, and pushes it to `repo_id`, if there is one.

    Args:
        card: Further arguments of [`write_model_card`].
    """
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    write_model_card(output_dir, metrics=metrics, repo_id=repo_id, **card)
    if repo_id is not None:
        push_folder(repo_id, output_dir)


@dataclass
class TrainingRun:
    """
    Describes a training as it really ran, for the card.

    Args:
        steps (`int`): Steps of the optimiser.
        epochs (`float`, *optional*): Passes over the training data; None for a stream, whose length nobody knows.
        batch_size (`int`): Rows of a step over all processes and micro-steps.
        learning_rate (`float`): Peak of the learning rate.
        seed (`int`): Seed of the run.
        mixed_precision (`str`): The precision as accelerate names it, `"no"`, `"bf16"` or `"fp16"`.
        rows (`str`, *optional*): The word for what a batch counts.
        kept_step (`int`, *optional*): The step whose model was kept, if it is not the last.
        earlier_precisions (sequence of `(str, int)`, *optional*): Other precisions that it began in, each with the step
            until which it had them, as [`Computing`] records them.
    """

    steps: int
    epochs: float | None
    batch_size: int
    learning_rate: float
    seed: int
    mixed_precision: str
    rows: str = "pairs"
    kept_step: int | None = None
    earlier_precisions: Sequence[tuple[str, int]] = ()

    def __str__(self) -> str:
        kept = ""
        if self.kept_step not in (None, self.steps):
            kept = f"; the model is that of step {self.kept_step:,}, the best on validation"
        precisions = [
            f"{PRECISIONS.get(precision, precision)} until step {step:,}" for precision, step in self.earlier_precisions
        ]
        if not self.earlier_precisions or self.earlier_precisions[-1][1] < self.steps:
            precisions.append(PRECISIONS.get(self.mixed_precision, self.mixed_precision))
        return "\n".join([
            f"- Steps: {self.steps:,} of {self.batch_size:,} {self.rows} (over all processes){kept}",
            *([] if self.epochs is None else [f"- Epochs: {round(self.epochs, 2):g}"]),
            f"- Learning rate: {self.learning_rate:g} at its peak",
            f"- Seed: {self.seed}",
            f"- Precision: {', then '.join(precisions)}",
        ])  # fmt: skip


def write_model_card(
    folder: Path,
    *,
    data_name: str,
    metrics: dict[str, float],
    provenance: dict[str, Any] | None,
    measured_on: str | None = None,
    trained_by: str = PRETRAINED,
    task: str = "image-text-retrieval",
    base_model: str | None = None,
    repo_id: str | None = None,
    training: TrainingRun | None = None,
    search: str | None = None,
) -> Path:
    """
    Writes `README.md`, the model card: tags, base model, data, training, where the regions come from, metrics and use.

    Args:
        folder (`Path`): Folder of the saved model.
        data_name (`str`): The training data, in words.
        metrics (`dict[str, float]`): Metrics on the validation split; empty for a model that was not evaluated.
        provenance (`dict`, *optional*): `RegionStore.provenance` of the training regions.
        measured_on (`str`, *optional*): The size of that split in words, without which recall at K says little.
        trained_by (`str`, *optional*): The way of training, in words that follow "Unicoder-VL, ".
        task (`str`, *optional*): The task that the model is for, one of `_USES`, which decides the example of its use.
        base_model (`str`, *optional*): The model that the training began with; the metadata name it where it is a
            repository, and the text a folder by its name alone, which may be published where its path may not.
        repo_id (`str`, *optional*): The repository that the folder is pushed to; without it the card loads the folder.
        training ([`TrainingRun`], *optional*): The training as it really ran.
        search (`str`, *optional*): How a search in two stages orders its candidates, in words.

    Returns:
        `Path`: The file.
    """
    name = repo_id or folder.resolve().name
    on_hub = base_model is not None and _is_repository(base_model)
    tag = "pre-training" if trained_by.startswith("pre-trained") else "fine-tuning"
    metadata = _metadata(name, data_name, task, tag, base_model if on_hub else None, metrics)
    if base_model is not None and not on_hub:
        base_model = PureWindowsPath(os.path.abspath(base_model)).name  # of either kind of path
    known = {
        field: value
        for field, value in (provenance or {}).items()
        if value not in (None, [], {}) and field not in ("dtype", "package_version")  # which do not change the features
    }
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    text = Template(template).substitute(
        name=name,
        base_model=base_model or "none, trained from scratch",
        data_name=data_name,
        trained_by=trained_by,
        training="" if training is None else f"\n## Training\n\n{training}\n",
        regions="\n".join(f"- {field}: {_shorten(value)}" for field, value in known.items()) or "- unknown",
        measured_on=f"validation: {measured_on}" if measured_on else "validation",
        metrics="\n".join(_metric_row(*item) for item in metrics.items()) or "| not evaluated | |",
        search="" if search is None else f"\n## Search\n\n{search}\n",
        location=repo_id or folder.as_posix(),
        **_USES[task],
    )
    path = folder / CARD_FILE
    # A card tells that a run is finished: half of one must not.
    huggingface_hub.ModelCard(f"---\n{metadata}\n---\n\n{text}").save(partial_path(path))
    with partial_path(path).open("r+b") as file:
        complete(file, path)
    return path


def _metadata(
    name: str, data_name: str, task: str, tag: str, base_model: str | None, metrics: dict[str, float]
) -> huggingface_hub.ModelCardData:
    """Makes what the Hub reads of the card: tags, the base model, and the metrics as results."""
    results = [
        huggingface_hub.EvalResult(
            task_type=_USES[task]["task_type"],
            task_name=tag.capitalize(),
            dataset_type="image-text",
            dataset_name=data_name,
            dataset_split="validation",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics.items()
    ]
    return huggingface_hub.ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        tags=["unicoder-vl", "unicoder-vl-hf", "vision-language", task, tag],
        base_model=base_model,
        model_name=name,
        eval_results=results or None,
    )


# With trust_remote_code the snippet of the card needs no package of ours: it gives the regions as a dict.
_USES = {
    "image-text-retrieval": {
        "task_type": "image-text-matching",
        "auto_class": "AutoModelForSequenceClassification",
        "use": """captions = ["A dog runs.", "A cat sleeps."]
inputs = processor(text=captions, regions=[regions, regions], return_tensors="pt")
scores = model(**inputs).scores  # one for each caption; higher = better match""",
    },
    "visual-commonsense-reasoning": {
        "task_type": "multiple-choice",
        "auto_class": "AutoModelForMultipleChoice",
        "use": """texts = ["What does the dog do? ; It runs.", "What does the dog do? ; It sleeps."]
inputs = processor(text=texts, regions=[regions, regions], max_length=156, return_tensors="pt")
# The region that each token names, or -1. Here the fifth, "dog", names the second region.
inputs["token_region_ids"] = inputs["input_ids"] * 0 - 1
inputs["token_region_ids"][:, 4] = 1
choices = {name: tensor[None] for name, tensor in inputs.items()}
probabilities = model(**choices).logits.softmax(dim=-1)  # of the two answers to one question""",
    },
    "visual-question-answering": {
        "task_type": "visual-question-answering",
        "auto_class": "AutoModelForVisualQuestionAnswering",
        "use": """inputs = processor(text="What is on the table?", regions=regions, return_tensors="pt")
probabilities = model(**inputs).logits[0].sigmoid()  # of each answer by itself
answer = model.config.id2label[int(probabilities.argmax())]""",
    },
    "visual-entailment": {
        "task_type": "visual-entailment",
        # It makes the same logits; there is no Auto class of this task.
        "auto_class": "AutoModelForVisualQuestionAnswering",
        "use": """inputs = processor(text="Two dogs play.", regions=regions, return_tensors="pt")
probabilities = model(**inputs).logits[0].softmax(dim=-1)  # of contradiction, entailment, neutral
judgement = model.config.id2label[int(probabilities.argmax())]""",
    },
    "visual-reasoning": {
        "task_type": "visual-reasoning",
        "auto_class": "AutoModel",
        "use": """# The encoder alone: there is no Auto class of this task. With the package unicoder-vl-hf:
# model = unicoder_vl_hf.UnicoderVLForVisualReasoning.from_pretrained(name)
inputs = processor(text="There is a dog in both.", regions=regions, return_tensors="pt")
states = model(**inputs).last_hidden_state  # of the sentence with one photo""",
    },
    "visual-grounding": {
        "task_type": "visual-grounding",
        "auto_class": "AutoModel",
        "use": """# The encoder alone: there is no Auto class of this task. With the package unicoder-vl-hf:
# model = unicoder_vl_hf.UnicoderVLForGrounding.from_pretrained(name)
inputs = processor(text="the dog on the left", regions=regions, return_tensors="pt")
states = model(**inputs).last_hidden_state  # of the words, then of the regions""",
    },
}


def _is_repository(name: str) -> bool:
    """Whether from_pretrained takes `name` for a repository of the Hub: a folder of that name comes first."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        return False
    return not Path(name).exists()


def _metric_row(name: str, value: float) -> str:
    """Writes a row of the table: fractions and losses to four decimals; ranks count images or captions."""
    decimals = 0 if name.endswith(("_tied_ranks", "_ties")) else 1 if name.endswith("_rank") else 4
    return f"| {name} | {value:,.{decimals}f} |"


def _shorten(value: Any) -> str:
    """Writes `value` as JSON, but only the beginning and the length of a long list, such as 1600 class names."""
    if isinstance(value, list) and len(value) > 10:
        return f"{json.dumps(value[:5], ensure_ascii=False)[:-1]}, …] ({len(value)} in all)"
    return json.dumps(value, ensure_ascii=False)

"""Run by test_hub.py in processes whose Hub is the stub: `python hub_client.py ACTION FOLDER`.

`with_package` uploads in every way that we have, and downloads it all again; `without_package` downloads. Both write to
FOLDER/ACTION.json what they got.
"""

import json
import re
import sys
from pathlib import Path

import huggingface_hub
from checkpoint_matrix import inspect_checkpoint, model_output
from without_package import hide_package

METRICS = {"matching_accuracy": 0.87654321, "mlm_perplexity": 12.5}
PROVENANCE = {
    "detector": "pythia",
    "detector_revision": None,
    "class_names": [f"class {n}" for n in range(1600)],
    "feature_dim": 6,
}
KEPT_AT_HOME = (
    "checkpoint-3/model.safetensors",
    "partial-4/model.safetensors",
    "_data/regions/manifest.json",
    "_data/regions/regions-00000.safetensors",
    "_data/scenes/captions.jsonl",
    "pretraining/events.out",
    "runs/now/events.out",
)


def push(folder: Path) -> dict:
    """To three repositories: by transformers' own methods, by Trainer, and by our loop's functions."""
    import tiny
    from transformers import TrainingArguments

    from unicoder_vl_hf import DataCollatorForUnicoderVLPreTraining, UnicoderVLForPreTraining
    from unicoder_vl_hf.runs.model_card import create_hub_repository, push_folder, write_model_card
    from unicoder_vl_hf.tasks.pretraining.run_trainer import PretrainingTrainer
    from unicoder_vl_hf.tasks.pretraining.setup import PretrainingSetup

    model = tiny.model(UnicoderVLForPreTraining)
    processor = tiny.processor(region_provenance=PROVENANCE)
    model.push_to_hub("someone/plain")
    processor.push_to_hub("someone/plain")

    setup = PretrainingSetup(
        model=model,
        processor=processor,
        collator=DataCollatorForUnicoderVLPreTraining(processor, {}, seed=0),
        train=[],
        validation=None,
        data_name="two photos",
    )
    arguments = TrainingArguments(
        output_dir=folder / "trained", hub_model_id="someone/trained", report_to="none", use_cpu=True
    )
    trainer = PretrainingTrainer(setup, arguments, base_model="google-bert/bert-base-uncased")
    trainer.last_metrics = METRICS
    trainer.push_to_hub()

    run = folder / "run"
    name = create_hub_repository("run")
    again = create_hub_repository("someone/run")
    for path in KEPT_AT_HOME:
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_text("not for the Hub")
    (run / "log.jsonl").write_text("{}\n")
    model.save_pretrained(run)
    processor.save_pretrained(run)
    write_model_card(run, data_name="two photos", metrics=METRICS, provenance=PROVENANCE, repo_id=name)
    push_folder(name, run)
    model.config.triplet_margin = 0.3
    model.push_to_hub(name)  # a change, by transformers' own method: leaves the card
    model.save_pretrained(run)
    return {"names": [name, again], "output": model_output(model, processor)}


def load(folder: Path, **options) -> dict:
    found = {}
    for name in ("someone/plain", "someone/trained", "someone/run"):
        found[name] = inspect_checkpoint(name, **options)
        found[name]["snapshot"] = huggingface_hub.snapshot_download(name)
    card = Path(found["someone/run"]["snapshot"], "README.md").read_text()
    variables: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], variables)
    found["snippet"] = [type(variables["model"]).__module__, variables["scores"].tolist()]
    # Downloaded from the Hub by the remote class, saved, and loaded from the folder: it must not look back to the Hub.
    saved = folder / f"saved_{'with' if not options else 'without'}_package"
    variables["model"].save_pretrained(saved)
    variables["processor"].save_pretrained(saved)
    found["saved"] = inspect_checkpoint(saved, **options)
    return found


if __name__ == "__main__":
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "with_package":
        result = {"pushed": push(folder), "loaded": load(folder)}
    else:
        hide_package()
        result = {"loaded": load(folder, trust_remote_code=True)}
    (folder / f"{action}.json").write_text(json.dumps(result))

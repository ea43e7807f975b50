"""Loads a checkpoint by every Auto class. Shared by test_remote_code.py and its client, which has no unicoder_vl_hf."""

from pathlib import Path

import numpy as np
import torch
import transformers

# Auto class -> name of its class, and the output that stands for all.
MODELS = {
    "AutoModel": ("UnicoderVLModel", "pooler_output"),
    "AutoModelForPreTraining": ("UnicoderVLForPreTraining", "region_logits"),
    "AutoModelForSequenceClassification": ("UnicoderVLForImageTextRetrieval", "scores"),
    "AutoModelForMultipleChoice": ("UnicoderVLForMultipleChoice", "logits"),
    "AutoModelForVisualQuestionAnswering": ("UnicoderVLForQuestionAnswering", "logits"),
}
OTHERS = {
    "AutoConfig": "UnicoderVLConfig",
    "AutoProcessor": "UnicoderVLProcessor",
    "AutoFeatureExtractor": "UnicoderVLFeatureExtractor",
}


def regions() -> dict:
    """Fields of a record: a dict needs no class of the package."""
    rng = np.random.default_rng(0)
    boxes = [[0, 0, 640, 480], [64, 120, 320, 360], [10, 20, 30, 40]]
    return {
        "image_id": "photo",
        "image_width": 640,
        "image_height": 480,
        "boxes": np.array(boxes, dtype=np.float32),
        "features": rng.standard_normal((3, 6)).astype(np.float32),
    }


@torch.no_grad()
def model_output(model, processor) -> list:
    """One output of `model`, as nested lists of floats, of a caption with regions."""
    inputs = dict(processor(text=["a dog runs ."], regions=[regions()], return_tensors="pt"))
    name = dict(MODELS.values())[type(model).__name__]
    if "MultipleChoice" in type(model).__name__:  # two choices that share the image
        inputs = {key: value if "region" in key else value.repeat(2, 1)[None] for key, value in inputs.items()}
        inputs["input_ids"][0, 1, 1] = 7
    return getattr(model(**inputs), name).tolist()


def describe(loaded) -> list[str]:
    return [type(loaded).__name__, type(loaded).__module__]


def inspect_checkpoint(folder: Path, resave: Path | None = None, **options) -> dict:
    """
    `{Auto class: {class, config_class, parts, output}}`, and saves what each model class loaded, with the processor, to
    `resave/<folder>-<Auto class>`. The classes are `[name, module]`.
    """
    found = {}
    for auto in OTHERS:
        loaded = getattr(transformers, auto).from_pretrained(folder, **options)
        found[auto] = {"class": describe(loaded)}
        if auto == "AutoProcessor":
            processor = loaded
            found[auto]["parts"] = [describe(processor.feature_extractor), type(processor.tokenizer).__name__]
        if auto == "AutoFeatureExtractor":
            found[auto]["max_regions"] = loaded.max_regions
    for auto in MODELS:
        torch.manual_seed(0)  # heads that the checkpoint lacks are drawn alike, with the package and without
        model = getattr(transformers, auto).from_pretrained(folder, **options).eval()
        found[auto] = {
            "class": describe(model),
            "config_class": describe(model.config),
            "output": model_output(model, processor),
        }
        if resave is not None:
            target = resave / f"{folder.name}-{auto}"
            model.save_pretrained(target)
            processor.save_pretrained(target)
    return found

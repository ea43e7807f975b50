"""Loads checkpoints to score with, pre-trained (zero-shot) or fine-tuned, but none whose matching head would be new."""

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig

from ..configuration_unicoder_vl import UnicoderVLConfig
from ..modeling_unicoder_vl import (
    UnicoderVLFirstStage,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    UnicoderVLPreTrainedModel,
)
from ..name_lists import did_you_mean, hub_options
from ..processes import start_processes
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord

PairModel = UnicoderVLForImageTextRetrieval | UnicoderVLForPreTraining  # a model whose matching head scores pairs
Model = TypeVar("Model", bound=UnicoderVLPreTrainedModel)


def load_for_scoring(
    name: str | PathLike[str], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[UnicoderVLForImageTextRetrieval, UnicoderVLProcessor]:
    """
    Loads the model with the matching head of a pre-training or retrieval checkpoint, and its processor.

    Args:
        name (`str` or `os.PathLike`): A folder or a repository of the Hub.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): The dtype of the weights, whatever they were
            saved in.
        options: Arguments of every `from_pretrained`, such as `revision`, `token` and `local_files_only`.

    Raises:
        `ValueError`: there is no such checkpoint, it is another model, lacks weights that scoring needs, or has fewer
            rows of word embeddings than its tokenizer has tokens.
    """
    expected = "UnicoderVLForPreTraining or UnicoderVLForImageTextRetrieval"
    return load_complete(UnicoderVLForImageTextRetrieval, name, ("bert.", "matching_head."), expected, dtype, **options)


def load_complete(
    model_class: type[Model],
    name: str | PathLike[str],
    needed: tuple[str, ...],
    expected: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Model, UnicoderVLProcessor]:
    """
    Loads a model none of whose weights that score would be new, and its processor.

    Args:
        model_class (`type`): The class of the model.
        name (`str` or `os.PathLike`): A folder or a repository of the Hub.
        needed (`tuple[str, ...]`): How the names of the weights begin that the checkpoint must have.
        expected (`str`): The classes of checkpoints that have them, for the message.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the weights.
        options: Arguments of `from_pretrained` of model, configuration and processor alike, such as `revision`.

    Raises:
        `ValueError`: see [`load_for_scoring`].
    """
    config = load_config(name, **options)
    if not isinstance(config, UnicoderVLConfig):
        raise ValueError(f"{name} is a {config.model_type}; expected a checkpoint of Unicoder-VL.")
    try:
        loaded: Any = model_class.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(f"{name} has a damaged file of weights, {error}: copy it again.") from error
    model, report = loaded
    if config.matching_head == "similarity":
        needed = (*needed, "first_stage.")
    if missing := sorted(key for key in report["missing_keys"] if key.startswith(needed)):
        raise ValueError(
            f"{name} ({config.architectures}) has no {missing[:3]}: its scores would be random. Expected a checkpoint "
            f"of {expected}."
        )
    processor = AutoProcessor.from_pretrained(name, **options)
    processor.check_model(model)
    return model.eval(), processor


def load_config(name: str | PathLike[str], **options: Any) -> PreTrainedConfig:
    """
    Loads the configuration of a model, which tells its kind. Every model is looked for here first.

    Args:
        name (`str` or `os.PathLike`): A folder or a repository of the Hub.
        options: Arguments of `from_pretrained`.

    Raises:
        `ValueError`: there is no model of that name, or the Hub cannot be reached and did not give it before.
    """
    options |= hub_options(name)
    try:
        return AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        reason = str(error).splitlines()[0].partition(" Use `repo_type`")[0]  # an argument of another function
        meant = did_you_mean(str(name), (each.name for each in Path().iterdir()))
        raise ValueError(
            f"There is no model {str(name)!r}: no folder of that name with a config.json, and no repository of the Hub "
            f"that can be reached from here ({reason}){meant}"
        ) from error


def load_for_store(
    name: str | PathLike[str],
    store: Mapping[str, RegionRecord] | None,
    device: torch.device | str | None = None,
) -> tuple[UnicoderVLForImageTextRetrieval, UnicoderVLProcessor]:
    """
    Loads a checkpoint as [`load_for_scoring`] does, in float32, with a store as the processor's default, and warns if
    the model was trained on regions of another kind.

    Args:
        name (`str` or `os.PathLike`): A folder or a repository of the Hub.
        store (`Mapping[str, RegionRecord]`, *optional*): The store.
        device (`torch.device` or `str`, *optional*): The device of the model; None takes that of this process.

    Raises:
        `ValueError`: see [`load_for_scoring`].
    """
    model, processor = load_for_scoring(name)
    nn.Module.to(model, start_processes().device if device is None else device)
    processor.set_store(store)
    return model, processor


def checkpoint_provenance(name: str | PathLike[str], model: UnicoderVLForImageTextRetrieval) -> dict[str, Any]:
    """
    Collects the facts that tell a checkpoint from others, as JSON: its name, the class that saved it (pre-training
    means zero-shot), the revision if it is of the Hub, and a digest of the weights that scoring reads.
    """
    return {
        "name": str(name),
        "saved_by": next(iter(model.config.architectures or ()), None),
        "revision": getattr(model.config, "_commit_hash", None),
        "scoring_weights_sha256": scoring_digest(model),
    }


def scoring_first_stage(model: PairModel) -> UnicoderVLFirstStage | None:
    """Gives the first stage by whose projections the model scores pairs, too; None where it reads `[CLS]` alone."""
    return cast(UnicoderVLFirstStage, model.first_stage) if model.config.matching_head == "similarity" else None


def scoring_digest(model: PairModel) -> str:
    """Computes the digest of the weights that scoring reads."""
    first_stage = scoring_first_stage(model)
    projections = {} if first_stage is None else first_stage.state_dict(prefix="first_stage.")
    return weights_digest({**model.bert.state_dict(), **model.matching_head.state_dict(), **projections})


def scoring_settings(config: UnicoderVLConfig) -> dict[str, Any]:
    """Picks the fields of a configuration that change scores without changing a weight or its shape."""
    settings = {
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "num_attention_heads": config.num_attention_heads,
    }
    # Left out where it says nothing, so that what was recorded before it came still compares.
    return settings | ({"num_text_layers": config.num_text_layers} if config.num_text_layers else {})


def former_scoring_digest(model: PairModel) -> str:
    """Computes the digest that scoring jobs of 9bccc44 call `model`, by which jobs that were begun then go on."""
    digest = hashlib.sha256(repr(tuple(scoring_settings(model.config).values())).encode())
    weights = {**model.bert.state_dict(), **model.matching_head.state_dict(prefix="matching_head.")}
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Computes the SHA-256 of the names of weights and of their values in float32."""
    digest = hashlib.sha256()
    for key, weight in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

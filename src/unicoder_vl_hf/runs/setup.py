"""The setup of a run of any task: captions joined with their regions, a model and its processor."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer

from .. import logging
from ..configuration_unicoder_vl import UnicoderVLConfig
from ..data.caption_files import select_split
from ..data.captions import check_tokens, join, read_captions
from ..feature_extraction_unicoder_vl import UnicoderVLFeatureExtractor
from ..modeling_unicoder_vl import UnicoderVLForPreTraining, UnicoderVLPreTrainedModel
from ..processing_unicoder_vl import UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from ..regions.conversion import convert
from ..regions.shards import MANIFEST, NO_OBJECT_IDS, shard_path
from ..regions.store import RegionStore
from ..scoring.checkpoints import load_config
from .arguments import DataArguments, ModelArguments


def check_object_ids(store: RegionStore, image_ids: Sequence[str], num_classes: int) -> int:
    """
    Checks that masked object classification can predict the object ids of these images, before a training begins: the
    collator would find a fault, too, but perhaps days later.

    Returns:
        The highest object id of these images.

    Raises:
        `ValueError`: an image has no object ids, or one that is not below `num_classes`.
    """
    highest = store.highest_object_ids(image_ids)
    lacking, wrong = np.flatnonzero(highest == NO_OBJECT_IDS), np.flatnonzero(highest >= num_classes)
    if len(lacking) > 0:
        of_grid = str(store.provenance["detector"]).startswith("grid:")  # which has no classifier
        ways = "Leave it out" if of_grid else "Add them with `unicoder-vl label`, or leave it out"
        raise ValueError(
            f"{store.path}, image {image_ids[lacking[0]]!r}{_one_of(lacking)}: the record has no object_ids, which "
            f"masked object classification predicts. {ways}: --no_moc."
        )
    if len(wrong) > 0:
        raise ValueError(
            f"{store.path}, image {image_ids[wrong[0]]!r}{_one_of(wrong)}: object_ids hold "
            f"{highest[wrong[0]]}, expected 0 to {num_classes - 1}, as the model predicts, or -1 for none. Ids count "
            "from 0, without background: convert the regions anew if theirs do not; or give the detector's number of "
            "classes with --num_region_classes; or leave the task out: --no_moc."
        )
    return int(highest.max())


def _one_of(images: np.ndarray) -> str:
    return f" (one of {len(images):,})" if len(images) > 1 else ""


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=UnicoderVLPreTrainedModel)

# Folder of rendered or converted data in the output folder. A push leaves names with "_" out, ours and Trainer's.
DATA_FOLDER = "_data"

# Heads with an output for each label, which a further task may need anew.
_TASK_HEADS = ("answer_head.", "reasoning_head.", "grounding_head.")

# Fields of a model that learns the scenes in minutes on two cores.
SCENES_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass
class CaptionedRegions:
    """
    Captions joined with the regions of their images.

    Args:
        store ([`RegionStore`]): The regions.
        captions (`datasets.Dataset`): The captions of all splits; every image has regions.
        train (`datasets.Dataset`): The captions of the training split.
        path (`Path`): The file that the captions come from.
        name (`str`): The data in words.
        num_tokens (`np.ndarray` of shape `(len(train),)`, *optional*): The tokens of each training caption, once
            [`load_processor`] has counted them.
    """

    store: RegionStore
    captions: datasets.Dataset
    train: datasets.Dataset
    path: Path
    name: str
    num_tokens: np.ndarray | None = None

    def validation(self, split: str, without: str | None = None) -> datasets.Dataset:
        """
        Gives the captions of a split to validate on, and warns if its images are trained on, too.

        Raises:
            `ValueError`: there is no such split; `without` is the option that does without one, as the error names it.
        """
        try:
            rows = select_split(self.captions, self.path, split)
        except ValueError as error:
            if without is None:
                raise
            raise ValueError(
                f"{error} Name the one to validate on with --validation_split, or do without: {without}."
            ) from error
        images = rows.unique("image_id")
        if trained := len(set(images).intersection(self.train.unique("image_id"))):
            logger.warning(
                f"{trained:,} of the {len(images):,} images of the split {split!r} are trained on, too: its figures "
                "say less about images never seen."
            )
        return rows


@dataclass
class TrainingSetup:
    """
    The model, the data and the loss of a training run of any task. A subclass describes the training for the log and
    the card.

    Args:
        model ([`UnicoderVLPreTrainedModel`]): The model that is trained.
        processor ([`UnicoderVLProcessor`]): The processor that makes its inputs.
        collator (callable): Makes the batches.
        train, validation: The rows; None for no validation.
        data_name (`str`): The data in words.
        loss (callable, *optional*): Computes the loss of `(model, batch)`, if it is not the model's own.

    Raises:
        `ValueError`: the tokenizer has more tokens than the model knows.
    """

    model: UnicoderVLPreTrainedModel
    processor: UnicoderVLProcessor
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    train: Any
    validation: Any
    data_name: str
    loss: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] | None = None

    task: ClassVar[str] = "image-text-retrieval"  # the use of the model, see [`write_model_card`]
    rows: ClassVar[str] = "pairs"  # the word for the rows of a batch

    def __post_init__(self):
        self.processor.check_model(self.model)

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The parts of the loss that are trained, as the model's output names them; none if the loss has no parts."""
        return ()

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of the data that make the run, beside its arguments: it is not resumed with others."""
        return {}

    @property
    def trained_by(self) -> str:
        """The way in which the model is trained, in words that follow "Unicoder-VL, "."""
        raise NotImplementedError

    @property
    def measured_on(self) -> str | None:
        """The part of the validation split that is evaluated, in words; None without evaluation."""
        raise NotImplementedError

    @property
    def card(self) -> dict[str, Any]:
        """The arguments of [`write_model_card`] that describe data and training."""
        return {
            "data_name": self.data_name,
            "provenance": self.processor.feature_extractor.region_provenance,
            "trained_by": self.trained_by,
            "measured_on": self.measured_on,
            "task": self.task,
        }


def in_words(captions: datasets.Dataset) -> str:
    """Writes the numbers of captions and images, without which recall at K says little."""
    return f"{len(captions):,} captions of {len(captions.unique('image_id')):,} images"


def open_data(arguments: DataArguments, output_dir: str | Path) -> CaptionedRegions:
    """
    Reads captions and regions and joins them. Scenes are rendered, and feature files converted, into the output folder.

    Raises:
        `ValueError`: a caption has no regions (unless `skip_missing`), or a file has a fault.
    """
    if arguments.on_scenes:
        from ..scenes.world import build_scenes

        folder = build_scenes(Path(output_dir, DATA_FOLDER, "scenes"))
        path, store = folder / "captions.jsonl", RegionStore(folder / "regions")
    else:
        path = Path(str(arguments.captions))
        store = open_or_convert(
            Path(str(arguments.regions)), Path(output_dir, DATA_FOLDER, "regions"), arguments.num_region_classes
        )
    captions, report = join(
        read_captions(path, ids=arguments.caption_ids),
        store,
        skip_missing=arguments.skip_missing,
        skip_option="--skip_missing",
    )
    logger.warning(f"{path} with {store}:\n{report}")
    train = select_split(captions, path, arguments.train_split)
    return CaptionedRegions(store, captions, train, path, "rendered scenes" if arguments.on_scenes else path.stem)


def open_or_convert(path: Path, converted: Path, num_classes: int | None) -> RegionStore:
    """
    Opens the store at `path`, or, if feature files of another format are there, the store `converted`, which is made of
    them once.

    Raises:
        `ValueError`: `converted` was made of other files, or a file has a fault.
    """
    if (path / MANIFEST).exists():
        return RegionStore(path)
    origin = converted.with_name(f"{converted.name}.source")  # names the files that were converted
    if origin.exists() and (source := origin.read_text(encoding="utf-8")) != str(path.absolute()):
        raise ValueError(f"{converted} was converted from {source}, not from {path}: take another --output_dir.")
    if not (converted / MANIFEST).exists():
        made = [folder for folder in (converted, *converted.parents) if not folder.exists()]
        converted.parent.mkdir(parents=True, exist_ok=True)
        origin.write_text(str(path.absolute()), encoding="utf-8")
        try:
            convert(path, converted, resume=True, num_classes=num_classes)
        except BaseException:
            if not shard_path(converted, 0).exists():  # nothing that the same files could go on with
                origin.unlink()
                for folder in made:
                    with contextlib.suppress(OSError):  # it was not made, or holds something else
                        folder.rmdir()
            raise
    return RegionStore(converted)


def load_model(arguments: ModelArguments, store: RegionStore, model_class: type[Model], **fields: Any) -> Model:
    """
    Loads a model from a Unicoder-VL checkpoint of any kind or from a BERT, or makes one with new weights. `fields` are
    further fields of its configuration.

    Raises:
        `ValueError`: the checkpoint is of another kind, or does not fit the regions, `max_length` or an option.
    """
    known = store.provenance["num_classes"]
    regions: dict[str, Any] = {
        "region_feature_dim": store.feature_dim,
        "num_region_classes": arguments.num_region_classes or known or UnicoderVLConfig().num_region_classes,
        "use_image_token_embedding": arguments.image_token,
    }
    if arguments.num_hidden_layers is not None:
        regions["num_hidden_layers"] = arguments.num_hidden_layers
    if arguments.num_text_layers is not None:
        regions["num_text_layers"] = arguments.num_text_layers
    if arguments.dropout is not None:
        fields |= {"hidden_dropout_prob": arguments.dropout, "attention_probs_dropout_prob": arguments.dropout}
    if arguments.initializer_range is not None:
        fields |= {"initializer_range": arguments.initializer_range}
    if arguments.location_initializer_range is not None:
        fields |= {"location_initializer_range": arguments.location_initializer_range}
    name = arguments.base_model
    if name is None and arguments.num_text_layers == -1:
        raise ValueError("num_text_layers=-1 takes those of a BERT: give --model_name_or_path, or a number.")
    if name is None:
        from ..scenes.world import scene_tokenizer

        config = {**SCENES_MODEL, "vocab_size": len(scene_tokenizer()), **regions, **fields}
        model = model_class(UnicoderVLConfig(**config))
    elif is_unicoder_vl(name):
        model = _load_quietly(model_class, name, fields | {"query_bank_size": None})  # of embeddings that may change
        model.config.calibration = None  # of scores that the training changes
        model.config.joint_dropout_prob = fields.get("joint_dropout_prob", 0.0)  # of another training
        _check_unchanged(arguments, model)
        if model.config.region_feature_dim != store.feature_dim:
            raise ValueError(
                f"{name} takes features of width {model.config.region_feature_dim}, but those of {store.path} have "
                f"width {store.feature_dim}. Give --regions of the detector that it was trained with (`unicoder-vl "
                "extract` or `convert`), or train anew from a BERT: --model_name_or_path google-bert/bert-base-uncased."
            )
    else:
        model = model_class.from_bert(name, **regions, **fields)
    if arguments.max_length > model.config.max_position_embeddings:
        raise ValueError(
            f"max_length={arguments.max_length}, but the model has {model.config.max_position_embeddings} positions: "
            f"give --max_length {model.config.max_position_embeddings} or less."
        )
    if model.config.padding_free is None:  # evaluating, too, reads nothing of padding
        model.config.padding_free = True
    return model


def _load_quietly(model_class: type[Model], name: str, fields: dict[str, Any]) -> Model:
    """
    Loads a Unicoder-VL, and warns in one line of what the checkpoint lacks, where transformers reports a table. A first
    stage that is new was asked for, and so are the outputs of a head of a task for which `fields` name others.

    Raises:
        `ValueError`: the checkpoint has anything else in another shape.
    """
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": "id2label" in fields}
    with logging.without_warnings_of_transformers():
        loaded: Any = model_class.from_pretrained(name, **options, **fields)
    model, report = loaded
    reshaped = {key for key, *_ in report["mismatched_keys"]}
    if wrong := sorted(key for key in reshaped if not key.startswith(_TASK_HEADS)):
        raise ValueError(f"{name} has other shapes than {model_class.__name__}: {wrong}.")
    new_keys = {*report["missing_keys"], *reshaped}
    if new := sorted(key for key in new_keys if not key.startswith("first_stage.")):
        logger.warning(f"{model_class.__name__} from {name}: new parameters {new}.")
    if unused := sorted(report["unexpected_keys"]):
        logger.warning(f"{model_class.__name__} from {name}: left unused in the checkpoint {unused}.")
    return model


def _check_unchanged(arguments: ModelArguments, model: UnicoderVLPreTrainedModel):
    """
    Checks that no option asks for another architecture than a Unicoder-VL checkpoint has: it would be passed over.

    Raises:
        `ValueError`: an option differs from the checkpoint.
    """
    config = model.config
    options: list[tuple[str, Any, Any]] = [
        (name, getattr(arguments, name), getattr(config, name)) for name in ("num_hidden_layers", "num_text_layers")
    ]
    if not arguments.image_token:
        options.append(("image_token", False, config.use_image_token_embedding))
    if isinstance(model, UnicoderVLForPreTraining):  # which alone predicts them
        options.append(("num_region_classes", arguments.num_region_classes, config.num_region_classes))
    for name, wanted, has in options:
        any_text_layers = name == "num_text_layers" and wanted == -1 and has > 0
        if wanted is not None and wanted != has and not any_text_layers:
            raise ValueError(
                f"--{name} is {wanted}, but the Unicoder-VL {arguments.base_model} was made with {has}, which stays. "
                f"Leave the option out, or give {has}; or begin with a BERT."
            )


def load_processor(arguments: DataArguments, data: CaptionedRegions) -> UnicoderVLProcessor:
    """
    Loads the processor of a run, see [`processor_for`], counts the tokens of the training captions, and logs how many
    are cut.

    Raises:
        `ValueError`: a caption has no token, or `--scale_features` does not fit the checkpoint.
    """
    processor = processor_for(arguments, data.store, data.train.unique("image_id"))
    check_tokens(data.captions, processor.tokenizer, data.path)
    data.num_tokens = processor.count_tokens(data.train["caption"])
    if cut := int((data.num_tokens > arguments.max_length).sum()):
        logger.warning(
            f"{cut:,} of {len(data.train):,} training captions exceed {arguments.max_length} tokens and are cut."
        )
    return processor


def processor_for(arguments: ModelArguments, store: RegionStore, train_image_ids: Sequence[str]) -> UnicoderVLProcessor:
    """
    Loads the processor of a Unicoder-VL checkpoint, its feature scale included, or makes one for a BERT or new weights.
    It records the provenance of the regions that are trained on, and warns if a checkpoint was trained on others.

    Raises:
        `ValueError`: `scale_features` is asked for, but the checkpoint was trained on unscaled features.
    """
    name, provenance = arguments.base_model, store.provenance
    if name is not None and is_unicoder_vl(name):
        processor = UnicoderVLProcessor.from_pretrained(name)
        extractor = processor.feature_extractor
        extractor.check_provenance(provenance)
        if arguments.scale_features and extractor.feature_mean is None:
            raise ValueError(f"{name} was trained on unscaled features: leave out --scale_features.")
        if arguments.max_regions is not None:
            extractor.max_regions = arguments.max_regions
        extractor.feature_dim, extractor.region_provenance = store.feature_dim, provenance
    else:
        scale: dict[str, Any] = {}
        if arguments.scale_features:
            scale["feature_mean"], scale["feature_std"] = feature_statistics(store, train_image_ids)
        extractor = UnicoderVLFeatureExtractor(
            max_regions=arguments.max_regions or 100,
            feature_dim=store.feature_dim,
            region_provenance=provenance,
            **scale,
        )
        if name is None:
            from ..scenes.world import scene_tokenizer

            processor = UnicoderVLProcessor(extractor, scene_tokenizer())
        else:
            processor = UnicoderVLProcessor(extractor, AutoTokenizer.from_pretrained(name))
    return processor


def feature_statistics(
    store: Mapping[str, RegionRecord], image_ids: Sequence[str], max_images: int = 10_000
) -> tuple[np.ndarray, float]:
    """
    Measures the mean feature over the regions of these images (at most `max_images`, drawn evenly), and the standard
    deviation of all values around it: the `feature_mean` and `feature_std` of `UnicoderVLFeatureExtractor`.

    Returns:
        The mean, float64 of shape `(D,)`, and one number.
    """
    image_ids = image_ids[:: max(1, math.ceil(len(image_ids) / max_images))]
    count, total, squares = 0, np.float64(0), np.float64(0)
    for image_id in logging.tqdm(image_ids, desc="Measuring features", unit="image", leave=False):
        features = np.asarray(store[image_id].features, dtype=np.float64)
        count, total, squares = count + len(features), total + features.sum(0), squares + (features**2).sum(0)
    mean = np.asarray(total / count)
    return mean, float(np.sqrt((squares / count - mean**2).mean()))


def is_unicoder_vl(name: str) -> bool:
    """
    Whether a folder or a repository of the Hub holds a Unicoder-VL.

    Raises:
        `ValueError`: there is no model of that name.
    """
    return load_config(name).model_type == UnicoderVLConfig.model_type

"""The command lines of training scripts as dataclasses: options that all tasks share, and their spellings."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .. import logging
from ..files import make_folder
from ..name_lists import unknown_option

logger = logging.get_logger(__name__)


class _Parser(HfArgumentParser):
    """A parser that says in one line what is wrong, where the usage of TrainingArguments takes two hundred."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        self.exit(2, f"{self.prog}: {message.removesuffix('.')}{end} --help lists the options.\n")

    def add_argument(self, *names: str, may_change: bool = False, **options: Any) -> argparse.Action:
        """Takes the metadata of a field, of which `may_change` is for [`run_identity`] alone, not for argparse."""
        return super().add_argument(*names, **options)

    def parse_args_into_dataclasses(self, args: Any = None, *_: Any, **options: Any) -> tuple[Any, ...]:
        try:
            args = in_our_spelling(sys.argv[1:] if args is None else args, self)
            if fault := unknown_option(args, self._option_string_actions):
                self.error(fault)
            *parsed, unknown = super().parse_args_into_dataclasses(args, return_remaining_strings=True, **options)
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.error(str(error))
        if unknown:
            self.error(f"unknown argument {unknown[0]}")
        return tuple(parsed)


def make_parser(*classes: type, **options: Any) -> HfArgumentParser:
    """
    Makes a parser of dataclasses. Options cannot be abbreviated, and the help of `--no_x` says that it turns x off.
    """
    parser = _Parser(classes, allow_abbrev=False, **options)  # type: ignore[arg-type]
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):  # which transformers gives the help of its opposite
            action.help, action.default = f"Turn --{action.dest} off.", argparse.SUPPRESS
    return parser


def parse_evaluation(options: type, argv: Sequence[str] | None) -> Any:
    """
    Parses the options of an evaluation, and makes the folders of the files that it will write, so that it does not fail
    at its end for want of one.

    Args:
        options (`type`): The dataclass of the options.
        argv (sequence of `str`, *optional*): The words of the command line, by default those of this process.

    Raises:
        `ValueError`: a file is in the place of a folder.
    """
    (args,) = make_parser(options).parse_args_into_dataclasses(argv)
    for name in ("output", "submission", "gallery"):
        if (path := getattr(args, name, None)) is not None:
            make_folder(Path(path).absolute().parent)
    return args


def parse_arguments(
    classes: tuple[type, ...],
    argv: Sequence[str] | None,
    *,
    paper: dict[str, Any],
    scenes: dict[str, Any],
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    data: str = "--captions",
) -> tuple[Any, ...]:
    """
    Reads a command line as dataclasses. A fault in it, or `--help`, ends the program.

    Args:
        classes (`tuple[type, ...]`): The dataclasses that hold the options.
        argv (sequence of `str`, *optional*): The words of the command line; by default those of this process.
        paper (`dict`): Defaults of a command line that names `data`, and of the help.
        scenes (`dict`): Defaults of a command line that does not.
        recipes (`dict` of `dict`, *optional*): Further defaults of a command line with `--recipe NAME`, by the name.
        data (`str`, *optional*, defaults to `"--captions"`): The option that names data of one's own.

    Returns:
        An object of each class.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    on_scenes = {name: value for name, value in scenes.items() if paper.get(name) != value}
    parser = make_parser(
        *classes,
        description=f"The defaults below are the paper's. Without {data}, on the rendered scenes: "
        + ", ".join(f"{name} {value}" for name, value in on_scenes.items()),
    )
    names = {word.split("=")[0] for word in argv}
    parser.set_defaults(**(paper if names & {data, "--help", "-h"} else scenes))
    if recipes is not None:
        listed = [f"{name}: {', '.join(f'{key} {value}' for key, value in of.items())}" for name, of in recipes.items()]
        first = _Parser((), allow_abbrev=False, add_help=False)
        for each in (first, parser):  # which knows it for the help alone
            each.add_argument(
                "--recipe",
                choices=("paper", *recipes),
                default=argparse.SUPPRESS,
                help=f"Set of defaults: the paper's, or another. {'; '.join(listed)}. (default: paper)",
            )
        given, argv = first.parse_known_args(argv)
        parser.set_defaults(**recipes.get(getattr(given, "recipe", "paper"), {}))
    try:
        argv = in_our_spelling(argv, parser)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    if not _knows(parser, "mixed_precision"):  # for the help: what is given has become --bf16 and --fp16
        parser.add_argument(
            "--mixed_precision",
            "--mixed-precision",
            default=argparse.SUPPRESS,
            help="Precision: auto (what the hardware is fast in), no, bf16 or fp16. (default: auto)",
        )
    return parser.parse_args_into_dataclasses(argv)


def in_our_spelling(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """
    Spells a command line in the options that a script has. Our loop, Trainer and evaluations differ in a few options,
    and each kind of script takes those of the others. `--eval_steps` and `--save_steps` count for Trainer whatever its
    default strategy is.

    Raises:
        `ValueError`: options contradict each other, or a value has no counterpart.
    """
    options: list[tuple[str, list[str], list[str]]] = []  # name, values, and the words as they were given
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else [], [word]))
        elif options:
            options[-1][1].append(word)
            options[-1][2].append(word)
        else:
            options.append(("", [], [word]))
    given = {name: (values or ["true"])[0] for name, values, _ in options}

    precisions = sorted(given.keys() & {"mixed_precision", "bf16", "fp16"}, reverse=True)
    if len(precisions) > 1 and "mixed_precision" in precisions:
        raise ValueError(f"--{' and --'.join(precisions)}: give --mixed_precision alone")
    if "tokens_per_batch" in given and (rows := given.keys() & {"train_batch_size", "per_device_train_batch_size"}):
        raise ValueError(f"--tokens_per_batch and --{rows.pop()} both say how large a batch is: give one")
    for name in ("eval", "save"):
        if f"{name}_steps" in given and f"{name}_strategy" not in given and _knows(parser, f"{name}_strategy"):
            parser.set_defaults(**{f"{name}_strategy": "steps"})

    accumulation = given.get("gradient_accumulation_steps", parser.get_default("gradient_accumulation_steps"))
    words: list[str] = []
    for name, _, as_given in options:
        if name not in _SPELLINGS or _knows(parser, name):
            words += as_given
            continue
        try:
            spelt = _SPELLINGS[name](given[name], int(accumulation or 1) * int(os.environ.get("WORLD_SIZE", 1)))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"--{name} {given[name]}: {error}") from error
        words += [word for ours, value in spelt.items() for word in (f"--{ours}", str(value))]
    return words


def _knows(parser: argparse.ArgumentParser, name: str) -> bool:
    return any(action.dest == name for action in parser._actions)


def _flags_of_precision(value: str, _) -> dict[str, Any]:
    if value not in ("auto", "no", "bf16", "fp16"):
        raise ValueError("expected auto, no, bf16 or fp16")
    return {} if value == "auto" else {flag: value == flag for flag in ("bf16", "fp16")}


def _pairs_of_a_micro_batch(value: str, micro_batches: int) -> dict[str, Any]:
    if int(value) % micro_batches:
        raise ValueError(
            f"a step of {micro_batches} micro-batches, over all processes, cannot hold so many pairs: give a multiple, "
            "or another --gradient_accumulation_steps"
        )
    return {"per_device_train_batch_size": int(value) // micro_batches}


def _share_of_the_steps(value: str, _) -> dict[str, Any]:
    if float(value) >= 1:
        raise ValueError("expected a share of the steps, below 1, such as 0.1")
    return {"warmup_ratio": value}


# For an option of the other kind of script: what it is in this one, where the step of a run has so many micro-batches.
_SPELLINGS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "bf16": lambda value, _: {"mixed_precision": "bf16" if string_to_bool(value) else "no"},
    "fp16": lambda value, _: {"mixed_precision": "fp16" if string_to_bool(value) else "no"},
    "mixed_precision": _flags_of_precision,
    "per_device_train_batch_size": lambda value, micro_batches: {"train_batch_size": int(value) * micro_batches},
    "train_batch_size": _pairs_of_a_micro_batch,
    "warmup_steps": _share_of_the_steps,
    "warmup_ratio": lambda value, _: {"warmup_steps": value},
}


def option(default: Any, help: str, *, may_change: bool = False) -> Any:
    """
    Makes the field of an option in a dataclass of arguments.

    Args:
        default: The value of a command line that leaves the option out; `...` if it may not. A list is copied.
        help (`str`): The help of the command line.
        may_change (`bool`, *optional*, defaults to `False`): Whether a run may be resumed with another value, see
            [`run_identity`].
    """
    metadata = {"help": help, "may_change": may_change}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def run_identity(*arguments: Any, **facts: Any) -> dict[str, Any]:
    """
    Collects the values by which a resumed run is the same run: the fields of its `arguments`, which are dataclasses,
    and `facts` of its data. An [`option`] that `may_change` is left out: a run may be resumed with another value of
    it.
    """
    values = {
        each.name: getattr(of_class, each.name)
        for of_class in arguments
        for each in fields(of_class)
        if not each.metadata.get("may_change", False)
    }
    return values | facts


@dataclass
class ModelArguments:
    """Names the model that a run of any task starts from, and says how it reads text and regions."""

    model_name_or_path: str | None = option(
        None, "BERT or Unicoder-VL to start from. Default: BERT-base; on the scenes, new weights.", may_change=True
    )
    num_region_classes: int | None = option(
        None, "Object classes that the detector knows. Default: those of the store, else 1600."
    )
    num_hidden_layers: int | None = option(
        None, "Number of layers: the BERT's from the first on, further ones begin as copies of its last. Default: its."
    )
    num_text_layers: int | None = option(
        None,
        "First layers that read words alone, once a caption and not once a pair; regions join after them. -1 takes all "
        "of the BERT's, and puts two behind them. Default: those of a Unicoder-VL, else 0.",
    )
    initializer_range: float | None = option(
        None,
        "Standard deviation of weights that are new. Default: that of the model to start from; BERT has 0.02, which is "
        "little for a model narrower than its 768.",
    )
    location_initializer_range: float | None = option(
        None,
        "Standard deviation of new weights of the location's projection, such as 1 where it matters how regions lie. "
        "Default: as of all others.",
    )
    dropout: float | None = option(
        None, "Dropout of hidden states and attention. Default: that of the model to start from; BERT has 0.1."
    )
    image_token: bool = option(True, "Adds the [IMG] token's vector to every region.")
    max_length: int = option(44, "Most tokens of a caption; longer captions are cut.")
    max_regions: int | None = option(
        None, "Most regions of an image; the best by score stay. Default: those of a Unicoder-VL, else 100."
    )
    scale_features: bool = option(
        False, "Subtracts the training regions' mean from features, divides by their standard deviation."
    )

    @property
    def on_scenes(self) -> bool:
        """Whether the run has no data of its own, and so takes rendered scenes; a subclass says it."""
        raise NotImplementedError

    @property
    def base_model(self) -> str | None:
        """The folder or repository that the model starts from; None for new weights."""
        if self.model_name_or_path is None and not self.on_scenes:
            return "google-bert/bert-base-uncased"
        return self.model_name_or_path


@dataclass
class DataArguments(ModelArguments):
    """Names the data and the model of a run. Without `captions` the run takes rendered scenes and a small model."""

    captions: str | None = option(
        None, "Caption file in any layout that read_captions reads. Default: the rendered scenes'.", may_change=True
    )
    caption_ids: str | None = option(
        None, "Other ids for the captions' images: stem, coco, a .csv, or CAPTIONS:COLUMN."
    )
    regions: str | None = option(
        None,
        "RegionStore of the images, or feature files, which are converted to one in the output folder.",
        may_change=True,
    )
    train_split: str = option("train", "Split of the captions to train on.")
    validation_split: str = option("val", "Split of the captions to evaluate on.", may_change=True)
    skip_missing: bool = option(False, "Leaves out captions whose image has no regions.", may_change=True)
    align_regions: bool = option(
        False,
        "A BERT's new region embeddings begin as the words that training captions lead one to expect of a region.",
    )

    def __post_init__(self):
        if (self.captions is None) != (self.regions is None):
            raise ValueError("Give both --captions and --regions, or neither for the rendered scenes.")

    @property
    def on_scenes(self) -> bool:
        """Whether the run has no captions of its own, and so takes the rendered scenes."""
        return self.captions is None

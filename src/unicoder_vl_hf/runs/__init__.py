"""Training runs: their arguments, setup, checkpoints, log, model card and Trainer."""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .arguments import DataArguments, ModelArguments, make_parser, parse_arguments
    from .checkpoints import CheckpointFolder
    from .log import JsonLog, LossMeter
    from .model_card import TrainingRun, create_hub_repository, finish_run, write_model_card
    from .trainer import EpochOfData, TaskTrainer, trainer_checkpoints, training_defaults

__getattr__, __dir__ = lazily(
    __name__,
    {
        "arguments": ["DataArguments", "ModelArguments", "make_parser", "parse_arguments"],
        "checkpoints": ["CheckpointFolder"],
        "log": ["JsonLog", "LossMeter"],
        "model_card": ["TrainingRun", "create_hub_repository", "finish_run", "write_model_card"],
        "trainer": ["EpochOfData", "TaskTrainer", "trainer_checkpoints", "training_defaults"],
    },
)

__all__ = [
    "CheckpointFolder",
    "DataArguments",
    "EpochOfData",
    "JsonLog",
    "LossMeter",
    "ModelArguments",
    "TaskTrainer",
    "TrainingRun",
    "create_hub_repository",
    "finish_run",
    "make_parser",
    "parse_arguments",
    "trainer_checkpoints",
    "training_defaults",
    "write_model_card",
]

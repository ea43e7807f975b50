from .alignment import align_regions as align_regions
from .arguments import (
    DataArguments as DataArguments,
    ModelArguments as ModelArguments,
    make_parser as make_parser,
    parse_arguments as parse_arguments,
)
from .checkpoints import CheckpointFolder as CheckpointFolder
from .log import JsonLog as JsonLog, LossMeter as LossMeter
from .model_card import (
    TrainingRun as TrainingRun,
    create_hub_repository as create_hub_repository,
    finish_run as finish_run,
    write_model_card as write_model_card,
)
from .trainer import (
    EpochOfData as EpochOfData,
    TaskTrainer as TaskTrainer,
    trainer_checkpoints as trainer_checkpoints,
    training_defaults as training_defaults,
)

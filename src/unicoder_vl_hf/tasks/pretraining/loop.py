"""The arguments of `examples/run_pretraining.py`, its recipes, and what makes a resumed run the same run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LoopArguments:
    """The loop of `examples/run_pretraining.py`; the defaults are the paper's."""

    output_dir: str = field(metadata={"help": "Checkpoints, the log, and in the end the model."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the training pairs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Its peak, after the warm-up."})
    train_batch_size: int = field(default=192, metadata={"help": "Pairs of an optimiser step over ALL processes."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Micro-steps of an optimiser step."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with a rising learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW with 0 is the paper's Adam."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped; 0 clips none."})
    max_steps: int = field(default=-1, metadata={"help": "End after so many steps, whatever the epochs."})
    mixed_precision: str = field(
        default="auto", metadata={"help": "auto (what the hardware is fast in), no, bf16, fp16."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, a third more time."})
    seed: int = field(default=0, metadata={"help": "Masks, mismatches, order, dropout and new weights follow from it."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and mask."})
    logging_steps: int = field(default=20, metadata={"help": "Steps between lines of the log."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between evaluations. Default: every epoch."})
    eval_on_start: bool = field(default=False, metadata={"help": "Evaluate before the first step too."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint's folder, or 'latest'. With more steps than before the run becomes longer."},
    )
    report_to: str = field(default="none", metadata={"help": "A tracker of accelerate, such as tensorboard, or none."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the model, processor and card in the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository. Default: the output folder's name."})

    def __post_init__(self):
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}, expected at least 1, or -1 for all epochs.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}, expected a share of the steps in 0..1, below 1.")


# A run may be resumed with others of these; all other arguments decide what it computes.
MAY_CHANGE = set(
    "output_dir captions regions model_name_or_path skip_missing validation_split max_validation_pairs "
    "num_train_epochs max_steps gradient_accumulation_steps mixed_precision gradient_checkpointing "
    "dataloader_num_workers logging_steps save_steps save_total_limit eval_steps eval_on_start "
    "resume_from_checkpoint report_to push_to_hub hub_model_id".split()
)


def run_identity(*arguments: Any, **facts: Any) -> dict[str, Any]:
    """What makes a run the run it is, of the dataclasses of its command line, and `facts` of its data."""
    given = {name: value for of_class in arguments for name, value in dataclasses.asdict(of_class).items()}
    return {name: value for name, value in given.items() if name not in MAY_CHANGE} | facts


# The paper's recipe, and one that learns the scenes in minutes on two cores. A batch is counted in pairs.
PAPER = {"num_train_epochs": 10, "learning_rate": 1e-4, "train_batch_size": 192, "gradient_accumulation_steps": 4}
SCENES = {"num_train_epochs": 3, "learning_rate": 1e-3, "train_batch_size": 32, "gradient_accumulation_steps": 1}

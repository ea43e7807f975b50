"""The arguments of `run.py`, which is our own loop, and the recipes of pre-training."""

from dataclasses import dataclass, field


@dataclass
class LoopArguments:
    """Says how our own loop of pre-training runs; the defaults are the paper's."""

    output_dir: str = field(
        metadata={"help": "Folder for checkpoints, the log, and in the end the model.", "may_change": True}
    )
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the training pairs.", "may_change": True})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak of the learning rate, after the warm-up."})
    train_batch_size: int = field(default=192, metadata={"help": "Pairs of an optimiser step over ALL processes."})
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Micro-steps of an optimiser step.", "may_change": True}
    )
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with a rising learning rate."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of AdamW, which with 0 is the paper's Adam."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped; 0 clips none."})
    max_steps: int = field(
        default=-1,
        metadata={
            "help": "Steps after which the run ends, whatever the epochs; -1 takes all epochs.",
            "may_change": True,
        },
    )
    mixed_precision: str = field(
        default="auto",
        metadata={"help": "Precision: auto (what the hardware is fast in), no, bf16, fp16.", "may_change": True},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute activations twice: less memory, a third more time.", "may_change": True},
    )
    seed: int = field(default=0, metadata={"help": "Seed of masks, mismatches, order, dropout and new weights."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read and mask.", "may_change": True}
    )
    logging_steps: int = field(default=20, metadata={"help": "Steps between lines of the log.", "may_change": True})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints.", "may_change": True})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep.", "may_change": True})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between evaluations. Default: every epoch.", "may_change": True}
    )
    eval_on_start: bool = field(
        default=False, metadata={"help": "Evaluate before the first step too.", "may_change": True}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint's folder, or 'latest'. With more steps than before the run becomes longer.",
            "may_change": True,
        },
    )
    report_to: str = field(
        default="none", metadata={"help": "A tracker of accelerate, such as tensorboard, or none.", "may_change": True}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the model, processor and card in the end.", "may_change": True}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository of the Hub. Default: the output folder's name.", "may_change": True}
    )

    def __post_init__(self):
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}, expected at least 1, or -1 for all epochs.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}, expected a share of the steps in 0..1, below 1.")


# The paper's recipe, and one that learns the scenes in minutes on two cores. A batch is counted in pairs.
PAPER = {"num_train_epochs": 10, "learning_rate": 1e-4, "train_batch_size": 192, "gradient_accumulation_steps": 4}
SCENES = {"num_train_epochs": 3, "learning_rate": 1e-3, "train_batch_size": 32, "gradient_accumulation_steps": 1}

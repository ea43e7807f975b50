"""Pre-trains Unicoder-VL with Accelerate: one process or many, any mixed precision, exact resume at any step.

    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run --output_dir runs/scenes
    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run --output_dir runs/flickr8k \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path google-bert/bert-base-uncased

Without --captions it trains a small model on the rendered scenes; with it, the defaults are the paper's (section
Pre-training): 10 epochs, AdamW without weight decay, 1e-4 after a linear warm-up over 10 % of the steps, 192 pairs a
step in 4 micro-steps. Ctrl-C leaves a checkpoint; --resume_from_checkpoint latest goes on as if nothing had happened.
"""

from pathlib import Path

from accelerate.utils import set_seed

from ...errors import run_script
from ...processes import Computing, new_accelerator, start_processes
from ...runs.arguments import parse_arguments
from ...runs.model_card import create_hub_repository
from .loop import PAPER, SCENES, STRONG, LoopArguments, PretrainingLoop
from .setup import PretrainingArguments, prepare_pretraining


def main(argv: list[str] | None = None) -> bool:
    """Pre-trains with the options of `argv`, by default those of the command line; False if Ctrl-C stopped it."""
    data_args, args = parse_arguments(
        (PretrainingArguments, LoopArguments), argv, paper=PAPER, scenes=SCENES, recipes={"strong": STRONG}
    )
    if data_args.streaming and args.max_steps < 1:
        raise ValueError("--streaming knows no end of an epoch: give --max_steps in place of --num_train_epochs.")
    output_dir = Path(args.output_dir)
    resume_from = args.checkpoints.resolve(args.resume_from_checkpoint)
    if args.push_to_hub:
        args.hub_model_id = create_hub_repository(args.hub_model_id or output_dir.name)
    processes = start_processes()
    set_seed(args.seed)
    with processes.main_process_first():
        setup = prepare_pretraining(data_args, output_dir, seed=args.seed)
    computing = Computing.choose(
        args.mixed_precision,
        processes.device.type,
        setup.model.config.hidden_size,
        resume_from,
        args.checkpoints.step_of(resume_from),
    )
    accelerator = new_accelerator(
        computing, log_with=None if args.report_to == "none" else args.report_to, project_dir=str(output_dir)
    )
    return PretrainingLoop(data_args, args, setup, accelerator, computing).run(resume_from)


if __name__ == "__main__":
    run_script(main)

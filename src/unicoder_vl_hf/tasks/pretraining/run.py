"""Pre-trains Unicoder-VL with Accelerate: one process or many, any mixed precision, exact resume at any step.

    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run --output_dir runs/scenes
    accelerate launch -m unicoder_vl_hf.tasks.pretraining.run --output_dir runs/flickr8k \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path google-bert/bert-base-uncased

Without --captions it trains a small model on the rendered scenes; with it, the defaults are the paper's (section
Pre-training): 10 epochs, AdamW without weight decay, 1e-4 after a linear warm-up over 10 % of the steps, 192 pairs a
step in 4 micro-steps. Ctrl-C leaves a checkpoint; --resume_from_checkpoint latest goes on as if nothing had happened.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ... import logging
from ...data.negatives import pairs_digest
from ...data.samplers import StepBatchSampler
from ...errors import run_script
from ...processes import Computing, StopSignal, new_accelerator, start_processes
from ...runs.arguments import parse_arguments, run_identity
from ...runs.checkpoints import CheckpointFolder, follow_schedule, save_weights_as_pretrained
from ...runs.log import JsonLog, LossMeter, beside_the_bar, in_a_line
from ...runs.model_card import TrainingRun, create_hub_repository, finish_run
from .evaluation import evaluate_pretraining
from .loop import PAPER, SCENES, LoopArguments
from .setup import PretrainingArguments, prepare_pretraining

logger = logging.get_logger("unicoder_vl_hf.run_pretraining")


def main(argv: list[str] | None = None) -> bool:
    data_args, args = parse_arguments((PretrainingArguments, LoopArguments), argv, paper=PAPER, scenes=SCENES)
    output_dir = Path(args.output_dir)
    checkpoints = CheckpointFolder(output_dir, keep=args.save_total_limit)
    resume_from = checkpoints.resolve(args.resume_from_checkpoint)

    repo_id = create_hub_repository(args.hub_model_id or output_dir.name) if args.push_to_hub else None
    processes = start_processes()
    set_seed(args.seed)
    with processes.main_process_first():
        setup = prepare_pretraining(data_args, output_dir, seed=args.seed)
    computing = Computing.choose(
        args.mixed_precision, processes.device.type, setup.model.config.hidden_size, resume_from
    )
    accelerator = new_accelerator(
        computing, log_with=None if args.report_to == "none" else args.report_to, project_dir=str(output_dir)
    )

    sampler = StepBatchSampler(
        len(setup.train),
        rows_per_step=args.train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    steps_per_epoch = sampler.steps_per_epoch
    total_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * steps_per_epoch
    if args.gradient_checkpointing:
        setup.model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        setup.model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, round(args.warmup_ratio * total_steps), total_steps)
    model, optimizer = accelerator.prepare(setup.model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    save_weights_as_pretrained(accelerator)

    pairs = {"train_pairs": len(setup.train), "train_pairs_sha256": pairs_digest(setup.train.pairs)}
    identity = run_identity(data_args, args, **pairs, total_steps=total_steps)
    step, meter = 0, LossMeter(accelerator, setup.loss_parts)
    if resume_from is None:
        set_seed(args.seed, device_specific=True)  # another dropout in every process
    else:
        saved = checkpoints.read(resume_from, identity)
        goes_further = checkpoints.check_steps(
            args.resume_from_checkpoint, resume_from, total_steps, saved["total_steps"]
        )
        step = saved["step"]
        meter.load(saved["losses"])
        accelerator.load_state(str(resume_from))
        if goes_further:
            follow_schedule(scheduler)
            checkpoints.reopen()
        logger.warning(f"Resumed from {resume_from} after {step:,} of {total_steps:,} steps.")
    log = JsonLog(output_dir / "log.jsonl", accelerator, resume_step=step)
    if args.report_to != "none":
        accelerator.init_trackers("pretraining", {**asdict(data_args), **asdict(args)})
    accelerator.print(
        f"{total_steps:,} steps of {args.train_batch_size} of {len(setup.train):,} pairs; processes: "
        f"{accelerator.num_processes}, {computing}"
    )

    def evaluate() -> dict[str, float]:
        if setup.validation is None:
            return {}
        with computing.threads():
            metrics = evaluate_pretraining(
                model, setup.validation, setup.collator, accelerator, num_workers=args.dataloader_num_workers
            )
        log.write(step, {f"eval_{name}": value for name, value in metrics.items()})
        if accelerator.is_main_process:
            tqdm.write(in_a_line(step, metrics))
        return metrics

    if args.eval_on_start and step == 0:
        evaluate()
    model.train()
    meter.start_clock()
    progress = logging.tqdm(
        total=total_steps, initial=step, unit="step", desc="Pre-training", disable=not accelerator.is_local_main_process
    )
    with StopSignal() as stop, progress, computing.threads():
        while step < total_steps and not stop.is_set():
            epoch, start_step = divmod(step, steps_per_epoch)
            sampler.set_epoch(epoch, start_step=start_step)
            batches = setup.train_batches(sampler, accelerator.device, num_workers=args.dataloader_num_workers)
            for index, (batch, weight) in enumerate(batches, start=1):
                last = index % args.gradient_accumulation_steps == 0
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    outputs = model(**batch)
                    # Rows of this micro-batch over the rows of the step; DDP divides by the processes.
                    accelerator.backward(outputs.loss * (weight * accelerator.num_processes))
                meter.add(outputs, batch["matching_labels"], weight)
                if not last:
                    continue

                if args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
                meter.gather()
                step += 1
                progress.update()
                if step % args.logging_steps == 0:
                    position = {"learning_rate": scheduler.get_last_lr()[0], "epoch": step / steps_per_epoch}
                    log.write(step, values := meter.mean(args.logging_steps) | position)
                    progress.set_postfix(beside_the_bar(values))
                if step % (args.eval_steps or steps_per_epoch) == 0 and step < total_steps:
                    evaluate()
                    meter.start_clock()
                ends = stop.agreed(accelerator) or step == total_steps
                if step % args.save_steps == 0 or ends:
                    state = {"step": step, "losses": meter.state()}
                    checkpoints.save(state, identity, accelerator, setup.processor, computing)
                if ends:
                    break

    if step < total_steps:
        accelerator.print(f"Stopped after {step} of {total_steps} steps.")
    else:
        if accelerator.is_main_process:  # before the last evaluation: whatever happens there, the model is saved
            accelerator.unwrap_model(model).save_pretrained(output_dir)
            setup.processor.save_pretrained(output_dir)
        metrics = evaluate()
        if accelerator.is_main_process:
            training = TrainingRun(
                steps=step,
                epochs=step / steps_per_epoch,
                batch_size=args.train_batch_size,
                learning_rate=args.learning_rate,
                seed=args.seed,
                mixed_precision=accelerator.mixed_precision,
            )
            finish_run(
                output_dir, metrics, repo_id=repo_id, base_model=data_args.base_model, training=training, **setup.card
            )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return step == total_steps


if __name__ == "__main__":
    run_script(main)

"""Pre-trains Unicoder-VL with Accelerate: one process or many, any mixed precision, exact resume at any step.

    accelerate launch examples/run_pretraining.py --output_dir runs/scenes
    accelerate launch examples/run_pretraining.py --output_dir runs/flickr8k \
        --captions dataset_flickr8k.json --regions regions/ --model_name_or_path google-bert/bert-base-uncased

Without --captions it trains a small model on the rendered scenes; with it, the defaults are the paper's (section
Pre-training): 10 epochs, AdamW without weight decay, 1e-4 after a linear warm-up over 10 % of the steps, 192 pairs a
step in 4 micro-steps. Ctrl-C leaves a checkpoint; --resume_from_checkpoint latest goes on as if nothing had happened.
"""

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_linear_schedule_with_warmup
from transformers.utils import logging

from unicoder_vl_hf.data.samplers import StepBatchSampler
from unicoder_vl_hf.pretraining import (
    MAY_CHANGE,
    LoopArguments,
    PretrainingArguments,
    evaluate_pretraining,
    prepare_pretraining,
    preset,
)
from unicoder_vl_hf.training import (
    CheckpointFolder,
    JsonLog,
    StopSignal,
    create_hub_repository,
    push_folder,
    resolve_precision,
    save_weights_as_pretrained,
    start_processes,
    write_model_card,
)

logger = logging.get_logger("unicoder_vl_hf.run_pretraining")


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    # Without abbreviations, or --caption would not choose the paper's preset.
    parser = HfArgumentParser((PretrainingArguments, LoopArguments), allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**preset(argv))
    data_args, args = parser.parse_args_into_dataclasses(argv)

    output_dir = Path(args.output_dir)
    checkpoints = CheckpointFolder(output_dir, keep=args.save_total_limit)
    resume_from = checkpoints.resolve(args.resume_from_checkpoint)
    state = start_processes()
    accelerator = Accelerator(
        mixed_precision=resolve_precision(args.mixed_precision, state.device.type),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(output_dir),
    )
    repo_id = create_hub_repository(args.hub_model_id or output_dir.name) if args.push_to_hub else None
    set_seed(args.seed)
    with accelerator.main_process_first():
        setup = prepare_pretraining(data_args, output_dir, seed=args.seed)
    processor, collator = setup.processor, setup.collator

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

    arguments = {**asdict(data_args), **asdict(args)}
    identity = {name: value for name, value in arguments.items() if name not in MAY_CHANGE}
    identity |= {"train_pairs": len(setup.train), "total_steps": total_steps}
    # Since the last line of the log: of the loss, its three parts, and the share of matches.
    step, sums = 0, torch.zeros(5, device=accelerator.device)
    if resume_from is None:
        set_seed(args.seed, device_specific=True)  # another dropout in every process
    else:
        saved = checkpoints.read(resume_from, identity)
        step = saved["step"]
        sums += torch.tensor(saved["losses"], device=accelerator.device)
        accelerator.load_state(str(resume_from))
        logger.warning(f"Resumed from {resume_from} after {step:,} of {total_steps:,} steps.")
    log = JsonLog(output_dir / "log.jsonl", resume_step=step, enabled=accelerator.is_main_process)
    if args.report_to != "none":
        accelerator.init_trackers("pretraining", arguments)
    accelerator.print(
        f"{total_steps:,} steps of {args.train_batch_size} of {len(setup.train):,} pairs; processes: "
        f"{accelerator.num_processes}, mixed precision: {accelerator.mixed_precision}"
    )

    def record(values: dict[str, float]):
        log.write(step, values)
        accelerator.log(values, step=step)

    def evaluate() -> dict[str, float]:
        if setup.validation is None:
            return {}
        metrics = evaluate_pretraining(
            model, setup.validation, collator, accelerator, num_workers=args.dataloader_num_workers
        )
        record({f"eval_{name}": value for name, value in metrics.items()})
        accelerator.print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def save():
        checkpoints.save({"step": step, "losses": sums.tolist()}, identity, accelerator, processor)

    if args.eval_on_start and step == 0:
        evaluate()
    model.train()
    of_step = torch.zeros_like(sums)
    since, rows_since = time.perf_counter(), 0
    progress = tqdm(
        total=total_steps, initial=step, unit="step", desc="Pre-training", disable=not accelerator.is_local_main_process
    )
    with StopSignal() as stop, progress:
        while step < total_steps and not stop.is_set():
            epoch, start_step = divmod(step, steps_per_epoch)
            setup.train.set_epoch(epoch)
            sampler.set_epoch(epoch, start_step=start_step)
            loader = DataLoader(
                setup.train,
                batch_sampler=sampler,
                collate_fn=collator,
                num_workers=args.dataloader_num_workers,
                generator=torch.Generator(),  # or it would draw from the dropout's
            )
            for index, (batch, weight) in enumerate(zip(loader, sampler.weights(), strict=True), start=1):
                batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                last = index % args.gradient_accumulation_steps == 0
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    outputs = model(**batch)
                    # Rows of this micro-batch over the rows of the step; DDP divides by the processes.
                    accelerator.backward(outputs.loss * (weight * accelerator.num_processes))
                matches = (batch["matching_labels"] == 1).float().mean()
                parts = (outputs.loss, outputs.mlm_loss, outputs.moc_loss, outputs.matching_loss, matches)
                of_step += torch.stack([part.detach() for part in parts]) * weight
                rows_since += len(batch["matching_labels"])
                if not last:
                    continue

                if args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
                sums += accelerator.reduce(of_step, reduction="sum")  # the same in every process
                of_step.zero_()
                step += 1
                progress.update()
                if step % args.logging_steps == 0:
                    loss, mlm, moc, matching, matches = (sums / args.logging_steps).tolist()
                    now = time.perf_counter()
                    record(
                        # Of masked tokens and regions the mean over matches, as in the evaluation.
                        {"loss": loss, "mlm_loss": mlm / matches, "moc_loss": moc / matches, "matching_loss": matching}
                        | {
                            "learning_rate": scheduler.get_last_lr()[0],
                            "epoch": step / steps_per_epoch,
                            "rows_per_second": rows_since * accelerator.num_processes / (now - since),
                        }
                    )
                    progress.set_postfix(loss=f"{loss:.3f}")
                    sums.zero_()
                    since, rows_since = now, 0
                if step % (args.eval_steps or steps_per_epoch) == 0 and step < total_steps:
                    evaluate()
                    since, rows_since = time.perf_counter(), 0
                if stop.is_set():
                    accelerator.set_trigger()
                if accelerator.check_trigger():  # in any process: all stop at the same step
                    stop.set()
                if step % args.save_steps == 0 or stop.is_set():
                    save()
                if step == total_steps or stop.is_set():
                    break
        metrics = evaluate() if step == total_steps else {}

    if step < total_steps:
        accelerator.print(f"Stopped after {step} of {total_steps} steps: go on with --resume_from_checkpoint latest.")
    elif accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
        write_model_card(
            output_dir,
            base_model=data_args.base_model,
            repo_id=repo_id,
            data_name=setup.data_name,
            provenance=setup.processor.feature_extractor.region_provenance,
            metrics=metrics,
        )
        if repo_id is not None:
            push_folder(repo_id, output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()

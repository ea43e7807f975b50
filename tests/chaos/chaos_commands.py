"""
The commands that `chaos.py` kills. To add one: an entry of `COMMANDS`, and if need be a line in `chaos_inputs.py` that
makes what it reads and in `fork_server.py` that makes its blocks small.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

UNICODER = "-m unicoder_vl_hf.cli"
PAIRS = 4  # of a step of a training, over all processes
WORLD, STORE = "{inputs}/world/captions.jsonl", "{inputs}/world/regions"
TRAINING = (
    f"--captions {WORLD} --regions {STORE} --model_name_or_path {{inputs}}/bert_with_dropout --output_dir out --seed 5 "
    "--num_train_epochs 1 --learning_rate 1e-3 --gradient_accumulation_steps 1 --save_steps 3 "
)


@dataclass(frozen=True)
class Command:
    """
    A command, and how its work is counted.

    Args:
        words: The command line behind `python`, run in an empty folder. `{inputs}` is the folder that `chaos_inputs.py`
            fills, and `{rows}` the rows of a step for each process.
        unit: The function that does a unit of work, `module:name`.
        units: Names the units that a call did, by its arguments.
        most_lost: Units that a process may do again after a kill: those of a block or a shard, or the steps between two
            checkpoints.
        processes: Whether a launcher's processes may share the work, and another number of them go on.
        trains: Whether its processes meet at every step, so that weights are equal at a fixed number of them alone, and
            `--resume_from_checkpoint latest` is what goes on.
        any_order: Whether the records of its store come in another order where several processes wrote them.
    """

    name: str
    words: str
    unit: str
    units: Callable[..., Iterable[object]]
    most_lost: int
    processes: bool = True
    trains: bool = False
    any_order: bool = False


def first_pair(items: object, captions: Sequence[int], images: Sequence[int]) -> list[str]:
    """Names a block of scores."""
    return [f"{captions[0]}-{images[0]}"]


COMMANDS = [
    Command(
        "extract",
        f"{UNICODER} extract {{inputs}}/photos out --detector chaos_inputs:Colours",
        "unicoder_vl_hf.regions.parts:detect",
        lambda detector, batch: [photo.image_id for photo in batch],
        most_lost=6,
        any_order=True,
    ),
    Command(
        "convert",
        f"{UNICODER} convert {{inputs}}/features.tsv out --num-classes 9 --skip-broken",
        "unicoder_vl_hf.regions.store:RegionStoreWriter.write",
        lambda writer, record: [record.image_id],
        most_lost=4,
        processes=False,
    ),
    Command(
        "merge",
        f"{UNICODER} merge {{inputs}}/parts/0 {{inputs}}/parts/1 {{inputs}}/parts/2 --output out",
        "os:link",
        lambda source, path: [path.name],
        most_lost=1,
        processes=False,
    ),
    Command(
        "index",
        f"{UNICODER} index {STORE} --model {{inputs}}/model --output out",
        "unicoder_vl_hf.search.encoders:UnicoderVLDualEncoder.embed_images",
        lambda encoder, image_ids: [image_ids[0]],
        most_lost=1,
    ),
    Command(
        "mine",
        f"{UNICODER} mine {{inputs}}/model {WORLD} {STORE} out --images-per-set 9",
        "unicoder_vl_hf.scoring.scorer:_Embedded.score",
        first_pair,
        most_lost=1,
    ),
    Command(
        "score",
        f"examples/evaluate_retrieval.py --model {{inputs}}/model --captions {WORLD} --regions {STORE} --split train "
        "--scores_dir out --output out.json",
        "unicoder_vl_hf.scoring.scorer:_Embedded.score",
        first_pair,
        most_lost=1,
    ),
    Command(
        "pre-train",
        f"examples/run_pretraining.py {TRAINING} --train_batch_size {PAIRS} --max_validation_pairs 4 "
        "--mixed_precision no --logging_steps 2",
        "unicoder_vl_hf.tasks.pretraining.loop:PretrainingLoop._change_weights",
        lambda loop: [loop.step],
        most_lost=3,
        trains=True,
    ),
    Command(
        "fine-tune",
        f"examples/run_retrieval.py {TRAINING} --per_device_train_batch_size {{rows}} --bf16 false --disable_tqdm true "
        "--max_validation_images 4 --eval_strategy steps --save_strategy steps --eval_steps 3 "
        "--logging_steps 3",  # as many as --save_steps: a start of Trainer forgets the losses since the last line
        "transformers.trainer:Trainer.training_step",
        lambda trainer, *_: [trainer.state.global_step],
        most_lost=3,
        trains=True,
    ),
]


def _log(data: bytes) -> object:
    """Reads a log of pre-training without the speed in it."""
    lines = [json.loads(line) for line in data.splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


def _trainer_state(data: bytes) -> object:
    """Reads Trainer's state without times, and without the mean loss of what this start of the run trained."""
    state = json.loads(data)
    for entry in state["log_history"]:
        for name in ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"):
            entry.pop(name, None)
    return state


# Files that hold a time or a random name, and how the rest of them is compared; all others are compared byte for byte.
NOT_BYTES: dict[str, Callable[[bytes], object]] = {
    "log.jsonl": _log,
    "README.md": lambda data: sorted(data.splitlines()),  # Trainer sorts the metrics of a run that goes on
    "trainer_state.json": _trainer_state,
    "state.json": lambda data: {**json.loads(data), "_fingerprint": None},  # of `datasets`, a random name
    "training_args.bin": lambda data: None,  # says whether the run was resumed
}

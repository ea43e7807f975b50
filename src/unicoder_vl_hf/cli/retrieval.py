"""The commands of image-text retrieval: mining hard negatives, and training a first stage of search."""

from argparse import Namespace

from .commands import GO_ON, Add, Commands, Result, add_caption_ids, add_restart, add_shares, share_of

commands = Commands()


def _mine_arguments(add: Add) -> None:
    _add_training_data(add, "caption file")
    add("output", help="new folder of captions with their negatives, for run_retrieval.py")
    add("--split", default="train", help="split of the captions (default: train)")
    add_caption_ids(add)
    add("--num-negatives", type=int, default=3, help="negative captions, and images, of each pair (default: 3)")
    add(
        "--images-per-set",
        type=int,
        default=100,
        help="images that are scored with the captions of one another (default: 100)",
    )
    add(
        "--candidates",
        type=int,
        help="candidates that the checkpoint's first stage proposes from the whole split, instead of sets",
    )
    add("--range-min", type=int, default=0, help="hardest candidates that are passed over (default: 0)")
    add("--range-max", type=int, help="hardest candidates that are looked at (default: all)")
    add("--min-score", type=float, help="lowest sigmoid(score) of a negative")
    add("--max-score", type=float, help="highest sigmoid(score) of a negative")
    add("--absolute-margin", type=float, help="distance below the lowest match of the query")
    add("--relative-margin", type=float, help="distance below the lowest match, as a share of it")
    add(
        "--sampling-strategy",
        choices=("top", "random"),
        default="top",
        help="negatives that are taken: the hardest, or any that are left",
    )
    add("--seed", type=int, default=0, help="seed of sets and draws (default: 0)")
    _add_pairs(add)
    add_restart(add)
    add_shares(add)


@commands.register("mine", "Hard negatives for fine-tuning, by the current model", _mine_arguments, GO_ON)
def _mine(args: Namespace) -> object:
    from ..tasks.retrieval.mining import mine

    mined = mine(
        args.model,
        args.captions,
        args.regions,
        args.output,
        split=args.split,
        num_negatives=args.num_negatives,
        range_min=args.range_min,
        range_max=args.range_max,
        max_score=args.max_score,
        min_score=args.min_score,
        absolute_margin=args.absolute_margin,
        relative_margin=args.relative_margin,
        sampling_strategy=args.sampling_strategy,
        images_per_set=args.images_per_set,
        candidates=args.candidates,
        duplicates=args.duplicates,
        caption_ids=args.caption_ids,
        seed=args.seed,
        max_length=args.max_length,
        skip_missing=args.skip_missing,
        restart=args.restart,
        share=share_of(args),
    )
    negatives = {name: sum(map(len, mined[f"negative_{name}"])) for name in ("captions", "image_ids")}
    num_mined = mined["split"][:].count(args.split) if "split" in mined.column_names else len(mined)
    lines = [args.output, f"  pairs              {len(mined):,}, of which {num_mined:,} are mined"]
    for name, count in zip(("captions", "images"), negatives.values(), strict=True):
        lines.append(f"  negative {name:9} {count:,}, {count / num_mined:.1f} a pair")
    return Result("\n".join(lines), {"path": args.output, "pairs": len(mined), "negatives": negatives})


def _first_stage_arguments(add: Add) -> None:
    _add_training_data(add, "caption file, with both splits")
    add("output", help="new folder of the checkpoint with its first stage")
    add("--split", default="train", help="split to train on (default: train)")
    add("--validation-split", default="val", help="split to choose the best epoch by (default: val)")
    add_caption_ids(add)
    add("--projection-dim", type=int, default=256, help="width of the embeddings (default: 256)")
    add("--epochs", type=int, default=20, help="epochs of training (default: 20)")
    add("--batch-size", type=int, default=512, help="pairs of a batch (default: 512)")
    add("--learning-rate", type=float, default=2e-3, help="learning rate (default: 2e-3)")
    add("--seed", type=int, default=0, help="seed of new weights and shuffles (default: 0)")
    _add_pairs(add)


@commands.register(
    "train-first-stage",
    "A first stage of search for a checkpoint, by training its projection alone",
    _first_stage_arguments,
)
def _train_first_stage(args: Namespace) -> object:
    from ..tasks.retrieval.first_stage import train_first_stage

    metrics = train_first_stage(
        args.model,
        args.captions,
        args.regions,
        args.output,
        split=args.split,
        validation_split=args.validation_split,
        projection_dim=args.projection_dim,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        duplicates=args.duplicates,
        caption_ids=args.caption_ids,
        seed=args.seed,
        max_length=args.max_length,
        skip_missing=args.skip_missing,
    )
    table = "\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items() if "recall" in name)
    return Result(table, {"path": args.output, **metrics})


def _add_training_data(add: Add, captions: str) -> None:
    add("model", help="checkpoint with its processor")
    add("captions", help=captions)
    add("regions", help="folder of the store")


def _add_pairs(add: Add) -> None:
    add("--duplicates", help="file of photos that show the same, a group a line: .jsonl or .csv")
    add("--max-length", type=int, default=44, help="most tokens of a caption (default: 44)")
    add("--skip-missing", action="store_true", help="leave out captions whose image has no regions")

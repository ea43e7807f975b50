"""The commands of image-text retrieval: mining hard negatives, and training a first stage of search."""

from argparse import ArgumentParser, Namespace

from .commands import GO_ON, Commands, add_caption_ids, add_restart

commands = Commands()


def _mine_arguments(parser: ArgumentParser) -> None:
    _add_training_data(parser, "caption file")
    parser.add_argument("output", help="new folder of captions with their negatives, for run_retrieval.py")
    parser.add_argument("--split", default="train", help="split of the captions (default: train)")
    add_caption_ids(parser)
    parser.add_argument(
        "--num-negatives", type=int, default=3, help="negative captions, and images, of each pair (default: 3)"
    )
    parser.add_argument(
        "--images-per-set",
        type=int,
        default=100,
        help="images that are scored with the captions of one another (default: 100)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        help="candidates that the checkpoint's first stage proposes from the whole split, instead of sets",
    )
    parser.add_argument("--range-min", type=int, default=0, help="hardest candidates that are passed over (default: 0)")
    parser.add_argument("--range-max", type=int, help="hardest candidates that are looked at (default: all)")
    parser.add_argument("--min-score", type=float, help="lowest sigmoid(score) of a negative")
    parser.add_argument("--max-score", type=float, help="highest sigmoid(score) of a negative")
    parser.add_argument("--absolute-margin", type=float, help="distance below the lowest match of the query")
    parser.add_argument("--relative-margin", type=float, help="distance below the lowest match, as a share of it")
    parser.add_argument(
        "--sampling-strategy",
        choices=("top", "random"),
        default="top",
        help="negatives that are taken: the hardest, or any that are left",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sets and draws (default: 0)")
    _add_pairs(parser)
    add_restart(parser)


@commands.register("mine", "Hard negatives for fine-tuning, by the current model", _mine_arguments, GO_ON)
def _mine(args: Namespace) -> None:
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
    )
    print(mined)


def _first_stage_arguments(parser: ArgumentParser) -> None:
    _add_training_data(parser, "caption file, with both splits")
    parser.add_argument("output", help="new folder of the checkpoint with its first stage")
    parser.add_argument("--split", default="train", help="split to train on (default: train)")
    parser.add_argument("--validation-split", default="val", help="split to choose the best epoch by (default: val)")
    add_caption_ids(parser)
    parser.add_argument("--projection-dim", type=int, default=256, help="width of the embeddings (default: 256)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of training (default: 20)")
    parser.add_argument("--batch-size", type=int, default=512, help="pairs of a batch (default: 512)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="learning rate (default: 2e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of new weights and shuffles (default: 0)")
    _add_pairs(parser)


@commands.register(
    "train-first-stage",
    "A first stage of search for a checkpoint, by training its projection alone",
    _first_stage_arguments,
)
def _train_first_stage(args: Namespace) -> None:
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
    print("\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items() if "recall" in name))


def _add_training_data(parser: ArgumentParser, captions: str) -> None:
    parser.add_argument("model", help="checkpoint with its processor")
    parser.add_argument("captions", help=captions)
    parser.add_argument("regions", help="folder of the store")


def _add_pairs(parser: ArgumentParser) -> None:
    parser.add_argument("--duplicates", help="file of photos that show the same, a group a line: .jsonl or .csv")
    parser.add_argument("--max-length", type=int, default=44, help="most tokens of a caption (default: 44)")
    parser.add_argument("--skip-missing", action="store_true", help="leave out captions whose image has no regions")

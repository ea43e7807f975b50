"""The commands of foils, which tell whether a model looks: making them, and measuring a checkpoint by them."""

from argparse import Namespace
from collections import Counter

from .commands import Add, Commands, Result, add_caption_ids

commands = Commands()


def _make_arguments(add: Add) -> None:
    add("output", help="new file of foils, a JSON object a line")
    add("--captions", help="caption file, with all splits (default: the rendered scenes)")
    add("--regions", help="folder of the store of its images, with COCO's classes")
    add("--splits", nargs="+", default=["val", "test"], help="splits that foils are made of (default: val test)")
    add("--train-split", default="train", help="split that scorers without images are trained on (default: train)")
    add(
        "--for-training",
        action="store_true",
        help="foils to learn from (`run_retrieval.py --foils`), of --train-split in place of --splits: not filtered",
    )
    add_caption_ids(add)
    add("--seed", type=int, default=0, help="seed of these scorers, or of the choice for training (default: 0)")


@commands.register("foil", "Captions made false by a word, which cannot be told without the image", _make_arguments)
def _make(args: Namespace) -> object:
    import numpy as np

    from ..tasks.foil.making import make_foils
    from ..tasks.foil.metrics import accuracies_by_kind

    foils = make_foils(
        args.output,
        args.captions,
        args.regions,
        splits=args.splits,
        train_split=args.train_split,
        caption_ids=args.caption_ids,
        seed=args.seed,
        for_training=args.for_training,
    )
    if args.for_training:
        of_kind = Counter(foil.kind for foil in foils)
        captions = len({(foil.image_id, foil.caption) for foil in foils})
        lines = [f"{len(foils):,} foils of {captions:,} captions to learn from."]
        lines += [f"{kind:12}{count:>7,}" for kind, count in of_kind.most_common()]
        return Result(
            "\n".join(lines), {"path": args.output, "foils": len(foils), "captions": captions, "kinds": of_kind}
        )
    margins = np.array([foil.text_only for foil in foils])
    lines = [
        f"{len(foils):,} foils. Scorers without images, of other seeds than chose them, tell (percent; chance 50):"
    ]
    kinds, image_ids = [foil.kind for foil in foils], [foil.image_id for foil in foils]
    accuracies, each = accuracies_by_kind(margins, kinds, image_ids), (margins > 0).mean(axis=0)
    lines += [f"{kind:12}{accuracy.num_foils:>7,}  {accuracy}" for kind, accuracy in accuracies.items()]
    lines.append("each of them: " + ", ".join(f"{100 * share:.1f}" for share in each))
    return Result("\n".join(lines), {"path": args.output, "foils": len(foils), "text_only": accuracies, "each": each})


def _accuracy_arguments(add: Add) -> None:
    add("model", nargs="+", help="checkpoint with its processor; or several, say of three seeds: the mean counts")
    add("foils", help="file that `unicoder-vl foil` made")
    add("regions", help="folder of the store")
    add("--split", help="split whose foils are taken (default: all)")
    add("--output", help="JSON file for the figures")


@commands.register("foil-accuracy", "How often does a model prefer captions to their foils?", _accuracy_arguments)
def _accuracy(args: Namespace) -> object:
    from ..tasks.foil.evaluation import evaluate_foils, foil_table

    model = args.model if len(args.model) > 1 else args.model[0]
    results = evaluate_foils(model, args.foils, args.regions, split=args.split, output=args.output)
    title = "Pairs whose caption scores above its foil (percent, 95 % interval; chance 50, of the difference 0)"
    return Result(f"{title}\n{foil_table(results)}", results)

"""The commands of other people's checkpoints: looking into them, and importing them."""

from argparse import Namespace

from .commands import Add, Commands

commands = Commands()


def _add_source(add: Add) -> None:
    add("source", help="folder, file of weights, or repository of the Hub")
    add("--revision", help="branch, tag or commit of the repository")


def _import_arguments(add: Add) -> None:
    _add_source(add)
    add("output", help="new folder of the model")
    add(
        "--from",
        dest="family",
        choices=("uniter", "villa", "visualbert", "oscar", "volta", "bert"),
        help="family of the checkpoint (default: as its keys tell)",
    )
    add("--tokenizer", help="folder or repository of its vocabulary (default: its own, else BERT's of as many words)")
    add(
        "--region-type",
        type=int,
        choices=(0, 1),
        help="token type of VisualBERT's regions (default: 0, as its authors trained; 1 for Volta's)",
    )
    add(
        "--heads",
        dest="num_attention_heads",
        type=int,
        help="attention heads of a layer, where no config.json tells them",
    )
    add(
        "--task",
        choices=("vqa", "entailment", "nlvr2", "grounding"),
        help="task of its head (default: as it tells; entailment tells not)",
    )
    add("--answers", help="file of the names of that head's outputs, such as trainval_label2ans.pkl")
    add("--approximate", action="store_true", help="take what is near where nothing is exact, and say so")


@commands.register("import-checkpoint", "The weights of a sister of Unicoder-VL, as a model of ours", _import_arguments)
def _import(args: Namespace) -> object:
    from ..checkpoints.importing import import_checkpoint

    return import_checkpoint(
        args.source,
        args.output,
        family=args.family,
        tokenizer=args.tokenizer,
        revision=args.revision,
        region_type=args.region_type,
        num_attention_heads=args.num_attention_heads,
        approximate=args.approximate,
        task=args.task,
        answers=args.answers,
    )


@commands.register("inspect-checkpoint", "Tells what a folder of weights holds, of ours or of others", _add_source)
def _inspect(args: Namespace) -> object:
    from ..checkpoints.inspection import inspect_checkpoint

    return inspect_checkpoint(args.source, args.revision)

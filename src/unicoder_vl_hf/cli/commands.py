"""The registration of commands, the options that several commands share, and what a command shows in the end."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..regions.store import RegionStore
    from ..shares import Share

# Words after Ctrl-C of a command that takes `--restart`.
GO_ON = "Run again, it goes on; --restart begins anew."

Add = Callable[..., object]  # `add_argument` of a parser
Run = Callable[[Namespace], object]


@dataclass(frozen=True)
class Result:
    """
    The outcome of a command, for people and for machines.

    Args:
        text (`str`): A table or a line.
        data: The same for `--json`: dataclasses, mappings, sequences, arrays, paths and plain values.
        code (`int`, *optional*, defaults to 0): The exit code.
    """

    text: str
    data: Any
    code: int = 0


@dataclass(frozen=True)
class Command:
    """
    A command of `unicoder-vl`.

    Args:
        name (`str`): The word that the user types.
        help (`str`): A line about the command.
        add_arguments (`callable`): Adds its arguments by `add_argument` of a parser.
        run (`callable`): Runs it on the parsed arguments, and returns what is shown in the end: a [`Result`], another
            object for both its text and its data, None for nothing, or an iterator of what is shown at once, while the
            command goes on. It imports the modules that it needs itself, so that other commands need not wait for them.
        go_on (`str`, *optional*): Words after Ctrl-C, which say how the command goes on.
    """

    name: str
    help: str
    add_arguments: Callable[[Add], None]
    run: Run
    go_on: str = ""


class Commands(list[Command]):
    """A family of commands, in the order of `--help`."""

    def register(
        self, name: str, help: str, add_arguments: Callable[[Add], None], go_on: str = ""
    ) -> Callable[[Run], Run]:
        """Decorates the function that runs a command. Arguments are those of [`Command`]."""

        def registered(run: Run) -> Run:
            self.append(Command(name, help, add_arguments, run, go_on))
            return run

        return registered


def add_restart(add: Add) -> None:
    """Adds the option `--restart`."""
    add("--restart", action="store_true", help="begin anew; what was complete stays until this is")


def add_shares(add: Add) -> None:
    """Adds the options `--share` and `--gather` by which the tasks of an array compute a job."""
    add("--share", metavar="I/N", help="compute share I of N alone, from 0/N on, as a task of an array")
    add("--gather", type=int, metavar="N", help="put together what N shares computed; those that are missing are named")


def share_of(args: Namespace) -> "Share | None":
    """Reads the options of [`add_shares`]."""
    from ..shares import Share

    return Share.of_options(args.share, args.gather)


def add_growth(add: Add, items: str) -> None:
    """Adds the options `--add` and `--remove` by which a finished output grows and shrinks."""
    add("--add", action="store_true", help=f"add the {items} that a finished one lacks")
    add("--remove", nargs="+", metavar="ID", help=f"ids of {items} to take out; or a .txt, one a line")


def removed(args: Namespace) -> list[str] | None:
    """Reads the ids of `--remove`, see [`add_growth`]."""
    from ..name_lists import read_names

    is_list = args.remove is not None and len(args.remove) == 1 and args.remove[0].endswith(".txt")
    return read_names(args.remove[0]) if is_list else args.remove


def add_caption_ids(add: Add) -> None:
    """Adds the option `--caption-ids`."""
    add(
        "--caption-ids",
        help="other names for the images of the captions: stem, coco, a .csv (source_id, image_id), or CAPTIONS:COLUMN",
    )


def add_detector(add: Add) -> None:
    """Adds the options of what finds the regions of a photo that is given in place of an image of the store."""
    add(
        "--detector",
        metavar="FAMILY:NAME",
        help="detector of the photo (default: that of the regions that the model was trained on)",
    )
    add_detector_option(add, "grid_size=7")
    add("--cache", metavar="FOLDER", help="folder of a store that keeps the regions of photos for the next time")


def add_detector_option(add: Add, example: str) -> None:
    """Adds the option `--option`, see [`detector_options`]."""
    add(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"option of the detector, such as {example}",
    )


def detector_options(args: Namespace, *taken: str) -> dict[str, Any]:
    """
    Reads the options of a detector, each value as JSON if it is some, else as text, and checks its name.

    Args:
        args (`argparse.Namespace`): `option` holds texts NAME=VALUE, and `detector` the name, if any.
        taken (`str`): Names that no option may have, since they are arguments of other functions on the way.

    Raises:
        `ValueError`: there is no such family of detectors, a text has another form, or a name is taken or given twice.
    """
    from ..regions.detectors import split_name

    if args.detector is not None:
        split_name(args.detector)
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--option is {text!r}, expected NAME=VALUE.")
        if name in args:
            raise ValueError(f"--option {text}: {name} is an option of its own, and none of the detector.")
        if name in taken:
            raise ValueError(f"--option {text}: no detector has an option {name}.")
        if name in options:
            raise ValueError(f"--option {text}: {name} is given twice.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def check_paths(args: Namespace, *names: str) -> None:
    """Raises FileNotFoundError where an argument names no file or folder, before libraries load for seconds."""
    for name in names:
        path = getattr(args, name)
        if path is not None and "://" not in path and not Path(path).exists():
            raise FileNotFoundError(f"{name}: {path} does not exist.")


def problems(found: Iterable[object]) -> Result:
    """Makes the result of a check: each problem and their number, and the exit code 1 if there are any."""
    listed = list(found)
    count = f"{len(listed)} problem{'s' if len(listed) > 1 else ''}." if listed else "No problem found."
    return Result("\n".join([*map(str, listed), count]), {"problems": listed}, int(bool(listed)))


def stored(store: "RegionStore") -> Result:
    """Makes the result of a command that wrote a store: its size, and where its regions come from."""
    known = {name: value for name, value in store.provenance.items() if value not in (None, [], {})}
    facts = {"images": len(store), "regions": store.num_regions, "feature_dim": store.feature_dim}
    rows = facts | {name: known[name] for name in ("dtype", "detector", "num_classes") if name in known}
    lines = [f"  {name:12} {f'{value:,}' if isinstance(value, int) else value}" for name, value in rows.items()]
    return Result("\n".join([str(store.path), *lines]), {"path": store.path, **facts, "provenance": known})


def show(result: object, as_json: bool, indent: int | None = 2) -> int:
    """Prints what a command found, as text or as JSON, one a line where it goes on, and returns its exit code."""
    if result is None:
        return 0
    if isinstance(result, Iterator):
        return max(show(each, as_json, indent=None) for each in result)
    if not isinstance(result, Result):
        result = Result(str(result), result)
    shown = json.dumps(result.data, default=_plain, ensure_ascii=False, indent=indent) if as_json else result.text
    print(shown, flush=True)
    return result.code


def _plain(value: Any) -> Any:
    """Makes of an object what JSON knows."""
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if is_dataclass(value):
        return {each.name: vars(value)[each.name] for each in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)

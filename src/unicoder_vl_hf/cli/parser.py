"""`unicoder-vl`: region features, from photos or from files of other tools, and search with them, from the shell."""

from argparse import ArgumentParser
from collections.abc import Sequence

from .._version import package_version
from ..errors import USER_ERRORS, end_with, stopped
from . import photos, retrieval, search, stores, vcr

FAMILIES = (photos, stores, retrieval, search, vcr)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command. Returns its exit code: 0 or that of the command, 1 after an error that the user can mend, which is
    said in one line, or 130 after Ctrl-C.

    Modules that a command needs are imported when it runs: Ctrl-C is caught meanwhile, and others need not wait for it.
    """
    program, go_on = "unicoder-vl", ""
    try:
        args, unknown = build_parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        program, go_on = f"{program} {args.command.name}", args.command.go_on
        return args.command.run(args) or 0
    except USER_ERRORS as error:
        return end_with(error, program)
    except KeyboardInterrupt:
        return stopped(program, go_on)


def build_parser() -> ArgumentParser:
    """
    Builds the parser of all commands. Its namespace holds the [`Command`] as `command` and its parser as `parser`.
    """
    parser = ArgumentParser(prog="unicoder-vl", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unicoder-vl-hf {package_version()}")
    parsers = parser.add_subparsers(required=True, metavar="command")
    for family in FAMILIES:
        for command in family.commands:
            description = command.help if command.help.endswith("?") else f"{command.help}."
            added = parsers.add_parser(command.name, help=command.help, description=description, allow_abbrev=False)
            added.set_defaults(command=command, parser=added)
            command.add_arguments(added)
    return parser

"""
`unicoder-vl` makes stores of region features, from photos or from files of other tools, looks into them, and scores,
explains, searches and answers with a trained model. `unicoder-vl COMMAND --help` tells more of one. Training and
evaluation are scripts of `examples/`.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from .. import logging
from .._version import __version__
from ..errors import USER_ERRORS, FinishedRun, end_with, stopped, warn_in_one_process
from ..name_lists import did_you_mean, unknown_option
from . import app, checkpoints, foil, photos, plan, retrieval, scoring, search, serving, stores, vcr, vqa
from .commands import show

FAMILIES = (photos, stores, checkpoints, scoring, retrieval, search, serving, foil, vcr, vqa, app, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command. Returns its exit code: 0 or that of the command, 1 after an error that the user can mend, which is
    said in one line, or 130 after Ctrl-C.

    Modules that a command needs are imported when it runs: Ctrl-C is caught meanwhile, and others need not wait for it.
    """
    program, go_on = "unicoder-vl", ""
    try:
        parser, words = build_parser(), sys.argv[1:] if argv is None else argv
        _check_words(words, parser)
        args, unknown = parser.parse_known_args(words)
        command, its_parser, as_json = (vars(args).pop(name) for name in ("command", "parser", "json"))
        del args.parsers
        if unknown:
            its_parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        program, go_on = f"{program} {command.name}", command.go_on
        with logging.without_bars_of_libraries():
            return show(command.run(args), as_json)
    except FinishedRun as finished:
        warn_in_one_process(str(finished))
        return 0
    except USER_ERRORS as error:
        return end_with(error, program)
    except KeyboardInterrupt:
        return stopped(program, go_on)


def _check_words(words: Sequence[str], parser: ArgumentParser) -> None:
    """Ends as argparse does at a command or an option that there is not, and asks whether another was meant."""
    parsers = parser.get_default("parsers")
    if words and not words[0].startswith("-"):
        if words[0] not in parsers:
            parser.error(
                f"there is no command {words[0]!r}, only {', '.join(parsers)}.{did_you_mean(words[0], parsers)}"
            )
        parser, words = parsers[words[0]], words[1:]
    else:
        words = words[:1]  # what follows is of no known command
    if fault := unknown_option(words, parser._option_string_actions):
        parser.error(fault)


def build_parser() -> ArgumentParser:
    """
    Builds the parser of all commands. Its namespace holds the [`Command`] as `command` and its parser as `parser`.
    """
    parser = ArgumentParser(prog="unicoder-vl", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unicoder-vl-hf {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="command")
    parser.set_defaults(parsers=parsers.choices)
    for family in FAMILIES:
        for command in family.commands:
            description = command.help if command.help.endswith("?") else f"{command.help}."
            added = parsers.add_parser(command.name, help=command.help, description=description, allow_abbrev=False)
            added.set_defaults(command=command, parser=added)
            command.add_arguments(added.add_argument)
            added.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser

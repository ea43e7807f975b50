"""
Endings of a command: an error that a user can mend, Ctrl-C and a finished run are each said in one line, without a
traceback.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

from . import logging

USER_ERRORS = (ValueError, OSError, ImportError, KeyError)
TRACEBACK = "UNICODER_VL_TRACEBACK"  # set in the environment: show the traceback, too


def end_with(error: Exception, program: str) -> int:
    """
    Logs one of `USER_ERRORS` in one line and returns the exit code 1. Raises it again where the environment asks for
    the traceback, and where it is a KeyError whose key is no sentence: our own are sentences, so that one is a defect
    of the code.
    """
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # else it were quoted
    if os.environ.get(TRACEBACK, "0") != "0" or (isinstance(error, KeyError) and " " not in message):
        raise error
    sys.stderr.write(f"{logging.coloured(program, 31, sys.stderr)}: {message or type(error).__name__}\n")
    return 1


def stopped(program: str, go_on: str = "") -> int:
    """
    Says that Ctrl-C ended the program, followed by `go_on`, which says how to go on. Returns 130, the exit code of
    shells.
    """
    sys.stderr.write(f"{program}: stopped. {go_on}".rstrip() + "\n")
    return 130


logger = logging.get_logger(__name__)


class FinishedRun(ValueError):
    """An error that says that nothing is left to do here: a command says so, and ends with 0."""


def run_script(main: Callable[[], bool | None] | str, go_on: str = ""):
    """
    Makes a command of `main`, without the progress bars of the libraries below. Where it is a name, `module:function`,
    it is imported here, so that Ctrl-C meanwhile ends in one line, too.

    A run that Ctrl-C stopped ends with exit code 130, as in a shell, so that whatever follows after `&&` does not start
    with a half-trained model. This holds for a training that saved a checkpoint and returned False, and for anything
    that stopped at once; `go_on` then says how to go on. A training that was finished before ends with 0. An error that
    the user can mend is logged in one line by each process that meets it, and ends with 1, whereupon the launcher ends
    the other processes.
    """
    rank = os.environ.get("RANK")
    program = Path(sys.argv[0]).name + (f" (process {rank})" if rank else "")
    try:
        with logging.without_bars_of_libraries():
            trained = resolve_name(main)() if isinstance(main, str) else main()
    except FinishedRun as finished:
        warn_in_one_process(str(finished))
        return
    except USER_ERRORS as error:
        sys.exit(end_with(error, program))
    except KeyboardInterrupt:
        sys.exit(stopped(program, go_on))
    if trained is False:
        warn_in_one_process("Go on with the same command and --resume_from_checkpoint latest.")
        sys.exit(130)


def warn_in_one_process(text: str):
    """Warns in one of the processes of the launcher."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)

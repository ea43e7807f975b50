"""
How a command ends: an error that a user can mend, Ctrl-C and a finished run are said in one line, without the way they
took through the code.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import logging

USER_ERRORS = (ValueError, OSError, ImportError, KeyError)
TRACEBACK = "UNICODER_VL_TRACEBACK"  # set in the environment: the way, too


def end_with(error: Exception, program: str) -> int:
    """
    Says one of `USER_ERRORS` and returns the exit code 1. Raises it again where the environment asks for the traceback,
    and where it is a KeyError of a bare key: ours are sentences, that one is a defect of the code.
    """
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # whose str() is quoted
    if os.environ.get(TRACEBACK, "0") != "0" or (isinstance(error, KeyError) and " " not in message):
        raise error
    sys.stderr.write(f"{program}: {message or type(error).__name__}\n")
    return 1


def stopped(program: str, go_on: str = "") -> int:
    """Says that Ctrl-C ended it, and in `go_on` what goes on where; returns 130, as the shell has it."""
    sys.stderr.write(f"{program}: stopped. {go_on}".rstrip() + "\n")
    return 130


logger = logging.get_logger(__name__)


class FinishedRun(ValueError):
    """There is nothing left to train."""


def run_script(main: Callable[[], bool | None], go_on: str = ""):
    """
    `main` as a command. What Ctrl-C stopped ends with 130, as the shell has it, so that what follows after `&&` does
    not take up half a model: a training that returned False, after a checkpoint, or anything else, at once; `go_on`
    then says what goes on. A training that was finished before ends well. An error that the user can mend is said in
    one line by each process that meets it, and ends with 1, whereupon the launcher ends the others.
    """
    rank = os.environ.get("RANK")
    program = Path(sys.argv[0]).name + (f" (process {rank})" if rank else "")
    try:
        trained = main()
    except FinishedRun as finished:
        _warn_once(str(finished))
        return
    except USER_ERRORS as error:
        sys.exit(end_with(error, program))
    except KeyboardInterrupt:
        sys.exit(stopped(program, go_on))
    if trained is False:
        _warn_once("Go on with the same command and --resume_from_checkpoint latest.")
        sys.exit(130)


def _warn_once(text: str):
    """In one of the launcher's processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)

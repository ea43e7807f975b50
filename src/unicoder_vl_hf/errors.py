"""
How a command ends: errors that a user can mend, and Ctrl-C, are said in one line, without the way they took through the
code.
"""

import os
import sys

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

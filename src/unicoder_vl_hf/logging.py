"""
Log lines and progress bars like those of `transformers.utils.logging`, for code that does without transformers.

A command that only reads and writes files starts at once; importing transformers for a logger would take seconds.
Loggers are Python's own, as transformers hands them to other packages: warnings go to stderr. Progress bars are tqdm's,
and are turned off by any of `TQDM_DISABLE=1`, `HF_HUB_DISABLE_PROGRESS_BARS=1`, or
`disable_progress_bar()` of transformers.
"""

import functools
import logging
import os
import sys
from typing import Any


def get_logger(name: str) -> logging.Logger:
    """Gives the logger of a module, by its name."""
    return logging.getLogger(name)


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning, unless the same was logged before in this process."""
    logger.warning(message)


def tqdm(*args: Any, disable: bool = False, **kwargs: Any) -> Any:
    """Makes a progress bar with tqdm's arguments; `disable` says that this process shows none."""
    from tqdm import auto

    if disable or _are_bars_disabled():
        kwargs["disable"] = True  # passing False on would overrule TQDM_DISABLE
    return auto.tqdm(*args, **kwargs)


def _are_bars_disabled() -> bool:
    transformers = sys.modules.get("transformers.utils.logging")
    if transformers is not None:
        return not transformers.is_progress_bar_enabled()
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}

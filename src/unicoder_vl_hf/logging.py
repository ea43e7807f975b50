"""
Log lines and progress bars like those of `transformers.utils.logging`, for code that does without transformers.

A command that only reads and writes files starts at once; importing transformers for a logger would take seconds.
Loggers are Python's own, as transformers hands them to other packages: warnings go to stderr. Progress bars are tqdm's,
and are turned off by any of `TQDM_DISABLE=1`, `HF_HUB_DISABLE_PROGRESS_BARS=1`, or
`disable_progress_bar()` of transformers.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def without_bars_of_libraries() -> Iterator[None]:
    """
    Runs a block without the progress bars of datasets and transformers, which a run would show for every selection of
    rows, load and save. Ours, Trainer's and those of downloads stay, and so do all warnings.
    """
    from transformers.utils import logging as of_transformers

    before = of_transformers.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))
    try:
        with without_bars_of_datasets():
            yield
    finally:
        of_transformers.set_tqdm_hook(before)


@contextlib.contextmanager
def without_bars_of_datasets() -> Iterator[None]:
    """Runs a block without the progress bars of datasets alone, and without importing transformers."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def without_warnings_of_transformers() -> Iterator[None]:
    """Runs a block without warnings of transformers, whose report of what a checkpoint lacks the block replaces."""
    from transformers.utils import logging as of_transformers

    verbosity = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)


def _are_bars_disabled() -> bool:
    transformers = sys.modules.get("transformers.utils.logging")
    if transformers is not None:
        return not transformers.is_progress_bar_enabled()
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}

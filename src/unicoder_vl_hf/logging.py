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
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TextIO


def get_logger(name: str) -> logging.Logger:
    """Gives the logger of a module, by its name."""
    return logging.getLogger(name)


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning, unless the same was logged before in this process."""
    logger.warning(message)


def coloured(text: str, code: int, stream: TextIO) -> str:
    """Colours a text by an ANSI code such as 31 for red, where the stream is a terminal and NO_COLOR is not set."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{code}m{text}\033[0m"


def tqdm(*args: Any, disable: bool = False, **kwargs: Any) -> Any:
    """
    Makes a progress bar with tqdm's arguments, in the place of those around it; `disable` says that this process shows
    none.
    """
    from tqdm import auto

    if disable or _are_bars_disabled():
        kwargs["disable"] = True  # passing False on would overrule TQDM_DISABLE
    elif around := list(auto.tqdm._instances):  # one at a time: it stands where they stood, until it ends
        for bar in around:
            bar.clear()
        kwargs.setdefault("position", 0)
    return auto.tqdm(*args, **kwargs)


class _Hider:
    """A finder of modules that hides the bars of datasets and transformers as soon as these are imported."""

    def __init__(self) -> None:
        self.undo = contextlib.ExitStack()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds the modules that make bars as the usual finder does, with a loader that hides these afterwards."""
        spec = PathFinder.find_spec(name, path, target) if name in _WITH_BARS else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                self.hide(module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec

    def hide(self, module: Any) -> None:
        """Hides the bars of a module of `_WITH_BARS`."""
        if module.__name__.startswith("transformers"):
            before = module.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))
            self.undo.callback(module.set_tqdm_hook, before)
        elif not module.are_progress_bars_disabled():
            module.disable_progress_bars()
            self.undo.callback(module.enable_progress_bars)


_WITH_BARS = ("transformers.utils.logging", "datasets.utils.tqdm")


@contextlib.contextmanager
def without_bars_of_libraries() -> Iterator[None]:
    """
    Runs a block without the progress bars of datasets and transformers, which a run would show for every selection of
    rows, load and save; neither is imported for it. Ours, Trainer's and those of downloads stay, and so do all
    warnings.
    """
    hider = _Hider()
    sys.meta_path.insert(0, hider)
    try:
        with hider.undo:
            for name in _WITH_BARS:
                if name in sys.modules:
                    hider.hide(sys.modules[name])
            yield
    finally:
        sys.meta_path.remove(hider)


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

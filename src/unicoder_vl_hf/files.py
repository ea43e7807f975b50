"""Files and folders that appear whole or not at all: written beside their place and renamed, locked, begun anew."""

import csv
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from . import logging

logger = logging.get_logger(__name__)

LEAST_FREE = 2**20  # bytes: a disk that has less is full


def sync_folder(folder: Path) -> None:
    """Makes sure that the names of the files in a folder outlast a crash of the system."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def partial_path(path: Path) -> Path:
    """Gives the path under which a file is written until it is complete."""
    return path.with_name(f"{path.name}.partial")


def complete(file: IO, path: Path) -> None:
    """
    Closes the file at `partial_path(path)` and gives it its name, in an order that leaves a whole file after a crash.
    """
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(partial_path(path), path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically: readers see the old file or the new one."""
    with partial_path(path).open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        complete(file, path)


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Writes rows of cells as CSV, atomically: readers see the old file or the new one."""
    with partial_path(path).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
        complete(file, path)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """
    Runs a block that saves into a folder. Where its disk is full, raises the OSError that says so and names the folder,
    in place of what libraries raise then.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or not folder.exists() or shutil.disk_usage(folder).free > LEAST_FREE:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def json_digest(value: Any) -> str:
    """The SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_writable(folder: Path) -> None:
    """Raises OSError, which names the folder, where nothing can be written into it: before work is lost by that."""
    tempfile.TemporaryFile(dir=folder).close()


def make_folder(folder: Path) -> None:
    """Makes a folder where there is none. Raises ValueError where a file is in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} is, or is below, a file: take another folder.") from None


LOCK_PATIENCE = 5.0  # seconds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Keeps a folder for one writer: the system holds the lock, and frees it when the process ends, however it does.

    Raises:
        ValueError: Another writer is at work in the folder.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            # Forked readers of a writer that was killed hold its lock until they notice.
            give_up = time.monotonic() + LOCK_PATIENCE
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        raise ValueError(f"{folder} is being written by another process: wait until it ends.") from None
                    time.sleep(0.1)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it to processes forked meanwhile
        os.close(handle)


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """
    Opens a file to write, which gets its name when the block ends without an error. Raises ValueError if it exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or choose another name.")
    try:
        with partial_path(path).open("wb") as file:
            yield file
            complete(file, path)
    finally:
        partial_path(path).unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Makes a folder to fill, which gets its name when the block ends without an error. Raises ValueError if it exists.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or choose another name.")
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """
    Removes a folder, renamed first: what has lost some of its files must not pass for a folder that is whole. Removes
    also what a kill left of an earlier call.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def replace_folder(folder: Path, new: Path) -> None:
    """
    Gives a folder that is whole the place of another one, which is removed. A kill between the two steps is mended by
    `put_back`.
    """
    old = folder.with_name(f".{folder.name}.old")
    os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old)


def put_back(folder: Path) -> None:
    """Puts a folder back that `replace_folder` had moved away when it was killed."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, folder)


@dataclass(frozen=True)
class OutputKind:
    """
    A kind of folder that commands write, recognised by the files in it, so that `--restart` removes no other folder.

    Args:
        name (`str`): Name of the kind in messages, such as `"region store"`.
        last (`str`): The file that is written last: a folder that holds it is complete.
        files (tuple of `str`): Patterns of the names of all files that a folder may hold, `last` among them.
        work (tuple of `str`): Patterns for the folders of unfinished work that lie beside it.
    """

    name: str
    last: str
    files: tuple[str, ...]
    work: tuple[str, ...] = ()

    def is_complete(self, folder: Path) -> bool:
        """Tells whether the folder holds a complete output."""
        return (folder / self.last).exists()

    def check(self, folder: Path, patterns: tuple[str, ...]) -> None:
        """Raises ValueError where `folder` is a file, or holds something that none of the patterns fits."""
        if folder.is_file():
            raise ValueError(
                f"{folder} is a file, no {self.name}, so --restart does not remove it: take another folder."
            )
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
        if foreign:
            raise ValueError(
                f"{folder} holds {foreign[0]!r}, which is no part of a {self.name}, so --restart does not remove "
                "it: move it away, or take another folder."
            )


@contextmanager
def begun_anew(output: str | os.PathLike, restart: bool, kind: OutputKind, *work: Path) -> Iterator[None]:
    """
    Runs a block that writes the folder `output`, or goes on with it; with `restart`, as if nothing were there.

    A restart removes unfinished work. It sets a complete output aside, and removes it when the block ends without an
    error: until then the disk holds both. If the block fails before anything is begun, the complete output comes back.
    To go on with a restart that was stopped, enter this block without `restart`. Of several processes, only one
    enters it.

    Args:
        output (`str` or `os.PathLike`): The folder that the block writes.
        restart (`bool`): Whether to begin anew.
        kind (`OutputKind`): The kind of folder that `output` is.
        work (`Path`): Folders beside it in which the block keeps unfinished work.

    Raises:
        ValueError: `restart` would remove a file that is no part of such a folder, or another process writes the
            folder.
    """
    folder = Path(os.path.realpath(output))
    before = folder.with_name(f".{folder.name}.before-restart")
    if restart:
        kind.check(folder, kind.files)
        for path in work:
            kind.check(path, kind.work)
        with ExitStack() as stack:
            for path in (folder, *work):
                if path.exists():
                    stack.enter_context(locked(path))
            for path in work:
                shutil.rmtree(path, ignore_errors=True)
            if not kind.is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                shutil.rmtree(before, ignore_errors=True)  # left by a restart that was killed after it was complete
                os.replace(folder, before)
                logger.warning(f"{folder} begins anew; its former content is in {before} until it is complete.")
    try:
        yield
    except BaseException:
        if before.exists() and not any(path.exists() for path in (folder, *work)):
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def say_finished(output: str | os.PathLike) -> None:
    """Warns that an output is finished, so that a command has nothing to do."""
    logger.warning(f"{os.fspath(output)} is finished, and stays as it is; --restart begins anew.")

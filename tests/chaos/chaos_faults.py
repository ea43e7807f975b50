"""Faults beside kills: a full disk, a read-only one, a clock that jumps, renames that report an error though done."""

import contextlib
import errno
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chaos_commands import Command
from chaos_machine import CLOCK, KILL, RENAME, Machine, Run, content, differing

DAY = 24 * 3600


class CannotTry(Exception):
    """Says why a fault cannot be made here."""


@contextlib.contextmanager
def disk(folder: Path, pages: int) -> Iterator[Callable[[str], None]]:
    """A disk of its own at a folder; gives a function that mounts it anew with other options."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * mmap.PAGESIZE}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        raise CannotTry(f"no small disk can be mounted: {done.stderr.strip()}")

    def mount_again(options: str) -> None:
        for _ in range(300):  # killed processes let go of their files a little later
            if subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"{folder} cannot be mounted {options}")

    try:
        yield mount_again
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def failed(run: Run, *words: str) -> None:
    """Asserts that a command ended with 1 and one line that says why."""
    code = run.wait()
    last = run.output.strip().splitlines()[-1:]
    assert code == 1 and "Traceback" not in run.output, f"ended with {code}: {run.output[-3000:]}"
    assert all(word in last[0] for word in words), f"the error is {last}, expected {words}"


def finished(machine: Machine, command: Command, folder: Path, **options: Any) -> Run:
    """Runs a command to its end, and asserts that it wrote what an undisturbed one writes."""
    run = machine.start_command(command, folder, **options)
    code = run.wait()
    assert code == 0, f"ended with {code}: {run.output[-3000:]}"
    names = differing(content(folder), content(machine.undisturbed(command).folder))
    assert not names, f"differs in {names}"
    return run


def full_disk(machine: Machine, command: Command, folder: Path, rng: random.Random) -> str:
    """It says so, what was there stays, and when there is space the same command goes on."""
    files = [path for path in machine.undisturbed(command).folder.rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // mmap.PAGESIZE) for path in files)
    with disk(folder, 2 + int(pages * rng.uniform(0.3, 0.7))) as mount_again:
        (folder / "theirs").write_text("a file of somebody else")
        first = machine.start_command(command, folder / "work")
        failed(first, "No space left on device")
        mount_again("size=1G")
        second = finished(machine, command, folder / "work")
        assert (folder / "theirs").read_text() == "a file of somebody else"
        lost = len(first.units & second.units)
        assert lost <= command.most_lost, f"{lost} units were done again, at most {command.most_lost} expected"
    return f"{lost} of {len(first.units)} units done again"


def read_only(machine: Machine, command: Command, folder: Path, rng: random.Random) -> str:
    """It names the folder before it works, be it new or begun, and goes on when it may write."""
    with disk(folder, 2**18) as mount_again:
        work = folder / "work"
        work.mkdir()
        for begun in (False, True):
            if begun:
                fault = KILL, machine.undisturbed(command).events // 2, 0
                run = machine.start_command(command, work, fault=fault)
                run.wait()
                run.kill(whole=True)  # its readers, too, which still write to the disk
            mount_again("ro")
            run = machine.start_command(command, work)
            failed(run, "Read-only file system", "out")
            assert not run.units, f"{len(run.units)} units were done before it said so"
            mount_again("rw")
        finished(machine, command, work)
    return "no unit done before the error"


def clock(machine: Machine, command: Command, folder: Path, rng: random.Random) -> str:
    """It is a day too fast when the command is killed, and right when it goes on; then it falls back by a day."""
    whole = machine.undisturbed(command)
    run = machine.start_command(command, folder, fault=(CLOCK, 1, DAY))
    if run.wait(whole.seconds * rng.uniform(0.3, 0.9)) is None:
        run.kill(whole=True)
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (time.time() + DAY,) * 2)
    finished(machine, command, folder, fault=(CLOCK, int(1 + whole.events * rng.random()), -DAY))
    return "equal"


def renames(machine: Machine, command: Command, folder: Path, rng: random.Random) -> str:
    """A rename is done and reports an error, as on NFS: the command ends, or not, and run again it goes on."""
    (count,) = machine.undisturbed(command).numbers("renames")
    if not count:
        raise CannotTry("it renames nothing")
    number = rng.randint(1, count)
    error = rng.choice([errno.ESTALE, errno.EEXIST, errno.ENOENT, errno.EIO])
    run = machine.start_command(command, folder, fault=(RENAME, number, error))
    code = run.wait()
    if code:
        failed(run, os.strerror(error))
    finished(machine, command, folder)
    return f"rename {number} of {count}, {errno.errorcode[error]}: ended with {code}"


FAULTS = {"full disk": full_disk, "read-only disk": read_only, "clock": clock, "rename": renames}


def try_fault(name: str, machine: Machine, command: Command, folder: Path, rng: random.Random) -> str:
    """
    Tries a fault with a command in a new folder, and tells what came of it.

    Raises:
        AssertionError: The command does not stand it.
        CannotTry: The fault cannot be made here.
    """
    if machine.faults is None:
        raise CannotTry("there is no gcc, which compiles faults.c")
    return FAULTS[name](machine, command, folder, rng)

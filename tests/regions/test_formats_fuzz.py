"""
Damaged and hostile feature files. Whatever the bytes, each image ends in a record or in a ValueError that names the
file, and the next one is read: no hang, crash, flood of memory, other exception or executed pickle.

    UNICODER_VL_FUZZ=10000 pytest -s tests/test_formats_fuzz.py

changes 10,000 files; without the variable, a few hundred. They are read in a process of their own, whose crash the test
survives. `PYTHONPATH=src python tests/test_formats_fuzz.py FOLDER 17 18` repeats case 17 alone.
"""

import io
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

for module in ("lmdb", "msgpack", "msgpack_numpy", "h5py"):
    pytest.importorskip(module)

import foreign_arrays as arrays  # noqa: E402
import foreign_pickles as pickles  # noqa: E402
import lmdb  # noqa: E402

from unicoder_vl_hf.regions.formats import FORMATS, read_items  # noqa: E402

CASES = int(os.environ.get("UNICODER_VL_FUZZ", "300"))
BATCH = 1000  # for one test, which a few minutes must do for
SECONDS = 60  # for one small file, on a busy machine
MEMORY = 4 * 2**30  # more than this process has already
# Format, and a writer of an example.
SOURCES: list[tuple[str, Callable[[Path], Path]]] = [
    *pickles.WRITERS.items(),
    *arrays.WRITERS.items(),
    ("uniter-lmdb", partial(pickles.uniter_lmdb, name="all_compressed")),
    ("volta-lmdb", partial(pickles.volta_lmdb, row=pickles.volta_arrays)),
    ("volta-lmdb", partial(pickles.volta_lmdb, row=pickles.vilbert_arrays)),
    ("vinvl-tsv", arrays.write_vinvl_captioning),
    ("hdf5", arrays.write_hdf5_fixed),
    ("lxmert-tsv", partial(arrays.write_lxmert, row=arrays.lxmert_row_without_attributes)),
    ("vinvl-tsv", arrays.write_vinvl_own),
    ("volta-hdf5", arrays.write_volta_hdf5),  # twice, as HDF5 has many kinds of damage
    ("volta-lmdb", partial(pickles.volta_lmdb, row=pickles.volta_row_with_none)),
    ("milvlg-npz", pickles.milvlg_npz_boxes),
    ("mmf-npy", pickles.pythia_npy),
    ("vlbert-json", pickles.vlbert_zip),
]
HOSTILE = "executed"  # created by a pickle that is run


class Bomb:
    def __reduce__(self):
        return open, (HOSTILE, "w")


def change(rng: np.random.Generator, data: bytes) -> bytes:
    """One change in most cases, four at most."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = int(rng.integers(len(result) + 1))
        # Headers and footers are small, and decide most.
        at = int(rng.choice([at, at, min(at, at % 256), max(0, len(result) - at % 256)]))
        length = int(rng.choice([1, 2, 4, 8, rng.integers(1, 200)]))
        number = [0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), 10**6][rng.integers(10)]
        match rng.integers(8):
            case 0 if at < len(result):  # a flipped bit
                result[at] ^= 1 << int(rng.integers(8))
            case 1:  # other bytes
                result[at : at + length] = rng.bytes(min(length, max(0, len(result) - at)))
            case 2:  # a number that lies
                result[at : at + length] = number.to_bytes(8, "little")[:length]
            case 3:  # a number in text that lies
                result[at : at + length] = str(number).encode()
            case 4:  # cut short
                del result[at:]
            case 5:  # a part gone
                del result[at : at + length]
            case 6:  # a part of elsewhere
                begin = int(rng.integers(len(result) + 1))
                result[at:at] = result[begin : begin + length]
            case 7:  # a pickle that runs code
                payload = pickle.dumps(Bomb(), int(rng.integers(6)))
                result[at : at + int(rng.choice([0, len(payload)]))] = payload
    return bytes(result)


def change_file(rng: np.random.Generator, path: Path) -> None:
    """Changes the bytes of a file, or what is in its container, the container being whole."""
    data = path.read_bytes()
    inside = rng.integers(2)
    if inside and path.suffix in (".npz", ".zip"):
        members = {}
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        chosen = list(members)[rng.integers(len(members))]
        members[chosen] = change(rng, members[chosen])
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    elif inside and path.name == "data.mdb":
        options = {"map_size": 2**24, "lock": False, "sync": False}
        with lmdb.open(str(path.parent), **options) as environment, environment.begin(write=True) as transaction:
            found = list(transaction.cursor())
            key, value = found[rng.integers(len(found))]
            transaction.put(key, change(rng, value))
    else:
        path.write_bytes(change(rng, data))


def outcome(source: Path, target: str, format: str, folder: Path, case: int) -> str:
    """What comes of changing a file of a copy of `source`, and reading what was `target` in it."""
    rng = np.random.default_rng(case)
    shutil.copytree(source, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "lock.mdb")
    change_file(rng, files[rng.integers(len(files))])
    path = folder / target
    for module in FORMATS.values():
        module.matches(path)
    result = "read"
    try:
        for item in read_items(path, format):
            try:
                item.record()
            except ValueError as error:  # as `convert --skip-broken` goes on
                result = refused(error, folder)
    except ValueError as error:
        result = refused(error, folder)
    return result


def refused(error: ValueError, folder: Path) -> str:
    """The outcome of a clear error, which names the file."""
    if str(folder) not in str(error):
        raise error
    return "refused"


def run(folder: Path, first: int, last: int) -> None:
    """Prints each case's number and format, and what came of it."""
    os.chdir(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    examples = []
    for number, (format, write) in enumerate(SOURCES):
        source = folder / f"source {number}"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        examples.append((source, write(source).relative_to(source).as_posix(), format))
    for case in range(first, last):
        source, target, format = examples[case % len(examples)]
        print(f"case {case}, {format}:", end=" ", flush=True)
        signal.alarm(SECONDS)
        try:
            print(outcome(source, target, format, folder / "changed", case), flush=True)
        except BaseException as error:
            print(f"{type(error).__name__} {str(error)!r:.200}", flush=True)
            if last == first + 1:
                traceback.print_exc()
        if Path(HOSTILE).exists():
            print(f"case {case}, {format}: EXECUTED")
            Path(HOSTILE).unlink()
        signal.alarm(0)
        if last > first + 1:
            shutil.rmtree("changed", ignore_errors=True)


def run_aside(folder: Path, first: int, last: int) -> None:
    """`run` in a process of its own, which leaves in files of `folder` what it prints."""
    for stream, name in ((sys.stdout, "printed"), (sys.stderr, "errors")):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    run(folder, first, last)


@pytest.mark.parametrize("start", range(0, CASES, BATCH))
def test_changed_files(start, tmp_path):
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    first, last = start, min(CASES, start + BATCH)
    while first < last and len(failures) < 20:
        process = multiprocessing.get_context("forkserver").Process(target=run_aside, args=(tmp_path, first, last))
        process.start()
        process.join()
        printed, errors = ((tmp_path / name).read_text() for name in ("printed", "errors"))
        first = last
        for line in printed.splitlines():
            case, format, result = re.fullmatch(r"case (\d+), ([\w-]+): ?(.*)", line).groups()
            counts[format, result if result in ("read", "refused") else "FAILED"] += 1
            if result not in ("read", "refused"):
                failures.append(line)
        if process.exitcode:
            assert printed, errors
            failures.append(f"The process ended by {process.exitcode} in {line} {errors[-2000:]}")
            first = int(case) + 1
    for format in FORMATS:
        print(format, {result: count for (name, result), count in counts.items() if name == format})
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == last - start
    assert {name for name, _ in SOURCES} == set(FORMATS)


if __name__ == "__main__":
    run(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]))

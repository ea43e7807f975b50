"""
Commands that are killed at random go on and write what undisturbed ones write: `chaos.py` in short, so that CI has some
kills and faults of each kind. `make chaos` kills a hundred times, and tries every fault with every command.
"""

import random

import chaos
import pytest
from chaos_faults import CannotTry, disk, failed, try_fault
from chaos_machine import Machine

SEED = 1


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with Machine(tmp_path_factory.mktemp("chaos")) as machine:
        yield machine


def named(name: str) -> chaos.Row:
    (row,) = (row for row in chaos.rows() if row.name == name)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extract", "pre-train"])
def test_a_killed_command_goes_on(machine, name):
    row = named(name)
    chaos.kill_all(machine, [row], 1, SEED)
    assert not row.problems and row.kills == 1


class Middle(random.Random):
    """Draws the middle: kills come halfway through the calls of what is left, whatever the machine's speed."""

    def random(self):
        return 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pre-train", "fine-tune"])
def test_a_training_goes_on_with_two_processes_and_with_one(machine, name):
    if machine.faults is None:
        pytest.skip("there is no gcc, which compiles faults.c")
    row = named(f"{name}, 1 → 2 → 1 processes")
    chaos.kill_command(machine, row, row.command, Middle(), machine.work_folder(), kills=2)
    assert (row.kills, row.starts, row.most_lost) == (2, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full disk", "read-only disk", "rename"])
def test_a_fault_is_said_and_survived(machine, fault, tmp_path):
    rng = random.Random(f"{SEED} {fault}")
    try:
        try_fault(fault, machine, named("extract").command, tmp_path / "work", rng)
    except CannotTry as reason:
        pytest.skip(str(reason))


SCORES = """
import numpy as np
from unicoder_vl_hf.errors import run_script
from unicoder_vl_hf.scoring.blocks import BlockFolder

def main():
    folder = BlockFolder("scores", {})
    folder.write(0, np.ones(2**13))
    folder.result(1, (2**23,), lambda block: np.arange(0, 2**23, 2**10))  # a number on each page

run_script(main)
"""


@pytest.mark.slow
def test_scores_that_do_not_fit_end_by_an_error(machine, tmp_path):
    """And not by a signal, as a memory map does of more than the disk holds."""
    (tmp_path / "scores.py").write_text(SCORES)
    try:
        with disk(tmp_path / "disk", pages=64):
            failed(machine.start([str(tmp_path / "scores.py")], tmp_path / "disk"), "No space left on device")
    except CannotTry as reason:
        pytest.skip(str(reason))

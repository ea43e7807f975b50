"""
Commands that are killed at random go on and write what undisturbed ones write: `chaos.py` in short.
`make chaos` kills a hundred times, and tries every fault with every command.
"""

import random

import chaos
import pytest
from chaos_faults import FAULTS, CannotTry
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
@pytest.mark.parametrize("number, name", enumerate(row.name for row in chaos.rows()))
def test_a_killed_command_goes_on(machine, number, name):
    row = named(name)
    chaos.kill_all(machine, [row], 1, SEED + number)
    assert not row.problems and row.kills == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, name",
    [("full disk", "extract"), ("read-only disk", "fine-tune"), ("clock", "fine-tune"), ("rename", "index")],
)
def test_a_fault_is_said_and_survived(machine, fault, name, tmp_path):
    if machine.faults is None:
        pytest.skip("there is no gcc, which compiles faults.c")
    try:
        FAULTS[fault](machine, named(name).command, tmp_path / "work", random.Random(f"{SEED} {fault} {name}"))
    except CannotTry as reason:
        pytest.skip(str(reason))

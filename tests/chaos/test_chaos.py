"""
Commands that are killed at random go on and write what undisturbed ones write: `chaos.py` in short, so that CI has some
kills and faults of each kind. `make chaos` kills a hundred times, and tries every fault with every command.
"""

import random

import chaos
import pytest
from chaos_faults import CannotTry, try_fault
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
@pytest.mark.parametrize("name", ["extract", "score", "pre-train"])
def test_a_killed_command_goes_on(machine, name):
    row = named(name)
    chaos.kill_all(machine, [row], 2, SEED)
    assert not row.problems and row.kills == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault, name", [("full disk", "score"), ("read-only disk", "score"), ("rename", "extract")])
def test_a_fault_is_said_and_survived(machine, fault, name, tmp_path):
    rng = random.Random(f"{SEED} {fault} {name}")
    try:
        try_fault(fault, machine, named(name).command, tmp_path / "work", rng)
    except CannotTry as reason:
        pytest.skip(str(reason))

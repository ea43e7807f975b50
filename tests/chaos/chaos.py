"""
Kills the package's commands with SIGKILL at random moments, starts them again until they end, and compares what they
wrote with what an undisturbed run wrote. Then come a full disk, a read-only one, a clock that jumps, and renames that
are done and report an error. `python tests/chaos/chaos.py --kills 100` prints tables; `make chaos` calls it.

Half of the kills come at a moment of the undisturbed run's duration, and half at one of its calls that change files, in
the middle of a write, too: `faults.c` counts these, where gcc can compile it.
"""

import argparse
import contextlib
import random
import signal
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from chaos_commands import COMMANDS, Command
from chaos_faults import FAULTS, CannotTry, try_fault
from chaos_machine import KILL, Machine, Run, content, differing, records, trained
from chaos_serving import expected_answers, kill_while_it_answers


@dataclass
class Row:
    """
    A row of the table of kills.

    Args:
        name: A command, as it is started.
        command: The command; None for the server.
        processes: Number of processes of each start; the last is that of all further ones.
    """

    name: str
    command: Command | None = None
    processes: tuple[int, ...] = (1,)
    kills: int = 0
    starts: int = 0
    most_lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def allowed(self) -> int:
        """Units that a kill may cost."""
        if self.command is None:
            return 1
        return self.command.most_lost * (1 if self.command.trains else max(self.processes))

    def __str__(self) -> str:
        cells = [self.name, self.kills, self.starts, self.most_lost, self.allowed, "no" if self.problems else "yes"]
        return f"| {' | '.join(map(str, cells))} |"


# Float32 rounds what two processes sum up otherwise than what one does, by 1e-6 here; a step changes weights by 1e-3.
close = partial(np.allclose, rtol=1e-5, atol=1e-5)

TITLE = "| command | kills | starts | units lost by a kill, at most | allowed | equal |\n|---|---|---|---|---|---|"


def rows() -> list[Row]:
    """Each command by one process, those that share their work by more, and the server."""
    found = [Row(command.name, command) for command in COMMANDS]
    for command in COMMANDS:
        if command.trains:
            found.append(Row(f"{command.name}, 2 processes", command, (2,)))
            # Each process has a dropout of its own, and so that of two is another one than that of one.
            command = replace(command, words=command.words.replace("bert_with_dropout", "lively_bert"))
        if command.processes:
            found.append(Row(f"{command.name}, 1 → 2 → 1 processes", command, (1, 2, 1)))
    return [*found, Row("serve")]


def kill_all(machine: Machine, chosen: list[Row], kills: int, seed: int) -> None:
    """Kills the commands of the rows in turn, one to three times until they end, until there were so many kills."""
    for number in count():
        row = chosen[number % len(chosen)]
        left = kills - sum(row.kills for row in chosen)
        if left <= 0:
            return
        rng, folder = random.Random(f"{seed} {number}"), machine.work_folder()
        try:
            if row.command is None:
                kill_server(machine, row, rng, folder)
            else:
                kill_command(machine, row, row.command, rng, folder, min(left, rng.randint(len(row.processes), 3)))
        except AssertionError as error:
            row.problems.append(f"{row.name} in {folder}: {error}")
            print(row.problems[-1], file=sys.stderr)
        print(row, file=sys.stderr, flush=True)  # as far as it has come


def kill_command(machine: Machine, row: Row, command: Command, rng: random.Random, folder: Path, kills: int) -> None:
    """
    Kills a command so many times, or until it has ended before.

    Raises:
        AssertionError: It does not go on, does too much again, or does not write what an undisturbed run writes.
    """
    runs: list[Run] = []
    code, progress = None, 0.0
    while code != 0:
        processes = row.processes[min(len(runs), len(row.processes) - 1)]
        if len(runs) == kills:
            run = machine.start_command(command, folder, processes)
        else:
            moment = rng.uniform(0, 1 - progress)
            progress += moment / 2  # what is done is not done again, but every start has its beginning
            run = kill_at(machine, command, folder, processes, moment, rng)
        code = run.wait()
        row.kills += code == -signal.SIGKILL
        row.starts += 1
        runs.append(run)
        assert code == 0 or (code == -signal.SIGKILL and len(runs) <= kills), f"ended with {code}: {run.output[-3000:]}"
        sizes = run.numbers("world")
        assert all(size == processes for size in sizes), f"{processes} processes were in worlds of {sizes}"
    for run in runs:
        run.kill(whole=True)  # readers that a kill left behind
    for number, run in enumerate(runs[:-1]):
        lost = len(run.units & set().union(*(later.units for later in runs[number + 1 :])))
        row.most_lost = max(row.most_lost, lost)
        assert lost <= row.allowed, f"kill {number} lost {lost} units, at most {row.allowed} expected"
    whole = machine.undisturbed(command, row.processes[-1])
    if command.trains:
        wrong = [step for run in runs for step, rows in run.rows.items() if rows != whole.rows.get(step)]
        assert not wrong, f"steps {wrong} took other rows"
        assert set().union(*(run.rows for run in runs)) == whole.rows.keys(), "steps are missing"
    if command.any_order and max(row.processes) > 1:
        names = differing(records(folder), records(whole.folder))
    elif command.trains and len(row.processes) > 1:
        names = differing(trained(folder), trained(whole.folder), close)
    else:
        names = differing(content(folder), content(whole.folder))
    assert not names, f"differs in {names}"


def kill_at(machine: Machine, command: Command, folder: Path, processes: int, moment: float, rng: random.Random) -> Run:
    """Starts a command and kills one of its processes after a share of its time, or of its calls that change files."""
    whole, rank = machine.undisturbed(command, processes), rng.randrange(processes)
    by_time, alone = machine.faults is None or rng.random() < 0.5, rng.random() < 0.5
    if not by_time:
        fault = KILL, 1 + int(moment * whole.events), 0
        return machine.start_command(command, folder, processes, fault=fault, rank=rank)
    run = machine.start_command(command, folder, processes)
    if run.wait(moment * whole.seconds) is None:
        run.kill(whole=not alone, rank=rank)
    return run


def kill_server(machine: Machine, row: Row, rng: random.Random, folder: Path) -> None:
    """Kills a server while it starts or answers. Raises AssertionError where an answer is wrong."""
    expected, seconds = expected_answers(machine)
    row.kills, row.starts = row.kills + 1, row.starts + 1
    unanswered = kill_while_it_answers(machine, folder, rng.uniform(0, 1.5 * seconds), expected)
    row.most_lost = max(row.most_lost, unanswered)


def try_faults(machine: Machine, chosen: list[Command], seed: int) -> tuple[str, list[str]]:
    """Tries each fault with each command; a table, and what is wrong."""
    lines, problems = ["| fault | command | outcome |", "|---|---|---|"], []
    for name in FAULTS:
        for command in chosen:
            folder = machine.folder / "faults" / f"{name}-{command.name}".replace(" ", "-")
            rng = random.Random(f"{seed} {name} {command.name}")
            try:
                outcome = try_fault(name, machine, command, folder, rng)
            except CannotTry as reason:
                outcome = f"not tried: {reason}"
            except AssertionError as error:
                outcome = "wrong"
                problems.append(f"{name}, {command.name} in {folder}: {error}")
                print(problems[-1], file=sys.stderr, flush=True)
            lines.append(f"| {name} | {command.name} | {outcome} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills in all (default: 100)")
    parser.add_argument("--seed", type=int, help="seed of all moments (default: any, which is printed)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="ROW", help="beginnings of rows (default: all)")
    parser.add_argument("--folder", type=Path, help="new folder to work in, which stays (default: one that is removed)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    chosen = [row for row in rows() if row.name.startswith(tuple(args.only))]
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        machine = stack.enter_context(Machine(folder.absolute()))
        kill_all(machine, chosen, args.kills, seed)
        print(TITLE, *chosen, "", sep="\n", flush=True)
        tried, problems = try_faults(
            machine, [row.command for row in chosen if row.command and row.processes == (1,)], seed
        )
    print(tried)
    problems = [problem for row in chosen for problem in row.problems] + problems
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

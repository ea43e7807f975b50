import itertools

import numpy as np
import pytest
from torch.utils.data import BatchSampler, DataLoader

from unicoder_vl_hf.data import samplers
from unicoder_vl_hf.data.samplers import (
    ReadAhead,
    StepBatchSampler,
    StreamBatchSampler,
    TokenBatchSampler,
    cut_evenly,
    epoch_order,
    step_parts,
)

GRID = list(itertools.product((1, 5, 23, 24), (1, 4, 7, 30), (1, 2, 3), (1, 2, 4)))


def sampler(num_rows=23, rows_per_step=7, epoch=0, **options):
    made = StepBatchSampler(num_rows, rows_per_step=rows_per_step, **({"seed": 5} | options))
    made.set_epoch(epoch)
    return made


def steps(num_rows, rows_per_step, micro_batches, num_processes, start_step=0):
    """All parts of each step, over processes and micro-batches: [step][process][micro_batch] -> (rows, weight)."""
    parts = []
    for process_index in range(num_processes):
        mine = sampler(
            num_rows,
            rows_per_step,
            micro_batches=micro_batches,
            num_processes=num_processes,
            process_index=process_index,
        )
        mine.set_start_step(start_step)
        parts.append(list(mine.parts()))
        assert len(mine) == len(parts[-1])
        assert list(mine) == [rows for rows, _ in parts[-1]]
        assert list(mine.weights()) == [weight for _, weight in parts[-1]]
    count = len(parts[0]) // micro_batches
    return [[mine[s * micro_batches : (s + 1) * micro_batches] for mine in parts] for s in range(count)]


def counted(step):
    """The rows that a step trains on, fillers left out."""
    return sorted(row for process in step for rows, weight in process for row in rows if weight > 0)


def test_order_by_hand():
    made = StepBatchSampler(7, rows_per_step=4, micro_batches=2, num_processes=1, seed=0, shuffle=False)
    assert list(made.parts()) == [([0, 1], 0.5), ([2, 3], 0.5), ([4, 5], 2 / 3), ([6], 1 / 3)]
    first, second = (
        StepBatchSampler(5, rows_per_step=4, micro_batches=1, num_processes=2, process_index=p, seed=0, shuffle=False)
        for p in (0, 1)
    )
    assert list(first.parts()) == [([0, 1], 0.5), ([4], 1.0)]
    assert list(second.parts()) == [([2, 3], 0.5), ([4], 0.0)]  # a filler: process 1 takes part, its row counts nothing


def test_weights_need_no_order(monkeypatch):
    made = sampler(23, 7, micro_batches=2)
    expected = [weight for _, weight in made.parts()]
    monkeypatch.setattr(samplers, "epoch_order", lambda *_, **__: pytest.fail("the epoch is permuted again"))
    assert list(made.weights()) == expected
    assert len(set(expected)) > 1


def test_step_parts_by_hand():
    assert step_parts(np.array([7, 3, 5]), 2) == [([7, 3], 2 / 3), ([5], 1 / 3)]
    assert step_parts(np.array([7]), 3) == [([7], 1.0), ([7], 0.0), ([7], 0.0)]


@pytest.mark.parametrize("num_rows, rows_per_step, micro_batches, num_processes", GRID)
def test_every_row_once_and_no_process_alone(num_rows, rows_per_step, micro_batches, num_processes):
    made = steps(num_rows, rows_per_step, micro_batches, num_processes)
    assert len(made) == sampler(num_rows, rows_per_step).steps_per_epoch == -(-num_rows // rows_per_step)
    assert sorted(row for step in made for row in counted(step)) == list(range(num_rows))
    for step in made:
        parts = [part for process in step for part in process]
        assert len(parts) == micro_batches * num_processes
        assert all(rows for rows, _ in parts)
        assert sum(weight for _, weight in parts) == pytest.approx(1, abs=1e-12)
        total = len(counted(step))
        assert all(weight in (0, len(rows) / total) for rows, weight in parts)
        sizes = [round(weight * total) for _, weight in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_rows, rows_per_step, micro_batches, num_processes", GRID)
def test_a_step_is_the_same_however_it_is_split(num_rows, rows_per_step, micro_batches, num_processes):
    whole = [counted(step) for step in steps(num_rows, rows_per_step, 1, 1)]
    assert [counted(step) for step in steps(num_rows, rows_per_step, micro_batches, num_processes)] == whole


@pytest.mark.parametrize("num_rows, rows_per_step, micro_batches, num_processes", GRID)
def test_resume_is_the_tail(num_rows, rows_per_step, micro_batches, num_processes):
    whole = steps(num_rows, rows_per_step, micro_batches, num_processes)
    for start in range(len(whole) + 1):
        assert steps(num_rows, rows_per_step, micro_batches, num_processes, start) == whole[start:]


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return [row for rows in sampler(100, 10, epoch, seed=seed) for row in rows]

    assert order(0, 0) == order(0, 0) == epoch_order(100, seed=0, epoch=0).tolist()
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) != sorted(order(0, 0))


def test_start_step_belongs_to_its_epoch():
    made = sampler(20, 5)
    made.set_epoch(3, start_step=2)
    assert len(made) == 2
    made.set_epoch(3)  # the same epoch announced again, as accelerate does when a loader starts
    assert len(made) == 2
    made.set_epoch(4)
    assert len(made) == 4


def test_feeds_a_loader():
    made = sampler(23, 7, micro_batches=2)
    loader = DataLoader(range(23), batch_sampler=made, collate_fn=list)
    assert len(loader) == len(made) == 8
    assert list(loader) == list(made)
    made.set_epoch(0, start_step=3)
    assert list(loader) == list(made) and len(loader) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_rows": 0}, "num_rows=0"),
        ({"rows_per_step": 0}, "rows_per_step=0"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"num_processes": 2, "process_index": 2}, "process_index=2; expected 0 to 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(**({"num_rows": 10, "rows_per_step": 4, "seed": 0} | options))


def test_refuses_a_step_outside_the_epoch():
    with pytest.raises(ValueError, match="step=5 is not in the epoch; expected 0 to 4"):
        sampler(23, 7).set_start_step(5)
    with pytest.raises(ValueError, match="epoch=-1"):
        sampler().set_epoch(-1)


def test_each_batch_is_announced_while_the_one_before_it_is_here():
    events = []
    ahead = ReadAhead(BatchSampler(range(5), 2, drop_last=False), lambda rows: events.append(f"announced {rows}"))
    assert len(ahead) == 3
    for _ in range(2):  # epochs
        events.clear()
        for rows in ahead:
            events.append(f"given {rows}")
        assert events == ["announced [2, 3]", "given [0, 1]", "announced [4]", "given [2, 3]", "given [4]"]


# Steps of equal tokens


def lengths_of(rows, epoch):
    """Two sequences a row, of 10 to 99 tokens; the second differs from epoch to epoch."""
    return np.stack((10 + rows * 37 % 90, 10 + (rows * 53 + 7 * epoch) % 90), axis=1)


def by_tokens(num_rows=2000, tokens_per_batch=4000, epoch=0, **options):
    num_tokens = int(lengths_of(np.arange(num_rows), 0).sum())
    made = TokenBatchSampler(
        lengths_of, num_rows, num_tokens=num_tokens, tokens_per_batch=tokens_per_batch, **({"seed": 5} | options)
    )
    made.set_epoch(epoch)
    return made


def test_cut_evenly_by_hand():
    assert cut_evenly(np.array([1, 1, 1, 1, 2, 2, 4]), 3).tolist() == [0, 4, 6, 7]
    assert cut_evenly(np.array([9, 1, 1, 1]), 3).tolist() == [0, 1, 2, 4]  # none is empty
    assert cut_evenly(np.array([1, 1, 1, 9]), 3).tolist() == [0, 2, 3, 4]
    assert cut_evenly(np.array([9, 1, 1, 1]), 2, least=2).tolist() == [0, 2, 4]


def test_steps_of_equal_tokens_by_hand():
    lengths = {0: [5, 5], 1: [1, 1], 2: [3, 3], 3: [1, 3], 4: [2, 2]}
    made = TokenBatchSampler(
        lambda rows, epoch: np.array([lengths[row] for row in rows.tolist()]),
        5, num_tokens=26, tokens_per_batch=13, seed=0, shuffle=False,
    )  # fmt: skip
    # In the order of the longest sequence, and then of all tokens: 1, 4, 3, 2, 0.
    assert list(made.parts()) == [([1, 4, 3], 3 * 2 / 5), ([2, 0], 2 * 2 / 5)]


@pytest.mark.parametrize("num_rows, micro_batches, num_processes", [(2000, 1, 1), (2000, 3, 2), (61, 1, 2), (40, 2, 2)])
def test_every_row_once_in_steps_that_are_those_of_any_split(num_rows, micro_batches, num_processes):
    split = {"micro_batches": micro_batches, "num_processes": num_processes}
    processes = [by_tokens(num_rows, epoch=1, process_index=p, **split) for p in range(num_processes)]
    parts = [list(process.parts()) for process in processes]
    whole = [sorted(rows) for rows in by_tokens(num_rows, epoch=1)]
    assert {len(mine) for mine in parts} == {len(process) for process in processes} == {micro_batches * len(whole)}
    for step, rows in enumerate(whole):
        taken = [rows for mine in parts for rows, _ in mine[step * micro_batches : (step + 1) * micro_batches]]
        assert sorted(row for rows in taken for row in rows) == rows
        assert all(taken)
    assert sorted(row for rows in whole for row in rows) == list(range(num_rows))
    for process, mine in zip(processes, parts, strict=True):
        assert list(process) == [rows for rows, _ in mine] and list(process.weights()) == [weight for _, weight in mine]
    # A row counts the same wherever it is, and a step 1 on average.
    assert len({round(weight / len(rows), 12) for mine in parts for rows, weight in mine}) == 1
    assert sum(weight for mine in parts for _, weight in mine) == pytest.approx(len(whole))
    assert processes[0].mean_rows == pytest.approx(num_rows / len(whole) / micro_batches / num_processes)


def test_no_micro_batch_is_empty_whatever_the_lengths():
    """Two rows of 8 have nearly all tokens; each of 4 steps has a row for each of 2 micro-batches all the same."""
    lengths = np.array([[100], [100], [1], [1], [1], [1], [1], [1]])
    made = TokenBatchSampler(
        lambda rows, epoch: lengths[rows], 8, num_tokens=206, tokens_per_batch=52, micro_batches=2, seed=0
    )
    assert made.steps_per_epoch == 4 and sorted(made) == [[row] for row in range(8)]


def test_micro_batches_have_equal_tokens_and_little_padding():
    made = by_tokens(micro_batches=2)
    tokens = [int(lengths_of(np.array(rows), 0).sum()) for rows in made]
    assert max(tokens) - min(tokens) < 2 * 99 * 2  # a row more or less, of a step and of a micro-batch
    assert np.mean(tokens) == pytest.approx(4000 / 2, rel=0.02)

    def padded(batches):
        return sum(lengths_of(np.array(rows), 0).max() * 2 * len(rows) for rows in batches)

    plain = list(sampler(2000, 2000 // made.steps_per_epoch, micro_batches=2))
    real = sum(tokens)
    assert padded(made) / real < 1 + 0.6 * (padded(plain) / real - 1)


def test_steps_of_equal_tokens_follow_from_seed_and_epoch():
    assert list(by_tokens()) == list(by_tokens())
    assert len({tuple(map(tuple, by_tokens(seed=seed, epoch=epoch))) for seed in range(2) for epoch in range(2)}) == 4
    whole = list(by_tokens(epoch=1, micro_batches=2))
    for start_step in (1, 16, 17, len(whole) // 2):  # within a window, and where one begins
        resumed = by_tokens(epoch=1, micro_batches=2)
        resumed.set_epoch(1, start_step=start_step)
        assert list(resumed) == whole[2 * start_step :] and len(resumed) == len(whole) - 2 * start_step
    # The steps of a window of 16 do not come in the order of their lengths.
    longest = [lengths_of(np.array(rows), 0).max() for rows in list(by_tokens())[:16]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_lengths_are_asked_for_as_they_are_needed():
    asked = []
    made = by_tokens()
    made.lengths = lambda rows, epoch: asked.append(len(rows)) or lengths_of(rows, epoch)
    batches = iter(made)
    next(batches)
    assert asked == [16 * 2000 // made.steps_per_epoch]
    made.set_epoch(0, start_step=20)
    asked.clear()
    next(iter(made))
    assert len(asked) == 1  # none of the window that was trained on


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch=0; expected at least 1"),
        ({"tokens_per_batch": 300, "micro_batches": 4}, r"have 2\.8 rows of 109 tokens .* fill 4 micro-batches .* 436"),
    ],
)
def test_refuses_a_budget(options, message):
    with pytest.raises(ValueError, match=message):
        by_tokens(**options)


def test_each_process_of_a_stream_numbers_its_own_rows():
    """Steps of 12 rows: 4 for each of three processes, in three micro-batches; weights come to 1 over all."""
    options = {"rows_per_step": 12, "micro_batches": 3, "seed": 0, "num_processes": 3}
    for process in range(3):
        sampler = StreamBatchSampler(5, process_index=process, **options)
        assert sampler.steps_per_epoch == 5 and len(list(sampler)) == len(sampler) == 15
        assert [row for rows in sampler for row in rows] == list(range(20))
        assert list(sampler.parts())[3:6] == [([4, 5], 1 / 6), ([6], 1 / 12), ([7], 1 / 12)]
        assert sum(sampler.weights()) == pytest.approx(5 / 3)
        sampler.set_epoch(0, start_step=4)
        assert list(sampler) == [[16, 17], [18], [19]]


@pytest.mark.parametrize("rows, processes, micro_batches", [(10, 4, 1), (8, 4, 3)])
def test_steps_of_a_stream_are_equal_for_all_processes(rows, processes, micro_batches):
    with pytest.raises(ValueError, match=rf"train_batch_size={rows}: .* expected a multiple of 4 from "):
        StreamBatchSampler(5, rows_per_step=rows, micro_batches=micro_batches, seed=0, num_processes=processes)

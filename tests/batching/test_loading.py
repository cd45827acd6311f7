"""Planning: every pair once, the same steps for one process and many, passes that keep the token budget."""

from __future__ import annotations

import pytest

from lightning_rlhf.batching.steps import Step, epoch_order, group_by_length, plan
from lightning_rlhf.randomness import Key


def random_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths from 5 to 104, with ties."""
    return [5 + value % 100 for value in epoch_order(10 * count, Key((seed, 1)))[:count]]


def counted(step: Step) -> list[int]:
    return step.indices[: len(step.indices) - step.num_padding]


def cut(step: Step) -> list[list[int]]:
    indices = iter(step.indices)
    return [[next(indices) for _ in range(size)] for size in step.micro_batches]


@pytest.mark.parametrize("count", [1, 17, 24, 61])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 50, 150, 10_000])
def test_ranks_share_the_steps_of_one_process_within_the_budget(count: int, world: int, limit: int | None) -> None:
    lengths = random_lengths(count)
    order = epoch_order(count, Key((0,)))
    shards = [plan(order, lengths, 8, limit, rank, world) for rank in range(world)]
    assert {len(shard) for shard in shards} == {-(-count // 8)}
    assert sorted(i for shard in shards for step in shard for i in counted(step)) == list(range(count))
    for number, steps in enumerate(zip(*shards, strict=True)):
        expected = order[8 * number : 8 * (number + 1)]
        assert sorted(i for step in steps for i in counted(step)) == sorted(expected)
        assert len({len(step.micro_batches) for step in steps}) == 1
        for step in steps:
            # the average over ranks of (sum over pairs / num_global) is the mean over the pairs of the step
            assert step.num_global * world == len(expected)
            assert sum(step.micro_batches) == len(step.indices)
            assert set(step.indices) <= set(expected)
            assert all(size == 1 for size in step.micro_batches[len(step.micro_batches) - step.num_padding :])
            for part in cut(step):
                assert len(part) >= 1
                assert len(part) == 1 or limit is None or sum(lengths[i] for i in part) <= limit


def test_a_step_worked_out_by_hand() -> None:
    """Longest first to the emptier rank: 9 | 8, then 5 joins 8, 4 joins 9, and 1 comes to 13 | 13 on rank 0."""
    lengths = [5, 9, 1, 8, 4]
    first, second = (plan([0, 1, 2, 3, 4], lengths, 5, 13, rank, world=2) for rank in range(2))
    assert first == [Step([1, 4, 2], (2, 1), 0, 2.5)]
    # rank 0 needs two passes, so rank 1 halves its one
    assert second == [Step([3, 0], (1, 1), 0, 2.5)]


def test_a_rank_without_pairs_repeats_the_shortest_for_nothing() -> None:
    assert plan([1, 0], [3, 7], 4, 5, rank=0, world=3) == [Step([1], (1,), 0, 2 / 3)]
    assert plan([1, 0], [3, 7], 4, 5, rank=2, world=3) == [Step([0], (1,), 1, 2 / 3)]


def test_a_pair_over_the_budget_is_a_pass_of_its_own() -> None:
    (step,) = plan([0, 1, 2, 3], [4, 99, 3, 3], 4, 10)
    assert cut(step) == [[1], [0, 2, 3]]


def test_ranks_get_about_as_many_tokens() -> None:
    lengths = random_lengths(64)
    shares = [plan(list(range(64)), lengths, 64, None, rank, 4)[0] for rank in range(4)]
    tokens = [sum(lengths[i] for i in share.indices) for share in shares]
    assert max(tokens) - min(tokens) <= min(lengths) + 5


def test_without_a_budget_accumulation_still_makes_passes() -> None:
    (step,) = plan(list(range(8)), [5] * 8, 8, None, min_micro_batches=2)
    assert step.micro_batches == (4, 4)
    # a last step with fewer pairs than passes does not repeat any
    assert [step.micro_batches for step in plan(list(range(9)), [5] * 9, 8, None, min_micro_batches=4)] == [
        (2, 2, 2, 2),
        (1,),
    ]


def test_one_batch_windows_leave_the_order() -> None:
    order = epoch_order(37, Key((3,)))
    assert group_by_length(order, random_lengths(37), 4, 1, Key((5,))) == order


def test_windows_hold_their_pairs_and_steps_are_of_one_length() -> None:
    lengths = random_lengths(71)
    order = epoch_order(71, Key((3,)))
    grouped = group_by_length(order, lengths, 4, 5, Key((5,)))
    assert grouped == group_by_length(order, lengths, 4, 5, Key((5,)))
    assert grouped != group_by_length(order, lengths, 4, 5, Key((6,)))
    for start in range(0, 68, 20):
        end = min(start + 20, 68)
        window = grouped[start:end]
        assert sorted(window) == sorted(order[start:end])
        steps = sorted(sorted(lengths[i] for i in window[at : at + 4]) for at in range(0, len(window), 4))
        # the steps of a window do not overlap
        assert [length for step in steps for length in step] == sorted(lengths[i] for i in window)
    # the short last step keeps its random composition
    assert grouped[68:] == order[68:]


def test_equal_lengths_are_grouped_by_chance_and_the_same_each_time() -> None:
    order = epoch_order(16, Key((3,)))
    grouped = group_by_length(order, [7] * 16, 4, 4, Key((5,)))
    steps = {tuple(order[at : at + 4]) for at in range(0, 16, 4)}
    assert {tuple(grouped[at : at + 4]) for at in range(0, 16, 4)} == steps

"""MeanWithError: closed form, cancellation, batching, precision, and two processes."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_rlhf.evaluation import MeanWithError, mean_with_error


def test_mean_and_standard_error_by_hand() -> None:
    """Of 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, s^2 = 14 / 3, stderr = sqrt(14 / 12)."""
    mean, error = mean_with_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == pytest.approx(3.0, abs=1e-12)
    assert error == pytest.approx(math.sqrt(14 / 12), abs=1e-12)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 0, 7], [3, 3, 3, 3]])
def test_batching_changes_nothing(sizes: list[int]) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = MeanWithError()
    for batch in values.split(sizes):
        metric.update(batch)
    mean, error = metric.compute()
    assert mean.item() == pytest.approx(statistics.fmean(values.tolist()), abs=1e-12)
    assert error.item() == pytest.approx(statistics.stdev(values.tolist()) / math.sqrt(12), abs=1e-12)


def test_a_large_mean_does_not_cancel_the_spread() -> None:
    """Around 1e9 the squares differ in their 18th digit, which float64 has not; the deviations are 1, 0, 1."""
    metric = MeanWithError()
    for value in (1e9 - 1, 1e9, 1e9 + 1):
        metric.update(torch.tensor([value], dtype=torch.float64))
    mean, error = metric.compute()
    assert mean.item() == 1e9
    assert error.item() == pytest.approx(math.sqrt(1 / 3), rel=1e-9)


def test_too_few_numbers_give_nan_not_zero() -> None:
    metric = MeanWithError()
    metric.update(torch.tensor([2.5]))
    mean, error = metric.compute()
    assert mean.item() == 2.5
    assert math.isnan(error.item())
    assert all(math.isnan(value) for value in mean_with_error(torch.empty(0)))


def test_reset_forgets_and_forward_keeps_the_total() -> None:
    metric = MeanWithError()
    batch_mean, _ = metric(torch.tensor([1.0, 3.0]))
    second_mean, _ = metric(torch.tensor([5.0]))
    assert (batch_mean.item(), second_mean.item(), metric.compute()[0].item()) == (2.0, 5.0, 3.0)
    metric.reset()
    metric.update(torch.tensor([7.0]))
    assert metric.compute()[0].item() == 7.0


def test_half_precision_runs_keep_float64_states() -> None:
    module = torch.nn.Module()
    module.metric = MeanWithError()
    module.to(torch.bfloat16)
    module.metric.update(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert module.metric.moments.dtype == torch.float64
    assert module.metric.compute()[0].item() == pytest.approx(0.15, abs=1e-15)


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from lightning_rlhf.evaluation import MeanWithError

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
values = torch.arange(10, dtype=torch.float64).square() + 1e6
metric = MeanWithError()
metric.update(values[:7] if rank == 0 else values[7:])  # unequal shares: means of means would be wrong
mean, error = metric.compute()
print(mean.item(), error.item())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_report_what_one_would(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    commands = [[sys.executable, str(tmp_path / "script.py"), str(rank), str(tmp_path / "store")] for rank in (0, 1)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) for line in commands]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    expected = mean_with_error(torch.arange(10, dtype=torch.float64).square() + 1e6)
    assert tuple(map(float, outputs[0].split())) == pytest.approx(expected, rel=1e-11)

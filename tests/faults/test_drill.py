"""A short drill: a run and its judge, killed at random moments, lose nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.fault_drill import PAIRS, drill


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the supervisor looks for processes in /proc")
def test_a_run_that_is_killed_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    found = drill(tmp_path, kills=3, minutes=2, rounds=3, processes=1, seed=3)
    assert found["faults"] == []
    assert found["kills"] == 3
    assert found["labels"] == 3 * PAIRS
    assert found["weights_equal"]

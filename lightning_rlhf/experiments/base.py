"""The interface of experiments: an experiment lists its jobs and runs one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rlhf.experiments.curves import Curve


@dataclass(frozen=True)
class Job:
    """Something to run in a process of its own.

    Args:
        name: unique, fit for a path; its folder is named so.
        identity: the settings that decide its result, plain data: a job with another identity is not the same.
        after: names of jobs that must have ended.
    """

    name: str
    identity: Any
    after: tuple[str, ...] = ()


class AbstractExperiment(ABC):
    """A grid of settings, arms and seeds.

    Subclass it to compare by other runs than these. It must pickle: jobs run in other processes.
    """

    unit: str = "labels"
    """Quantity on the horizontal axis of curves."""

    @abstractmethod
    def jobs(self) -> Sequence[Job]:
        """All jobs, those that others wait for first."""

    @abstractmethod
    def run(self, job: Job, root: Path) -> list[Curve]:
        """Do one job, or continue it where it was killed, and return its runs.

        Args:
            job: one of `jobs`.
            root: folder of all jobs; this one's is ``root / job.name``, which exists.
        """

    def regime(self, setting: str) -> str:
        """Short description of a setting, for the report."""
        return setting

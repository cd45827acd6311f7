"""Comparisons over many seeds: ``lightning-rlhf compare``."""

from lightning_rlhf.experiments.base import AbstractExperiment, Job
from lightning_rlhf.experiments.claims import Claim
from lightning_rlhf.experiments.curves import Curve, CurvePoint
from lightning_rlhf.experiments.fits import FitArm, FitExperiment, FitSetting
from lightning_rlhf.experiments.run import CompareRun
from lightning_rlhf.experiments.stages import FitStage, StagedArm, StagedExperiment, StagedSetting
from lightning_rlhf.experiments.tabular import TabularExperiment, TabularSetting


__all__ = [
    "AbstractExperiment",
    "Claim",
    "CompareRun",
    "Curve",
    "CurvePoint",
    "FitArm",
    "FitExperiment",
    "FitSetting",
    "FitStage",
    "Job",
    "StagedArm",
    "StagedExperiment",
    "StagedSetting",
    "TabularExperiment",
    "TabularSetting",
]

"""Comparisons over many seeds: ``lightning-rlhf compare``."""

from lightning_rlhf.comparison.claims import Claim
from lightning_rlhf.comparison.curves import Curve, CurvePoint
from lightning_rlhf.comparison.experiments import AbstractExperiment, Job
from lightning_rlhf.comparison.fits import FitExperiment, FitSetting
from lightning_rlhf.comparison.run import CompareRun
from lightning_rlhf.comparison.stages import FitStage, StagedArm, StagedExperiment, StagedSetting
from lightning_rlhf.comparison.tabular import TabularExperiment, TabularSetting


__all__ = [
    "AbstractExperiment",
    "Claim",
    "CompareRun",
    "Curve",
    "CurvePoint",
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

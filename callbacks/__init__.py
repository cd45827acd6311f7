"""Callbacks: metrics, files, tables and stopping rules of a run. Import them as `lightning_rlhf.callbacks`.

They read the outputs of the steps of the module and the round of the DataModule, through `lightning_rlhf.protocols`.
None of them changes training, except `LabelBudget`, which ends it; `WeightAverage` changes the weights that are
evaluated and exported.
"""

from lightning_rlhf.callbacks.agreement import RewardAgreement
from lightning_rlhf.callbacks.average import WeightAverage
from lightning_rlhf.callbacks.budget import LabelBudget
from lightning_rlhf.callbacks.completions import CompletionsTable
from lightning_rlhf.callbacks.export import HFExport
from lightning_rlhf.callbacks.final import FinalValidation
from lightning_rlhf.callbacks.forecast import SilverMonitor
from lightning_rlhf.callbacks.frontier import FrontierPlot
from lightning_rlhf.callbacks.kl import KLMonitor
from lightning_rlhf.callbacks.nonfinite import NonFiniteGuard
from lightning_rlhf.callbacks.page import RunPage
from lightning_rlhf.callbacks.progress import ProgressBar, StepLines
from lightning_rlhf.callbacks.reward import RewardMonitor
from lightning_rlhf.callbacks.rollouts import RolloutMonitor
from lightning_rlhf.callbacks.summary import LossSummary, PairSummary, Summary
from lightning_rlhf.callbacks.throughput import Throughput
from lightning_rlhf.callbacks.weights import WeightMonitor


__all__ = [
    "CompletionsTable",
    "FinalValidation",
    "FrontierPlot",
    "HFExport",
    "KLMonitor",
    "LabelBudget",
    "LossSummary",
    "NonFiniteGuard",
    "PairSummary",
    "ProgressBar",
    "RewardAgreement",
    "RewardMonitor",
    "RolloutMonitor",
    "RunPage",
    "SilverMonitor",
    "StepLines",
    "Summary",
    "Throughput",
    "WeightAverage",
    "WeightMonitor",
]

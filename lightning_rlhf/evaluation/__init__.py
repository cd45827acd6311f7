"""Evaluation: means with their errors, how good reward models, judges and policies are, and a run's frontier."""

from lightning_rlhf.evaluation.benchmarks import rewardbench_sections, subset_accuracies
from lightning_rlhf.evaluation.best_of_n import BestOfN, best_of_n_accuracy, best_of_n_gold
from lightning_rlhf.evaluation.concordance import KendallsW, kendalls_w
from lightning_rlhf.evaluation.frontier import FrontierPoint, read_frontier, write_frontier
from lightning_rlhf.evaluation.judges import JudgeMetrics
from lightning_rlhf.evaluation.metrics import MeanWithError, mean_with_error
from lightning_rlhf.evaluation.pairs import PairMetrics
from lightning_rlhf.evaluation.plots import plot_frontier
from lightning_rlhf.evaluation.rates import length_controlled_rate, two_sided_binomial_p, wilson_interval
from lightning_rlhf.evaluation.wins import HarmlessRate, WinRate


__all__ = [
    "BestOfN",
    "FrontierPoint",
    "HarmlessRate",
    "JudgeMetrics",
    "KendallsW",
    "MeanWithError",
    "PairMetrics",
    "WinRate",
    "best_of_n_accuracy",
    "best_of_n_gold",
    "kendalls_w",
    "length_controlled_rate",
    "mean_with_error",
    "plot_frontier",
    "read_frontier",
    "rewardbench_sections",
    "subset_accuracies",
    "two_sided_binomial_p",
    "wilson_interval",
    "write_frontier",
]

"""Evaluation: means with their errors, how good reward models are, and the reward-KL frontier of a run."""

from lightning_rlhf.evaluation.best_of_n import BestOfN, best_of_n_accuracy, best_of_n_gold
from lightning_rlhf.evaluation.frontier import FrontierPoint, read_frontier, write_frontier
from lightning_rlhf.evaluation.metrics import MeanWithError, mean_with_error
from lightning_rlhf.evaluation.pairs import PairMetrics
from lightning_rlhf.evaluation.plots import plot_frontier


__all__ = [
    "BestOfN",
    "FrontierPoint",
    "MeanWithError",
    "PairMetrics",
    "best_of_n_accuracy",
    "best_of_n_gold",
    "mean_with_error",
    "plot_frontier",
    "read_frontier",
    "write_frontier",
]

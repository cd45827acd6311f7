"""Evaluation: means with their errors, and the reward-KL frontier of a run."""

from lightning_rlhf.evaluation.frontier import FrontierPoint, read_frontier, write_frontier
from lightning_rlhf.evaluation.metrics import MeanWithError, mean_with_error
from lightning_rlhf.evaluation.plots import plot_frontier


__all__ = ["FrontierPoint", "MeanWithError", "mean_with_error", "plot_frontier", "read_frontier", "write_frontier"]

"""Reward against KL along the run, as a table and as a figure."""

from __future__ import annotations

from dataclasses import asdict

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rlhf.callbacks.base import HeldOutCallback
from lightning_rlhf.callbacks.reporting import preference_source, root, show_image
from lightning_rlhf.evaluation.frontier import FrontierPoint, write_frontier
from lightning_rlhf.evaluation.heldout import HeldOutRow, summarize
from lightning_rlhf.evaluation.plots import plot_frontier
from lightning_rlhf.protocols import beta_of
from lightning_rlhf.types import State


class FrontierPlot(HeldOutCallback):
    """Plots held-out reward against KL(policy || reference), one point per validation.

    Writes ``frontier.csv`` (columns step, labels, reward, reward_stderr, kl, kl_stderr, j; KL in nats per sequence) and
    ``frontier.png`` into ``trainer.default_root_dir`` after each validation of a fit, and shows the figure in
    TensorBoard and W&B. The checkpoint keeps the points, so that a resumed run continues its line; a repeated
    validation of a step replaces its point. Validations without rewards or log-probabilities give no point.

    Args:
        title: text above the figure.
        figure: False writes the table only: plotting takes longer than the training of small runs.
    """

    def __init__(self, title: str = "Reward-KL frontier", figure: bool = True) -> None:
        super().__init__()
        self.title, self.figure = title, figure
        self._points: dict[int, FrontierPoint] = {}

    @property
    def points(self) -> list[FrontierPoint]:
        """The points so far, by step."""
        return [self._points[step] for step in sorted(self._points)]

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Add the point of this validation, and write table and figure."""
        means = summarize(rows)
        # J = E[r] - beta KL(pi || pi_ref)
        j = means.j(beta_of(pl_module))
        if means.reward is None or means.kl is None or j is None:
            return
        self._points[trainer.global_step] = FrontierPoint(
            step=trainer.global_step,
            labels=preference_source(trainer).num_labels,
            reward=means.reward,
            reward_stderr=means.reward_stderr,
            kl=means.kl,
            kl_stderr=means.kl_stderr,
            j=j,
        )
        # a validation outside fit is kept for a fit that may follow, but must not replace the files of a run
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            folder = root(trainer)
            write_frontier(self.points, folder / "frontier.csv")
            if not self.figure:
                return
            plot_frontier(self.points, folder / "frontier.png", self.title)
            show_image(trainer, "val/frontier", folder / "frontier.png")

    def state_dict(self) -> State:
        """The points so far, as plain data."""
        return {"points": [asdict(point) for point in self.points]}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._points = {point["step"]: FrontierPoint(**point) for point in state_dict["points"]}

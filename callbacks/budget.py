"""Stop a run when its label budget is spent."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.callbacks.reporting import preference_source
from lightning_rlhf.protocols import PricedSource, datamodule_of
from lightning_rlhf.types import State


PATIENCE = 20
"""Rounds in a row with hardly a label after which a run with a budget ends."""

LEAST_LABELED = 0.05
"""Share of the pairs of those rounds that must have cost a label, so that the run goes on."""


class LabelBudget(Callback):
    """Stops the run when its labels are spent.

    The DataModule cuts the last round to the remaining labels, so that no more than ``labels`` are bought. The run
    trains on that round as on the others, and stops before it would sample another one. Only labels with a verdict
    count. A run that is resumed with a spent budget stops at once; to continue, resume it with a larger budget. Pairs
    of equal responses cost no label: when 19 of 20 pairs in `PATIENCE` rounds are such pairs, the run stops with a
    warning.

    With ``cost`` it counts the price of the labels, of all sources together and failed attempts included, in the unit
    of the labeler. No round is begun from that cost on; since the price of a round is known when it is over, the last
    one may exceed the budget.

    Args:
        labels: labels the run may buy in all, over all its restarts, >= 1; default: no limit.
        cost: cost from which on no further round is begun, > 0; default: no limit.

    Raises:
        ValueError: if neither is given, or one is out of range.
    """

    def __init__(self, labels: int | None = None, cost: float | None = None) -> None:
        if labels is None and cost is None:
            raise ValueError("LabelBudget needs a limit: set labels, or cost")
        if labels is not None and labels < 1:
            raise ValueError(f"LabelBudget needs at least one label; got labels={labels}")
        # also refuses NaN
        if cost is not None and not cost > 0:
            raise ValueError(f"LabelBudget.cost must be > 0; got {cost}")
        self.labels, self.cost = labels, cost
        self._round_done_at = 0
        self._cost_done_at = 0.0
        # labels and free ties at the ends of the latest rounds, and before the first one
        self._ends: list[tuple[int, int]] = [(0, 0)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the budget of the DataModule before it samples."""
        if stage != "fit":
            return
        source = preference_source(trainer)
        if self.cost is not None:
            datamodule_of(trainer, PricedSource, "LabelBudget.cost").cost_budget = self.cost
        if self.labels is None:
            return
        if source.label_budget not in (None, self.labels):
            raise ValueError(
                f"the DataModule has label_budget={source.label_budget} and the LabelBudget callback has "
                f"labels={self.labels}; set the budget in one place"
            )
        source.label_budget = self.labels

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the rounds before the restart had spent the budget."""
        # counted at the end of a round: a run that was interrupted in its last round still finishes it
        if self._is_spent():
            trainer.should_stop = True

    def _is_spent(self) -> bool:
        labels_spent = self.labels is not None and self._round_done_at >= self.labels
        return labels_spent or (self.cost is not None and self._cost_done_at >= self.cost)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the budget is spent."""
        source = preference_source(trainer)
        # a round may be trained on for several epochs, and the last round is finished like the others
        if not source.ends_round(trainer.current_epoch):
            return
        self._round_done_at = source.num_labels
        if self.cost is not None:
            self._cost_done_at = datamodule_of(trainer, PricedSource, "LabelBudget.cost").cost()
        self._ends = [*self._ends[-PATIENCE:], (self._round_done_at, source.num_ties)]
        labels, ties = (last - first for first, last in zip(self._ends[0], self._ends[-1], strict=True))
        if self._is_spent():
            trainer.should_stop = True
        elif len(self._ends) > PATIENCE and labels <= LEAST_LABELED * (labels + ties):
            rank_zero_warn(
                f"the last {PATIENCE} rounds brought {labels} labels: the two responses of the other pairs were equal, "
                f"so that the policy has collapsed. The run stops at {self._round_done_at} labels, before its budget "
                f"is spent; raise data.decoding.temperature, train less on each label, or start from another policy"
            )
            trainer.should_stop = True

    def state_dict(self) -> State:
        """Labels and cost when the last round ended, and labels and free ties of the latest rounds."""
        state: State = {"round_done_at": self._round_done_at, "ends": self._ends}
        return state if self.cost is None else {**state, "cost_done_at": self._cost_done_at}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._round_done_at = state_dict["round_done_at"]
        # earlier checkpoints do not have them
        self._ends = [(labels, ties) for labels, ties in state_dict.get("ends", [])]
        # a budget of labels alone does not keep it
        self._cost_done_at = state_dict.get("cost_done_at", 0.0)

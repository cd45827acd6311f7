"""Repair of checkpoints that Lightning saved at the end of an epoch, or of a run within one."""

from __future__ import annotations

from typing import TypedDict, cast


class _Progress(TypedDict):
    """Counts of epochs, or of batches, in a checkpoint of Lightning."""

    total: dict[str, int]
    current: dict[str, int]
    is_last_batch: bool


_FitLoop = TypedDict(
    "_FitLoop",
    {
        "epoch_progress": _Progress,
        "epoch_loop.batch_progress": _Progress,
        "epoch_loop.state_dict": dict[str, int],
        "state_dict": dict[str, object],
    },
)


class _Loops(TypedDict):
    fit_loop: _FitLoop


def forget_finished_epoch(checkpoint: dict[str, object], max_steps: int = -1) -> None:
    """Repair a Lightning checkpoint that was saved when the batches of an epoch were done, before it is restored.

    Lightning 2.6 starts such an epoch once more: it asks for its loader again, with ``max_steps`` it runs an empty
    epoch and counts it, and it compares the batches done with the length of the *next* epoch, so that it skips as many
    batches of a next round that is longer. From then on it counts fewer epochs started than processed, and so would
    later checkpoints. Here such a checkpoint becomes one of the epoch's end.

    An epoch that ``max_steps`` or ``EarlyStopping`` cut short counts as processed, too, so that a run continued with
    more steps would leave out the rest of it. Here it becomes an epoch that is under way, if there are steps left.

    Args:
        checkpoint: the checkpoint; changed in place.
        max_steps: optimizer steps after which the continued run ends; -1 for no limit.
    """
    if "loops" not in checkpoint:  # saved with weights only
        return
    fit_loop = cast(_Loops, checkpoint["loops"])["fit_loop"]
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    cut_short = batches["current"]["completed"] > 0 and not batches["is_last_batch"]
    has_steps_left = max_steps < 0 or cast(int, checkpoint["global_step"]) < max_steps
    if epochs["total"]["processed"] == epochs["total"]["started"] and cut_short and has_steps_left:
        for count in (epochs["total"], epochs["current"]):
            count["processed"] = count["completed"] = count["started"] - 1
        return
    if epochs["total"]["processed"] != epochs["total"]["started"]:
        if not batches["is_last_batch"]:  # saved in the middle of the epoch
            return
        # saved at the end of its last batch, before it was counted
        for count in (epochs["total"], epochs["current"]):
            count["processed"] = count["started"]
        if batches["total"]["completed"] < batches["total"]["processed"]:
            batches["total"]["completed"] = batches["total"]["processed"]
            # Lightning counts a step after the callbacks of its batch, one of which saved the checkpoint
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    for count in (epochs["total"], epochs["current"]):
        count["completed"] = count["processed"]
    # else Lightning would compare these counts with the length of the next epoch
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    fit_loop["state_dict"].pop("combined_loader", None)

"""A loss that is no number: the step is dropped or the run stops, and the pairs are named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lightning_rlhf.callbacks import NonFiniteGuard
from lightning_rlhf.callbacks.nonfinite import all_finite, gradient_norm, offenders
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.datamodules.preferences import PreferenceDataModule
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.losses import AbstractPreferenceLoss, DPOLoss, PairLogps
from lightning_rlhf.modules import DPOModule
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import PromptRow, RecordedPair


class Rows(AbstractPromptSource):
    def __init__(self) -> None:
        self.report = {}

    def load(self) -> list[PromptRow]:
        return [PromptRow(f"row {n}", f"{n}?", None, RecordedPair("yes", "no")) for n in range(6)]


class Broken(AbstractPreferenceLoss):
    """DPO whose loss, or only its gradient, is NaN in some calls.

    Args:
        calls: which, from 0.
        gradient_only: leave the value finite.
    """

    def __init__(self, calls: set[int], gradient_only: bool = False) -> None:
        self.calls, self.gradient_only, self.call = calls, gradient_only, -1

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        self.call += 1
        losses = DPOLoss()(pairs, beta)
        if self.call not in self.calls:
            return losses
        if self.gradient_only:  # the root has an infinite slope at 0
            return losses + (losses - losses.detach()).abs().sqrt()
        return losses * float("nan")


class Poison(L.Callback):
    """Makes the log-probability of one pair NaN in the step ``step``, as a broken row would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            batch.reference_chosen_logps[1] = float("nan")


def fit(folder: Path, policy: Path, loss: AbstractPreferenceLoss | None, *callbacks: L.Callback) -> DPOModule:
    module = DPOModule(str(policy), loss, optimizer=partial(AdamW, lr=1e-2, weight_decay=0.0))
    data = PreferenceDataModule(
        Rows(),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=2,
        decoding=Decoding(max_new_tokens=8),
        rounds=PreferenceRoundOptions(epochs_per_round=None),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return module


def weights(module: DPOModule) -> list[Tensor]:
    return [p.detach() for p in module.policy.parameters()]


@pytest.mark.parametrize("gradient_only", [False, True])
def test_the_run_stops_before_the_weights_are_touched(tmp_path: Path, tiny_policy: Path, gradient_only: bool) -> None:
    guard = NonFiniteGuard()
    kept: list[list[Tensor]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            kept.append([p.detach().clone() for p in pl_module.policy.parameters()])

        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            kept.append([p.detach().clone() for p in pl_module.policy.parameters()])

    with pytest.raises(FloatingPointError, match=r"step 1; .*round 0, prompt \d, round 0, prompt \d.*optimizer\.lr"):
        fit(tmp_path, tiny_policy, Broken({1}, gradient_only), guard, Keep())
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_dropped_step_leaves_weights_and_optimizer_alone(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.warns(UserWarning, match=r"step 1; .*The step is dropped, the 1\. of this run"):
        module = fit(tmp_path / "a", tiny_policy, Broken({1}), guard := NonFiniteGuard("skip"))
    assert guard.skipped == 1
    assert module.trainer.global_step == 3
    state = next(iter(module.optimizers().state.values()))  # type: ignore[union-attr]
    assert state["step"] == 2
    assert all(p.isfinite().all() for p in weights(module))
    assert float(module.trainer.callback_metrics["train/skipped_steps"]) == 1


def test_the_pair_at_fault_is_named_alone(tmp_path: Path, tiny_policy: Path) -> None:
    names: list[str] = []

    class Names(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                names.extend(batch.names)

    with pytest.raises(FloatingPointError) as caught:
        fit(tmp_path, tiny_policy, None, NonFiniteGuard(), Names(), Poison(2))
    assert f"by their metrics, it is {names[1]}. The weights" in str(caught.value)


def test_too_many_dropped_steps_in_a_row_are_an_error(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(FloatingPointError, match="2 steps in a row"):
        fit(tmp_path, tiny_policy, Broken({0, 1, 2}), NonFiniteGuard("skip", most_in_a_row=2))


def test_finiteness_and_offenders_by_hand() -> None:
    fine = [torch.ones(3), torch.zeros(2, 2)]
    assert all_finite(fine)
    assert all_finite([])
    # a rank of many holds nothing of a small tensor
    assert all_finite([torch.zeros(0), *fine])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([*fine, torch.tensor([1.0, bad])])
    figures = {"loss": torch.tensor(float("nan")), "a": torch.tensor([1.0, float("inf")]), "b": torch.ones(2)}
    assert offenders(["x", "y", "idle"], figures) == ["y"]


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="stop or skip"):
        NonFiniteGuard("ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        NonFiniteGuard("skip", 0)


def test_the_norm_of_the_gradient_is_logged_before_clipping(tmp_path: Path, tiny_policy: Path) -> None:
    assert gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]) == 5
    assert gradient_norm([]) == 0
    wanted: list[float] = []
    logged: list[float] = []

    class Norms(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            trainer.gradient_clip_val, trainer.log_every_n_steps = 1e-3, 1  # type: ignore[attr-defined]

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            squares = [p.grad.double().square().sum() for p in pl_module.parameters() if p.grad is not None]
            wanted.append(float(torch.stack(squares).sum().sqrt()))

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics["train/grad_norm"]))

    guard = NonFiniteGuard()
    fit(tmp_path, tiny_policy, None, guard, Norms())
    assert logged == pytest.approx(wanted, rel=1e-5)
    assert min(logged) > 1e-2

"""KTO: its loss in closed form, the reference point by hand, and the majority where labels contradict each other."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_rlhf import Decoding, KTOModule, PreferenceDataModule
from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.datamodules.options import BatchOptions, PreferenceRoundOptions, PromptOptions
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.losses import dpo_loss, kto_loss
from lightning_rlhf.models.load import LoRA
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.rewards import LexiconReward
from lightning_rlhf.samplers import VanillaSampler


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_and_its_gradient_in_closed_form() -> None:
    ratio, kl = double(-3, 0.2, 4, 1).requires_grad_(), double(0.7)[0].requires_grad_()
    desirable = double(1, 0, 1, 0.25)
    loss = kto_loss(ratio, desirable, kl, 0.3, 1.5, 0.5)
    s = torch.sigmoid(0.3 * (ratio.detach() - 0.7))
    torch.testing.assert_close(loss, desirable * 1.5 * (1 - s) + (1 - desirable) * 0.5 * s)
    (gradient,) = torch.autograd.grad(loss.sum(), ratio, retain_graph=True)
    expected = (-1.5 * desirable + 0.5 * (1 - desirable)) * 0.3 * s * (1 - s)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-15)
    assert torch.autograd.grad(loss.sum(), kl, allow_unused=True) == (None,)


def test_the_first_loss_is_half_the_weight_and_its_gradient_a_quarter_of_beta() -> None:
    ratio = double(0, 0).requires_grad_()
    loss = kto_loss(ratio, double(1, 0), double(0)[0], 0.1, 2.0, 1.0)
    assert loss.tolist() == [1.0, 0.5]
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    torch.testing.assert_close(gradient, double(-2 * 0.1 / 4, 0.1 / 4))


@pytest.mark.parametrize("p", [0.55, 0.8])
def test_contradicting_labels_go_to_the_majority_and_those_of_dpo_to_their_mean(p: float) -> None:
    """Two responses to one prompt; the first is preferred with probability p. The reference is uniform."""

    def trained(kto: bool) -> float:
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(250):
            ratio = logits.log_softmax(-1) - math.log(0.5)
            if kto:
                # both responses are as frequent in mismatched pairs
                kl = ratio.detach().mean().clamp(min=0)
                loss = kto_loss(ratio, double(p, 1 - p), kl, 1.0).mean()
            else:
                loss = dpo_loss(ratio[0] - ratio[1], double(p)[0], 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(logits.detach().softmax(-1)[0])

    assert trained(kto=True) > 0.95
    assert trained(kto=False) == pytest.approx(p, abs=1e-3)


# -- the module --------------------------------------------------------------------------------------------------------


def module(policy: Path, **options: Any) -> KTOModule:
    return KTOModule(str(policy), **{"beta": 0.5, "optimizer": partial(SGD, lr=0.3), **options})


def data(pairs_per_batch: int = 3) -> PreferenceDataModule:
    return PreferenceDataModule(
        BuiltinPrompts("train", limit=6),
        VanillaSampler(),
        RewardLabeler(LexiconReward(scale=4.0)),
        pairs_per_batch=pairs_per_batch,
        decoding=Decoding(max_new_tokens=4, rows=4),
        rounds=PreferenceRoundOptions(prompts_per_round=6),
        # a pair is a micro-batch: the reference point must be that of the whole step
        batching=BatchOptions(max_tokens_per_micro_batch=1),
        prompt_options=PromptOptions(max_prompt_tokens=240),
    )


def fit(folder: Path, policy: KTOModule, datamodule: PreferenceDataModule, *callbacks: L.Callback) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **quiet,
    ).fit(policy, datamodule=datamodule)


def log_ratio(module: KTOModule, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """Log-ratio of a response by plain forward passes."""
    assert module.reference is not None

    def logp(model: Any) -> float:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[range(len(response)), list(response)].sum())

    with torch.no_grad():
        policy = logp(module.policy)
        with module.reference.active() as reference:
            return policy - logp(reference)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_step_follows_the_formula(tmp_path: Path, tiny_policy: Path, lora: LoRA | None) -> None:
    points: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: PreferenceBatch, *_: Any) -> None:
            kl, losses = [], []
            pairs = sorted(zip(batch.chosen, batch.rejected, batch.prompts, strict=True))
            for (_, _, prompt), (chosen, rejected, _) in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
                kl += [log_ratio(pl_module, prompt, response) for response in (chosen, rejected)]
            points.append(max(sum(kl) / len(kl), 0.0))
            for prompt, chosen, rejected, label in zip(
                batch.prompts, batch.chosen, batch.rejected, batch.label.tolist(), strict=True
            ):
                for response, p in ((chosen, label), (rejected, 1 - label)):
                    s = 1 / (1 + math.exp(-0.5 * (log_ratio(pl_module, prompt, response) - points[-1])))
                    losses.append(p * 1.5 * (1 - s) + (1 - p) * s)
            self.expected = sum(losses) / len(losses)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            assert pl_module.step_metrics["kto_kl"].tolist() == pytest.approx([points[-1]] * 3, abs=1e-4)
            assert float(pl_module.step_metrics["loss"]) == pytest.approx(self.expected, rel=1e-4)

    torch.manual_seed(0)
    fit(tmp_path, module(tiny_policy, desirable_weight=1.5, lora=lora), data(), Watch())
    assert len(points) == 4
    # the policy is the reference at first, and then leaves it
    assert points[0] == pytest.approx(0.0, abs=1e-5)
    assert lora is not None or max(points) > 1e-3


def test_a_single_pair_has_no_reference_point(tmp_path: Path, tiny_policy: Path) -> None:
    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            assert pl_module.step_metrics["kto_kl"].tolist() == [0.0]

    fit(tmp_path, module(tiny_policy), data(pairs_per_batch=1), Watch())


def test_wrong_weights_are_refused(tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=r"model.undesirable_weight must be finite and >= 0; got -1.0"):
        module(tiny_policy, undesirable_weight=-1.0)

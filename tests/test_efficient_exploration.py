"""The module of efficient exploration: its loss against brute force, its anchor, and bitwise resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel

from lightning_rlhf import EfficientExplorationModule, PreferenceDataModule
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.logprobs.anchored import logps_and_anchor_kl
from lightning_rlhf.logprobs.compute import Layout, summed_logps
from lightning_rlhf.losses import NudgedPreferenceLoss
from lightning_rlhf.models.load import LoRA, load_policy
from lightning_rlhf.models.reference import FrozenCopyReference
from lightning_rlhf.modules import Anchor
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.rewards import LexiconReward
from lightning_rlhf.samplers import VanillaSampler


GROUPS: list[Any] = [((5, 9, 7), ((4, 8), (3, 3, 6, 0))), ((11, 2), ((7,), (9, 5, 1)))]


def module(policy: Path, **options: Any) -> EfficientExplorationModule:
    settings = {"optimizer": partial(AdamW, lr=1e-2, weight_decay=0.0), "anchor": Anchor(0.3, 0.8), **options}
    return EfficientExplorationModule(str(policy), **settings)


def data() -> PreferenceDataModule:
    return PreferenceDataModule(
        BuiltinPrompts("train", limit=6),
        VanillaSampler(),
        RewardLabeler(LexiconReward(scale=4.0)),
        pairs_per_batch=2,
        decoding=Decoding(max_new_tokens=4, rows=4),
        rounds=PreferenceRoundOptions(prompts_per_round=4),
        prompt_options=PromptOptions(max_prompt_tokens=240),
    )


def trainer(folder: Path, epochs: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        **{"enable_checkpointing": bool(callbacks), **quiet, **options},
    )


def perturbed(policy: Path, seed: int) -> PreTrainedModel:
    model: Any = load_policy(str(policy)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_kl_is_that_of_whole_distributions_at_every_prefix(tiny_policy: Path, layout: Layout) -> None:
    model, old = perturbed(tiny_policy, 1), perturbed(tiny_policy, 2)
    logps, kl = logps_and_anchor_kl(model, FrozenCopyReference(old), GROUPS, layout=layout)
    expected_logps, expected_kl = [], []
    for prompt, responses in GROUPS:
        for response in responses:
            total_logp, total_kl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for t, token in enumerate(response):
                # one forward pass per prefix, and the sum over the vocabulary by hand
                ids = torch.tensor([[*prompt, *response[:t]]])
                q, p = (m(input_ids=ids).logits[0, -1].softmax(-1) for m in (old, model))
                total_kl = total_kl + (q.detach() * (q.detach() / p).log()).sum()
                total_logp = total_logp + p[token].log()
            expected_logps.append(total_logp)
            expected_kl.append(total_kl)
    torch.testing.assert_close(logps, torch.stack(expected_logps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kl, torch.stack(expected_kl), rtol=1e-7, atol=1e-9)
    assert kl.min() > 1e-3
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(value.sum(), weights) for value in (kl, torch.stack(expected_kl)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)  # norms of the model are float32
    assert all(parameter.grad is None for parameter in old.parameters())


def test_the_anchor_is_the_average_of_the_policy_and_the_step_follows_the_formula(
    tmp_path: Path, tiny_policy: Path
) -> None:
    policies: list[dict[str, torch.Tensor]] = []
    checks: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            policies.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})
            # the loss of the step from its parts: -(p - 1/2 + eps) log pi(c) - (1/2 - p + eps) log pi(r) + 0.3 KL
            logps = summed_logps(pl_module.policy, batch.groups()).view(-1, 2)
            _, kl = logps_and_anchor_kl(pl_module.policy, pl_module.anchor, batch.groups())
            label = batch.label.to(logps)
            gain = (label - 0.5 + 0.1) * logps[:, 0] + (0.5 - label + 0.1) * logps[:, 1]
            checks.append(float((0.3 * kl.view(-1, 2).sum(1) - gain).mean().detach()))

        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            assert checks[-1] == pytest.approx(float(pl_module.step_metrics["loss"]), rel=1e-4)

    # one folder with `start`: the anchor starts where the policy starts
    policy = module(tiny_policy, loss=NudgedPreferenceLoss(0.1), optimizer=partial(SGD, lr=0.05))
    trainer(tmp_path, 2, Watch(), enable_checkpointing=False).fit(policy, datamodule=data())
    policies.append({n: p.detach().clone() for n, p in policy.policy.named_parameters()})
    assert len(policies) == 5
    average = policies[0]
    for weights in policies[1:]:
        # decay 0.8, after every optimizer step
        average = {name: 0.8 * average[name] + 0.2 * weights[name] for name in average}
    assert policy.anchor is not None and policy.anchor.own_model is not None
    moved = dict(policy.anchor.own_model.named_parameters())
    for name, expected in average.items():
        torch.testing.assert_close(moved[name], expected, rtol=1e-4, atol=1e-6)
    # the reference is another model, and stays
    assert policy.reference is not None and policy.reference.own_model is not None
    fixed = dict(policy.reference.own_model.named_parameters())
    assert all(torch.equal(fixed[name], policies[0][name]) for name in fixed)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_run_continues_bitwise(tmp_path: Path, tiny_policy: Path, lora: LoRA | None) -> None:
    def fit(checkpoint: Path | None, *callbacks: L.Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # adapters are sampled
        policy = module(tiny_policy, lora=lora)
        trainer(tmp_path, 2, *callbacks).fit(policy, datamodule=data(), ckpt_path=checkpoint)
        assert policy.anchor is not None
        state = policy.anchor.state_dict()
        assert state["version"] == 4
        assert lora is None or all("lora_" in name for name in state["weights"])
        anchor = {f"anchor {name}": tensor for name, tensor in state["weights"].items()}
        return {**{n: p.detach().clone() for n, p in policy.policy.named_parameters()}, **anchor}

    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
    straight = fit(None, keep)
    continued = fit(tmp_path / "kept" / "step=3.ckpt")
    assert any(name.startswith("anchor") for name in straight)
    assert all(torch.equal(straight[name], continued[name]) for name in straight)


def test_the_anchor_starts_where_the_policy_starts(tmp_path: Path, tiny_policy: Path) -> None:
    start = load_policy(str(tiny_policy))
    with torch.no_grad():
        start.get_output_embeddings().weight += 0.5  # type: ignore[operator]
    start.save_pretrained(tmp_path / "start")
    policy = module(tiny_policy, start=str(tmp_path / "start"))
    trainer(tmp_path, 1, max_steps=0).fit(policy, datamodule=data())
    assert policy.anchor is not None and policy.anchor.own_model is not None
    moved, own = (dict(m.named_parameters()) for m in (policy.policy, policy.anchor.own_model))
    assert all(torch.equal(moved[name], own[name]) for name in own)
    torch.testing.assert_close(own["lm_head.weight"], start.get_output_embeddings().weight)  # type: ignore[union-attr]


def test_sharded_models_and_wrong_anchors_are_refused(tmp_path: Path, tiny_policy: Path) -> None:
    policy = module(tiny_policy)
    policy.trainer = trainer(tmp_path, 1, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="does not run sharded; use --config trainer/ddp"):
        policy.setup("fit")
    for wrong in ({"coefficient": -1.0}, {"decay": 1.0}):
        with pytest.raises(ValueError, match=r"model\.anchor\.coefficient must be finite"):
            Anchor(**wrong)

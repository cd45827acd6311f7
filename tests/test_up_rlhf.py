"""UP-RLHF (arXiv 2401.00243) and efficient reward ensembles (2401.16635): diversity, uncertainty, members in turn."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.cli import main
from lightning_rlhf.losses import nuclear_norm_ratio
from lightning_rlhf.rewards import AbstractReward, RewardOutput, UncertaintyPenalty, disagreement
from lightning_rlhf.types import Prompt, Response


# -- the nuclear norm --------------------------------------------------------------------------------------------------


def test_ascent_finds_the_largest_ratio_that_the_ranks_allow() -> None:
    """Five members of rank 4 that begin alike: from sqrt(4) to sqrt(5 * 4)."""
    generator = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64))[0].T
    stacked = block.repeat(5, 1) + 1e-3 * torch.randn(20, 64, generator=generator, dtype=torch.float64)
    start = nuclear_norm_ratio(stacked).item()
    assert start == pytest.approx(math.sqrt(4), abs=0.1)
    stacked.requires_grad_()
    optimizer = torch.optim.Adam([stacked], lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        (-nuclear_norm_ratio(stacked)).backward()
        optimizer.step()
    assert nuclear_norm_ratio(stacked).item() == pytest.approx(math.sqrt(20), abs=1e-3)


def test_the_gradient_of_the_ratio_is_right_and_its_scale_is_none() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nuclear_norm_ratio, (matrix,))
    torch.testing.assert_close(nuclear_norm_ratio(matrix), nuclear_norm_ratio(7.0 * matrix))
    # the scale has no gradient: sum of A * dA = 0
    nuclear_norm_ratio(matrix).backward()
    assert matrix.grad is not None
    assert (matrix.detach() * matrix.grad).sum().item() == pytest.approx(0.0, abs=1e-12)


# -- over-optimization in a world of 400 arms --------------------------------------------------------------------------

ARMS, MEMBERS, PAIRS = 400, 5, 500
BETAS = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05)
"""Strengths of the KL, from a policy that stays to one that optimizes hard."""


class Tabulated(AbstractReward):
    """The mean reward of the members for each arm, and its standard deviation over them."""

    def __init__(self, members: Tensor) -> None:
        self.members = members

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        members = self.members[[response.ids[0] for response in responses]]
        return RewardOutput(members.mean(1), disagreement(members), members)


@dataclass
class Bandit:
    """Arms that the reference covers by Zipf's law, and rewards fitted to labels on its samples.

    Args:
        reference: log-probability of each arm.
        gold: true reward of each arm; rare arms are worse by one.
        members: rewards by the members, [arms, members].
        seen: whether an arm is in a labeled pair, [arms].
    """

    reference: Tensor
    gold: Tensor
    members: Tensor
    seen: Tensor

    @classmethod
    def of(cls, seed: int) -> Bandit:
        """Sample pairs by the reference, Bradley-Terry labels, and fit each member from its own random start."""
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        reference = (-1.5 * torch.arange(1, ARMS + 1, dtype=torch.float64).log()).log_softmax(0)
        gold = normal(ARMS)
        gold[ARMS // 4 :] -= 1.0
        pairs = torch.multinomial(reference.exp(), 2 * PAIRS, replacement=True, generator=generator).view(PAIRS, 2)
        difference = gold[pairs[:, 0]] - gold[pairs[:, 1]]
        wins = torch.rand(PAIRS, generator=generator, dtype=torch.float64) < difference.sigmoid()
        # a member is the MAP estimate under a prior around its random start: off the data it stays there
        start = normal(ARMS, MEMBERS)
        fitted = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([fitted], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            gaps = fitted[pairs[:, 0]] - fitted[pairs[:, 1]]
            loss = -F.logsigmoid(torch.where(wins[:, None], gaps, -gaps)).sum() + (fitted - start).square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(reference, gold, fitted.detach(), torch.bincount(pairs.flatten(), minlength=ARMS) > 0)

    def gold_of(self, reward: Tensor) -> Tensor:
        """True reward of pi_ref exp(reward / beta) for each of `BETAS`."""
        policies = [(self.reference + reward / beta).softmax(0) for beta in BETAS]
        return torch.stack([policy @ self.gold for policy in policies])

    def rewards(self, weight: float = 2.0) -> dict[str, Tensor]:
        """Reward of a single member, of the mean, and of the mean with `UncertaintyPenalty`; [arms] each."""
        penalized = UncertaintyPenalty(Tabulated(self.members), weight=weight)
        responses = [Response((arm,), str(arm), "eos") for arm in range(ARMS)]
        output = penalized.score([Prompt(0, (1,), "x")] * ARMS, responses)
        penalized.observe(output)
        return {"single": self.members[:, 0], "mean": output.mean, "penalty": penalized.earned(output)}

    def auroc(self) -> float:
        """P(u of an arm without labels > u of an arm with labels)."""
        uncertainty = disagreement(self.members)
        return (uncertainty[~self.seen][:, None] > uncertainty[self.seen]).double().mean().item()


def bandits(seeds: int) -> dict[str, Tensor]:
    """True reward by seed and beta, [seeds, betas], of each reward; and ``auroc``, [seeds]."""
    worlds = [Bandit.of(seed) for seed in range(seeds)]
    found = {name: torch.stack([w.gold_of(w.rewards()[name]) for w in worlds]) for name in worlds[0].rewards()}
    return {**found, "auroc": torch.tensor([world.auroc() for world in worlds])}


def test_the_penalty_ends_over_optimization() -> None:
    found = bandits(6)
    # the members disagree where nothing was labeled
    assert found["auroc"].mean() > 0.65
    gold = {name: found[name].mean(0) for name in ("single", "mean", "penalty")}
    # from its best KL to the weakest one, the reward of a single model leads far astray
    assert gold["single"].max() - gold["single"][-1] > 0.5
    assert gold["penalty"].max() - gold["penalty"][-1] < 0.05
    assert gold["penalty"][-1] > gold["single"][-1] + 0.5


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*has not learned rewards")
def test_the_configs_train_the_ensemble_and_the_policy(tmp_path: Path, tiny_policy: Path) -> None:
    pairs = [{"prompt": f"say {i}: ", "chosen": "abcd"[i % 4] + "z", "rejected": "y" * (1 + i % 3)} for i in range(6)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    small = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    small += ["--trainer.max_steps=2", "--data.decoding.max_new_tokens=4"]
    small += ["--data.prompts=DatasetPrompts", f"--data.prompts.path={rows}"]
    main(
        [
            *("fit", "--config=up_rlhf_reward", *small, f"--model.backbone={tiny_policy}", "--data.pairs_per_batch=3"),
            *("--data.heldout=DatasetPrompts", f"--data.heldout.path={rows}", f"--run_dir={tmp_path / 'reward'}"),
        ]
    )
    manifest = json.loads((tmp_path / "reward" / "model" / "ensemble.json").read_text())
    assert (manifest["kind"], manifest["size"]) == ("lora", 5)
    main(
        [
            *("fit", "--config=up_rlhf", *small, f"--model.policy={tiny_policy}"),
            *(f"--data.reward.reward.path={tmp_path / 'reward' / 'model'}", "--data.prompts_per_batch=2"),
            *("--data.heldout=null", "--data.rounds.prompts_per_round=2", f"--run_dir={tmp_path / 'policy'}"),
            *("--model.optimizer.lr=1e-2", "--model.lr_scheduler.warmup_steps=0"),
        ]
    )
    with next((tmp_path / "policy").rglob("metrics.csv")).open() as file:
        logged = list(csv.DictReader(file))
    # the KL is a term of the loss: it is 0 while the policy is the reference
    losses = [float(row["train/kl_loss/loss_k2"]) for row in logged if row.get("train/kl_loss/loss_k2")]
    assert losses[0] == pytest.approx(0.0, abs=1e-9)
    assert losses[-1] > 0


def report(seeds: int = 30) -> None:
    """Print the table of docs/systems.md: means over seeds with one standard error."""
    found = bandits(seeds)
    found["penalty - mean"] = found["penalty"] - found["mean"]
    print("beta", BETAS)
    for name, values in found.items():
        mean, error = values.mean(0).reshape(-1), (values.std(0) / math.sqrt(seeds)).reshape(-1)
        print(f"{name:15}", "  ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)))


if __name__ == "__main__":
    report()

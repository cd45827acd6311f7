"""Policies that learn from rewards: sampled tokens get the advantages, runs continue bitwise, and rewards rise."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from lightning_rlhf import Decoding, PolicyGradientModule, RolloutDataModule
from lightning_rlhf.advantages import GAE, GRPO, RLOO, AbstractAdvantage, LearnedBaseline
from lightning_rlhf.callbacks import LabelBudget, RolloutMonitor
from lightning_rlhf.cli import main
from lightning_rlhf.datamodules.options import BatchOptions, RoundOptions
from lightning_rlhf.datamodules.rollouts import RewardShaping
from lightning_rlhf.evaluation.rollouts import repetition, round_metrics
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.logprobs.compute import response_logps
from lightning_rlhf.modules import KLControl, PolicyLoss, ReferenceUpdate, ValueModel
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.rewards import AbstractReward, LLMScoreReward, RewardOutput, UncertaintyPenalty
from lightning_rlhf.types import Prompt, PromptRow, Response, Rollout


class Rows(AbstractPromptSource):
    """Prompts of different lengths."""

    def __init__(self, count: int) -> None:
        self.count = count

    def load(self) -> list[PromptRow]:
        return [PromptRow(f"row {i}", text="say " + "x" * (i % 4)) for i in range(self.count)]


class Even(AbstractReward):
    """A judge with a rule: the share of even token ids, unsure where many are small; counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        self.asked += len(responses)
        shares = [sum(token % 2 == 0 for token in r.ids) / len(r.ids) for r in responses]
        spread = [sum(token < 99 for token in r.ids) / len(r.ids) for r in responses]
        return RewardOutput(torch.tensor(shares), torch.tensor(spread))


def module(policy: Path, advantage: AbstractAdvantage, lr: float = 1e-2, **options: Any) -> PolicyGradientModule:
    L.seed_everything(0, verbose=False)
    return PolicyGradientModule(str(policy), advantage, optimizer=partial(AdamW, lr=lr, weight_decay=0.0), **options)


def data(reward: AbstractReward | None = None, count: int = 6, **options: Any) -> RolloutDataModule:
    settings = {
        "responses_per_prompt": 2,
        "rounds": RoundOptions(prompts_per_round=4),
        "prompts_per_batch": 2,
        "decoding": Decoding(max_new_tokens=5, rows=4),
        **options,
    }
    return RolloutDataModule(Rows(count), reward or Even(), **settings)


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    settings.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), enable_model_summary=False, **settings)


def weights(module: L.LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Steps(L.Callback):
    """Keeps what training steps returned, and the rounds."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.rounds: list[Any] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rounds.append(trainer.datamodule.round)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_sampled_distribution(
    tmp_path: Path, tiny_policy: Path, temperature: float
) -> None:
    kept, decoding = Steps(), Decoding(max_new_tokens=5, rows=4, temperature=temperature)
    policy = module(tiny_policy, RLOO(), lr=1e-9)
    trainer(tmp_path, kept, max_epochs=1).fit(policy, datamodule=data(decoding=decoding))
    drawn = kept.rounds[0]
    assert len(drawn.groups) == 4 and {len(group) for group in drawn.groups} == {2}
    for rollout in drawn.rollouts:
        assert rollout.temperature == temperature
        (expected,) = response_logps(
            policy.policy, [(rollout.prompt.ids, [rollout.response.ids])], temperature=temperature
        )
        torch.testing.assert_close(torch.tensor(rollout.response.policy_logps), expected.detach(), atol=1e-4, rtol=0)
        # the policy has not moved from its reference
        assert rollout.response.log_ratio() == pytest.approx(0.0, abs=1e-4)
    # responses of one prompt differ, and a reward is what the reward said
    assert all(group[0].response.ids != group[1].response.ids for group in drawn.groups)
    expected_rewards = Even().score([], [r.response for r in drawn.rollouts]).mean.tolist()
    assert [r.reward for r in drawn.rollouts] == pytest.approx(expected_rewards)


def test_advantages_by_hand(tiny_policy: Path) -> None:
    def rollout(policy: tuple[float, ...], reference: tuple[float, ...], values: tuple[float, ...]) -> Rollout:
        ids = tuple(range(1, len(policy) + 1))
        return Rollout(Prompt(0, (1,), "x"), Response(ids, "", "eos", policy, reference), 1.0, values)

    first, second = rollout((-1.0, -2.0), (-1.5, -1.0), (0.5, 0.25)), rollout((-3.0,), (-1.0,), (1.0,))
    # rho: (-0.1 * 0.5, 0.9 * 2 + 0.1) and (0.9 * 1 + 0.2): returns (1.85, 1.9) and 1.1
    (group,) = module(tiny_policy, LearnedBaseline(), beta=0.1).compute_advantages([[first, second]], [2.0, 1.0])
    assert group.advantages == pytest.approx((1.85 - 0.5, 1.9 - 0.25, 1.1 - 1.0))
    assert group.targets == pytest.approx((1.85, 1.9, 1.1))
    (group,) = module(tiny_policy, RLOO(), beta=0.1).compute_advantages([[first, second]], [2.0, 1.0])
    assert group.advantages == pytest.approx((0.75, 0.75, -0.75))
    assert group.targets is None
    # with the KL in the loss, rewards alone are compared; the penalty objective leaves them whole
    loss = module(tiny_policy, RLOO(), beta=0.1, kl=KLControl("penalty", placement="loss_k2"))
    (group,) = loss.compute_advantages([[first, second]], [2.0, 1.0])
    assert group.advantages == pytest.approx((1.0, 1.0, -1.0))
    white = module(tiny_policy, LearnedBaseline(), beta=0.1, loss=PolicyLoss(whiten_advantages=True))
    (group,) = white.compute_advantages([[first, second]], [2.0, 1.0])
    assert sum(group.advantages) == pytest.approx(0.0, abs=1e-6)
    assert group.targets == pytest.approx((1.85, 1.9, 1.1))  # the value model learns what it learned before


def test_the_loss_is_that_of_response_tokens_alone(tmp_path: Path, tiny_policy: Path) -> None:
    """By hand from all logits, row by row: prompts and padding carry nothing, and the value model reads states."""
    kept = Steps()
    policy = module(
        tiny_policy,
        LearnedBaseline(),
        beta=0.2,
        kl=KLControl(placement="loss_k2"),
        loss=PolicyLoss(aggregation="sequence_mean"),
        value=ValueModel(coefficient=0.5),
    )
    decoding = Decoding(max_new_tokens=5, rows=4, temperature=0.7)
    trainer(tmp_path, kept, max_epochs=1).fit(policy, datamodule=data(prompts_per_batch=4, decoding=decoding))
    start, losses = AutoModelForCausalLM.from_pretrained(tiny_policy), []
    for rollout in kept.rounds[0].rollouts:
        prompt, ids = rollout.prompt.ids, rollout.response.ids
        with torch.no_grad():
            logits = start(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        # the head of the value model begins at zero, and every token returns (1 - beta) R; policy and reference agree
        returns = 0.8 * rollout.reward
        losses.append((-logps * returns + 0.5 * returns**2).mean())
    assert kept.outputs[0]["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": RLOO()},
        {"advantage": GAE(), "loss": PolicyLoss(0.2, "token_mean", True), "value": ValueModel(clip=0.2)},
        {
            "advantage": GRPO(),
            "loss": PolicyLoss(0.2, "sequence_mean"),
            "kl": KLControl(placement="loss_k3"),
        },
    ],
    ids=["rloo", "ppo", "grpo"],
)
def test_micro_batches_and_accumulation_change_nothing(
    tmp_path: Path, tiny_policy: Path, options: dict[str, Any]
) -> None:
    class Plain(PolicyGradientModule):
        """Without the normalization of AdamW, which makes much of rounding where gradients are small."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    found, last_losses = [], []
    start = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_policy).parameters()]).detach()
    for name, tokens, pieces in (("whole", None, {}), ("parts", 14, {}), ("both", 14, {"accumulate_grad_batches": 2})):
        per_batch = 2 if pieces else 4
        kept, policy = Steps(), Plain(str(tiny_policy), **options)
        rollouts = data(prompts_per_batch=per_batch, rounds=RoundOptions(4, 2), batching=BatchOptions(tokens))
        trainer(tmp_path / name, kept, **pieces).fit(policy, datamodule=rollouts)
        found.append(weights(policy))
        assert (found[-1][: len(start)] - start).abs().max() > 1e-3
        last_losses.append(kept.outputs[-1]["loss"].item())
    for other, loss in zip(found[1:], last_losses[1:], strict=True):
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)
        assert loss == pytest.approx(last_losses[0], abs=1e-4)


RESUMED = {
    "ppo": (
        lambda: GAE(lam=0.9),
        {
            "beta": 0.1,
            "kl": KLControl("penalty", target=0.5),
            "loss": PolicyLoss(clip=0.2),
            "value": ValueModel(clip=0.2),
        },
        {"shaping": RewardShaping("mean_std", missing_eos_penalty=0.3), "rounds": RoundOptions(4, 2)},
    ),
    "rloo": (
        RLOO,
        {"reference": ReferenceUpdate("previous")},
        {"shaping": RewardShaping("std"), "rounds": RoundOptions(4, 2)},
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_continues_bitwise_from_every_checkpoint(tmp_path: Path, tiny_policy: Path, name: str) -> None:
    """Two rounds of two epochs of two steps; most checkpoints lie in the middle of a rollout's epochs."""
    make, options, settings = RESUMED[name]

    def fit(folder: Path, *callbacks: L.Callback, ckpt: str | None = None) -> tuple[torch.Tensor, float, int]:
        policy, reward = module(tiny_policy, make(), **options), Even()
        rollouts = data(UncertaintyPenalty(reward, 0.5), **settings)
        trainer(folder, *callbacks, max_epochs=4).fit(policy, datamodule=rollouts, ckpt_path=ckpt)
        return weights(policy), policy.kl_coefficient, reward.asked

    straight = tmp_path / "straight"
    every = ModelCheckpoint(straight / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    expected, coefficient, asked = fit(straight, every)
    assert asked == 16
    if "kl" in options:
        assert coefficient != options["beta"]
    checkpoints = sorted((straight / "ckpt").glob("*.ckpt"))
    assert len(checkpoints) == 8
    for number, checkpoint in enumerate(checkpoints[::2]):  # in the middle of an epoch, and at its end
        # the ledger holds rounds that the checkpoint has not seen: they are read back, and not scored again
        copy = shutil.copytree(straight, tmp_path / f"again{number}")
        found, again, asked = fit(copy, ckpt=str(checkpoint))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        assert (again, asked) == (coefficient, 0)


def test_a_round_that_was_cut_off_is_scored_on_from_where_it_was(tmp_path: Path, tiny_policy: Path) -> None:
    class Mortal(Even):
        """May fail in its second chunk."""

        dies = False

        def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
            if self.asked and self.dies:
                raise ConnectionError("the judge is away")
            return super().score(prompts, responses)

    found = []
    dying = Mortal()
    dying.dies = True
    for name, judges in (("straight", [Mortal()]), ("cut", [dying, Mortal()])):
        for judge in judges:
            policy, rollouts = module(tiny_policy, RLOO()), data(UncertaintyPenalty(judge, 0.5))
            try:
                trainer(tmp_path / name).fit(policy, datamodule=rollouts)
            except ConnectionError:
                assert judge.dies and judge.asked == 4
                rollouts.teardown("fit")  # what the end of the process would do
        found.append(weights(policy))
        with PreferenceStore(tmp_path / name / "ledger.sqlite", read_only=True) as store:
            assert RolloutTable(store).count_scores(before=2) == 16
    assert sum(judge.asked for judge in judges) == 16
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


def learned(folder: Path, tiny_policy: Path, **options: Any) -> tuple[float, float, float]:
    """Mean reward of the first and of the last two rounds, and the KL of those."""
    kept = Steps()
    policy = module(tiny_policy, RLOO(), **options)
    rollouts = data(
        count=16,
        responses_per_prompt=4,
        rounds=RoundOptions(prompts_per_round=16),
        prompts_per_batch=16,
        decoding=Decoding(max_new_tokens=6, rows=64),
    )
    trainer(folder, kept, max_epochs=12).fit(policy, datamodule=rollouts)
    figures = [round_metrics(drawn.groups, drawn.rewards) for drawn in kept.rounds]
    last = figures[-2:]
    return figures[0]["reward"], sum(f["reward"] for f in last) / 2, sum(f["kl/k1"] for f in last) / 2


@pytest.mark.slow
def test_a_rule_judge_is_pleased_and_the_pull_bounds_the_drift(tmp_path: Path, tiny_policy: Path) -> None:
    """Direct RLAIF with a judge that follows a rule: reward up, KL bounded by beta, and further drift without it."""
    before, after, kl = learned(tmp_path / "pulled", tiny_policy, beta=0.1)
    _, free, drift = learned(tmp_path / "free", tiny_policy, beta=0.0)
    assert after > before + 0.08
    assert free > after
    assert drift > 1.3 * kl
    assert 0 < kl < 4


@pytest.mark.slow
def test_the_learned_baseline_learns_too(tmp_path: Path, tiny_policy: Path) -> None:
    kept = Steps()
    policy = module(tiny_policy, LearnedBaseline(), beta=0.05, lr=2e-2, value=ValueModel(learning_rate=3e-2))
    rollouts = data(
        count=16, responses_per_prompt=4, rounds=RoundOptions(16), prompts_per_batch=16,
        decoding=Decoding(max_new_tokens=6, rows=64),
    )  # fmt: skip
    trainer(tmp_path, kept, max_epochs=12).fit(policy, datamodule=rollouts)
    rewards = [sum(drawn.rewards) / len(drawn.rewards) for drawn in kept.rounds]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.08
    # values begin at zero, and learn what to expect
    first, last = (sum(v for r in kept.rounds[i].rollouts for v in r.values) for i in (0, -1))
    assert first == 0.0
    errors = [output["value_loss"].mean().item() for output in kept.outputs]
    assert sum(errors[-3:]) < 0.7 * sum(errors[:3]) and last > 0


def test_beta_follows_the_kl_by_hand(tiny_policy: Path) -> None:
    def drawn(log_ratio: float) -> list[list[Rollout]]:
        response = Response((1, 2), "", "eos", (-1.0, -1.0), (-1.0 - log_ratio, -1.0))
        return [[Rollout(Prompt(0, (1,), "x"), response)]]

    policy = module(tiny_policy, RLOO(), beta=0.1, kl=KLControl("penalty", target=2.0))
    for kl, factor in ((2.2, 1.01), (8.0, 1.02), (2.0, 1.0), (-3.0, 0.98)):  # the error is cut to 20 %, the gain is 0.1
        before = policy.kl_coefficient
        policy.observe_round(drawn(kl))
        assert policy.kl_coefficient == pytest.approx(before * factor)
    assert policy.beta == policy.kl_coefficient  # what a nat costs, for the callbacks
    assert module(tiny_policy, RLOO(), beta=0.05).beta == pytest.approx(1 / 19)


def test_the_uncertainty_penalty_by_hand() -> None:
    class Given(AbstractReward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
            return RewardOutput(torch.ones(len(responses)), torch.tensor([float(len(r.ids)) for r in responses]))

    reward = UncertaintyPenalty(Given(), 0.5)
    output = reward.score([], [Response((1,), "", "eos"), Response((1, 2, 3), "", "eos")])
    assert output.mean.tolist() == [1.0, 1.0]
    reward.observe(output)
    assert reward.earned(output).tolist() == [1.5, 0.5]  # about the mean of 1 and 3
    reward.observe(RewardOutput(torch.zeros(2), torch.tensor([0.0, 0.0])))
    assert reward.earned(output).tolist() == [1.0, 0.0]  # about the mean of 1, 3, 0 and 0
    other = UncertaintyPenalty(Given(), 0.5)
    other.load_state_dict(reward.state_dict())
    assert other.earned(output).tolist() == [1.0, 0.0]

    class Sure(AbstractReward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
            return RewardOutput(torch.ones(len(responses)))

    with pytest.raises(ValueError, match=r"reports its std, and Sure does not"):
        UncertaintyPenalty(Sure()).score([], [Response((1,), "", "eos")])


def test_rewards_are_normalized_by_all_rounds_so_far(tmp_path: Path, tiny_policy: Path) -> None:
    kept = Steps()
    rollouts = data(shaping=RewardShaping("mean_std", missing_eos_penalty=0.25))
    trainer(tmp_path, kept, max_epochs=3).fit(module(tiny_policy, RLOO()), datamodule=rollouts)
    raw: list[float] = []
    for drawn in kept.rounds:
        mine = [r.reward for r in drawn.rollouts]
        raw += mine
        seen = torch.tensor(raw, dtype=torch.float64)
        cut = torch.tensor([r.response.finish_reason == "length" for r in drawn.rollouts])
        expected = (torch.tensor(mine, dtype=torch.float64) - seen.mean()) / seen.std() - 0.25 * cut
        assert drawn.rewards == pytest.approx(expected.tolist())
    assert cut.any()


def test_figures_of_a_round_by_hand() -> None:
    assert repetition((1, 2, 3, 1, 2, 3)) == pytest.approx(1 / 4)
    assert repetition((7, 7, 7, 7, 7)) == pytest.approx(2 / 3)
    assert repetition((1, 2, 3)) == repetition((1,)) == 0.0

    def rollout(length: int, reward: float, eos: bool = True) -> Rollout:
        reason = "eos" if eos else "length"
        response = Response(tuple(range(length)), "", reason, (-1.0,) * length, (-1.5,) * length)  # type: ignore[arg-type]
        return Rollout(Prompt(0, (1,), "x"), response, reward=reward, std=0.5)

    groups = [[rollout(1, 1.0), rollout(3, 3.0, eos=False)], [rollout(2, 2.0), rollout(2, 2.0)]]
    found = round_metrics(groups, [0.1, 0.3, 0.2, 0.2])
    assert found["reward"] == 2.0 and found["earned"] == pytest.approx(0.2)
    assert found["kl/k1"] == pytest.approx(1.0) and found["kl/k3"] == pytest.approx(2 * (math.exp(-0.5) - 0.5))
    assert (found["length"], found["eos_rate"], found["flat_groups"]) == (2.0, 0.75, 0.5)
    assert found["length_reward_correlation"] == pytest.approx(1.0)
    assert found["nats_per_token"] == pytest.approx(1.0) and found["uncertainty"] == 0.5


def test_the_best_rollouts_are_shown_and_the_budget_is_kept(tmp_path: Path, tiny_policy: Path) -> None:
    kept, reward = Steps(), Even()
    callbacks = [kept, RolloutMonitor(top=2), LabelBudget(12)]
    run = trainer(tmp_path, *callbacks, max_epochs=9)
    run.fit(module(tiny_policy, RLOO()), datamodule=data(reward))
    assert reward.asked == 12
    assert [len(drawn.groups) for drawn in kept.rounds] == [4, 2]
    lines = (tmp_path / "top_rollouts.md").read_text().splitlines()
    assert len(lines) == 2 + 2 * 2 and lines[2].startswith("| 1 |")
    best = max(rollout.reward for rollout in kept.rounds[0].rollouts)
    assert f"{best:.3f}" in lines[4]
    figures = round_metrics(kept.rounds[1].groups, kept.rounds[1].rewards)
    assert run.callback_metrics["rollout/reward"].item() == pytest.approx(figures["reward"])
    with pytest.raises(ValueError, match="no multiple of the 2 that a prompt costs; take 12"):
        trainer(tmp_path / "odd", LabelBudget(13)).fit(module(tiny_policy, RLOO()), datamodule=data())


def test_bad_use_is_named(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match="RLOO needs at least 2 responses per prompt"):
        trainer(tmp_path / "1").fit(module(tiny_policy, RLOO()), datamodule=data(responses_per_prompt=1))
    nucleus = data(decoding=Decoding(max_new_tokens=2, top_p=0.9))
    with pytest.raises(ValueError, match=r"set data\.decoding\.top_p to 1"):
        trainer(tmp_path / "2").fit(module(tiny_policy, RLOO()), datamodule=nucleus)
    with pytest.raises(ValueError, match=r"data\.prompts_per_batch must be at least 1; got 0"):
        data(prompts_per_batch=0)
    with pytest.raises(ValueError, match=r"data\.shaping\.missing_eos_penalty must be finite and at least 0; got -1"):
        RewardShaping(missing_eos_penalty=-1.0)
    for beta, message in ((1.0, "the reward has no weight"), (1.5, r"beta must lie in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            module(tiny_policy, RLOO(), beta=beta)
    with pytest.raises(ValueError, match=r"model\.loss\.clip must be > 0"):
        PolicyLoss(clip=0.0)
    with pytest.raises(ValueError, match=r"needs model\.kl\.objective=penalty"):
        KLControl(target=6.0)


def test_a_frozen_copy_of_the_policy_judges_it(tmp_path: Path, tiny_judge: Path) -> None:
    """The config of self-improvement; scores of the last round are those of the checkpoint that the run began with."""
    main(
        [
            *("fit", "--config", "drlaif_self", f"--model.policy={tiny_judge}", "--data.reward.min_mass=0"),
            *("--model.optimizer.lr=1e-2", "--model.lr_scheduler.warmup_steps=0", "--data.rounds.prompts_per_round=2"),
            *("--data.decoding.max_new_tokens=4", "--data.heldout.limit=2", "--trainer.max_epochs=3"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
            f"--run_dir={tmp_path}",
        ]
    )
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    start = AutoModelForCausalLM.from_pretrained(tiny_judge)
    assert max((p - q).abs().max().item() for p, q in zip(trained.parameters(), start.parameters(), strict=True)) > 1e-3
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        last = [rollout for _, _, rollout in RolloutTable(store).rollouts(2)]
    expected = LLMScoreReward(str(tiny_judge), min_mass=0).score(
        [rollout.prompt for rollout in last], [rollout.response for rollout in last]
    )
    assert [rollout.reward for rollout in last] == pytest.approx(expected.mean.tolist(), abs=1e-5)
    assert expected.std is not None
    assert [rollout.std for rollout in last] == pytest.approx(expected.std.tolist(), abs=1e-5)
    assert all(-1 <= (rollout.reward or 0) <= 1 for rollout in last)
    assert (tmp_path / "top_rollouts.md").exists() and (tmp_path / "summary.json").exists()

"""RLGAF (arXiv 2305.06176): a discriminator as the reward, trained in rounds against the policy."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD

from lightning_rlhf import Decoding, PolicyGradientModule, RolloutDataModule
from lightning_rlhf.advantages import RLOO
from lightning_rlhf.callbacks import RolloutMonitor
from lightning_rlhf.cli import main
from lightning_rlhf.datamodules.options import RoundOptions
from lightning_rlhf.estimators.adversarial import (
    RewardForm,
    adversarial_reward,
    discriminator_accuracy,
    discriminator_loss,
)
from lightning_rlhf.estimators.returns import leave_one_out
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.losses.policy_gradient import reinforce_loss
from lightning_rlhf.modules import KLControl
from lightning_rlhf.prompts import DatasetCompletions
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import (
    AbstractDiscriminator,
    AdversarialReward,
    DiscriminatorSteps,
    ModelDiscriminator,
    NGramDiscriminator,
    RewardOutput,
    UncertaintyPenalty,
)
from lightning_rlhf.rewards.base import RoundSamples
from lightning_rlhf.types import Prompt, PromptRow, RecordedPair, Response, Rollout


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_minimal_at_the_ratio_of_the_densities() -> None:
    """With a share p of demonstrations D* = p, and (1 - s) p with smoothing s."""
    real = torch.tensor([True, True, True, False])
    for smoothing in (0.0, 0.2):
        logit = torch.tensor((1 - smoothing) * 0.75, dtype=torch.float64).logit().requires_grad_()
        losses = discriminator_loss(logit.expand(4), real, smoothing)
        torch.autograd.backward(losses.sum())
        assert logit.grad is not None
        assert logit.grad.item() == pytest.approx(0.0, abs=1e-12)
    d = torch.tensor([0.9, 0.6, 0.5, 0.2], dtype=torch.float64)
    expected = [-math.log(0.9), -math.log(0.6), -math.log(0.5), -math.log(0.8)]
    assert discriminator_loss(d.logit(), real).tolist() == pytest.approx(expected)


def test_the_forms_of_the_reward() -> None:
    d = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    logits = d.logit().requires_grad_()
    expected: dict[RewardForm, Tensor] = {
        "logit": d.log() - (1 - d).log(),
        "log_d": d.log(),
        "minus_log_1_minus_d": -(1 - d).log(),
        "d": d,
    }
    for form, values in expected.items():
        found = adversarial_reward(logits, form)
        torch.testing.assert_close(found, values)
        # the policy gets no gradient through D
        assert not found.requires_grad


def test_a_discriminator_that_says_one_thing_is_at_chance() -> None:
    right, wrong = torch.tensor([2.0, 1.0]), torch.tensor([-1.0, -3.0, -0.5])
    assert discriminator_accuracy(right, wrong) == 1.0
    assert discriminator_accuracy(wrong, right) == 0.0
    assert discriminator_accuracy(right, right) == discriminator_accuracy(torch.zeros(3), torch.zeros(2)) == 0.5
    # two of three samples are recognized, and all demonstrations
    assert discriminator_accuracy(right, torch.tensor([-1.0, 1.0, -2.0])) == pytest.approx((1 + 2 / 3) / 2)


# -- a world that can be enumerated ------------------------------------------------------------------------------------

WORDS = 20
SAY = Prompt(0, (1,), "say")


class Shown(AbstractPromptSource):
    """Demonstrations in memory: completions of one prompt."""

    def __init__(self, completions: list[str], prompt: str = "say") -> None:
        self.completions, self.prompt = completions, prompt

    def load(self) -> list[PromptRow]:
        return [PromptRow(f"row {i}", text=self.prompt, completion=text) for i, text in enumerate(self.completions)]


def said(word: int) -> Rollout:
    return Rollout(SAY, Response((word,), f"w{word}", "eos"))


def imitate(seed: int, form: RewardForm, rounds: int = 250, size: int = 128) -> dict[str, float]:
    """Train a table of 20 words by REINFORCE on the reward of a discriminator that sees 4000 demonstrations.

    Returns:
        Total variation distance to the distribution of the demonstrations at the start, at the end, and of the
        empirical distribution (the maximum-likelihood estimate); mean accuracy of D over the last 50 rounds.
    """
    key = Key((seed,))
    expert = torch.randn(WORDS, generator=key.generator(), dtype=torch.float64).softmax(-1)
    shown = torch.multinomial(expert, 4000, replacement=True, generator=key.fold(1).generator())
    steps = DiscriminatorSteps(first=50, later=5, batch_size=size, learning_rate=0.03)
    reward = AdversarialReward(
        Shown([f"w{i}" for i in shown.tolist()]), NGramDiscriminator(prompt_words=False), form, steps
    )
    theta = torch.zeros(WORDS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, rounds)
    history: list[list[Rollout]] = []
    accuracies = []
    for index in range(rounds):
        policy = theta.softmax(-1)
        chosen = torch.multinomial(policy.detach(), size, replacement=True, generator=key.fold(2, index).generator())
        history.append([said(i) for i in chosen.tolist()])
        samples = RoundSamples(index, history[-1], history.__getitem__, key.fold(3, index))
        reward.learn(samples)
        rewards = reward.score(samples.prompts, samples.responses).mean.double()
        advantages = leave_one_out(rewards, torch.zeros(size, dtype=torch.int64))
        optimizer.zero_grad()
        torch.autograd.backward(reinforce_loss(policy.log()[chosen], advantages).mean())
        optimizer.step()
        schedule.step()
        accuracies.append(reward.metrics()["discriminator/accuracy"])

    def distance(distribution: Tensor) -> float:
        return (distribution - expert).abs().sum().item() / 2

    return {
        "start": distance(torch.full_like(expert, 1 / WORDS)),
        "end": distance(theta.detach().softmax(-1)),
        "likelihood": distance(torch.bincount(shown, minlength=WORDS) / len(shown)),
        "accuracy": sum(accuracies[-50:]) / 50,
    }


@pytest.mark.parametrize(("form", "seed"), [("logit", 0), ("minus_log_1_minus_d", 1)])
def test_the_policy_ends_at_the_demonstrations_and_the_discriminator_at_chance(form: RewardForm, seed: int) -> None:
    found = imitate(seed, form)
    assert found["start"] > 0.25
    assert found["end"] < 0.08
    assert 0.45 <= found["accuracy"] <= 0.57


# -- gradients of the policy -------------------------------------------------------------------------------------------


class Rows(AbstractPromptSource):
    def load(self) -> list[PromptRow]:
        return [PromptRow(f"row {i}", text="say " + "x" * (i % 4)) for i in range(6)]


class Demonstrations(AbstractPromptSource):
    """A response to each of the prompts of `Rows`."""

    def __init__(self, text: str = "yes") -> None:
        self.text = text

    def load(self) -> list[PromptRow]:
        texts = [("say " + "x" * i, self.text * (i + 1)) for i in range(4)]
        return [PromptRow("a row", text=prompt, completion=completion) for prompt, completion in texts]


class Fixed(AbstractDiscriminator):
    """Does not learn; its logit is a constant, or the mean token modulo 7."""

    def __init__(self, constant: bool) -> None:
        self.constant = constant
        self._unused = nn.Parameter(torch.zeros(1))

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        return torch.tensor([[sum(i % 7 for i in r.ids) / len(r.ids)] for r in responses])

    def logits(self, rows: Tensor) -> Tensor:
        return self._unused * 0 + (torch.full_like(rows[:, 0], 0.3) if self.constant else rows[:, 0])

    def parameters(self) -> list[nn.Parameter]:
        return [self._unused]

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        del state


def run(
    folder: Path,
    policy: Path,
    discriminator: AbstractDiscriminator,
    demonstrations: AbstractPromptSource | None = None,
    *callbacks: L.Callback,
    ckpt: str | None = None,
) -> tuple[Tensor, AdversarialReward, L.Trainer]:
    L.seed_everything(0, verbose=False)
    module = PolicyGradientModule(
        str(policy), RLOO(), beta=0.0, kl=KLControl("penalty"), optimizer=partial(SGD, lr=0.1)
    )
    steps = DiscriminatorSteps(first=6, later=3, batch_size=4, learning_rate=0.05, replay=0.5)
    reward = AdversarialReward(demonstrations or Demonstrations(), discriminator, steps=steps)
    data = RolloutDataModule(
        Rows(),
        reward,
        responses_per_prompt=2,
        rounds=RoundOptions(prompts_per_round=4, epochs_per_round=2),
        prompts_per_batch=2,
        decoding=Decoding(max_new_tokens=5, rows=4),
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()]), reward, trainer


def test_demonstrations_give_the_policy_no_gradient_of_their_own(tmp_path: Path, tiny_policy: Path) -> None:
    """With a frozen D the policy is the same bit by bit whatever is demonstrated, and stays where D is constant."""
    start, *_ = run(tmp_path / "constant", tiny_policy, Fixed(constant=True))
    trained, *_ = run(tmp_path / "yes", tiny_policy, Fixed(constant=False), Demonstrations("yes"))
    other, *_ = run(tmp_path / "no", tiny_policy, Fixed(constant=False), Demonstrations("\u4e2d no"))
    assert torch.equal(trained, other)
    assert (trained - start).abs().max() > 1e-4
    from transformers import AutoModelForCausalLM

    before = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_policy).parameters()])
    assert torch.equal(start, before)


# -- rounds ------------------------------------------------------------------------------------------------------------

DISCRIMINATORS = {
    "ngrams": lambda policy: NGramDiscriminator(buckets=512),
    "head": lambda policy: ModelDiscriminator(str(policy)),
    "model": lambda policy: ModelDiscriminator(str(policy), train_trunk=True, pooling="last"),
}


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_run_continues_bitwise_from_every_checkpoint(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    """Three rounds of two epochs of two steps; the ledger holds rounds that the checkpoint has not seen."""
    straight = tmp_path / "straight"
    every = ModelCheckpoint(straight / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make = DISCRIMINATORS[kind]
    expected, reward, trainer = run(straight, tiny_policy, make(tiny_policy), None, every, RolloutMonitor())
    logged = trainer.callback_metrics
    for name, value in reward.metrics().items():
        assert logged[f"rollout/rewards/{name}"].item() == pytest.approx(value, rel=1e-5)
    # the last reward is known from the ledger, too
    assert logged["rollout/reward_std"].item() > 0
    checkpoints = sorted((straight / "ckpt").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(checkpoints) == 12
    for checkpoint in (checkpoints[2], checkpoints[4]):  # in the middle of round 0, and at the start of round 1
        copy = shutil.copytree(straight, tmp_path / f"again {checkpoint.stem}")
        found, again, _ = run(copy, tiny_policy, make(tiny_policy), ckpt=str(checkpoint))
        assert torch.equal(found, expected)
        for mine, theirs in zip(again.discriminator.parameters(), reward.discriminator.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert again.metrics() == reward.metrics()


class Mortal(NGramDiscriminator):
    """May fail when the second chunk of a round is scored."""

    dies = False
    asked = 0

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        self.asked += 1
        if self.dies and self.asked == 6:
            raise ConnectionError("away")
        return super().encode(prompts, responses)


def test_a_round_that_was_cut_off_while_it_was_scored_learns_once(tmp_path: Path, tiny_policy: Path) -> None:
    expected, *_ = run(tmp_path / "straight", tiny_policy, Mortal(buckets=512))
    dying = Mortal(buckets=512)
    dying.dies = True
    with pytest.raises(ConnectionError, match="away"):
        run(tmp_path / "cut", tiny_policy, dying)
    found, *_ = run(tmp_path / "cut", tiny_policy, Mortal(buckets=512))
    assert torch.equal(found, expected)


# -- parts -------------------------------------------------------------------------------------------------------------


def rollout(text: str, prompt: str = "say") -> Rollout:
    return Rollout(Prompt(0, (1,), prompt), Response((1, 2), text, "eos"))


def test_each_sample_is_compared_with_a_demonstration_of_its_prompt() -> None:
    """Word a is right for the first prompt, and b for the second: words alone tell nothing."""

    class Two(AbstractPromptSource):
        def load(self) -> list[PromptRow]:
            pair = RecordedPair("b", "a")
            return [PromptRow("1", text="one", completion="a"), PromptRow("2", text="two", pair=pair)]

    reward = AdversarialReward(Two(), NGramDiscriminator(), steps=DiscriminatorSteps(first=200, learning_rate=0.1))
    wrong = [rollout("b", "one"), rollout("a", "two"), rollout("z", "three")]
    reward.learn(RoundSamples(0, wrong, lambda index: [], Key((1,))))
    asked = [rollout(text, prompt) for prompt in ("one", "two") for text in ("a", "b")]
    found = reward.score([r.prompt for r in asked], [r.response for r in asked]).mean
    assert (found > 0).tolist() == [True, False, False, True]
    # smoothing bounds the logit at log(0.9 / 0.1)
    assert found.max().item() == pytest.approx(math.log(9), abs=0.3)
    assert reward.metrics()["discriminator/accuracy"] == 0.5
    assert reward.metrics()["discriminator/accuracy_fitted"] == 1.0


def test_old_samples_are_replayed() -> None:
    """D has to know earlier samples of the policy: a demonstration that is one of them is worth less."""
    found = []
    for replay in (0.0, 0.5):
        steps = DiscriminatorSteps(first=0, later=300, learning_rate=0.1, replay=replay)
        reward = AdversarialReward(Shown(["old", "fine"]), NGramDiscriminator(n=1), steps=steps)
        rounds = [[rollout("old")], [rollout("new")]]
        for index in range(2):
            reward.learn(RoundSamples(index, rounds[index], rounds.__getitem__, Key((index,))))
        scores = reward.score([SAY, SAY], [Response((1,), text, "eos") for text in ("old", "fine")]).mean
        found.append((scores[1] - scores[0]).item())
    assert found[0] == pytest.approx(0.0, abs=0.2)
    assert found[1] > 0.5


def test_a_model_discriminator_reads_texts_with_its_own_tokenizer(tiny_policy: Path) -> None:
    messages = ({"role": "user", "content": "hi"},)
    prompts = [Prompt(0, (1,), "say "), Prompt(1, (1,), "hi", messages), Prompt(2, (1,), "x" * 400)]
    responses = [Response((9,), "yes", "eos"), Response((9,), "no", "length"), Response((9,), "long", "eos")]
    trained = ModelDiscriminator(str(tiny_policy), train_trunk=True)
    rows = trained.encode(prompts, responses)
    assert rows.shape[1] == 1 + 256  # the longest is cut to the window
    frozen = ModelDiscriminator(str(tiny_policy))
    states = frozen.encode(prompts, responses)
    # the same hidden states in both, and no logit before training
    trained.start(rows)
    frozen.start(states)
    assert trained.logits(rows).tolist() == frozen.logits(states).tolist() == [0.0, 0.0, 0.0]
    trunks = trained.parameters()[2:]
    for discriminator, features in ((trained, rows), (frozen, states)):
        with torch.no_grad():
            discriminator.parameters()[0].fill_(0.1)
        torch.autograd.backward(discriminator.logits(features)[:2].sum())
    torch.testing.assert_close(trained.logits(rows), frozen.logits(states), atol=1e-5, rtol=1e-5)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trunks)
    assert len(frozen.parameters()) == 2


def test_faults_are_named_before_anything_is_sampled(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 6 training prompts has a demonstration among the 1 prompts"):
        run(tmp_path, tiny_policy, NGramDiscriminator(), Shown(["yes"], prompt="another"))
    with pytest.raises(ValueError, match="row 0 has no response that demonstrates anything: read demonstrations with"):
        AdversarialReward(Rows(), NGramDiscriminator()).check_prompts([SAY])
    with pytest.raises(ValueError, match="form must be one of logit, log_d"):
        AdversarialReward(Rows(), NGramDiscriminator(), form="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps\.label_smoothing must lie in \[0, 0\.5\)"):
        DiscriminatorSteps(label_smoothing=0.5)
    with pytest.raises(ValueError, match="needs n >= 1 and buckets >= 2"):
        NGramDiscriminator(n=0)
    with pytest.raises(ValueError, match="pooling must be one of last, mean"):
        ModelDiscriminator(str(tiny_policy), pooling="max")  # type: ignore[arg-type]
    reward = AdversarialReward(Shown(["yes"]), NGramDiscriminator())
    with pytest.raises(ValueError, match="no prompt of round 3 has a demonstration"):
        reward.learn(RoundSamples(3, [rollout("a", "elsewhere")], lambda index: [], Key((1,))))


def test_wrappers_let_the_reward_learn() -> None:
    inner = AdversarialReward(Shown(["yes"]), NGramDiscriminator())
    outer = UncertaintyPenalty(inner)
    assert outer.learns_from_samples
    outer.learn(RoundSamples(0, [rollout("no")], lambda index: [], Key((1,))))
    assert outer.metrics() == inner.metrics() != {}
    with pytest.raises(ValueError, match="UncertaintyPenalty learns from rollouts, which preference learning has none"):
        RewardLabeler(outer)
    assert isinstance(inner.score([SAY], [Response((1,), "yes", "eos")]), RewardOutput)
    assert DatasetCompletions([{"prompt": "say", "completion": "yes"}]).load()[0].completion == "yes"


def test_the_config_fits_two_rounds(tmp_path: Path, tiny_policy: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}. ", "completion": "It is."}) + "\n" for i in range(6)))
    main(
        [
            *("fit", "--config=rlgaf", f"--model.policy={tiny_policy}", f"--data.prompts.path={rows}"),
            *(f"--data.reward.demonstrations.path={rows}", f"--data.reward.discriminator.model={tiny_policy}"),
            *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
            *("--trainer.enable_progress_bar=false", "--data.rounds.prompts_per_round=2", "--data.prompts_per_batch=2"),
            *("--data.responses_per_prompt=2", "--data.decoding.max_new_tokens=4", f"--run_dir={tmp_path / 'run'}"),
        ]
    )
    written = next((tmp_path / "run").rglob("metrics.csv")).read_text()
    assert "rollout/rewards/discriminator/accuracy_fitted" in written
    assert (tmp_path / "run" / "model").exists()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "discriminator" in str(saved["RolloutDataModule"]["reward"].keys())


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, tiny_policy: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}. ", "completion": "It is."}) + "\n" for i in range(6)))
    command = [
        *("-m", "lightning_rlhf", "fit", "--config=rlgaf", f"--model.policy={tiny_policy}"),
        *(f"--data.prompts.path={rows}", f"--data.reward.demonstrations.path={rows}"),
        *(f"--data.reward.discriminator.model={tiny_policy}", "--data.reward.steps.first=8"),
        *("--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        *("--trainer.enable_progress_bar=false", "--data.rounds.prompts_per_round=4", "--data.prompts_per_batch=4"),
        *("--data.responses_per_prompt=2", "--data.decoding.max_new_tokens=4", "--model.optimizer.lr=1e-3"),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"one": [], "two": ["--config=trainer/ddp", "--trainer.devices=2"]}
    found = []
    for name, options in more.items():
        done = subprocess.run(
            [sys.executable, *(launcher if options else []), *command, *options, f"--run_dir={name}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with PreferenceStore(tmp_path / name / "ledger.sqlite", read_only=True) as store:
            table = RolloutTable(store)
            found.append([rollout for index in range(3) for _, _, rollout in table.rollouts(index)])
    assert len(found[0]) == len(found[1]) == 24
    for a, b in zip(*found, strict=True):
        assert (a.prompt, a.response.ids) == (b.prompt, b.response.ids)
        assert a.reward == pytest.approx(b.reward, abs=1e-5)
    assert len({rollout.reward for rollout in found[0]}) > 12

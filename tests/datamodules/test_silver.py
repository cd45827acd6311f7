"""Silver labels: which pairs a step trains on, with which weights; nothing counts them; runs continue bit by bit."""

from __future__ import annotations

import csv
import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW

from lightning_rlhf import DPOModule, PreferenceDataModule
from lightning_rlhf.callbacks import LabelBudget, SilverMonitor
from lightning_rlhf.collectors.silver import SilverOptions
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.estimators import gap_factor
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.preference_models import (
    AbstractPreferenceModel,
    ModelStart,
    Posterior,
    RewardPreferenceModel,
    win_probability,
)
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.samplers import AbstractPairSampler, HybridSampler, MixtureSampler, VanillaSampler
from lightning_rlhf.types import Preference, Prompt, Response, State


def counts(responses: Sequence[Response]) -> Tensor:
    """How often each of seven kinds of tokens occurs; [responses, 7]."""
    rows = [torch.bincount(torch.tensor([token % 7 for token in r.ids]), minlength=7) for r in responses]
    return torch.stack(rows).double()


class Bytes(AbstractReward):
    """Likes some tokens more than others."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        del prompts
        return RewardOutput((counts(responses) @ torch.arange(7.0).double()).float())


class Ridge(AbstractPreferenceModel):
    """Bayesian linear regression of 2 p - 1 on the gap of token counts, with unit prior and noise."""

    def __init__(self) -> None:
        self.fits: list[int] = []
        self.starts: list[ModelStart] = []
        self._precision = torch.eye(7, dtype=torch.float64)
        self._mean = torch.zeros(7, dtype=torch.float64)

    def setup(self, start: ModelStart) -> None:
        self.starts.append(start)

    def fit(self, preferences: Sequence[Preference]) -> None:
        self.fits.append(len(preferences))
        gaps = counts([p.comparison.a for p in preferences]) - counts([p.comparison.b for p in preferences])
        targets = torch.tensor([2 * p.probability - 1 for p in preferences], dtype=torch.float64)
        self._precision = torch.eye(7, dtype=torch.float64) + gaps.T @ gaps
        self._mean = torch.linalg.solve(self._precision, gaps.T @ targets)

    def posterior(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Posterior:
        del prompts
        features = counts(responses)
        return Posterior(features @ self._mean, features @ torch.linalg.solve(self._precision, features.T))


class Continued(Ridge):
    """The same model, but its fit is an average with the one before: it has a state."""

    REFITS: ClassVar[bool] = False

    def fit(self, preferences: Sequence[Preference]) -> None:
        before = self._mean
        super().fit(preferences)
        self._mean = (before + self._mean) / 2

    def state_dict(self) -> State:
        return {"mean": self._mean.clone(), "precision": self._precision.clone()}

    def load_state_dict(self, state: State) -> None:
        self._mean, self._precision = state["mean"].clone(), state["precision"].clone()


class Items(Callback):
    """Notes the items of each epoch, and how many optimizer steps it has."""

    def __init__(self) -> None:
        self.epochs: list[list[Preference]] = []
        self.steps: list[int] = []
        self.rounds: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        loader: Any = trainer.train_dataloader
        self.epochs.append([p for pairs, _ in loader.dataset for p in pairs])
        self.steps.append(len(loader))
        data: Any = trainer.datamodule
        self.rounds.append(data.round.index)


def fit(
    folder: Path,
    policy: Path,
    model: AbstractPreferenceModel,
    *,
    labels: int = 12,
    resume: str | None = None,
    sampler: AbstractPairSampler | None = None,
    **options: Any,
) -> tuple[DPOModule, PreferenceDataModule, Items]:
    """Rounds of four labels; silver labels from the second round on, three steps each on five silver pairs."""
    settings = {"pairs_per_step": 5, "steps_per_round": 3, "refit_every": 4, "min_labels": 8, "start_samples": 6}
    max_steps = options.pop("max_steps", -1)
    module = DPOModule(str(policy), optimizer=lambda parameters: AdamW(parameters, lr=1e-3))
    data = PreferenceDataModule(
        prompts=BuiltinPrompts("train", limit=10),
        sampler=sampler or VanillaSampler(),
        labeler=RewardLabeler(Bytes(), rule="bernoulli"),
        decoding=Decoding(max_new_tokens=6, rows=16),
        rounds=PreferenceRoundOptions(prompts_per_round=4),
        pairs_per_batch=4,
        silver=SilverOptions(model, **{**settings, **options}),
    )
    items = Items()
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=-1,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            LabelBudget(12),
            items,
            SilverMonitor(),
            ModelCheckpoint(folder / "steps", save_top_k=-1, every_n_train_steps=1),
        ],
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module, data, items


def weights(module: DPOModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.policy.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> tuple[Path, DPOModule, Items, Ridge]:
    """A run that nobody interrupted."""
    folder, model = tmp_path_factory.mktemp("whole"), Ridge()
    module, _, items = fit(folder, tiny_policy, model)
    return folder, module, items, model


def silver(preferences: Sequence[Preference]) -> list[Preference]:
    return [p for p in preferences if p.label.meta.get("kind") == "silver"]


def test_rounds_steps_and_weights(whole: tuple[Path, DPOModule, Items, Ridge]) -> None:
    """One real epoch, then three silver steps per round, each with the loss mean(silver) + 0.3 mean(real)."""
    _, _, items, model = whole
    assert items.rounds == [0, 1, 1, 1, 2, 2, 2]
    assert items.steps == [1] * 7
    assert model.fits == [8, 12]
    assert not silver(items.epochs[0])
    for preferences in items.epochs[1:]:
        own = silver(preferences)
        real = [p for p in preferences if p not in own]
        assert (len(own), len(real)) == (5, 4)
        # sum_i w_i l_i / 9 = sum over silver l_i / 5 + 0.3 sum over real l_i / 4
        assert [p.comparison.weight / 9 for p in own] == pytest.approx([1 / 5] * 5)
        assert [p.comparison.weight / 9 for p in real] == pytest.approx([0.3 / 4] * 4)
    assert {p.label.meta["fitted"] for p in silver(items.epochs[1])} == {8}
    assert {p.label.meta["fitted"] for p in silver(items.epochs[4])} == {12}
    # real pairs come from all rounds, silver pairs are new in every step
    assert {p.round for e in items.epochs[4:] for p in e if p not in silver(e)} == {0, 1, 2}
    texts = [tuple(p.comparison.a.ids + p.comparison.b.ids) for e in items.epochs[1:] for p in silver(e)]
    assert len(set(texts)) == len(texts) == 30


def test_labels_are_those_of_the_posterior(whole: tuple[Path, DPOModule, Items, Ridge]) -> None:
    """P = sigma(kappa m / sqrt(1 + pi kappa^2 v / 8)) with the mean and the variance of the gap."""
    _, _, items, model = whole
    for preference in silver(items.epochs[-1]):
        pair = preference.comparison
        posterior = model.posterior([pair.prompt] * 2, [pair.a, pair.b])
        mean, variance = posterior.gap(torch.tensor([0]), torch.tensor([1]))
        assert preference.label.meta["mean"] == pytest.approx(float(mean))
        assert preference.label.meta["variance"] == pytest.approx(float(variance))
        assert preference.probability == pytest.approx(float(win_probability(mean, variance, 2.0)))


@pytest.mark.parametrize(
    ("sampler", "count"),
    [
        (VanillaSampler(), 4),
        # of these, labels of pairs of the policy alone
        (MixtureSampler([VanillaSampler(), HybridSampler()]), 3),
        # there are none
        (HybridSampler(), 4),
    ],
    ids=["vanilla", "mixture", "hybrid"],
)
def test_kappa_follows_the_latest_labels_of_the_policy(
    tmp_path: Path, tiny_policy: Path, sampler: AbstractPairSampler, count: int
) -> None:
    """Kappa times the factor at which a fit to the other labels predicts the chosen ones."""
    model = Ridge()
    _, _, items = fit(tmp_path, tiny_policy, model, sampler=sampler, kappa_labels=count)
    # at 8 and at 12 labels: without the chosen ones, then with all
    assert model.fits == [8 - count, 8, 12 - count, 12]
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        preferences = list(store.preferences())
    chosen = [
        p for p in preferences if "reference" not in (p.comparison.a.source, p.comparison.b.source)
    ] or preferences
    assert (len(chosen) < 12) == isinstance(sampler, MixtureSampler)
    chosen = chosen[-count:]
    others = Ridge()
    others.fit([preference for preference in preferences if preference not in chosen])
    mean, _ = others.pair_gaps([preference.comparison for preference in chosen])
    factor = gap_factor(mean, torch.tensor([p.probability for p in chosen], dtype=torch.float64))
    assert factor != 1.0
    for preference in silver(items.epochs[-1]):
        gap, variance = (torch.tensor(preference.label.meta[name]) for name in ("mean", "variance"))
        assert preference.probability == pytest.approx(float(win_probability(gap, variance, 2.0 * factor)))


def test_labels_by_a_reward_are_scaled_to_the_latest_real_ones(tmp_path: Path, tiny_policy: Path) -> None:
    """P = sigma(kappa s gap), where s predicts the latest labels best; a reward knows them no better than before."""
    _, _, items = fit(tmp_path, tiny_policy, RewardPreferenceModel(Bytes()), kappa_labels=6)
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        latest = list(store.preferences())[-6:]

    def gaps(preferences: Sequence[Preference]) -> Tensor:
        firsts, seconds = ([getattr(p.comparison, side) for p in preferences] for side in "ab")
        return Bytes().score([], firsts).mean - Bytes().score([], seconds).mean

    label = torch.tensor([preference.probability for preference in latest], dtype=torch.float64)
    scale = 2.0 * gap_factor(gaps(latest), label)
    pairs = silver(items.epochs[-1])
    expected = torch.sigmoid(scale * gaps(pairs).double()).tolist()
    assert [preference.probability for preference in pairs] == pytest.approx(expected)
    assert {preference.label.meta["variance"] for preference in pairs} == {0.0}


def test_forecasts_are_made_before_the_labels_are_learned(whole: tuple[Path, DPOModule, Items, Ridge]) -> None:
    """The labels of round 2 under the model that was fitted to the eight labels of rounds 0 and 1."""
    folder = whole[0]
    (row,) = csv.DictReader((folder / "silver.csv").read_text().splitlines())
    assert (row["round"], row["fitted"], row["labels"], row["kappa"]) == ("2", "8", "4", "2.0")
    with PreferenceStore(folder / "ledger.sqlite", read_only=True) as store:
        preferences = list(store.preferences())
    model, new = Ridge(), [p for p in preferences if p.round == 2]
    model.fit([p for p in preferences if p.round < 2])
    losses, right = [], []
    for preference in new:
        pair = preference.comparison
        mean, variance = model.posterior([pair.prompt] * 2, [pair.a, pair.b]).gap(torch.tensor([0]), torch.tensor([1]))
        predicted = float(win_probability(mean, variance))
        losses.append(-math.log(predicted if preference.probability == 1 else 1 - predicted))
        right.append((predicted > 0.5) == (preference.probability == 1))
    assert float(row["nll"]) == pytest.approx(sum(losses) / 4)
    assert float(row["accuracy"]) == sum(right) / 4


def test_nothing_counts_silver_labels(whole: tuple[Path, DPOModule, Items, Ridge]) -> None:
    """12 labels were bought and counted; 30 silver pairs lie in a table of their own, at no cost."""
    folder = whole[0]
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM attempts").fetchone() == (12,)
        assert db.execute("SELECT labels, cost FROM totals").fetchone() == (12, 12.0)
        assert db.execute("SELECT COUNT(*) FROM comparisons").fetchone() == (12,)
        assert db.execute("SELECT COUNT(*), SUM(cost) FROM silver WHERE epoch >= 0").fetchone() == (30, 0.0)
        assert db.execute("SELECT COUNT(*) FROM silver WHERE epoch = -1").fetchone() == (3,)


def test_the_start_has_unlabeled_samples_of_the_reference(whole: tuple[Path, DPOModule, Items, Ridge]) -> None:
    (start,) = whole[3].starts
    assert len(start.samples) == 6
    assert {response.source for _, response in start.samples} == {"reference"}


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_continues_bit_by_bit(
    tmp_path: Path, tiny_policy: Path, whole: tuple[Path, DPOModule, Items, Ridge], step: int
) -> None:
    """From a checkpoint before the first fit, within a round, and at its end."""
    check_continued(tmp_path, tiny_policy, Ridge, step, weights(whole[1]))


def test_a_run_with_a_model_that_trains_on_continues_bit_by_bit(tmp_path: Path, tiny_policy: Path) -> None:
    """The second fit starts from the first one, which only the checkpoint has."""
    module, _, _ = fit(tmp_path / "whole", tiny_policy, Continued())
    check_continued(tmp_path, tiny_policy, Continued, 4, weights(module))


def check_continued(folder: Path, policy: Path, kind: type[Ridge], step: int, expected: dict[str, Tensor]) -> None:
    """Stop a run after some steps, continue it with new objects, and compare the weights."""
    fit(folder / "stopped", policy, kind(), max_steps=step)
    (checkpoint,) = (folder / "stopped" / "steps").glob(f"*step={step}.ckpt")
    module, _, _ = fit(folder / "stopped", policy, kind(), resume=str(checkpoint))
    found = weights(module)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with sqlite3.connect(folder / "stopped" / "ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM attempts").fetchone() == (12,)
        assert db.execute("SELECT COUNT(*) FROM silver WHERE epoch >= 0").fetchone() == (30,)


def test_pools_give_the_extremes(tmp_path: Path, tiny_policy: Path) -> None:
    """Of a pool of four: (highest, lowest) and (second highest, second lowest) by posterior mean."""
    model = Ridge()
    _, _, items = fit(tmp_path, tiny_policy, model, pool=4, pairs_per_prompt=2, pairs_per_step=4)
    own = silver(items.epochs[-1])
    assert len(own) == 4
    for outer, inner in zip(own[::2], own[1::2], strict=True):
        assert outer.comparison.prompt == inner.comparison.prompt
        pool = [outer.comparison.a, inner.comparison.a, inner.comparison.b, outer.comparison.b]
        means = model.posterior([outer.comparison.prompt] * 4, pool).mean
        assert bool((means[:-1] >= means[1:]).all())


def test_steps_that_share_a_sampling(tmp_path: Path, tiny_policy: Path) -> None:
    """Two steps per epoch, with as many items each."""
    _, _, items = fit(tmp_path, tiny_policy, Ridge(), steps_per_round=4, steps_per_sampling=2)
    assert items.steps == [1, 2, 2, 2, 2]
    assert len(items.epochs[1]) == 2 * (5 + 4)


def test_no_steps_trains_on_real_pairs(tmp_path: Path, tiny_policy: Path) -> None:
    """The model is fitted for samplers, and every round is one epoch on its own pairs."""
    model = Ridge()
    _, _, items = fit(tmp_path, tiny_policy, model, steps_per_round=0)
    assert items.rounds == [0, 1, 2]
    assert not any(silver(preferences) for preferences in items.epochs)
    assert model.fits == [8, 12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_sampling": 0}, "data.silver.steps_per_sampling must be at least 1"),
        ({"steps_per_round": 5, "steps_per_sampling": 2}, "must be a multiple"),
        ({"kappa": 0.0}, "data.silver.kappa > 0"),
        ({"pool": 3, "pairs_per_prompt": 2}, "need a pool of twice as many"),
        ({"start_samples": 1}, "data.silver.start_samples must be at least 2"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SilverOptions(Ridge(), **settings)


def test_kappa_of_a_model_that_trains_on_is_not_calibrated() -> None:
    with pytest.raises(ValueError, match="one that forgets earlier fits"):
        SilverOptions(Continued(), kappa_labels=8)


def test_rounds_that_contradict_silver_labels() -> None:
    with pytest.raises(ValueError, match=r"leave data.rounds.epochs_per_round=1 and data.rounds.replay=last"):
        PreferenceDataModule(
            prompts=BuiltinPrompts("train", limit=10),
            sampler=VanillaSampler(),
            labeler=RewardLabeler(Bytes()),
            rounds=PreferenceRoundOptions(replay="all"),
            silver=SilverOptions(Ridge()),
        )

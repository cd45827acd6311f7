"""Silver pairs: fresh pairs of the policy with soft labels by a preference model, and real pairs beside them.

The loop is that of D2PO (arXiv 2405.01511): a preference model learns from all real labels so far, and labels many
on-policy pairs for the preference loss. Silver labels are no labels: they are neither counted nor paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch

from lightning_rlhf.batching.steps import epoch_order
from lightning_rlhf.collectors.reference_logps import with_reference_logps
from lightning_rlhf.estimators.temperature import gap_factor
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Request
from lightning_rlhf.ledger.schema import silver_meta
from lightning_rlhf.ledger.silver import UNLABELED, SilverPair, SilverTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, win_probability
from lightning_rlhf.protocols import SilverModule
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.runtime import distributed, preemption
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers.draws import pool_requests, repeated
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response, State, pair_rows


T = TypeVar("T")


@dataclass(frozen=True)
class SilverOptions:
    """Silver labels: how a preference model labels further pairs of the policy.

    After every round of real labels the model is fitted to all of them. Then come ``steps_per_round`` optimizer steps,
    each on ``pairs_per_step`` fresh pairs of the policy with silver labels, and as many real pairs as a batch holds,
    sampled from all rounds. The loss of a step is (mean over silver pairs) + ``real_weight`` (mean over real pairs).

    Args:
        model: the preference model.
        pairs_per_step: silver pairs per optimizer step, >= 1.
        steps_per_round: optimizer steps between two rounds, >= 0; 0 trains on real pairs alone, and the model serves
            samplers.
        steps_per_sampling: optimizer steps whose pairs are sampled together, >= 1, a divisor of ``steps_per_round``;
            1 keeps every pair on-policy.
        real_weight: weight of the loss of real pairs, >= 0.
        kappa: scale of posterior reward gaps, > 0; above 1 it undoes the shrinkage of the posterior mean.
        kappa_labels: latest labels by which ``kappa`` is calibrated, >= 1; default: none, kappa is fixed. At every fit
            the model predicts each of them without its label (`AbstractPreferenceModel.held_out_gaps`); ``kappa`` is
            multiplied by the factor at which it predicts them best. A policy whose responses become equally good has
            smaller gaps than a model expects that learnt from earlier ones. Only labels of pairs of two samples
            of the policy count, which silver pairs are; where there are fewer of these, all labels.
        damping: use the posterior variance: the less certain a gap is, the nearer its label is to 1/2.
        refit_every: new labels after which the model is fitted again, >= 1.
        min_labels: labels before the first fit, >= 1; until then the run trains on real pairs, one epoch per round.
        pool: responses per prompt, >= 2; of a larger pool, the pairs (highest, lowest), then (second highest, second
            lowest) by posterior mean are taken.
        pairs_per_prompt: pairs of a pool, >= 1, at most ``pool / 2``.
        start_samples: responses of the reference that are sampled at the start, without labels, for the statistics of
            features, >= 2.
    """

    model: AbstractPreferenceModel
    pairs_per_step: int = 32
    steps_per_round: int = 16
    steps_per_sampling: int = 1
    real_weight: float = 0.3
    kappa: float = 2.0
    kappa_labels: int | None = None
    damping: bool = True
    refit_every: int = 32
    min_labels: int = 64
    pool: int = 2
    pairs_per_prompt: int = 1
    start_samples: int = 512

    def __post_init__(self) -> None:
        for name in ("pairs_per_step", "steps_per_sampling", "refit_every", "min_labels", "pairs_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.silver.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("pool", "start_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"data.silver.{name} must be at least 2; got {getattr(self, name)}")
        if self.kappa_labels is not None and not (self.kappa_labels >= 1 and self.model.REFITS):
            raise ValueError(
                f"data.silver.kappa_labels must be at least 1, and the model one that forgets earlier fits, such as "
                f"KernelPreferenceModel; got {self.kappa_labels} and {type(self.model).__name__}"
            )
        if not self.real_weight >= 0 or not self.kappa > 0:
            raise ValueError(
                f"data.silver.real_weight must be >= 0 and data.silver.kappa > 0; got {self.real_weight}, {self.kappa}"
            )
        if self.steps_per_round < 0 or self.steps_per_round % self.steps_per_sampling:
            raise ValueError(
                f"data.silver.steps_per_round must be a multiple of data.silver.steps_per_sampling; got "
                f"{self.steps_per_round} and {self.steps_per_sampling}"
            )
        if 2 * self.pairs_per_prompt > self.pool or self.pairs_per_step % self.pairs_per_prompt:
            raise ValueError(
                f"data.silver.pairs_per_prompt={self.pairs_per_prompt} pairs need a pool of twice as many responses, "
                f"and must divide data.silver.pairs_per_step; got pool={self.pool}, "
                f"pairs_per_step={self.pairs_per_step}"
            )

    @property
    def epochs_per_round(self) -> int:
        """Epochs of a round with silver labels: one per sampling."""
        return max(self.steps_per_round // self.steps_per_sampling, 1)


@dataclass(frozen=True)
class Forecast:
    """How well a preference model predicted the labels of a round before it was fitted to them.

    Args:
        round: the round.
        fitted: real labels that the model was fitted to.
        nll: mean negative log-likelihood of the labels, nats; ln 2 = 0.693 for a model that knows nothing.
        accuracy: share of the labels on the side of the posterior mean; soft labels count by their larger side.
        labels: labels of the round, free ties left out.
        kappa: scale of the reward gaps of silver labels when the round was bought; None in rows of earlier versions.
    """

    round: int
    fitted: int
    nll: float
    accuracy: float
    labels: int
    kappa: float | None = None


class SilverCollector:
    """Fits the preference model, and makes the training items of silver epochs; through the ledger.

    Everything follows from the key, the weights of the policy, and the real labels: a run that is continued trains on
    the same pairs, and two processes train on the pairs of one.

    Args:
        options: the settings.
        key: key of the run.
    """

    def __init__(self, options: SilverOptions, key: Key) -> None:
        check_plugin("data.silver.model", options.model, AbstractPreferenceModel)
        self.options, self.key = options, key.fold(Stream.SILVER)
        self.labels_fitted = 0
        """Real labels that the model was fitted to; 0 before the first fit."""
        self.kappa = options.kappa
        """Scale of reward gaps of the newest fit."""
        self.forecast: Forecast | None = None
        """Prediction of the newest round; None before the first one that a fitted model saw."""

    @property
    def model(self) -> AbstractPreferenceModel | None:
        """The model; None until it was fitted."""
        return self.options.model if self.labels_fitted else None

    def start(
        self,
        module: SilverModule,
        prompts: Sequence[Prompt],
        engine: PolicyEngine,
        store: PreferenceStore | None,
        state: State,
    ) -> None:
        """Set the model up; unlabeled samples of the reference are sampled once per run and kept in the ledger.

        Args:
            module: gives checkpoint, loading options and device.
            prompts: the training prompts.
            engine: samples from the reference.
            store: the ledger; None on ranks other than zero.
            state: the result of `state_dict` in a run that is continued; else empty.
        """
        samples = distributed.from_rank_zero(lambda: _table(store).pairs(UNLABELED))
        if not samples:
            count = -(-self.options.start_samples // 2)
            chosen = [prompts[i % len(prompts)] for i in range(count)]
            # pair i: two samples of the reference, softmax(h_ref) by mix = -1
            key = self.key.fold(0)
            requests = [Request(chosen[i // 2], key.fold(i), mix=-1.0) for i in range(2 * count)]
            mine = requests[distributed.rank() :: distributed.world_size()]
            responses = distributed.interleave(lambda: _generate(engine, mine))
            samples = [(Comparison(chosen[i], responses[2 * i], responses[2 * i + 1]), None) for i in range(count)]
            distributed.from_rank_zero(lambda: _table(store).add(UNLABELED, samples))
        unlabeled = list(zip(*pair_rows([pair for pair, _ in samples]), strict=True))
        self.options.model.setup(
            ModelStart(module.checkpoint, module.options, module.device, unlabeled, self.key.fold(1))
        )
        if state:
            self.options.model.load_state_dict(state["model"])
            self.labels_fitted = state["labels_fitted"]

    def update(self, rounds: Mapping[int, Sequence[Preference]], due: int) -> None:
        """Fit the model to the real labels of the rounds up to ``due``, wherever enough new ones have come.

        Args:
            rounds: the real pairs by round, from round 0 on.
            due: the newest round.
        """
        options = self.options
        last: list[Preference] | None = None
        seen: list[Preference] = []
        for index in range(due + 1):
            new = [preference for preference in rounds[index] if not preference.label.is_free_tie]
            # once per round, and never labels that the model was fitted to
            is_new = index == due and (self.forecast is None or self.forecast.round < due)
            if new and is_new and last is None and 0 < self.labels_fitted <= len(seen):
                self.forecast = self._predict(new, due)
            seen += new
            needed = self.labels_fitted + options.refit_every if self.labels_fitted else options.min_labels
            if len(seen) >= needed:
                last = list(seen)
                self.labels_fitted = len(seen)
                # a model that trains on must see every fit; for the others only the newest one counts
                if not options.model.REFITS:
                    options.model.fit(last)
        if last is not None and options.model.REFITS:
            # half of the labels at most, so that there is a model
            latest = min(options.kappa_labels or 0, len(last) // 2)
            if latest:
                self.kappa = options.kappa * self._calibration(last, latest)
            else:
                options.model.fit(last)

    def _calibration(self, preferences: Sequence[Preference], latest: int) -> float:
        """Fit the model; the factor of reward gaps at which it predicts the latest labels without knowing them.

        Along the policies pi_t ~ pi_ref exp(t f / beta) with the model's reward f, dJ/dt is proportional to
        Cov(r, f) - t Var(f): J is highest where t is the slope of the true gaps over the predicted ones on the
        policy's own pairs. With ``SilverOptions.kappa`` 1 and no damping, silver labels aim at this t.
        """
        own = [i for i, preference in enumerate(preferences) if _is_of_policy(preference.comparison)]
        chosen = (own if len(own) >= latest else range(len(preferences)))[-latest:]
        gap = self.options.model.held_out_gaps(preferences, chosen)
        label = torch.tensor([preferences[i].probability for i in chosen], dtype=torch.float64)
        return gap_factor(gap, label)

    def _predict(self, preferences: Sequence[Preference], index: int) -> Forecast:
        """Predict the labels of a round that the model has not seen (prequential validation)."""
        mean, variance = self.options.model.pair_gaps([preference.comparison for preference in preferences])
        predicted = win_probability(mean, variance)
        label = torch.tensor([preference.probability for preference in preferences], dtype=torch.float64)
        # -(p log q + (1 - p) log(1 - q))
        nll = torch.nn.functional.binary_cross_entropy(predicted, label).item()
        # a mean of 0 is a guess
        right = torch.where(mean == 0, 0.5, ((mean > 0) == (label > 0.5)).double()).mean().item()
        return Forecast(index, self.labels_fitted, nll, right, len(preferences), self.kappa)

    def items(
        self,
        epoch: int,
        real: Sequence[Preference],
        prompts: Sequence[Prompt],
        engine: PolicyEngine,
        store: PreferenceStore | None,
        real_pairs_per_step: int,
    ) -> list[Preference]:
        """Make the items of a silver epoch, weighted for the loss of `SilverOptions`.

        Args:
            epoch: the epoch.
            real: all real pairs so far.
            prompts: the training prompts.
            engine: samples from the policy.
            store: the ledger; None on ranks other than zero.
            real_pairs_per_step: real pairs beside the silver pairs of an optimizer step.
        """
        options = self.options
        pairs = distributed.from_rank_zero(lambda: _table(store).pairs(epoch))
        if not pairs:
            unlabeled = self._sample(epoch, prompts, engine)
            # on rank zero: the batches of a posterior round differently on every rank
            pairs = distributed.from_rank_zero(partial(self._label, unlabeled, epoch, store))
        silver = [Preference(comparison, label) for comparison, label in pairs if label is not None]
        count = options.steps_per_sampling * real_pairs_per_step if options.real_weight > 0 else 0
        replayed = _shuffled(real, count, self.key.fold(3, epoch))
        total = len(silver) + len(replayed)
        # the loss of a step is a mean over n = n_s + n_r items: weights n / n_s and w n / n_r make it
        # mean(silver) + w mean(real)
        mixed = [_weighted(preference, total / len(silver)) for preference in silver]
        return mixed + [_weighted(p, options.real_weight * total / len(replayed)) for p in replayed]

    def state_dict(self) -> State:
        """State for the checkpoint: the state of the model, if it trains on from fit to fit."""
        if not self.labels_fitted or self.options.model.REFITS:
            return {}
        return {"labels_fitted": self.labels_fitted, "model": self.options.model.state_dict()}

    def _sample(self, epoch: int, prompts: Sequence[Prompt], engine: PolicyEngine) -> list[Comparison]:
        """Fresh pairs of the policy on random prompts, without labels."""
        options = self.options
        key = self.key.fold(2, epoch)
        count = options.steps_per_sampling * options.pairs_per_step // options.pairs_per_prompt
        chosen = _shuffled(prompts, count, key)
        places = range(distributed.rank(), count, distributed.world_size())

        def sample() -> list[list[Comparison]]:
            preemption.check()
            requests: list[Request] = []
            for place in places:
                # folded by place: a prompt may come twice
                requests += pool_requests([chosen[place]], options.pool, key.fold(place))
            # of pools, the model chooses pairs before their reference log-probabilities are computed
            responses = _generate(engine, requests, options.pool > 2 and options.model.needs_reference_logps)
            return self._pools([chosen[place] for place in places], responses, engine)

        pools = distributed.interleave(sample)
        return list(chain.from_iterable(pools))

    def _pools(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], engine: PolicyEngine
    ) -> list[list[Comparison]]:
        """Pairs of each pool with reference log-probabilities, [prompts][pairs_per_prompt]."""
        size, wanted = self.options.pool, self.options.pairs_per_prompt
        if size == 2:
            chosen = [[(0, 1)] for _ in prompts]
        else:
            mean = self.options.model.posterior(repeated(prompts, size), responses).mean.reshape(-1, size)
            # (highest, lowest), (second highest, second lowest), ...; a stable sort, so that ties stay in order
            order = mean.argsort(dim=1, descending=True, stable=True).tolist()
            chosen = [list(zip(places[:wanted], reversed(places), strict=False)) for places in order]
        pools = []
        for number, (prompt, places) in enumerate(zip(prompts, chosen, strict=True)):
            pool = responses[number * size : (number + 1) * size]
            pools.append([Comparison(prompt, pool[a], pool[b], "silver", passes=float(size)) for a, b in places])
        flat = with_reference_logps(list(chain.from_iterable(pools)), engine)
        return [flat[i : i + wanted] for i in range(0, len(flat), wanted)]

    def _label(self, pairs: Sequence[Comparison], epoch: int, store: PreferenceStore | None) -> list[SilverPair]:
        """Label pairs by the posterior and write them into the ledger; on rank zero."""
        mean, variance = self.options.model.pair_gaps(pairs)
        damping = variance if self.options.damping else torch.zeros_like(variance)
        probabilities = win_probability(mean, damping, self.kappa).tolist()
        labeled: list[SilverPair] = []
        for pair, p, m, v in zip(pairs, probabilities, mean.tolist(), variance.tolist(), strict=True):
            equal = pair.has_equal_responses
            labeled.append((pair, Label(0.5 if equal else p, cost=0.0, meta=silver_meta(m, v, self.labels_fitted))))
        _table(store).add(epoch, labeled)
        return labeled


def _shuffled(items: Sequence[T], count: int, key: Key) -> list[T]:
    """``count`` items in random order: without replacement, then all over again where there are fewer."""
    order = epoch_order(len(items), key)
    return [items[order[i % len(order)]] for i in range(count)]


def _generate(engine: PolicyEngine, requests: Sequence[Request], reference_logps: bool = False) -> list[Response]:
    # the last chunk may have fewer prompts than there are ranks
    return engine.generate(requests, reference_logps=reference_logps) if requests else []


def _is_of_policy(pair: Comparison) -> bool:
    """Whether both responses are samples of the policy itself."""
    return pair.a.source == pair.b.source == "policy"


def _table(store: PreferenceStore | None) -> SilverTable:
    assert store is not None  # asked on rank zero
    return SilverTable(store)


def _weighted(preference: Preference, factor: float) -> Preference:
    comparison = preference.comparison
    return replace(preference, comparison=replace(comparison, weight=comparison.weight * factor))

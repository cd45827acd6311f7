"""A Gaussian process over rewards, with a kernel on features of a frozen language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_rlhf.estimators.preference_gp import Laplace, choose_variances, laplace, leave_one_out, predict
from lightning_rlhf.models.tokenizers import load_tokenizer
from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, Posterior
from lightning_rlhf.preference_models.trunk import FrozenTrunk, content
from lightning_rlhf.preference_models.whitening import Whitening, fit_whitening
from lightning_rlhf.types import Preference, Prompt, Response, pair_rows


SQUARED_NORM, PROMPT_SQUARED_NORM = 2.0, 4.0
"""Mean squared norms, after whitening, of sums over response tokens and of prompts.

The default scales assume them. They were chosen by accuracy on fresh pairs in the world "menu", seeds 30-32, two
oracles. With a quarter of the norm of prompts, or half or twice that of sums, it was lower by up to 0.016.
"""

EVIDENCE_PAIRS = 512
"""Pairs by whose evidence scales are chosen, at most: each step of the search is a fit."""

EVIDENCE_GROUPS = ((0, 1), (2,), (3, 4), (5,), (6,))
"""Kernels that share a multiplier: linear in tokens, second order, hidden states, length, surface."""


@dataclass(frozen=True)
class KernelScales:
    """Prior standard deviations of the parts of a reward, nats per unit of their features; 0 leaves a part out.

    The features have the same size at any width of the model and any length of responses: over the samples that whiten
    them, sums over tokens have a mean squared norm of 2 and prompts one of 4; length and surface features have a
    standard deviation of 1.

    Args:
        linear: weights of response tokens, e . e'.
        prompt: weights of prompt and response tokens together, (x . x')(e . e').
        pair: weights of pairs of response tokens, (e . e')^2 / 4.
        hidden: weights of the last hidden state, h . h'.
        middle: weights of the hidden state of the middle layer, m . m'.
        length: weight of the number of response tokens.
        surface: weights of surface features, if the model has any.
    """

    linear: float = 0.5
    prompt: float = 0.7
    pair: float = 1.0
    hidden: float = 0.5
    middle: float = 0.0
    length: float = 0.12
    surface: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # also refuses NaN
            if not 0 <= value < math.inf:
                raise ValueError(f"scales.{field.name} must be finite and >= 0; got {value}")
        if not any(getattr(self, field.name) for field in fields(self)):
            raise ValueError("scales are all 0, so that every reward would be 0: set at least one above 0")

    def variances(self) -> Tensor:
        """Squares of the scales, in their order; float64, [kernels]."""
        return torch.tensor([getattr(self, field.name) for field in fields(self)], dtype=torch.float64).square()


DEFAULT_SCALES = KernelScales()


@dataclass(frozen=True)
class Features:
    """Whitened features of responses; float64.

    Args:
        prompt: x; [responses, width].
        tokens: e; [responses, width].
        hidden: h; [responses, width].
        middle: m; [responses, width].
        length: standardized number of tokens; [responses, 1].
        surface: standardized surface features; [responses, 2], or [responses, 0] without them.
    """

    prompt: Tensor
    tokens: Tensor
    hidden: Tensor
    middle: Tensor
    length: Tensor
    surface: Tensor

    def __getitem__(self, index: slice | Tensor) -> Features:
        """Features of some responses."""
        return Features(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Contrasts:
    """Rewards of responses, or gaps between two responses to the same prompt.

    Args:
        first: features of the responses, or of the first of each pair.
        second: features of the second response of each pair; None for rewards of single responses.
    """

    first: Features
    second: Features | None = None

    def __getitem__(self, index: Tensor) -> Contrasts:
        """Some of the contrasts."""
        return Contrasts(self.first[index], None if self.second is None else self.second[index])

    def linear(self, name: str) -> Tensor:
        """A feature, or its difference within the pair."""
        own: Tensor = getattr(self.first, name)
        return own if self.second is None else own - getattr(self.second, name)


def kernel_grams(left: Contrasts, right: Contrasts, wanted: Sequence[bool]) -> Iterator[tuple[int, Tensor]]:
    """Prior covariances of contrasts under each kernel at scale 1, [left, right], with the number of the kernel.

    One at a time: with thousands of pairs each takes hundreds of megabytes.

    Args:
        left: contrasts of the rows.
        right: contrasts of the columns.
        wanted: whether a kernel is computed, in the order of `KernelScales`.
    """
    if wanted[0] or wanted[1]:
        # linear kernels are linear in the differences as well, one product instead of four
        tokens = left.linear("tokens") @ right.linear("tokens").T
        if wanted[0]:
            yield 0, tokens
        if wanted[1]:
            # both responses of a pair have the same x
            yield 1, (left.first.prompt @ right.first.prompt.T) * tokens
    if wanted[2]:
        yield 2, _second_order(left, right)
    for kernel, name in enumerate(("hidden", "middle", "length", "surface"), start=3):
        if wanted[kernel]:
            yield kernel, left.linear(name) @ right.linear(name).T


def _second_order(left: Contrasts, right: Contrasts) -> Tensor:
    """(e . e')^2 / 4: the product of all pairs of tokens, without computing them."""
    gram = torch.zeros(len(left.first.length), len(right.first.length), dtype=torch.float64)
    for sign, first in ((0.25, left.first), (-0.25, left.second)):
        for other_sign, second in ((1.0, right.first), (-1.0, right.second)):
            if first is not None and second is not None:
                gram.add_((first.tokens @ second.tokens.T).square_(), alpha=sign * other_sign)
    return gram


def prior_covariance(left: Contrasts, right: Contrasts, variances: Tensor) -> Tensor:
    """Prior covariance of contrasts, [left, right].

    Args:
        left: contrasts of the rows.
        right: contrasts of the columns.
        variances: variance of each kernel; 0 leaves it out; [kernels].
    """
    total = torch.zeros(len(left.first.length), len(right.first.length), dtype=torch.float64)
    for kernel, gram in kernel_grams(left, right, (variances > 0).tolist()):
        total.add_(gram, alpha=float(variances[kernel]))
    return total


@dataclass(frozen=True)
class _Statistics:
    """Statistics of unlabeled samples.

    Args:
        prompt: whitening of x.
        tokens: whitening of e.
        hidden: whitening of h.
        middle: whitening of m.
        length: mean and std of the number of tokens; [2, 1].
        surface: means and stds of the surface features; [2, features].
    """

    prompt: Whitening
    tokens: Whitening
    hidden: Whitening
    middle: Whitening
    length: Tensor
    surface: Tensor


class KernelPreferenceModel(AbstractPreferenceModel):
    """A Gaussian process over rewards with a Bradley-Terry likelihood, on features of a frozen language model.

    The prior covariance of two rewards is a sum of kernels::

        k = linear^2 e.e' + prompt^2 (x.x')(e.e') + pair^2 (e.e')^2 / 4
            + hidden^2 h.h' + middle^2 m.m' + length^2 l l'

    with e, m and h the sums over response tokens of input embeddings, middle and last hidden states, x the mean
    embedding of the prompt, and l the number of response tokens, EOS left out. The features are whitened by samples of
    the reference without labels. The posterior is Laplace's approximation (Rasmussen and Williams, GPML, section 3.4);
    a fit takes O(pairs^3) operations and O(pairs^2) memory.

    Args:
        scales: prior standard deviations of the parts.
        whitening: how far features are whitened, in [0, 1]: 1 gives all directions the same variance, 0 keeps their
            variances as they are. The directions of a pretrained model that vary much say most about its texts: there
            0.25 orders pairs better.
        surface: also use the number of repeated tokens and log pi_ref of the response, as a linear kernel. Report
            results with and without it: they may be terms of a simulated oracle.
        evidence_labels: labels from which on multipliers of the scales are chosen by the log evidence, >= 1; default:
            never. With fewer than 500 labels or so the choice is unstable.
        trunk: checkpoint of the features, as for ``model.policy``. It may be another causal LM than the policy, with
            another tokenizer, and may be larger. Default: the policy before training.
        most_labels: labels that the posterior uses, >= 1: the latest.
    """

    def __init__(
        self,
        *,
        scales: KernelScales = DEFAULT_SCALES,
        whitening: float = 1.0,
        surface: bool = False,
        evidence_labels: int | None = None,
        trunk: str | None = None,
        most_labels: int = 4096,
    ) -> None:
        if not 0 <= whitening <= 1:
            raise ValueError(f"whitening must be in [0, 1]; got {whitening}")
        if evidence_labels is not None and evidence_labels < 1:
            raise ValueError(f"evidence_labels must be at least 1, or null; got {evidence_labels}")
        if most_labels < 1:
            raise ValueError(f"most_labels must be at least 1; got {most_labels}")
        self.scales = scales
        self.whitening = whitening
        # log pi_ref is a surface feature
        self.surface = self.needs_reference_logps = surface
        self.evidence_labels = evidence_labels
        self.trunk = trunk
        self.most_labels = most_labels
        self._trunk: FrozenTrunk | None = None
        self._statistics: _Statistics | None = None
        self._variances = self._start_variances()
        self._pairs: Contrasts | None = None
        self._laplace: Laplace | None = None

    @property
    def variances(self) -> Tensor:
        """Variances of the kernels in the last fit, in the order of `KernelScales`; [kernels]."""
        return self._variances

    def setup(self, start: ModelStart) -> None:
        """Load the frozen trunk, and whiten by the samples.

        Raises:
            FileNotFoundError: if there is no checkpoint ``trunk``.
            ValueError: if there are fewer than two samples, or surface features lack log-probabilities.
        """
        if len(start.samples) < 2:
            raise ValueError(
                f"KernelPreferenceModel needs at least 2 samples of the reference to whiten features; got "
                f"{len(start.samples)}"
            )
        prompts, responses = zip(*start.samples, strict=True)
        if self.trunk is None:
            self._trunk = FrozenTrunk(start.checkpoint, start.options, start.device)
        else:
            tokenizer = load_tokenizer(self.trunk, trust_remote_code=start.options.trust_remote_code, ends_texts=False)
            self._trunk = FrozenTrunk(self.trunk, start.options, start.device, tokenizer=tokenizer)
        found = self._trunk.features(prompts, responses)
        ones = torch.ones_like(found.lengths)
        self._statistics = _Statistics(
            prompt=fit_whitening(found.prompt, ones, PROMPT_SQUARED_NORM, self.whitening),
            tokens=fit_whitening(found.tokens, found.lengths, SQUARED_NORM, self.whitening),
            hidden=fit_whitening(found.hidden, found.lengths, SQUARED_NORM, self.whitening),
            middle=fit_whitening(found.middle, found.lengths, SQUARED_NORM, self.whitening),
            length=_moments(found.lengths.double()[:, None]),
            surface=_moments(self._surface(responses)),
        )

    def fit(self, preferences: Sequence[Preference]) -> None:
        """Fit the posterior to the latest preferences, from the prior; see `AbstractPreferenceModel.fit`."""
        used = [preference for preference in preferences if not preference.label.is_free_tie][-self.most_labels :]
        self._pairs = self._contrasts(used)
        probabilities = torch.tensor([preference.probability for preference in used], dtype=torch.float64)
        self._variances = self._start_variances()
        if self.evidence_labels is not None and len(used) >= self.evidence_labels:
            # evenly over the run, since later pairs are of another policy
            count = min(len(used), EVIDENCE_PAIRS)
            chosen = torch.arange(count) * len(used) // count
            self._variances = self._by_evidence(self._pairs[chosen], probabilities[chosen])
        self._laplace = laplace(prior_covariance(self._pairs, self._pairs, self._variances), probabilities)

    def held_out_gaps(self, preferences: Sequence[Preference], chosen: Sequence[int]) -> Tensor:
        """Gaps in the posterior of all labels but the own one; see `AbstractPreferenceModel.held_out_gaps`."""
        self.fit(preferences)
        assert self._laplace is not None  # by `fit`
        gaps = leave_one_out(self._laplace)
        # the fit has the newest `most_labels` alone, and knows no label of an older pair
        oldest = len(preferences) - len(gaps)
        within = gaps[[i - oldest for i in chosen if i >= oldest]]
        older = [preferences[i].comparison for i in chosen if i < oldest]
        return torch.cat([self.pair_gaps(older)[0], within]) if older else within

    def posterior(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Posterior:
        """Posterior of the rewards of responses; see `AbstractPreferenceModel.posterior`."""
        if self._laplace is None or self._pairs is None:
            raise RuntimeError("KernelPreferenceModel was not fitted: call fit(preferences) before posterior")
        pool = Contrasts(self._features(prompts, responses))
        cross = prior_covariance(pool, self._pairs, self._variances)
        prior = prior_covariance(pool, pool, self._variances)
        return Posterior(*predict(self._laplace, cross, prior))

    def _start_variances(self) -> Tensor:
        variances = self.scales.variances()
        if not self.surface:
            # the surface kernel comes last
            variances[-1] = 0.0
        return variances

    def _by_evidence(self, pairs: Contrasts, probabilities: Tensor) -> Tensor:
        """Variances with multipliers for groups of kernels that are in use."""
        wanted = (self._variances > 0).tolist()
        grams = torch.zeros(len(wanted), len(probabilities), len(probabilities), dtype=torch.float64)
        for kernel, gram in kernel_grams(pairs, pairs, wanted):
            grams[kernel] = gram
        groups = [group for group in EVIDENCE_GROUPS if any(wanted[kernel] for kernel in group)]
        return choose_variances(grams, self._variances, probabilities, groups)

    def _contrasts(self, preferences: Sequence[Preference]) -> Contrasts:
        # in the order of the ledger, so that full chunks of the trunk stay the same from fit to fit
        features = self._features(*pair_rows([preference.comparison for preference in preferences]))
        return Contrasts(features[0::2], features[1::2])

    def _features(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Features:
        if self._trunk is None or self._statistics is None:
            raise RuntimeError("KernelPreferenceModel was not set up: call setup(start) before fit and posterior")
        found, statistics = self._trunk.features(prompts, responses), self._statistics
        return Features(
            prompt=statistics.prompt(found.prompt, torch.ones_like(found.lengths)),
            tokens=statistics.tokens(found.tokens, found.lengths),
            hidden=statistics.hidden(found.hidden, found.lengths),
            middle=statistics.middle(found.middle, found.lengths),
            length=(found.lengths.double()[:, None] - statistics.length[0]) / statistics.length[1],
            surface=(self._surface(responses) - statistics.surface[0]) / statistics.surface[1],
        )

    def _surface(self, responses: Sequence[Response]) -> Tensor:
        """Repeated tokens, and log pi_ref of the response in nats, not standardized; [responses, 2 or 0]."""
        if not self.surface:
            return torch.zeros(len(responses), 0, dtype=torch.float64)
        rows = []
        for response in responses:
            if response.reference_logps is None:
                raise ValueError(
                    "KernelPreferenceModel(surface=True) needs log-probabilities of the reference, which a response "
                    "lacks: sample it with reference_logps=True, or set surface=false"
                )
            ids = content(response)
            rows.append([float(len(ids) - len(set(ids))), sum(response.reference_logps)])
        return torch.tensor(rows, dtype=torch.float64).reshape(len(responses), 2)


def _moments(features: Tensor) -> Tensor:
    """Means and stds over the rows, [2, features]; std 1 where a feature does not vary."""
    mean = features.mean(0)
    std = (features - mean).square().mean(0).sqrt()
    return torch.stack([mean, torch.where(std > 0, std, 1.0)])

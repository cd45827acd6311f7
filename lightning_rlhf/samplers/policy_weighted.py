"""Policy-weighted sampling: of a pool of responses, keep the pair whose label lowers the expected loss in J most."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_rlhf.estimators.design import best_pair, greedy_pairs, pair_values, policy_weight
from lightning_rlhf.generation.base import AbstractEngine, GradientEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.renamed import renames_arguments
from lightning_rlhf.samplers.base import AbstractSelectiveSampler, SamplerState
from lightning_rlhf.samplers.draws import COIN, implicit_rewards, repeated
from lightning_rlhf.samplers.pilaf import checked_tilt
from lightning_rlhf.types import Comparison, Prompt


@renames_arguments(label_share="label_fraction")
class PolicyWeightedSampler(AbstractSelectiveSampler):
    """Samples a pool of n responses and keeps the pair whose label lowers the expected loss in J most.

    The pair maximizes the V-optimal design criterion ``sigma'(delta) g^T I^-1 Sigma I^-1 g``. delta is the
    implicit-reward gap of the pair and g its gradient. I is the Fisher information of the pairs labeled so far. Sigma
    is the covariance of reward gradients under the policy, ``-beta Hess J``. To first order, the criterion is the
    decrease of the expected loss ``tr(Sigma I^-1) / (2 beta)`` by one label: greedy V-optimal design, as in Han et al.
    2026 (arXiv 2606.19607). PILAF (arXiv 2502.04270) distributes the loss evenly over directions, but does not minimize
    it. The equations are in `lightning_rlhf.estimators.design`.

    Gradients are taken in the output head and projected at random to ``dim`` numbers (`HeadSketch`). They cost one more
    forward pass per response, which like all scoring is not counted in ``passes``. Memory: ``dim * (vocabulary + hidden
    size)`` float32 for the projection, four float64 matrices of ``dim * dim``, and ``2 * n * dim`` bytes per pair in
    the ledger. I and Sigma are updated after each round from the ledger and constant during a round, so that pairs do
    not depend on the batch. In the first round Sigma is the identity and I the prior.

    Args:
        n: responses per prompt, >= 2; each is decoded, and no more than two are labeled.
        dim: numbers per gradient, >= 1.
        tilt: sample half of the pool from pi+ and half from pi- of PILAF with this strength, > 0; Sigma is then the
            covariance of the tilted pool. Default: sample the whole pool from the policy.
        ridge: prior information, in policy pairs, > 0; use a large value for few labels and many parameters.
        ahead: fraction of the expected information of a round that is added to I in advance, in [0, 1]. Without it, all
            prompts of a long round select the same direction.
        decay: weight of earlier rounds in Sigma relative to the newest, in [0, 1]. I does not decay.
        label_fraction: fraction of the prompts of a round whose pair is labeled, in (0, 1]. They are chosen greedily by
            the criterion, each given the information of those before, so that they differ. ``passes`` are per sampled
            pair: a label costs ``1 / label_fraction`` times as many.

    Raises:
        ValueError: if an argument is out of range.
    """

    first_distribution, second_distribution = "pair of the pool", "with the most information on J"

    def __init__(
        self,
        n: int = 8,
        dim: int = 64,
        tilt: float | None = None,
        ridge: float = 100.0,
        ahead: float = 0.5,
        decay: float = 0.9,
        label_fraction: float = 1.0,
    ) -> None:
        if n < 2 or dim < 1:
            raise ValueError(f"a pool needs n >= 2 responses and dim >= 1 numbers per gradient; got {n} and {dim}")
        if not (0 < ridge < math.inf and 0 <= ahead <= 1 and 0 <= decay <= 1):
            raise ValueError(
                f"PolicyWeightedSampler expects ridge > 0, ahead in [0, 1] and decay in [0, 1]; "
                f"got {ridge}, {ahead} and {decay}"
            )
        if not 0 < label_fraction <= 1:
            raise ValueError(
                f"label_fraction is the fraction of pairs that are labeled, in (0, 1]; got {label_fraction}"
            )
        self.label_fraction = label_fraction
        self.n, self.dim, self.tilt = n, dim, checked_tilt(tilt)
        self.ridge, self.ahead, self.decay = ridge, ahead, decay
        self.passes_per_pair = float(n if tilt is None else 2 * n)
        self.method = f"Policy-weighted, N={n}" + ("" if tilt is None else ", tilted")
        self.information = torch.zeros(dim, dim, dtype=torch.float64)
        """I, the sum of ``sigma'(delta) g g^T`` over the labeled pairs; float64 [dim, dim]."""
        # Sigma = scatter / degrees of freedom, both summed over pools
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._degrees_of_freedom = 0.0
        self._round_size = 0
        # W = I^-1 Sigma I^-1 of the current round, computed at its first use
        self._weight: Tensor | None = None

    @property
    def sigma(self) -> Tensor:
        """Sigma, the covariance of gradients of policy samples, shrunk to a multiple of the identity; [dim, dim]."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        if self._degrees_of_freedom == 0:
            return eye
        sample = self._scatter / self._degrees_of_freedom
        # shrinkage c = dim / (dim + samples): with few samples, small eigenvalues of the sample covariance are noise
        shrinkage = self.dim / (self.dim + self._degrees_of_freedom)
        scale = sample.diagonal().mean().clamp_min(1e-12)
        # Sigma = (1 - c) S + c (tr S / dim) 1
        return (1 - shrinkage) * sample + shrinkage * scale * eye

    def regularized_information(self) -> Tensor:
        """I plus the prior and the expected information of the coming round; positive definite, [dim, dim].

        A policy pair has the information ``sigma'(delta) g g^T``, in expectation Sigma / 2 for small delta. The prior
        has the trace of `ridge` such pairs, but is isotropic. Directions in which the policy does not vary get little
        weight, since J does not depend on them.
        """
        sigma = self.sigma
        # I + ridge (tr Sigma / dim) 1 / 2 + ahead * round_size * Sigma / 2; E[g g^T] = 2 Sigma and sigma'(0) = 1/4
        return self.information + self._prior(sigma) + self.ahead * self._round_size * sigma / 2

    def _prior(self, sigma: Tensor) -> Tensor:
        return self.ridge * sigma.diagonal().mean() * torch.eye(self.dim, dtype=torch.float64) / 2

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample a pool per prompt and keep one pair; branch ``"policy_weighted"``.

        ``meta`` holds ``"delta"``, the criterion of the pair relative to the mean over its pool as ``"gain"``, and the
        gradients of the pool, the inputs of `observe`: base64 of float16, times ``"pool_scale"``.

        Raises:
            ValueError: if the engine has no access to the weights.
        """
        if not isinstance(engine, GradientEngine):
            raise ValueError(
                f"PolicyWeightedSampler differentiates the policy, which {type(engine).__name__} cannot; use "
                f"DecodeEngine, that is model.options.generation=local"
            )
        if not prompts:
            return []
        requests: list[Request] = []
        for prompt in prompts:
            requests.extend(self._request(prompt, key, i) for i in range(self.n))
        responses = engine.generate(requests, reference_logps=True)
        # grad r_theta = beta grad log pi_theta, in the sketched output head
        features = engine.beta * engine.head_gradients(repeated(prompts, self.n), responses, self.dim).double()
        rewards = implicit_rewards(responses, engine.beta)
        if self._weight is None:
            self._weight = policy_weight(self.regularized_information(), self.sigma)
        comparisons = []
        for i, prompt in enumerate(prompts):
            pool = slice(i * self.n, (i + 1) * self.n)
            # one pool at a time: batched products round by batch size, and pairs must not depend on the chunk
            centered = features[pool] - features[pool].mean(0)
            # values[a, b] = sigma'(delta) g^T W g with g = f_a - f_b
            values = pair_values(centered, rewards[pool], self._weight)
            first, second = map(int, best_pair(values))
            if values[first, second] <= 0:
                # no pair has any information: take the first two, which are a random pair of independent samples
                first, second = 0, 1
            blob, scale = packed(centered)
            mean = float(values.sum()) / (self.n * (self.n - 1))
            meta = {
                "delta": float(rewards[pool][first] - rewards[pool][second]),
                "gain": float(values[first, second]) / mean if mean > 0 else 1.0,
                "pool": blob,
                "pool_scale": scale,
                "pool_first": first,
                "pool_second": second,
            }
            a, b = responses[i * self.n + first], responses[i * self.n + second]
            comparisons.append(Comparison(prompt, a, b, "policy_weighted", passes=self.passes_per_pair, meta=meta))
        return comparisons

    def select_for_labeling(self, comparisons: Sequence[Comparison]) -> list[int]:
        """Select the pairs of a round that lower ``tr(Sigma I^-1)`` most, greedily; all if ``label_fraction`` is 1."""
        count = self.most_labels(len(comparisons))
        if count == len(comparisons):
            return list(range(count))
        # the gap of two equal responses is a rounding error
        equal = [i for i, comparison in enumerate(comparisons) if comparison.has_equal_responses]
        different = [i for i, comparison in enumerate(comparisons) if not comparison.has_equal_responses]
        if len(different) <= count:
            return [*different, *equal[: count - len(different)]]
        gaps, slopes = (
            torch.stack(parts) for parts in zip(*(self._gap(comparisons[i]) for i in different), strict=True)
        )
        sigma = self.sigma
        # without `ahead`: greedy_pairs adds the information of the chosen pairs itself
        return [different[i] for i in greedy_pairs(gaps, slopes, self.information + self._prior(sigma), sigma, count)]

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Add the labeled pairs to I, whether or not the labeler gave a preference, and all pools to Sigma."""
        # called before I changes, since the selection depends on it
        labeled = self.select_for_labeling(comparisons)
        self._scatter *= self.decay
        self._degrees_of_freedom *= self.decay
        # I += sigma'(delta) g g^T; sorted, so that the order of summation is always the same
        for position in sorted(labeled):
            gap, slope = self._gap(comparisons[position])
            self.information += slope * torch.outer(gap, gap)
        # Sigma = sum_pools F^T F / sum_pools (n - 1), with the centered features F of a pool
        for comparison in comparisons:
            pool = self._pool(comparison)
            self._scatter += pool.T @ pool
            self._degrees_of_freedom += len(pool) - 1
        self._round_size = len(labeled) or self._round_size
        self._weight = None

    def _pool(self, comparison: Comparison) -> Tensor:
        return unpacked(comparison.meta["pool"], comparison.meta["pool_scale"], self.dim)

    def _gap(self, comparison: Comparison) -> tuple[Tensor, Tensor]:
        """Gradient g of the implicit-reward gap of a pair, [dim], and sigma'(delta)."""
        pool, meta = self._pool(comparison), comparison.meta
        # sigma'(delta) = 1 / (2 cosh(delta / 2))^2; cosh overflows float64 beyond 710
        slope = 1 / (2 * math.cosh(min(abs(meta["delta"]), 700.0) / 2)) ** 2
        return pool[meta["pool_first"]] - pool[meta["pool_second"]], torch.tensor(slope, dtype=torch.float64)

    def state_dict(self) -> SamplerState:
        """I, Sigma, and the size of a round."""
        return {
            "information": self.information.clone(),
            "scatter": self._scatter.clone(),
            "freedom": self._degrees_of_freedom,
            "round_size": self._round_size,
        }

    def load_state_dict(self, state: SamplerState) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            ValueError: if the state was saved with another ``dim``.
        """
        if state["information"].shape != (self.dim, self.dim):
            raise ValueError(
                f"the checkpoint's PolicyWeightedSampler has dim={len(state['information'])}, this one "
                f"{self.dim}; continue with the dim of the run"
            )
        self.information, self._scatter = state["information"].clone(), state["scatter"].clone()
        self._degrees_of_freedom, self._round_size = float(state["freedom"]), int(state["round_size"])
        self._weight = None

    def _request(self, prompt: Prompt, key: Key, number: int) -> Request:
        """Request for one response of the pool; with a tilt, the first half from pi+ and the rest from pi-."""
        stream = key.fold(prompt.index, COIN + 1 + number)
        if self.tilt is None:
            return Request(prompt, stream)
        plus = number < self.n // 2
        return Request(prompt, stream, self.tilt if plus else -self.tilt, "plus" if plus else "minus")


def packed(features: Tensor) -> tuple[str, float]:
    """Encode a matrix as base64 of float16, with the scale to multiply it by."""
    # scaled to [-1, 1], since float16 overflows beyond 65504
    scale = float(features.abs().max()) or 1.0
    return base64.b64encode((features / scale).numpy().astype("<f2").tobytes()).decode(), scale


def unpacked(blob: str, scale: float, dim: int) -> Tensor:
    """Decode a matrix that `packed` encoded; float64 [rows, dim]."""
    values = np.frombuffer(base64.b64decode(blob), dtype="<f2").astype(np.float64)
    return torch.from_numpy(scale * values.reshape(-1, dim))

"""Policy-weighted choice: from a pool of draws, the one pair whose label lowers the expected loss in J most."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rlhf.estimators.design import best_pair, greedy_pairs, pair_values, policy_weight
from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, implicit_rewards
from lightning_rlhf.samplers.pilaf import checked_tilt
from lightning_rlhf.types import Comparison, Prompt


class PolicyWeightedSampler(AbstractPairSampler):
    """Draws a pool of n responses and labels the one pair that promises most for J.

    The pair maximises ``sigma'(delta) g' I^-1 Sigma I^-1 g``, where delta is its gap in implicit reward and g the
    gradient of delta; I is the Fisher information of the pairs labelled so far, and Sigma the covariance of gradients
    under the policy, which is minus beta times the Hessian of J. To first order this is the fall of the expected loss
    ``tr(Sigma I^-1) / (2 beta)`` by one label: greedy V-optimal design, as in Han et al. 2026 (arXiv 2606.19607).
    PILAF (arXiv 2502.04270) spreads the same loss evenly over directions, and does not minimise it.

    Gradients are those in the output head, projected at random to ``dim`` numbers (`HeadSketch`): one more forward pass
    per response, made in parallel and, like all scoring, not counted in ``passes``. Memory: ``dim * (vocabulary +
    hidden size)`` float32 for the projection and four float64 matrices ``dim * dim``; per pair ``2 * n * dim`` bytes in
    the ledger, from which I and Sigma are learnt when a round is over. During a round they stand still, so that pairs
    depend on no batch; until the first round is over, both count as unity.

    Args:
        n: responses per prompt, >= 2; each costs decoding, none a label.
        dim: numbers per gradient, >= 1.
        tilt: draw half of the pool from pi+ and half from pi- of PILAF with this strength, > 0; omit it to draw all of
            it from the policy. Sigma is then that of the tilted pool.
        ridge: prior information, in pairs of the policy, > 0; large where there is more to learn than labels can say.
        ahead: share of the information of a round that is counted before it is drawn, in [0, 1]: without it all prompts
            of a long round chase the same direction.
        decay: weight of earlier rounds in Sigma relative to the newest, in [0, 1]. I forgets nothing.
        label_share: share of the prompts of a round whose pair is labelled, in (0, 1]: those that promise most, chosen
            one after the other with the information of those before, so that they differ. ``passes`` are per pair
            drawn, of which a label then takes ``1 / label_share``.

    Raises:
        ValueError: if an argument is out of range.
    """

    first_law, second_law = "pair of the pool", "with the most information on J"

    def __init__(
        self,
        n: int = 8,
        dim: int = 64,
        tilt: float | None = None,
        ridge: float = 100.0,
        ahead: float = 0.5,
        decay: float = 0.9,
        label_share: float = 1.0,
    ) -> None:
        if n < 2 or dim < 1:
            raise ValueError(f"a pool needs n >= 2 responses and dim >= 1 numbers per gradient; got {n} and {dim}")
        if not (0 < ridge < math.inf and 0 <= ahead <= 1 and 0 <= decay <= 1):
            raise ValueError(
                f"PolicyWeightedSampler expects ridge > 0, ahead in [0, 1] and decay in [0, 1]; "
                f"got {ridge}, {ahead} and {decay}"
            )
        if not 0 < label_share <= 1:
            raise ValueError(f"label_share is the share of pairs that are labelled, in (0, 1]; got {label_share}")
        self.label_share = label_share
        self.n, self.dim, self.tilt = n, dim, checked_tilt(tilt)
        self.ridge, self.ahead, self.decay = ridge, ahead, decay
        self.passes_per_pair = float(n if tilt is None else 2 * n)
        self.method = f"Policy-weighted, N={n}" + ("" if tilt is None else ", tilted")
        self.information = torch.zeros(dim, dim, dtype=torch.float64)
        """Sum of ``sigma'(delta) g g'`` over the pairs that the labeler was shown."""
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._freedom = 0.0
        self._round_size = 0
        self._weight: Tensor | None = None

    @property
    def sigma(self) -> Tensor:
        """Sigma, the covariance of gradients of policy draws, shrunk to a multiple of unity while pools are few."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        if self._freedom == 0:
            return eye
        sample = self._scatter / self._freedom
        # the fewer draws per dimension, the less the small eigenvalues of the sample mean
        share = self.dim / (self.dim + self._freedom)
        scale = sample.diagonal().mean().clamp_min(1e-12)
        return (1 - share) * sample + share * scale * eye

    def regularised_information(self) -> Tensor:
        """I with the prior and the share of the coming round, positive definite.

        A pair of the policy has the information ``sigma'(delta) g g'``, that is Sigma / 2 where delta is small. The
        prior has as much in all directions together as `ridge` such pairs, but evenly spread: a direction that the
        policy never varies in is then left alone, since nothing of J depends on it.
        """
        sigma = self.sigma
        return self.information + self._prior(sigma) + self.ahead * self._round_size * sigma / 2

    def _prior(self, sigma: Tensor) -> Tensor:
        return self.ridge * sigma.diagonal().mean() * torch.eye(self.dim, dtype=torch.float64) / 2

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Draw a pool per prompt and keep one pair; branch ``"policy_weighted"``.

        ``meta`` holds ``"delta"``, the value of the pair over the mean of its pool as ``"gain"``, and the gradients of
        the pool, from which `observe` learns: base64 of float16, times ``"pool_scale"``.
        """
        if not prompts:
            return []
        requests = [self._request(prompt, key, i) for prompt in prompts for i in range(self.n)]
        drawn = engine.generate(requests, reference_logps=True)
        everyone = [prompt for prompt in prompts for _ in range(self.n)]
        features = engine.beta * engine.head_gradients(everyone, drawn, self.dim).double()
        rewards = implicit_rewards(drawn, engine.beta)
        if self._weight is None:
            self._weight = policy_weight(self.regularised_information(), self.sigma)
        comparisons = []
        for i, prompt in enumerate(prompts):
            pool = slice(i * self.n, (i + 1) * self.n)
            # one pool at a time: batched products round differently by size, and chunks must not matter
            centred = features[pool] - features[pool].mean(0)
            values = pair_values(centred, rewards[pool], self._weight)
            first, second = map(int, best_pair(values))
            if values[first, second] <= 0:
                # nothing to learn from any pair; a random one, which for draws in random order the first two are
                first, second = 0, 1
            blob, scale = packed(centred)
            mean = float(values.sum()) / (self.n * (self.n - 1))
            meta = {
                "delta": float(rewards[pool][first] - rewards[pool][second]),
                "gain": float(values[first, second]) / mean if mean > 0 else 1.0,
                "pool": blob,
                "pool_scale": scale,
                "pool_first": first,
                "pool_second": second,
            }
            a, b = drawn[i * self.n + first], drawn[i * self.n + second]
            comparisons.append(Comparison(prompt, a, b, "policy_weighted", passes=self.passes_per_pair, meta=meta))
        return comparisons

    def worth_labels(self, comparisons: Sequence[Comparison]) -> list[int]:
        """The pairs of a round that together promise most, greedily; all where ``label_share`` is 1."""
        count = self.most_labels(len(comparisons))
        if count == len(comparisons):
            return list(range(count))
        # equal responses teach nothing: what their gap has is rounding
        equal = [i for i, comparison in enumerate(comparisons) if comparison.has_equal_responses]
        different = [i for i, comparison in enumerate(comparisons) if not comparison.has_equal_responses]
        if len(different) <= count:
            return [*different, *equal[: count - len(different)]]
        gaps, slopes = (
            torch.stack(parts) for parts in zip(*(self._gap(comparisons[i]) for i in different), strict=True)
        )
        sigma = self.sigma
        return [different[i] for i in greedy_pairs(gaps, slopes, self.information + self._prior(sigma), sigma, count)]

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Add the pairs that were shown to the labeler to I, with a verdict or without, and all pools to Sigma."""
        labelled = self.worth_labels(comparisons)
        self._scatter *= self.decay
        self._freedom *= self.decay
        for position in sorted(labelled):
            gap, slope = self._gap(comparisons[position])
            self.information += slope * torch.outer(gap, gap)
        for comparison in comparisons:
            pool = self._pool(comparison)
            self._scatter += pool.T @ pool
            self._freedom += len(pool) - 1
        self._round_size = len(labelled) or self._round_size
        self._weight = None

    def _pool(self, comparison: Comparison) -> Tensor:
        return unpacked(comparison.meta["pool"], comparison.meta["pool_scale"], self.dim)

    def _gap(self, comparison: Comparison) -> tuple[Tensor, Tensor]:
        """Gradient of a pair's gap in implicit reward, [dim], and sigma' of the gap."""
        pool, meta = self._pool(comparison), comparison.meta
        slope = 1 / (2 * math.cosh(min(abs(meta["delta"]), 700.0) / 2)) ** 2
        return pool[meta["pool_first"]] - pool[meta["pool_second"]], torch.tensor(slope, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """I, Sigma, and the size of a round."""
        return {
            "information": self.information.clone(),
            "scatter": self._scatter.clone(),
            "freedom": self._freedom,
            "round_size": self._round_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if the gradients had another length.
        """
        if state["information"].shape != (self.dim, self.dim):
            raise ValueError(
                f"the checkpoint's PolicyWeightedSampler has dim={len(state['information'])}, this one "
                f"{self.dim}; continue with the dim of the run"
            )
        self.information, self._scatter = state["information"].clone(), state["scatter"].clone()
        self._freedom, self._round_size = float(state["freedom"]), int(state["round_size"])
        self._weight = None

    def _request(self, prompt: Prompt, key: Key, number: int) -> Request:
        own = key.fold(prompt.index, COIN + 1 + number)
        if self.tilt is None:
            return Request(prompt, own)
        plus = number < self.n // 2
        return Request(prompt, own, self.tilt if plus else -self.tilt, "plus" if plus else "minus")


def packed(features: Tensor) -> tuple[str, float]:
    """Write a matrix as base64 of float16, and the number to multiply it by."""
    scale = float(features.abs().max()) or 1.0
    return base64.b64encode((features / scale).numpy().astype("<f2").tobytes()).decode(), scale


def unpacked(blob: str, scale: float, dim: int) -> Tensor:
    """Read what `packed` wrote; float64 [rows, dim]."""
    values = np.frombuffer(base64.b64decode(blob), dtype="<f2").astype(np.float64)
    return torch.from_numpy(scale * values.reshape(-1, dim))

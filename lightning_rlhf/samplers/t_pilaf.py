"""T-PILAF: PILAF with the branch probability and the pair weight of Theorem 1, from running estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_rlhf.estimators import RunningZZ, pair_weight, tilt_probability
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler, SamplerState
from lightning_rlhf.samplers.draws import coin, implicit_reward_gap
from lightning_rlhf.samplers.pilaf import BASE_PASSES, TILT_PASSES, checked_tilt, pair_requests
from lightning_rlhf.types import Comparison, Prompt


class TPILAFSampler(AbstractPairSampler):
    """Samples pairs by T-PILAF, whose expected loss gradient is aligned with the gradient of J.

    T-PILAF of PILAF (arXiv 2502.04270), Theorem 1::

        zz(x) = Z+ Z- = E_{a, b ~ pi_theta}[cosh(r_theta(a) - r_theta(b))]
        p(x)  = zz / (1 + zz)               probability of y^a ~ pi+, y^b ~ pi-; else y^a, y^b ~ pi_theta
        w(x)  = (1 + zz) / (1 + mean zz)    loss weight of the pair

    zz is estimated per prompt by a running mean, shrunk to the mean over prompts. The estimate is updated after each
    round with the round's policy pairs, and is constant during a round. In the first round it is 1, and T-PILAF equals
    PILAF. Later a pair costs 2 + 2 p(x) forward passes, 3 or more.

    The theorem is about whole responses, while pi+ and pi- are mixed token by token, as in practical PILAF: exact for
    one token, an approximation for more. The theorem is local, too: it does not hold for a policy far from the oracle.

    Args:
        tilt: strength of the tilt, > 0. Default: the DPO beta of the policy, to which the theorem applies. Another tilt
            replaces beta in zz, too.
        prior_count: weight of the mean over prompts in the estimate of one prompt, in policy pairs, >= 0.
        decay: weight of earlier rounds relative to the newest round, in [0, 1].
        limit: cosh is clipped at exp(limit) in the estimate, >= 0; 3 keeps p(x) below 0.953.

    Raises:
        ValueError: if an argument is out of range.
    """

    method = "T-PILAF"
    first_distribution, second_distribution = "π_θ^+ / π_θ", "π_θ^− / π_θ"
    passes_per_pair = 3.0

    def __init__(
        self, tilt: float | None = None, prior_count: float = 4.0, decay: float = 0.9, limit: float = 3.0
    ) -> None:
        # also refuses NaN
        if not 0.0 <= prior_count < math.inf:
            raise ValueError(f"prior_count must be a finite number >= 0; got {prior_count}")
        self.tilt = checked_tilt(tilt)
        self.estimate = RunningZZ(strength=prior_count, decay=decay, limit=limit)

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one pair per prompt, all of them in one batch.

        ``meta`` holds ``"delta"``, ``"tilt_probability"`` and ``"tilt_over_beta"``, the inputs of `observe`.
        """
        tilt = engine.beta if self.tilt is None else self.tilt
        # p(x) = zz / (1 + zz)
        probabilities = [tilt_probability(self.estimate.zz(prompt.index)) for prompt in prompts]
        tilted = [coin(prompt, key) < p for prompt, p in zip(prompts, probabilities, strict=True)]
        responses = engine.generate(pair_requests(prompts, tilted, tilt, key), reference_logps=True)
        comparisons = []
        for i, (prompt, is_tilted) in enumerate(zip(prompts, tilted, strict=True)):
            a, b = responses[2 * i], responses[2 * i + 1]
            comparisons.append(
                Comparison(
                    prompt,
                    a,
                    b,
                    branch="tilt" if is_tilted else "base",
                    # w(x) = (1 + zz) / (1 + mean zz)
                    weight=pair_weight(self.estimate.zz(prompt.index), self.estimate.zz_bar),
                    passes=TILT_PASSES if is_tilted else BASE_PASSES,
                    meta={
                        "delta": implicit_reward_gap(a, b, engine.beta),
                        "tilt_probability": probabilities[i],
                        "tilt_over_beta": tilt / engine.beta,
                    },
                )
            )
        return comparisons

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Update zz with the policy pairs of the finished round."""
        # pairs of pi_theta only: zz = E[cosh(delta)] is an expectation under pi_theta
        base = [comparison for comparison in comparisons if comparison.branch == "base"]
        self.estimate.observe(
            [comparison.prompt.index for comparison in base],
            # with a tilt t, the implicit reward is t log(pi_theta / pi_ref)
            [comparison.meta["delta"] * comparison.meta["tilt_over_beta"] for comparison in base],
            # 1 / (1 - p(x)), since a prompt with a large zz is sampled from the base branch less often
            importance=[1.0 / (1.0 - comparison.meta["tilt_probability"]) for comparison in base],
        )

    def state_dict(self) -> SamplerState:
        """The running estimate."""
        return self.estimate.state_dict()

    def load_state_dict(self, state: SamplerState) -> None:
        """Restore the running estimate."""
        self.estimate.load_state_dict(state)

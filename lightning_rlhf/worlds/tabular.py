"""A softmax world small enough to enumerate: exact objective, gradients and Fisher information.

Many worlds are computed at once: the first dimension of every tensor is the world, one per seed of a comparison. The
policy is log-linear::

    pi_w(y|x) ∝ pi_ref(y|x) exp(w . phi(x, y) / beta)
    r_w(x, y)  = beta log(pi_w / pi_ref) = w . phi(x, y) - constant(x)      implicit reward
    delta      = w . dphi with dphi = phi(x, a) - phi(x, b)                 gap of a pair; its gradient is dphi

Notation as in `lightning_rlhf.estimators.pilaf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.estimators.kl import categorical_kl
from lightning_rlhf.randomness import Key
from lightning_rlhf.worlds.distributions import PairDistribution


class Objective(NamedTuple):
    """Mean reward, KL to the reference in nats, and J = reward - beta * KL, over prompts; each [worlds]."""

    reward: Tensor
    kl: Tensor
    j: Tensor


@dataclass(frozen=True)
class TabularWorld:
    """Prompts with a few responses each, an oracle, and a log-linear policy class.

    Args:
        features: phi(x, y); shape [worlds, prompts, responses, dimensions], float64.
        log_reference: log pi_ref; shape [worlds, prompts, responses].
        reward: r*(x, y), likewise.
        beta: price of a nat of KL, and the DPO beta, > 0.
    """

    features: Tensor
    log_reference: Tensor
    reward: Tensor
    beta: float

    @classmethod
    def draw(
        cls,
        seeds: list[int],
        *,
        num_prompts: int = 8,
        num_responses: int = 16,
        dim: int = 8,
        beta: float = 0.1,
        spread: float = 1.0,
        misfit: float = 0.0,
    ) -> TabularWorld:
        """Sample one world per seed: Gaussian features, a reference of moderate entropy, an oracle in the policy class.

        Args:
            seeds: seed of each world.
            num_prompts: prompts per world, >= 1.
            num_responses: responses per prompt, >= 2.
            dim: dimensions of the policy class, >= 1.
            beta: price of a nat of KL, > 0.
            spread: std of r* over the responses of the reference, > 0.
            misfit: std, relative to ``spread``, of a part of r* that the policy class cannot express.

        Raises:
            ValueError: if a size, beta or spread is out of range.
        """
        if num_prompts < 1 or num_responses < 2 or dim < 1 or beta <= 0 or spread <= 0 or misfit < 0:
            raise ValueError(
                "a world needs num_prompts >= 1, num_responses >= 2, dim >= 1, beta > 0, spread > 0 and misfit >= 0; "
                f"got {num_prompts}, {num_responses}, {dim}, {beta}, {spread} and {misfit}"
            )
        parts = []
        for seed in seeds:
            generator = Key((seed, _WORLD)).generator()
            shape = (num_prompts, num_responses)
            features = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
            log_reference = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
            truth = torch.randn(dim, generator=generator, dtype=torch.float64)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            # rescale to the exact std, so that worlds are comparable
            truth = truth * spread / deviation(features @ truth, log_reference)
            # r* = w* . phi + misfit
            parts.append((features, log_reference, features @ truth + misfit * spread * noise))
        features, log_reference, reward = (torch.stack(part) for part in zip(*parts, strict=True))
        return cls(features, log_reference, reward, beta)

    @property
    def num_worlds(self) -> int:
        """Number of worlds."""
        return self.features.shape[0]

    @property
    def dim(self) -> int:
        """Dimension of the policy class."""
        return self.features.shape[-1]

    def origin(self) -> Tensor:
        """Parameters at which the policy is the reference, zero; [worlds, dimensions]."""
        return self.features.new_zeros(self.num_worlds, self.dim)

    def log_policy(self, parameters: Tensor) -> Tensor:
        """Log pi_w of every response; shape [worlds, prompts, responses].

        Args:
            parameters: w; shape [worlds, dimensions].
        """
        # log pi_w = log pi_ref + w . phi / beta - log Z
        scores = torch.einsum("wxyd,wd->wxy", self.features, parameters)
        return (self.log_reference + scores / self.beta).log_softmax(-1)

    def objective(self, parameters: Tensor) -> Objective:
        """Exact reward, KL and J of a policy.

        Args:
            parameters: w; shape [worlds, dimensions].
        """
        # J = E_{x, y ~ pi}[r*] - beta KL(pi || pi_ref)
        log_policy = self.log_policy(parameters)
        reward = (log_policy.exp() * self.reward).sum(-1).mean(-1)
        kl = categorical_kl(log_policy, self.log_reference).mean(-1)
        return Objective(reward, kl, reward - self.beta * kl)

    def best_j(self) -> Tensor:
        """J of the optimal policy, which need not be in the policy class; [worlds]."""
        # J* = E_x[beta log E_{y ~ pi_ref} exp(r* / beta)], at pi* ∝ pi_ref exp(r* / beta)
        return (self.beta * torch.logsumexp(self.log_reference + self.reward / self.beta, -1)).mean(-1)

    def gradient_j(self, parameters: Tensor) -> Tensor:
        """Exact gradient of J in w; [worlds, dimensions].

        Args:
            parameters: w; shape [worlds, dimensions].
        """
        # grad J = (1/beta) E_x Cov_{y ~ pi}(r* - w . phi, phi)
        policy = self.log_policy(parameters).exp()
        error = self.reward - torch.einsum("wxyd,wd->wxy", self.features, parameters)
        centered = error - (policy * error).sum(-1, keepdim=True)
        return torch.einsum("wxy,wxy,wxyd->wd", policy, centered, self.features) / (self.beta * policy.shape[1])

    def covariance(self, parameters: Tensor) -> Tensor:
        """Sigma, the covariance of reward gradients, ``-beta Hess J`` at the optimum; [worlds, dim, dim].

        Args:
            parameters: w; shape [worlds, dimensions].
        """
        # Sigma = E_x Cov_{y ~ pi}[phi] = E_x(E[phi phi^T] - E[phi] E[phi]^T)
        policy = self.log_policy(parameters).exp()
        mean = torch.einsum("wxy,wxyd->wxd", policy, self.features)
        second = torch.einsum("wxy,wxyd,wxye->wde", policy, self.features, self.features)
        return (second - torch.einsum("wxd,wxe->wde", mean, mean)) / policy.shape[1]

    def expected_gradient(self, parameters: Tensor, pairs: PairDistribution) -> Tensor:
        """Gradient in w of the population DPO loss, with expected labels; [worlds, dimensions].

        Args:
            parameters: w; shape [worlds, dimensions].
            pairs: distribution and weight of the pairs of every prompt.
        """
        # grad L = -E_x E_q[weight (sigma(delta*) - sigma(delta)) dphi]
        delta = self.gaps(self.features @ parameters[:, None, :, None])
        error = self.gaps(self.reward[..., None]).sigmoid() - delta.sigmoid()
        mass = pairs.probability * pairs.weight * error
        # sum_{a,b} mass[a, b] (phi_a - phi_b) = 2 sum_{a,b} mass[a, b] phi_a, since mass is antisymmetric
        return -2 * torch.einsum("wxab,wxad->wd", mass, self.features) / mass.shape[1]

    def information(self, parameters: Tensor, pairs: PairDistribution) -> Tensor:
        """Fisher information per label; [worlds, dim, dim].

        Args:
            parameters: w; shape [worlds, dimensions].
            pairs: distribution of the pairs of every prompt; the weights are not used.
        """
        # I = E_x E_q[sigma'(delta) dphi dphi^T]
        delta = self.gaps(self.features @ parameters[:, None, :, None])
        mass = pairs.probability * delta.sigmoid() * (-delta).sigmoid()
        row = mass.sum(-1)
        # sum_{a,b} mass (phi_a - phi_b)(phi_a - phi_b)^T = 2 (sum mass phi_a phi_a^T - sum mass phi_a phi_b^T)
        own = torch.einsum("wxa,wxad,wxae->wde", row, self.features, self.features)
        cross = torch.einsum("wxab,wxad,wxbe->wde", mass, self.features, self.features)
        return 2 * (own - cross) / mass.shape[1]

    def asymptotic_gap(self, parameters: Tensor, pairs: PairDistribution) -> Tensor:
        """Limit of n E[J* - J] for a maximum-likelihood fit to n labels, the V-optimal design criterion; [worlds].

        Args:
            parameters: the true parameters w*; shape [worlds, dimensions].
            pairs: distribution of the pairs.
        """
        # n E[J* - J] -> tr(Sigma I^-1) / (2 beta)
        solved = torch.linalg.solve(self.information(parameters, pairs), self.covariance(parameters))
        trace: Tensor = solved.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace / (2 * self.beta)

    @staticmethod
    def gaps(values: Tensor) -> Tensor:
        """Differences ``values[a] - values[b]`` of all pairs of responses; [worlds, prompts, responses, responses].

        Args:
            values: one value per response; shape [worlds, prompts, responses, 1].
        """
        return values - values.transpose(-1, -2)


def deviation(reward: Tensor, log_reference: Tensor) -> Tensor:
    """Std of a reward over the responses of the reference, root mean square over prompts; a scalar.

    Args:
        reward: reward of every response; shape [..., prompts, responses].
        log_reference: log pi_ref; same shape.
    """
    # sqrt(E_x Var_{y ~ pi_ref}[r])
    reference = log_reference.exp()
    mean = (reference * reward).sum(-1, keepdim=True)
    variance: Tensor = (reference * (reward - mean) ** 2).sum(-1).mean()
    return variance.sqrt()


# second element of the key after the seed of a world; see also worlds/learning.py
_WORLD = 0

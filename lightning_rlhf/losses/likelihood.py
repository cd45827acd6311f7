"""Preference losses of likelihoods themselves: the NLL term, CPO, ORPO and SimPO, which have no reference.

Log-probabilities are nats, summed over response tokens (EOS included) or averaged over them. Labels are probabilities;
each loss is its expectation over the label. Where a loss has no reference, the pull towards the initial policy that its
beta gives in DPO is gone: CPO and ORPO have the likelihood of the preferred responses instead, SimPO a target margin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.losses.preference import AbstractPreferenceLoss, DPOLoss, PairLogps, dpo_loss


def logps_per_token(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen and rejected responses, averaged over their tokens, nats; shape [pairs] each."""
    # log pi_theta(y|x) / |y|
    return pairs.policy_chosen / pairs.chosen_length, pairs.policy_rejected / pairs.rejected_length


def preferred_nll(chosen_logps: Tensor, rejected_logps: Tensor, label: Tensor) -> Tensor:
    """Negative log-likelihood of the preferred response, in expectation over the label; shape [pairs].

    Args:
        chosen_logps: log pi_theta of the chosen responses, summed or averaged over tokens, nats; carries gradient.
        rejected_logps: log pi_theta of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
    """
    # -log pi(y_w|x). A response that is certainly not preferred is left out: 0 * -inf would be NaN
    chosen = torch.where(label > 0, chosen_logps, 0.0)
    rejected = torch.where(label < 1, rejected_logps, 0.0)
    return -label * chosen - (1 - label) * rejected


def simpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, label: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO: the likelihood per token as the reward, with a target margin; shape [pairs].

    Meng et al. 2024 (arXiv 2405.14734, eq. 6), in expectation over the label.

    Args:
        chosen_logps: log pi_theta of the chosen responses, averaged over tokens, nats per token; carries gradient.
        rejected_logps: log pi_theta of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: scale of the rewards, > 0; the paper uses 2 to 10.
        gamma: target margin of the rewards, >= 0.
    """
    # L = -log sigma(beta log pi(y_w)/|y_w| - beta log pi(y_l)/|y_l| - gamma)
    margin = beta * (chosen_logps - rejected_logps)
    return -label * F.logsigmoid(margin - gamma) - (1 - label) * F.logsigmoid(-margin - gamma)


def log_odds(logps: Tensor) -> Tensor:
    """Logarithm of the odds p / (1 - p) of probabilities; any shape.

    Args:
        logps: log p, <= 0. A p of 1 up to rounding counts as the largest number below 1, without gradient.
    """
    below_one = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    # log(1 - exp(x)): either form loses its digits where the other one keeps them
    near_zero = torch.log(-torch.expm1(below_one.clamp(min=-1.0)))
    far = torch.log1p(-torch.exp(below_one))
    return below_one - torch.where(below_one > -math.log(2), near_zero, far)


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, label: Tensor, beta: float) -> Tensor:
    """ORPO: the likelihood of the preferred response, plus the log-odds ratio of the two; shape [pairs].

    Hong et al. 2024 (arXiv 2403.07691, eq. 6 and 7), in expectation over the label. The probability of a response is
    the geometric mean over its tokens.

    Args:
        chosen_logps: log pi_theta of the chosen responses, averaged over tokens, nats per token; carries gradient.
        rejected_logps: log pi_theta of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: weight of the odds ratio, > 0, called lambda in the paper, which uses 0.1 to 0.25.
    """
    # L = -log P(y_w) - lambda log sigma(log odds(y_w) - log odds(y_l))
    ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
    return preferred_nll(chosen_logps, rejected_logps, label) + beta * dpo_loss(ratio, label, 1.0)


# -- classes that YAML can name ----------------------------------------------------------------------------------------


class NLLTermLoss(AbstractPreferenceLoss):
    """Base loss plus the negative log-likelihood of the preferred response (RPO, Pang et al. 2024, arXiv 2404.19733).

    It keeps the likelihood of preferred responses from falling, as it may under DPO. RPO also counts the tokens of
    the reasoning before an answer; here all tokens of the response count.

    Args:
        weight: weight of the likelihood, >= 0, called alpha in the paper, which uses 1.
        base: loss that the likelihood is added to. Default: the DPO loss.
        length_normalize: average the likelihood over the tokens of each response, as in the paper; false sums it.

    Raises:
        ValueError: if weight is negative or infinite.
    """

    def __init__(
        self, weight: float = 1.0, base: AbstractPreferenceLoss | None = None, length_normalize: bool = True
    ) -> None:
        self.weight = _checked_weight("NLLTermLoss", "weight", weight)
        self.base = DPOLoss() if base is None else base
        self.length_normalize = length_normalize

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        # loss = base - alpha log pi(y_w|x) / |y_w|
        logps = logps_per_token(pairs) if self.length_normalize else (pairs.policy_chosen, pairs.policy_rejected)
        return self.base(pairs, beta) + self.weight * preferred_nll(*logps, pairs.label)


class NLLLoss(AbstractPreferenceLoss):
    """Negative log-likelihood of the preferred response alone: supervised fine-tuning on the winners of pairs.

    -p log pi(y_w|x) - (1 - p) log pi(y_l|x) with the label p, nats per response. With verdicts of a judge as responses
    it is the loss of generative reward models, direct or STaR-SFT (arXiv 2410.12832); where p = 1 the rejected response
    has no gradient. The reference does not matter.
    """

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        del beta
        return preferred_nll(pairs.policy_chosen, pairs.policy_rejected, pairs.label)


class CPOLoss(AbstractPreferenceLoss):
    """CPO, Xu et al. 2024 (arXiv 2401.08417): DPO without reference, plus the likelihood of the preferred one.

    Args:
        nll_weight: weight of the negative log-likelihood per token, >= 0; the paper uses 1.

    Raises:
        ValueError: if nll_weight is negative or infinite.
    """

    def __init__(self, nll_weight: float = 1.0) -> None:
        self.nll_weight = _checked_weight("CPOLoss", "nll_weight", nll_weight)

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        # L = -log sigma(beta log pi(y_w) - beta log pi(y_l)) - log pi(y_w) / |y_w|
        prefer = dpo_loss(pairs.policy_chosen - pairs.policy_rejected, pairs.label, beta)
        return prefer + self.nll_weight * preferred_nll(*logps_per_token(pairs), pairs.label)


class ORPOLoss(AbstractPreferenceLoss):
    """ORPO, Hong et al. 2024 (arXiv 2403.07691), with ``model.beta`` as lambda; for a base model, without SFT before.

    The likelihood is that of the response; TRL's ORPO counts the tokens of the prompt, too.
    """

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return orpo_loss(*logps_per_token(pairs), pairs.label, beta)


class SimPOLoss(AbstractPreferenceLoss):
    """SimPO, Meng et al. 2024 (arXiv 2405.14734, eq. 6). Set ``model.beta`` to 2 or more.

    Args:
        gamma: target margin of the rewards ``beta * log pi / length``, >= 0; in the paper about 0.1 to 0.8 times beta.

    Raises:
        ValueError: if gamma is negative or infinite.
    """

    def __init__(self, gamma: float = 0.5) -> None:
        self.gamma = _checked_weight("SimPOLoss", "gamma", gamma)

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return simpo_loss(*logps_per_token(pairs), pairs.label, beta, self.gamma)


def _checked_weight(name: str, field: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} expects a finite {field} >= 0; got {value}. Use 0 for none")
    return value

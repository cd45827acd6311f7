"""The interface of preference losses, their input, and the classes that YAML can name.

The module collates preferences into `PairLogps`, calls the loss, multiplies by ``weight`` and takes the mean. The
formulas, DPO first, are in `lightning_rlhf.losses.preference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.runtime.fingerprint import KeepsArguments


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of pairs; every tensor has shape [pairs].

    Log-probabilities are sums over response tokens, EOS included when it was sampled, in nats.

    Args:
        policy_chosen: log pi_theta of the chosen responses; carries gradient.
        policy_rejected: log pi_theta of the rejected responses; carries gradient.
        reference_chosen: log pi_ref of the chosen responses.
        reference_rejected: log pi_ref of the rejected responses.
        chosen_length: tokens of the chosen responses, >= 1.
        rejected_length: tokens of the rejected responses, >= 1.
        chosen_from_reference: whether the chosen response was sampled from pi_ref; bool.
        rejected_from_reference: whether the rejected response was sampled from pi_ref; bool.
        label: P(chosen preferred) in [0, 1].
        weight: weight of the pair, >= 0. Applied by the module, never by a loss.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_from_reference: Tensor
    rejected_from_reference: Tensor
    label: Tensor
    weight: Tensor

    def margin(self) -> Tensor:
        """Log-ratio of the chosen minus log-ratio of the rejected response, nats; shape [pairs]."""
        # margin = log pi_theta(y_w)/pi_ref(y_w) - log pi_theta(y_l)/pi_ref(y_l)
        return (self.policy_chosen - self.reference_chosen) - (self.policy_rejected - self.reference_rejected)

    def margin_per_token(self) -> Tensor:
        """Margin of the log-ratios averaged over the tokens of each response, nats per token; shape [pairs]."""
        # log pi_theta(y_w)/pi_ref(y_w) / |y_w| - log pi_theta(y_l)/pi_ref(y_l) / |y_l|
        chosen = (self.policy_chosen - self.reference_chosen) / self.chosen_length
        return chosen - (self.policy_rejected - self.reference_rejected) / self.rejected_length


class AbstractPreferenceLoss(KeepsArguments, ABC):
    """Computes one loss per pair from the log-probabilities of pairs.

    Subclass it, implement ``__call__``, and name your class by its path: ``--model.loss=my_file.MyLoss``. Support soft
    labels by taking the expectation over the label. Do not use ``pairs.weight``: the module multiplies by it.
    """

    @abstractmethod
    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        """Compute the loss of each pair; shape [pairs].

        Called in every training and validation step, on every rank.

        Args:
            pairs: log-probabilities, labels and lengths.
            beta: strength of the pull towards the reference, > 0.
        """


def checked_losses(loss: AbstractPreferenceLoss, pairs: PairLogps, beta: float) -> Tensor:
    """Call a loss and check that it returns one value per pair; shape [pairs].

    Raises:
        ValueError: if it returns anything else, such as the mean.
    """
    losses: object = loss(pairs, beta)
    # the mean over pairs would broadcast to all of them without an error
    if not isinstance(losses, Tensor) or losses.shape != pairs.weight.shape:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"{type(loss).__name__} returned {found}; return one loss per pair, {tuple(pairs.weight.shape)}"
        )
    return losses

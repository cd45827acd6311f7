"""Log-probabilities of responses, and the exact KL to an anchor along them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rlhf.estimators.kl import categorical_kl
from lightning_rlhf.logprobs.compute import Layout, choose_layout, packed_logits
from lightning_rlhf.logprobs.packing import Group, pack
from lightning_rlhf.models.reference import AbstractReference


def logps_and_anchor_kl(
    model: nn.Module, anchor: AbstractReference, groups: Sequence[Group], *, layout: Layout = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute log p(response | prompt), and the KL of the anchor to the model at every token of the response.

    The KL of a response is ``sum_t KL(anchor(. | y_<t) || model(. | y_<t))``, over the whole vocabulary at each prefix
    of the response, and so without the noise of an estimate from sampled tokens. Several tensors [tokens, vocabulary]
    are in memory at a time: micro-batches bound them.

    Args:
        model: a causal language model of transformers, or a PeftModel of one; carries gradient if enabled.
        anchor: an earlier, or averaged, state of the model.
        groups: prompts with their responses, as token ids; neither may be empty.
        layout: as in `lightning_rlhf.logprobs.compute.response_logps`.

    Returns:
        Both in nats, [responses] each, group by group, in the given order; both carry gradient.
    """
    packed = pack(groups, choose_layout(model, groups) if layout == "auto" else layout)
    # first, while no graph of the model exists: they may share weights
    with anchor.active() as anchored:
        anchor_logps = packed_logits(anchored, packed).log_softmax(-1)
    logps = packed_logits(model, packed).log_softmax(-1)
    packed = packed.to(logps.device)
    chosen = -F.nll_loss(logps, packed.targets, reduction="none")
    # sum over v of pi_anchor(v) (log pi_anchor(v) - log pi(v)), [tokens]; the gradient flows through log pi alone
    kl = categorical_kl(anchor_logps, logps)
    return _sums(packed.split(chosen)), _sums(packed.split(kl))


def _sums(by_response: Sequence[Tensor]) -> Tensor:
    return torch.stack([tokens.sum() for tokens in by_response])

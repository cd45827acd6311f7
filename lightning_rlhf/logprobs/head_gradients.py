"""Gradients of log p(response) in the output head, one sketched vector per response: features for pair design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from lightning_rlhf.logprobs.compute import (
    attending,
    base_model,
    before_head,
    choose_layout,
    embedding,
    logit_rule,
    model_inputs,
)
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.head import LogitRule
from lightning_rlhf.logprobs.packing import Group, pack, split_by_tokens
from lightning_rlhf.randomness import Key


LOGITS_PER_TILE = 2**25
"""Number of logits in memory at a time, 128 MiB in float32."""


@dataclass(frozen=True)
class HeadSketch:
    """A random projection of gradients in the head to ``dim`` numbers, from vocabulary times hidden size.

    With the one-hot token e, its predicted distribution p and the hidden state h::

        grad_W log p(response) = sum over tokens of (e - p) h^T
        feature_j              = sum over tokens of (u_j . (e - p)) (v_j . h),    u_j and v_j random signs

    Inner products of features equal those of the gradients in expectation (u is scaled by ``1 / sqrt(dim)``).

    Args:
        dim: length of a feature vector, >= 1.
        seed: seed of the signs.
    """

    dim: int
    seed: int = 0

    def factors(self, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor]:
        """Projections u, [dim, vocabulary], and v, [dim, hidden]; float32 on the CPU."""
        return _factors(self.dim, self.seed, vocabulary, hidden)


@cache
def _factors(dim: int, seed: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor]:
    """The factors of `HeadSketch.factors`, cached, since every batch of a run uses the same."""
    # signs, uniform on {-1, +1}
    generator = Key((seed, dim)).generator()
    u = torch.randint(0, 2, (dim, vocabulary), generator=generator).float() * 2 - 1
    v = torch.randint(0, 2, (dim, hidden), generator=generator).float() * 2 - 1
    return u / dim**0.5, v


def head_gradients(
    model: nn.Module, groups: Sequence[Group], sketch: HeadSketch, *, tokens_per_batch: int | None = None
) -> Tensor:
    """Sketch the gradient of log p(response | prompt) in the output head; [responses, dim], float32 on the CPU.

    Runs one forward pass without gradient. Its memory is that of the forward pass, ``dim * (vocabulary + hidden size)``
    numbers of the sketch, and up to twice 128 MiB of logits.

    Args:
        model: a causal language model of transformers, or a PeftModel of one.
        groups: prompts with their responses, as token ids; neither may be empty.
        sketch: the projection.
        tokens_per_batch: maximum number of positions per forward pass. Default: one forward pass for all.

    Raises:
        ValueError: if the output head is not a linear layer; adapters on it, or a trained copy of it, are supported.
    """
    base = base_model(model)
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    plain = head
    # unwrap adapters of PEFT (base_layer) and trained copies (original_module)
    while isinstance(inner := getattr(plain, "base_layer", getattr(plain, "original_module", None)), nn.Module):
        plain = inner
    if not isinstance(plain, nn.Linear):
        raise ValueError(f"head gradients need a linear output head; {type(base).__name__} has {type(head).__name__}")
    if not groups:
        return torch.zeros(0, sketch.dim)
    layout = choose_layout(model, groups)
    batches = [list(range(len(groups)))]
    if tokens_per_batch is not None:
        batches = split_by_tokens(groups, tokens_per_batch, layout)
    device = embedding(base).device
    u, v = (factor.to(device) for factor in sketch.factors(plain.out_features, plain.in_features))
    found: dict[int, Tensor] = {}
    for batch in batches:
        packed = pack([groups[index] for index in batch], layout).to(device)
        kept: list[Tensor] = []

        def keep(hidden: Tensor, predictors: Tensor = packed.predictors, kept: list[Tensor] = kept) -> Tensor:
            kept.append(hidden.flatten(0, 1).index_select(0, predictors))
            # the model's own logits are not used: compute them at a single position
            return hidden[:1, :1]

        with torch.no_grad(), evaluating(model.modules()):
            with attending(base, packed), before_head(head, keep):
                model(**model_inputs(base, packed), use_cache=False)
            features = _token_features(kept[0], packed.targets, head, logit_rule(base, 1.0), u, v)
        # sum of the token features of each response
        total = features.new_zeros(len(packed.response_lengths), sketch.dim).index_add_(0, packed.owners, features)
        rows = iter(torch.split(total.cpu(), [len(groups[index][1]) for index in batch]))
        found |= {index: next(rows) for index in batch}
    return torch.cat([found[index] for index in range(len(groups))])


def _token_features(hidden: Tensor, targets: Tensor, head: nn.Module, rule: LogitRule, u: Tensor, v: Tensor) -> Tensor:
    """Feature of each token, [tokens, dim].

    Args:
        hidden: hidden states at the predicting positions, [tokens, width].
        targets: the predicted tokens, [tokens].
        head: the output head.
        rule: transformation of the logits.
        u: projection of the vocabulary, [dim, vocabulary].
        v: projection of the hidden states, [dim, width].
    """
    parts = []
    # tokens whose logits, [tile, vocabulary], are in memory at a time
    tile = max(1, LOGITS_PER_TILE // u.shape[1])
    for states, tokens in zip(torch.split(hidden, tile), torch.split(targets, tile), strict=True):
        logits = rule.apply(head(states).float())
        # residual = s (e - p), s the slope of the rule
        residual = -logits.softmax(-1)
        residual.scatter_add_(1, tokens[:, None], torch.ones_like(residual[:, :1]))
        residual = residual * rule.slope(logits)
        # feature_j = (u_j . (e - p)) (v_j . h)
        parts.append((residual @ u.T) * (states.float() @ v.T))
    return torch.cat(parts)

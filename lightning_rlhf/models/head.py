"""The language-model head on chosen positions: log-probability, entropy and greedy match of tokens from one pass.

Of the logits, a matrix [tokens, vocabulary] that is larger than everything else in a small model, no more than a tile
is held beyond a byte budget, and it is overwritten by its own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


LOGIT_BYTES = 256 * 2**20
"""Logits that would take more than this in float32 are computed in tiles, and again in the backward pass."""


@dataclass(frozen=True)
class LogitRule:
    """What becomes of the product of hidden states and head before the softmax: ``cap tanh(scale z / cap) / T``.

    Args:
        scale: factor on the logits; Cohere and Granite have one.
        cap: soft cap, as in Gemma; None for none.
        temperature: divides the logits, > 0.
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def apply(self, logits: Tensor) -> Tensor:
        """Change float32 or float64 logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits.div_(self.temperature) if self.temperature != 1.0 else logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the changed logits by the plain ones, from the changed ones."""
        slope = self.scale / self.temperature
        return slope * (1 - (logits * (self.temperature / self.cap)) ** 2) if self.cap else slope


@dataclass(frozen=True)
class TokenScores:
    """What one pass of the head says about each target.

    Args:
        logps: log-probability in nats, [tokens]; carries gradient.
        entropy: entropy of the law the target comes from, nats, [tokens]; no gradient. None if it was not asked for.
        greedy: whether the target is the most probable token, bool, [tokens]; None if it was not asked for.
    """

    logps: Tensor
    entropy: Tensor | None = None
    greedy: Tensor | None = None


def tile_size(vocabulary: int, byte_budget: int = LOGIT_BYTES) -> int:
    """Tokens whose float32 logits fit into a budget of bytes; at least one."""
    return max(1, byte_budget // (4 * vocabulary))


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rule: LogitRule | None = None,
    tile: int | None = None,
    statistics: bool = False,
) -> TokenScores:
    """Score targets under ``softmax(rule(hidden @ weight.T + bias))``; the softmax is taken in float32 at least.

    Logits that fit into one tile are kept for the backward pass and overwritten there. More are computed again, tile by
    tile, unless the head is frozen: then all that the backward pass needs is one vector [width] per token, which the
    forward pass computes while it holds the tile.

    Args:
        hidden: hidden states at the positions that predict, [tokens, width].
        weight: weight of the head, [vocabulary, width].
        targets: the tokens predicted, [tokens].
        bias: bias of the head, [vocabulary].
        rule: what the model does to its logits, and the temperature.
        tile: tokens whose logits are held at a time, >= 1; what fits into 256 MiB when not given.
        statistics: also return entropy and greedy match.
    """
    rule = rule or LogitRule()
    tile = tile or tile_size(weight.shape[0])
    # inside a Function autograd is always off
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    logps, entropy, greedy = cast(Any, _Scores).apply(hidden, weight, bias, targets, rule, tile, statistics, grad)
    return TokenScores(logps, entropy, greedy)


class _Scores(torch.autograd.Function):
    """Forward and backward of `score_tokens`, by hand.

    With z = rule(W h + b), p = softmax(z) and g the gradient of the log-probability of target y,
    d log p_y / dz = onehot(y) - p, so that dh = g s (onehot - p) W and dW = sum over tokens of g s (onehot - p) h',
    s the slope of the rule.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        tile: int,
        statistics: bool,
        grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        need_hidden, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        frozen = need_hidden and not need_weight and not need_bias
        logps, log_sums, entropy, greedy, directions = [], [], [], [], []
        kept: Tensor | None = None
        for part, target in _tiles(tile, hidden, targets):
            logits, compute_dtype = _logits(part, weight, bias, rule)
            log_sum = logits.logsumexp(-1)
            logps.append(logits.gather(-1, target[:, None]).squeeze(-1) - log_sum)
            if statistics:
                greedy.append(logits.argmax(-1) == target)
                law = (logits - log_sum[:, None]).exp_()
                # 0 log 0 is 0, also where a logit is -inf
                entropy.append(log_sum - law.mul_(logits).nan_to_num_(nan=0.0).sum(-1))
                del law
            if frozen:
                delta = _delta(logits, log_sum, target, rule)
                directions.append(delta.to(compute_dtype) @ weight.to(compute_dtype))
            else:
                log_sums.append(log_sum)
            if grad and not frozen and len(hidden) <= tile:
                kept = logits
        ctx.rule, ctx.tile, ctx.kept, ctx.frozen = rule, tile, kept, frozen
        if grad:
            ctx.compute_dtype = compute_dtype
            saved = [torch.cat(directions)] if frozen else [hidden, weight, bias, targets, torch.cat(log_sums)]
            ctx.save_for_backward(*saved)
        outputs = torch.cat(logps), _cat(entropy), _cat(greedy)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient: Tensor = gradients[0]
        rest = (None,) * 5
        if ctx.frozen:
            (directions,) = ctx.saved_tensors
            return ((gradient[:, None] * directions).to(directions.dtype), None, None, *rest)
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = ctx.compute_dtype
        by_hidden: list[Tensor] = []
        by_weight = by_bias = None
        for part, target, log_sum, g in _tiles(ctx.tile, hidden, targets, log_sums, gradient):
            kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass computes them anew
            logits = _logits(part, weight, bias, ctx.rule, dtype)[0] if kept is None else kept
            delta = _delta(logits, log_sum, target, ctx.rule).mul_(g.to(logits.dtype)[:, None])
            if need_bias:
                by_bias = delta.sum(0) if by_bias is None else by_bias + delta.sum(0)
            delta = delta.to(dtype)
            if need_hidden:
                by_hidden.append(delta @ weight.to(dtype))
            if need_weight:
                product = delta.T @ part.to(dtype)
                by_weight = product.to(weight.dtype) if by_weight is None else by_weight.add_(product)
            del logits, kept, delta
        return (
            torch.cat(by_hidden).to(hidden.dtype) if need_hidden else None,
            by_weight,
            by_bias.to(bias.dtype) if by_bias is not None else None,
            *rest,
        )


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule, dtype: torch.dtype | None = None
) -> tuple[Tensor, torch.dtype]:
    """Logits in float32 at least, and the dtype of the product: that of the weights, or of autocast."""
    if dtype is not None:  # the backward pass, where autocast is off
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    product = torch.nn.functional.linear(hidden, weight, bias)
    logits = product if product.dtype == torch.float64 else product.float()
    return rule.apply(logits), product.dtype


def _delta(logits: Tensor, log_sum: Tensor, target: Tensor, rule: LogitRule) -> Tensor:
    """Gradient of the log-probability of the target by the plain logits; overwrites the logits given."""
    slope = rule.slope(logits)  # before they are gone
    delta = logits.sub_(log_sum[:, None]).exp_().neg_()
    delta.scatter_add_(-1, target[:, None], torch.ones_like(log_sum)[:, None])
    return delta.mul_(slope) if not isinstance(slope, float) or slope != 1.0 else delta


def _tiles(tile: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of equal length into pieces of about equal length, ``tile`` at most."""
    return zip(*(t.tensor_split(max(1, math.ceil(len(t) / tile))) for t in tensors), strict=True)


def _cat(pieces: list[Tensor]) -> Tensor | None:
    return torch.cat(pieces) if pieces else None

"""The fused output head: log-probability, entropy and greedy match of tokens without the full logits in memory.

The logits, [tokens, vocabulary], are the largest tensor of a small model. Above a byte budget they are computed in
tiles, one tile in memory at a time, and the backward pass overwrites a tile with its own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor


LOGIT_BYTES = 256 * 2**20
"""Byte budget of float32 logits; above it they are computed in tiles, and again in the backward pass."""
SCRATCH_BYTES = 8 * 2**20
"""Byte budget of the copies of logits that exponentials are computed in, on the CPU: it stays in the caches."""
_idle: list[Tensor] = []
"""The memory of the last tile on the CPU, of at most `LOGIT_BYTES` or one token, while no tile is in it.

The C library would give so large a block back to the system at once, and the system would clear its pages again for the
next tile, which took half of the time of scoring.
"""


@dataclass(frozen=True)
class LogitRule:
    """Transformation of the logits z between head and softmax: ``cap tanh(scale z / cap) / temperature``.

    Args:
        scale: factor on the logits, as in Cohere and Granite.
        cap: soft cap, as in Gemma. Default: no cap.
        temperature: divides the logits, > 0.
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def apply(self, logits: Tensor) -> Tensor:
        """Transform float32 or float64 logits in place."""
        # z -> cap tanh(scale z / cap) / T
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits.div_(self.temperature) if self.temperature != 1.0 else logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the transformed logits in the plain ones, as a function of the transformed ones."""
        # d/dz [cap tanh(scale z / cap) / T] = (scale / T) (1 - tanh^2) with tanh = logits T / cap
        slope = self.scale / self.temperature
        return slope * (1 - (logits * (self.temperature / self.cap)) ** 2) if self.cap else slope


@dataclass(frozen=True)
class TokenScores:
    """Scores of each target token.

    Args:
        logps: log-probability in nats, [tokens]; carries gradient.
        entropy: entropy of the predicted distribution, nats, [tokens]; no gradient. None without ``statistics``.
        greedy: whether the target is the most probable token, bool, [tokens]; None without ``statistics``.
    """

    logps: Tensor
    entropy: Tensor | None = None
    greedy: Tensor | None = None


def tile_size(vocabulary: int, byte_budget: int = LOGIT_BYTES) -> int:
    """Number of tokens whose float32 logits fit into a byte budget; at least one."""
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
    """Score targets under ``softmax(rule(hidden @ weight.T + bias))``; the softmax is computed in float32 or better.

    Logits that fit into one tile are kept for the backward pass and overwritten there. Otherwise the backward pass
    computes them again, tile by tile. With a frozen head, the backward pass needs one vector [width] per token only,
    which the forward pass computes from each tile.

    Args:
        hidden: hidden states at the predicting positions, [tokens, width].
        weight: weight of the head, [vocabulary, width].
        targets: the predicted tokens, [tokens].
        bias: bias of the head, [vocabulary].
        rule: transformation of the logits, with the temperature. Default: none.
        tile: tokens whose logits are in memory at a time, >= 1. Default: as many as fit into 256 MiB.
        statistics: also return entropy and greedy match.
    """
    rule = rule or LogitRule()
    tile = tile or tile_size(weight.shape[0])
    # computed here, since autograd is always off in the forward of a Function
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    apply = cast(Callable[..., tuple[Tensor, Tensor | None, Tensor | None]], _Scores.apply)
    logps, entropy, greedy = apply(hidden, weight, bias, targets, rule, tile, statistics, grad)
    return TokenScores(logps, entropy, greedy)


class _Context(Protocol):
    """The context of autograd, with the attributes that `_Scores` keeps in it."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    frozen: bool
    tile: int
    rule: LogitRule
    compute_dtype: torch.dtype
    kept: Tensor | None

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _Scores(torch.autograd.Function):
    """Forward and backward pass of `score_tokens`.

    With logits ``z = rule(W h + b)``, ``p = softmax(z)``, target y, slope s of the rule, and the incoming gradient g of
    ``log p_y`` of each token::

        log p_y       = z_y - logsumexp(z)
        d log p_y/dz  = onehot(y) - p
        dh            = g s (onehot(y) - p) W
        dW            = sum over tokens of g s (onehot(y) - p) h^T
        db            = sum over tokens of g s (onehot(y) - p)
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        tile: int,
        statistics: bool,
        grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # needs_input_grad is set under no_grad as well
        need_hidden, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        frozen = need_hidden and not need_weight and not need_bias
        logps, log_sums, entropy, greedy, directions = [], [], [], [], []
        kept: Tensor | None = None
        # a single tile is kept for the backward pass; several would be the full logits in memory
        keep = grad and not frozen and len(hidden) <= tile
        buffer = None if keep else _take_buffer(hidden, weight, tile)
        for part, target in _tiles(tile, hidden, targets):
            logits, compute_dtype = _logits(part, weight, bias, rule, buffer=buffer)
            # log p_y = z_y - logsumexp(z)
            log_sum = torch.cat([rows.logsumexp(-1) for (rows,) in _tiles(_scratch_size(logits), logits)])
            logps.append(logits.gather(-1, target[:, None]).squeeze(-1) - log_sum)
            if statistics:
                greedy.append(logits.argmax(-1) == target)
                entropy.append(_entropy(logits, log_sum))
            if frozen:
                # s (onehot - p) W, the gradient of log p_y in h; the backward pass multiplies by g
                delta = _delta(logits, log_sum, target, rule)
                directions.append(delta.to(compute_dtype) @ weight.to(compute_dtype))
            else:
                log_sums.append(log_sum)
            if keep:
                kept = logits
            del logits
        _give_back(buffer)
        ctx.rule, ctx.tile, ctx.kept, ctx.frozen = rule, tile, kept, frozen
        if grad:
            ctx.compute_dtype = compute_dtype
            # p = exp(z - logsumexp(z)) in the backward pass: with the saved logsumexp it needs no second one
            saved = [torch.cat(directions)] if frozen else [hidden, weight, bias, targets, torch.cat(log_sums)]
            ctx.save_for_backward(*saved)
        outputs = torch.cat(logps), _cat(entropy), _cat(greedy)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        # targets, rule, tile, statistics and grad have no gradient
        rest = (None,) * 5
        if ctx.frozen:
            (directions,) = ctx.saved_tensors
            return ((gradient[:, None] * directions).to(directions.dtype), None, None, *rest)
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = ctx.compute_dtype
        by_hidden: list[Tensor] = []
        by_weight = by_bias = None
        buffer = _take_buffer(hidden, weight, ctx.tile) if ctx.kept is None else None
        for part, target, log_sum, g in _tiles(ctx.tile, hidden, targets, log_sums, gradient):
            kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass recomputes them
            logits = _logits(part, weight, bias, ctx.rule, dtype, buffer)[0] if kept is None else kept
            # g s (onehot - p), [tile, vocabulary]
            delta = _delta(logits, log_sum, target, ctx.rule).mul_(g.to(logits.dtype)[:, None])
            if need_bias:
                by_bias = delta.sum(0) if by_bias is None else by_bias + delta.sum(0)
            delta = delta.to(dtype)
            if need_hidden:
                by_hidden.append(delta @ weight.to(dtype))
            if need_weight:
                # dW += delta^T h
                product = delta.T @ part.to(dtype)
                by_weight = product.to(weight.dtype) if by_weight is None else by_weight.add_(product)
            del logits, kept, delta
        _give_back(buffer)
        return (
            torch.cat(by_hidden).to(hidden.dtype) if need_hidden else None,
            by_weight,
            by_bias.to(bias.dtype) if by_bias is not None else None,
            *rest,
        )


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: LogitRule,
    dtype: torch.dtype | None = None,
    buffer: Tensor | None = None,
) -> tuple[Tensor, torch.dtype]:
    """Logits in float32 or better, and the data type of the product: that of the weights, or of autocast."""
    if dtype is not None:  # backward pass: autocast is off there, so that the data type of the forward is passed in
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    out = None if buffer is None else buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    plain = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
    if out is not None and plain:
        # the products that `linear` calls, into memory that is there
        product = torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)
        return rule.apply(product), product.dtype
    product = torch.nn.functional.linear(hidden, weight, bias)
    if out is not None and product.dtype != torch.float64:
        logits = out.copy_(product)
    else:
        logits = product if product.dtype == torch.float64 else product.float()
    return rule.apply(logits), product.dtype


def _take_buffer(hidden: Tensor, weight: Tensor, tile: int) -> Tensor | None:
    """Memory for the logits of a tile, float32, flat; None where the device has an allocator that keeps memory."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float64:
        return None
    size = min(tile, len(hidden)) * len(weight)
    # pop(): a second thread finds none, and gets its own
    if _idle and (found := _idle.pop()).numel() >= size:
        return found
    # a tensor of inference mode could not be written outside of it
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.float32)


def _give_back(buffer: Tensor | None) -> None:
    """Keep the memory of a tile for the next one."""
    if buffer is not None and not _idle:
        _idle.append(buffer)


def _scratch_size(logits: Tensor) -> int:
    """Tokens whose exponentials are in memory at a time: few on the CPU, all elsewhere."""
    return tile_size(logits.shape[-1], SCRATCH_BYTES) if logits.device.type == "cpu" else max(1, len(logits))


def _entropy(logits: Tensor, log_sum: Tensor) -> Tensor:
    """Entropy of each token in nats, [tokens]."""
    means = []
    for rows, log_sums in _tiles(_scratch_size(logits), logits, log_sum):
        probabilities = (rows - log_sums[:, None]).exp_()
        # sum_v p_v z_v with 0 * -inf = 0
        means.append(probabilities.mul_(rows).nan_to_num_(nan=0.0).sum(-1))
    # H = -sum_v p_v log p_v = logsumexp(z) - sum_v p_v z_v
    return log_sum - torch.cat(means)


def _delta(logits: Tensor, log_sum: Tensor, target: Tensor, rule: LogitRule) -> Tensor:
    """Gradient of the log-probability of the target in the plain logits; overwrites ``logits``."""
    # s (onehot(y) - p) with p = exp(z - logsumexp(z))
    slope = rule.slope(logits)  # first, since the next line overwrites the logits
    delta = logits.sub_(log_sum[:, None]).exp_().neg_()
    delta.scatter_add_(-1, target[:, None], torch.ones_like(log_sum)[:, None])
    return delta.mul_(slope) if not isinstance(slope, float) or slope != 1.0 else delta


def _tiles(tile: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of equal length into pieces of about equal length, ``tile`` at most."""
    return zip(*(t.tensor_split(max(1, math.ceil(len(t) / tile))) for t in tensors), strict=True)


def _cat(pieces: list[Tensor]) -> Tensor | None:
    return torch.cat(pieces) if pieces else None

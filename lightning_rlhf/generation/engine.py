"""The decode engine: policy and reference rows in one batch, each row with its own mix of the two.

Prompts are prefilled once for all their responses, finished rows leave the batch, and the log-probabilities under both
models come out of the same forward passes that chose the tokens. A row pays only for the models its mix needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.estimators.pilaf import mix_logits
from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.models.logprobs import response_logps
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.types import FinishReason, Prompt, Response


class DecodeEngine(AbstractEngine):
    """Decodes batches of requests with KV caches.

    A response is a function of its request alone (prompt, key, mix) and of the weights, whatever the batch around it,
    up to float ties: each token is chosen by inverse transform of one uniform number of the request's own stream.

    Args:
        policy: the policy; switched to eval mode while decoding.
        reference: the frozen reference, or None when no request will need it.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: limits, temperature and nucleus.
        eos_ids: ids that end a response.
        tokens_per_batch: tokens of one teacher-forced scoring pass, for reference log-probabilities of policy rows.

    Raises:
        ValueError: if policy and reference have different vocabularies, whose logits cannot be mixed.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: AbstractReference | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beta: float,
        decoding: Decoding,
        eos_ids: Sequence[int],
        tokens_per_batch: int = 4096,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.tokenizer = tokenizer
        self.beta = beta
        self.decoding = decoding
        self.eos_ids = frozenset(eos_ids)
        self.tokens_per_batch = tokens_per_batch
        self.on_tokens: Callable[[int], None] | None = None
        """Called after each decoding step with the number of tokens it drew; moves progress bars."""
        if reference is not None:
            with reference.active() as model:
                sizes = vocabulary_size(policy), vocabulary_size(model)
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"policy and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens; their logits cannot "
                    f"be mixed: use a reference with the policy's tokenizer"
                )

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Draw one response per request, in order; see `AbstractEngine.generate`.

        Raises:
            ValueError: if a prompt is empty, or a request needs a reference and the engine has none.
        """
        for request in requests:
            if not request.prompt.ids:
                raise ValueError(f"prompt {request.prompt.index} has no tokens; give the tokenizer a BOS token")
            if self.reference is None and (request.mix != 0 or reference_logps):
                raise ValueError("this request needs a reference model, and the engine was built without one")
        # equal prompts side by side share a prefill, similar lengths share a batch without much padding
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt.ids), requests[i].prompt.ids))
        responses: dict[int, Response] = {}
        with evaluating(self.policy.modules()):
            for start in range(0, len(order), self.decoding.rows):
                chunk = order[start : start + self.decoding.rows]
                for i, response in zip(chunk, self._decode([requests[i] for i in chunk]), strict=True):
                    responses[i] = response
            result = [responses[i] for i in range(len(requests))]
            if reference_logps:
                result = self._score_missing(requests, result)
        return result

    def _decode(self, requests: Sequence[Request]) -> list[Response]:
        """Decode one batch."""
        limit, temperature, top_p = self.decoding.max_new_tokens, self.decoding.temperature, self.decoding.top_p
        rows = [_Row(request, request.key.uniforms(limit)) for request in requests]
        streams = []
        if any(request.mix != -1 for request in requests):
            streams.append(_Stream(self._use_policy, [row for row in rows if row.request.mix != -1], "policy_logps"))
        if any(request.mix != 0 for request in requests):
            streams.append(
                _Stream(self._use_reference, [row for row in rows if row.request.mix != 0], "reference_logps")
            )
        for stream in streams:
            stream.prefill()
        active = rows
        for step in range(limit):
            logits = _mixed(active, streams)
            uniforms = torch.stack([row.uniforms[step] for row in active])
            tokens = draw_tokens(logits / temperature, uniforms, top_p).tolist()
            for row, token in zip(active, tokens, strict=True):
                row.ids.append(token)
                row.done = token in self.eos_ids or step == limit - 1
            for stream in streams:
                stream.record()
            if self.on_tokens is not None:
                self.on_tokens(len(active))
            if any(row.done for row in active):
                active = [row for row in active if not row.done]
                for stream in streams:
                    stream.compact()
                streams = [stream for stream in streams if stream.rows]
            if not active:
                break
            for stream in streams:
                stream.advance()
        return [self._response(row) for row in rows]

    def _response(self, row: _Row) -> Response:
        reason: FinishReason = "eos" if row.ids[-1] in self.eos_ids else "length"
        return Response(
            ids=tuple(row.ids),
            text=str(self.tokenizer.decode(row.ids, skip_special_tokens=True)),
            finish_reason=reason,
            policy_logps=tuple(row.policy_logps) or None,
            reference_logps=tuple(row.reference_logps) or None,
            source=row.request.source,
        )

    def _score_missing(self, requests: Sequence[Request], responses: Sequence[Response]) -> list[Response]:
        """Fill in the log-probabilities that decoding did not need, by one teacher-forced pass per model."""
        prompts = [request.prompt for request in requests]
        with self._use_policy() as model:
            responses = with_logps(model, "policy_logps", prompts, responses, self.tokens_per_batch)
        return self.with_reference_logps(prompts, responses)

    def with_reference_logps(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """Give every response its reference log-probabilities; those that have them cost nothing.

        Args:
            prompts: the prompt of each response.
            responses: what to score.
        """
        with self._use_reference() as model:
            return with_logps(model, "reference_logps", prompts, responses, self.tokens_per_batch)

    @contextmanager
    def _use_policy(self) -> Iterator[PreTrainedModel]:
        yield self.policy

    @contextmanager
    def _use_reference(self) -> Iterator[PreTrainedModel]:
        assert self.reference is not None
        with self.reference.active() as model:
            yield model


def draw_tokens(logits: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """Draw one token per row by inverse transform sampling.

    Args:
        logits: unnormalised log-probabilities; shape [rows, vocabulary].
        uniforms: one number in [0, 1) per row; shape [rows].
        top_p: keep the smallest set of most probable tokens whose mass reaches this, in (0, 1].

    Raises:
        ValueError: if a row's logits are no law: NaN, +inf, or all -inf.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32).double()
    if top_p < 1.0:
        ordered, index = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.scatter(-1, index, ordered.masked_fill(outside, 0.0))
    if not bool(probabilities.isfinite().all()):
        raise ValueError(
            "the logits to decode from are not finite; the policy may have diverged (lower the learning rate, or use "
            "bfloat16 instead of float16), or the reference forbids tokens that the tilt asks for (lower the tilt)"
        )
    # float64: a float32 running sum over 100k tokens is too coarse for a fair draw
    cumulative = probabilities.cumsum(-1)
    threshold = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.size(-1) - 1)


def with_logps(
    model: PreTrainedModel,
    name: Literal["policy_logps", "reference_logps"],
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    tokens_per_batch: int,
) -> list[Response]:
    """Fill in log-probabilities under a model where they are missing; consecutive equal prompts are computed once."""
    missing = [i for i, response in enumerate(responses) if getattr(response, name) is None]
    groups = []
    for ids, members in groupby(missing, key=lambda i: prompts[i].ids):
        groups.append((ids, [responses[i].ids for i in members]))
    with evaluating(model.modules()):
        scored = response_logps(model, groups, tokens_per_batch=tokens_per_batch)
    filled = list(responses)
    for i, logps in zip(missing, scored, strict=True):
        filled[i] = replace(filled[i], **{name: tuple(logps.tolist())})  # type: ignore[arg-type]
    return filled


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits of a causal LM."""
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]


@dataclass
class _Row:
    """One response while it is decoded."""

    request: Request
    uniforms: Tensor
    done: bool = False

    def __post_init__(self) -> None:
        self.ids: list[int] = []
        self.policy_logps: list[float] = []
        self.reference_logps: list[float] = []


class _Stream:
    """The rows of a batch that need one of the two models, with that model's KV cache and next-token logits."""

    def __init__(self, use: Callable[[], AbstractContextManager[PreTrainedModel]], rows: list[_Row], name: str) -> None:
        self.use, self.rows, self.name = use, rows, name
        self.logits: Tensor
        self.mask: Tensor
        self.cache: DynamicCache

    def prefill(self) -> None:
        """Run the distinct prompts once, left-padded, and give each row its copy of the cache."""
        distinct = list(dict.fromkeys(row.request.prompt.ids for row in self.rows))
        length = max(map(len, distinct))
        with self.use() as model:
            ids = torch.zeros(len(distinct), length, dtype=torch.long, device=model.device)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(distinct):
                ids[i, length - len(prompt) :] = torch.tensor(prompt)
                mask[i, length - len(prompt) :] = 1
            self.cache = DynamicCache(config=model.config.get_text_config())
            self.logits = self._forward(model, ids, mask, (mask.cumsum(-1) - 1).clamp_min(0))
        if len(distinct) < len(self.rows):
            place = {prompt: i for i, prompt in enumerate(distinct)}
            self._select(torch.tensor([place[row.request.prompt.ids] for row in self.rows], device=mask.device), mask)
        else:
            self.mask = mask

    def advance(self) -> None:
        """Feed each row its newest token."""
        with self.use() as model:
            ids = torch.tensor([[row.ids[-1]] for row in self.rows], device=model.device)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=-1)
            self.logits = self._forward(model, ids, self.mask, self.mask.sum(-1, keepdim=True) - 1)

    def record(self) -> None:
        """Note the log-probability of each row's newest token under this model, untempered."""
        tokens = torch.tensor([row.ids[-1] for row in self.rows], device=self.logits.device)
        logps = self.logits.gather(-1, tokens[:, None]).squeeze(-1) - self.logits.logsumexp(-1)
        for row, logp in zip(self.rows, logps.tolist(), strict=True):
            getattr(row, self.name).append(logp)

    def compact(self) -> None:
        """Drop finished rows from the batch and from the cache."""
        keep = [i for i, row in enumerate(self.rows) if not row.done]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        if keep:
            self._select(torch.tensor(keep, device=self.mask.device), self.mask)

    def _forward(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _select(self, index: Tensor, mask: Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.mask, self.logits = mask[index], self.logits[index]


def _mixed(active: Sequence[_Row], streams: Sequence[_Stream]) -> Tensor:
    """Next-token logits of every active row, mixed by its own coefficient; shape [rows, vocabulary]."""
    logits: dict[str, dict[int, Tensor]] = {"policy_logps": {}, "reference_logps": {}}
    if len(streams) == 1:
        return streams[0].logits
    for stream in streams:
        for i, row in enumerate(stream.rows):
            logits[stream.name][id(row)] = stream.logits[i]
    policy, reference = logits["policy_logps"], logits["reference_logps"]
    # a model that a row does not use enters with coefficient 0; the other model's logits stand in for it
    return mix_logits(
        torch.stack([policy.get(id(row), reference.get(id(row))) for row in active]),  # type: ignore[misc]
        torch.stack([reference.get(id(row), policy.get(id(row))) for row in active]),  # type: ignore[misc]
        torch.tensor([row.request.mix for row in active], device=streams[0].logits.device),
    )

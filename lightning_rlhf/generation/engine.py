"""The decode engine: policy and reference rows in one batch, each row with its own mix of the two.

Prompts are prefilled once for all their responses, a row that ends makes room for the next, and the log-probabilities
under both models come out of the same forward passes that chose the tokens. A row pays only for the models its mix
needs.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.estimators.pilaf import mix_logits
from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.lanes import AbstractLanes, Lane, Name, Row, lanes_for
from lightning_rlhf.models.head_gradients import HeadSketch, head_gradients
from lightning_rlhf.models.logprobs import base_model, response_logps
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.reference import AbstractReference, AdapterOffReference
from lightning_rlhf.types import FinishReason, Prompt, Response


REFILL = 4
"""Waiting requests enter when this share of the rows, one in four, has ended."""


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
        self.rows, self.tokens_per_batch = decoding.rows, tokens_per_batch
        """Rows decoded together and tokens of a forward pass, less than was asked for where memory ran out."""
        fitting = _FITTING.get(base_model(policy))
        if fitting is not None:
            self.rows, self.tokens_per_batch = min(self.rows, fitting[0]), min(self.tokens_per_batch, fitting[1])
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
        # equal prompts side by side share a prefill, similar lengths share one without much filling. Longest first: if
        # memory is short, it is short at once
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt.ids), requests[i].prompt.ids))
        with evaluating(self.policy.modules()):
            ordered = [requests[i] for i in order]
            done = {id(row.request): self._response(row) for row in self._decode_within_memory(ordered)}
            result = [done[id(request)] for request in requests]
            if reference_logps:
                result = self._score_missing(requests, result)
        return result

    def _decode_within_memory(self, requests: Sequence[Request]) -> Iterator[Row]:
        """`_decode`; where memory runs out, what is not done is decoded again with half as many rows.

        Raises:
            MemoryError: if there is too little memory for one row.
        """
        waiting = list(requests)
        while True:
            ended: set[int] = set()
            try:
                for row in self._decode(waiting):
                    ended.add(id(row.request))
                    yield row
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # here, where the caches that the error held on to are gone
            free_memory()
            waiting = [request for request in waiting if id(request) not in ended]
            if self.rows == 1 and self.tokens_per_batch <= SMALLEST_PASS:
                raise MemoryError(
                    f"there is too little memory to decode a single response ({reason}): lower "
                    f"data.decoding.max_new_tokens or data.max_prompt_tokens, or use a smaller model"
                )
            self.rows = max(self.rows // 2, 1)
            self.tokens_per_batch = max(self.tokens_per_batch // 2, SMALLEST_PASS)
            _FITTING[base_model(self.policy)] = (self.rows, self.tokens_per_batch)
            warnings.warn(
                f"memory ran out while {self.decoding.rows} responses were decoded together ({reason}); from now on "
                f"{self.rows} are. Responses stay what they are. Set data.decoding.rows={self.rows} to begin with that",
                stacklevel=2,
            )

    def _decode(self, requests: Sequence[Request]) -> Iterator[Row]:
        """Decode in the order given, yielding rows as they end; a row that ends makes room for the next."""
        limit, temperature, top_p = self.decoding.max_new_tokens, self.decoding.temperature, self.decoding.top_p
        waiting = deque(Row(request, request.key.uniforms(limit).tolist()) for request in requests)
        active: list[Row] = []
        # prompts are prefilled together: a few at a time would waste the forward pass
        refill_from = max(1, self.rows // REFILL)
        prompts = [len(request.prompt.ids) for request in requests]
        with self._all_lanes({name for row in waiting for name in row.names}, prompts) as by_name:
            every = list(dict.fromkeys(by_name.values()))
            while waiting or active:
                if waiting and (not active or self.rows - len(active) >= min(refill_from, len(waiting))):
                    new = [waiting.popleft() for _ in range(min(self.rows - len(active), len(waiting)))]
                    active += new
                    for lanes in every:
                        added = [Lane(row, n) for row in new for n in row.names if by_name[n] is lanes]
                        if added:
                            lanes.admit(added)
                logits = _mixed(active, by_name)
                uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in active], dtype=torch.float64)
                for row, token in zip(active, draw_tokens(logits / temperature, uniforms, top_p).tolist(), strict=True):
                    row.ids.append(token)
                    row.done = token in self.eos_ids or len(row.ids) == limit
                used = [lanes for lanes in every if lanes.lanes]
                for lanes in used:
                    lanes.record()
                if self.on_tokens is not None:
                    self.on_tokens(len(active))
                yield from (row for row in active if row.done)
                active = [row for row in active if not row.done]
                for lanes in used:
                    lanes.release()
                    if lanes.lanes:
                        lanes.advance()

    @contextmanager
    def _all_lanes(self, names: set[Name], prompts: Sequence[int]) -> Iterator[dict[Name, AbstractLanes]]:
        """Lanes of the models that are needed: one batch for both where an adapter is all they differ by."""
        budget, compiled, limit = self.tokens_per_batch, self.decoding.compile, self.decoding.max_new_tokens
        with ExitStack() as stack:
            one_batch = isinstance(self.reference, AdapterOffReference) and self.reference.gates_rows and not compiled
            if len(names) == 2 and one_batch:
                assert isinstance(self.reference, AdapterOffReference)
                kind = lanes_for(self.policy, prompts, limit)
                both = kind(self._use_policy, stack.enter_context(self.reference.row_gate()), budget)
                yield {"policy": both, "reference": both}
                return
            found: dict[Name, AbstractLanes] = {}
            if "policy" in names:
                kind = lanes_for(self.policy, prompts, limit)
                found["policy"] = kind(self._use_policy, None, budget, compiled)
            if "reference" in names:
                with self._use_reference() as model:
                    kind = lanes_for(model, prompts, limit)
                found["reference"] = kind(self._use_reference, None, budget, compiled)
            yield found

    def _response(self, row: Row) -> Response:
        reason: FinishReason = "eos" if row.ids[-1] in self.eos_ids else "length"
        return Response(
            ids=tuple(row.ids),
            text=str(self.tokenizer.decode(row.ids, skip_special_tokens=True)),
            finish_reason=reason,
            policy_logps=tuple(row.logps["policy"]) or None,
            reference_logps=tuple(row.logps["reference"]) or None,
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

    def head_gradients(self, prompts: Sequence[Prompt], responses: Sequence[Response], dim: int) -> Tensor:
        """Sketch the gradient of each response; see `AbstractEngine.head_gradients`."""
        groups = []
        for ids, members in groupby(range(len(responses)), key=lambda i: prompts[i].ids):
            groups.append((ids, [responses[i].ids for i in members]))
        return head_gradients(self.policy, groups, HeadSketch(dim), tokens_per_batch=self.tokens_per_batch)

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
    # float64: a float32 running sum over 100k tokens is too coarse for a fair draw
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise ValueError(
            "the logits to decode from are not finite; the policy may have diverged (lower the learning rate, or use "
            "bfloat16 instead of float16), or the reference forbids tokens that the tilt asks for (lower the tilt)"
        )
    threshold = uniforms.to(cumulative.device)[:, None] * total
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.size(-1) - 1)


def with_logps(
    model: PreTrainedModel,
    name: Literal["policy_logps", "reference_logps"],
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    tokens_per_batch: int,
    temperature: float = 1.0,
) -> list[Response]:
    """Fill in log-probabilities under a model where they are missing; consecutive equal prompts are computed once."""
    missing = [i for i, response in enumerate(responses) if getattr(response, name) is None]
    groups = []
    for ids, members in groupby(missing, key=lambda i: prompts[i].ids):
        groups.append((ids, [responses[i].ids for i in members]))
    with evaluating(model.modules()):
        scored = response_logps(model, groups, tokens_per_batch=tokens_per_batch, temperature=temperature)
    filled = list(responses)
    for i, logps in zip(missing, scored, strict=True):
        filled[i] = replace(filled[i], **{name: tuple(logps.tolist())})  # type: ignore[arg-type]
    return filled


SMALLEST_PASS = 256
"""Tokens of a forward pass that memory must allow."""

_FITTING: WeakKeyDictionary[PreTrainedModel, tuple[int, int]] = WeakKeyDictionary()
"""Rows and tokens that fitted into memory, by policy; every round makes an engine of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error).lower() for word in words)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits of a causal LM."""
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]


def _mixed(active: Sequence[Row], by_name: dict[Name, AbstractLanes]) -> Tensor:
    """Next-token logits of every active row, mixed by its own coefficient; shape [rows, vocabulary]."""
    place = {(id(lane.row), lane.name): i for lanes in set(by_name.values()) for i, lane in enumerate(lanes.lanes)}

    def under(name: Name, instead: Name) -> Tensor:
        """Logits of each row under a model; a row that does not use it mixes it with 0, and takes the other's."""
        own = [name if (id(row), name) in place else instead for row in active]
        if len(set(own)) == 1:
            index = [place[id(row), own[0]] for row in active]
            logits = by_name[own[0]].logits
            return logits if index == list(range(len(logits))) else logits[torch.tensor(index, device=logits.device)]
        return torch.stack([by_name[n].logits[place[id(row), n]] for row, n in zip(active, own, strict=True)])

    if all(row.request.mix == 0 for row in active):
        return under("policy", "policy")
    policy, reference = under("policy", "reference"), under("reference", "policy")
    mix = torch.tensor([row.request.mix for row in active], device=policy.device)
    return mix_logits(policy, reference, mix)

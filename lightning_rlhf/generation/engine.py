"""The decode engine: continuous batching in which each response has its own mix of policy and reference logits.

PILAF (arXiv 2502.04270, section 5) samples the next token of a response from::

    pi+ : softmax((1 + beta) h_theta - beta h_ref)
    pi- : softmax((1 - beta) h_theta + beta h_ref)

`pilaf_logits` below makes this mix for every row of the batch. A prompt is prefilled once for all its responses, and a
finished response frees its row for the next request. The log-probabilities under both models come from the forward
passes that generate the tokens. A row runs only the models that its mix needs.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lightning_rlhf.generation.text import sampled_text
from lightning_rlhf.logprobs.compute import base_model, response_logps
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.head_gradients import HeadSketch, head_gradients
from lightning_rlhf.models.reference import AbstractReference, AdapterOffReference
from lightning_rlhf.types import FinishReason, Prompt, Response


REFILL = 4
"""Waiting requests enter when one in this many rows is free."""


class DecodeEngine(AbstractEngine):
    """Decodes batches of requests with KV caches.

    A response depends on its request (prompt, key, mix) and the weights only, not on the rest of the batch, up to
    rounding: each token is sampled by inverse transform of one uniform number from the random stream of the request.

    Args:
        policy: the policy; in eval mode while decoding.
        reference: the frozen reference, or None if no request needs it.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: length limit, temperature and top-p.
        eos_ids: ids that end a response.
        tokens_per_batch: token positions per forward pass of prefill and of scoring.

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
        """Batch size and token positions per forward pass; reduced after an out-of-memory error."""
        # an earlier engine of this policy may have found smaller sizes
        fitting = _FITTING_SIZES.get(base_model(policy))
        if fitting is not None:
            self.rows, self.tokens_per_batch = min(self.rows, fitting[0]), min(self.tokens_per_batch, fitting[1])
        self.on_tokens: Callable[[int], None] | None = None
        """Called after each decoding step with the number of new tokens; updates progress bars."""
        # checked here: mixing logits of different vocabularies would mix unrelated tokens
        if reference is not None:
            with reference.active() as model:
                sizes = vocabulary_size(policy), vocabulary_size(model)
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"policy and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens; their logits cannot "
                    f"be mixed: use a reference with the policy's tokenizer"
                )

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Generate one response per request, in order; see `AbstractEngine.generate`.

        Raises:
            ValueError: if a prompt is empty, or a request needs a reference and the engine has none.
            MemoryError: if there is too little memory for one row.
        """
        for request in requests:
            if not request.prompt.ids:
                raise ValueError(f"prompt {request.prompt.index} has no tokens; give the tokenizer a BOS token")
            if self.reference is None and (request.mix != 0 or reference_logps):
                raise ValueError("this request needs a reference model, and the engine was built without one")
        # equal prompts are adjacent and share a prefill; similar lengths need little padding. Longest first: if memory
        # does not suffice, the first batch shows it
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt.ids), requests[i].prompt.ids))
        with evaluating(self.policy.modules()):
            ordered = [requests[i] for i in order]
            done = {id(row.request): self._response(row) for row in self._decode_within_memory(ordered)}
            # back to the order of the requests
            result = [done[id(request)] for request in requests]
            if reference_logps:
                result = self._score_missing(requests, result)
        return result

    def _decode_within_memory(self, requests: Sequence[Request]) -> Iterator[Row]:
        """Run `_decode`; after an out-of-memory error, decode the unfinished requests again with half as many rows.

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
            # outside of the except block: inside, the traceback still holds the caches
            free_memory()
            # responses do not depend on the batch, so that decoding them again gives the same tokens
            waiting = [request for request in waiting if id(request) not in ended]
            if self.rows == 1 and self.tokens_per_batch <= MIN_TOKENS_PER_PASS:
                raise MemoryError(
                    f"there is too little memory to decode a single response ({reason}): lower "
                    f"data.decoding.max_new_tokens or data.prompt_options.max_prompt_tokens, or use a smaller model"
                )
            self.rows = max(self.rows // 2, 1)
            self.tokens_per_batch = max(self.tokens_per_batch // 2, MIN_TOKENS_PER_PASS)
            _FITTING_SIZES[base_model(self.policy)] = (self.rows, self.tokens_per_batch)
            warnings.warn(
                f"memory ran out while decoding {self.decoding.rows} responses in one batch ({reason}); now a batch "
                f"has {self.rows}. Responses do not change. Set data.decoding.rows={self.rows} to start with this "
                f"number",
                stacklevel=2,
            )

    def _decode(self, requests: Sequence[Request]) -> Iterator[Row]:
        """Decode in the given order and yield rows as they finish; a finished row makes room for the next request."""
        limit, temperature, top_p = self.decoding.max_new_tokens, self.decoding.temperature, self.decoding.top_p
        waiting = deque(Row(request, request.key.uniforms(limit).tolist()) for request in requests)
        active: list[Row] = []
        # refill in batches: prefilling one prompt at a time would underuse the forward pass
        refill_from = max(1, self.rows // REFILL)
        prompts = [len(request.prompt.ids) for request in requests]
        with self._all_lanes(names_of(waiting), prompts) as by_name:
            # policy and reference may share one batch, which must not advance twice per step
            every = list(dict.fromkeys(by_name.values()))
            while waiting or active:
                if waiting and (not active or self.rows - len(active) >= min(refill_from, len(waiting))):
                    new = [waiting.popleft() for _ in range(min(self.rows - len(active), len(waiting)))]
                    active += new
                    for lanes in every:
                        added = lanes_of(new, lanes, by_name)
                        if added:
                            lanes.admit(added)
                # mix first, then divide by the temperature: token ~ softmax(((1 + mix) h_theta - mix h_ref) / T)
                logits = tempered_logits(pilaf_logits(active, by_name), active, temperature)
                # one uniform number per token of a response: its tokens do not depend on the rest of the batch
                uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in active], dtype=torch.float64)
                tokens = sample_tokens(logits, uniforms, top_p).tolist()
                for row, token in zip(active, tokens, strict=True):
                    row.ids.append(token)
                    row.done = token in self.eos_ids or len(row.ids) == limit
                # a model that no active row runs has an empty batch, without logits to record
                used = [lanes for lanes in every if lanes.lanes]
                # log pi of the new tokens, from the logits that are already there
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
        """Lanes of the models in ``names``; one batch for both models if they differ by an adapter only."""
        budget, compiled, limit = self.tokens_per_batch, self.decoding.compile, self.decoding.max_new_tokens
        with ExitStack() as stack:
            # CUDA graphs cannot change the adapter per row, so that compiled models run in two batches
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
        """Make the response of a finished row."""
        reason: FinishReason = "eos" if row.ids[-1] in self.eos_ids else "length"
        return Response(
            ids=tuple(row.ids),
            text=sampled_text(self.tokenizer, row.request.prompt, row.ids, reason == "eos"),
            finish_reason=reason,
            policy_logps=tuple(row.logps["policy"]) or None,
            reference_logps=tuple(row.logps["reference"]) or None,
            source=row.request.source,
        )

    def _score_missing(self, requests: Sequence[Request], responses: Sequence[Response]) -> list[Response]:
        """Compute the log-probabilities that decoding did not need, with one teacher-forced scoring run per model."""
        prompts = [request.prompt for request in requests]
        with self._use_policy() as model:
            responses = with_logps(model, "policy_logps", prompts, responses, self.tokens_per_batch)
        return self.with_reference_logps(prompts, responses)

    def with_reference_logps(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """Add reference log-probabilities to the responses that have none.

        Args:
            prompts: the prompt of each response.
            responses: responses to score.
        """
        with self._use_reference() as model:
            return with_logps(model, "reference_logps", prompts, responses, self.tokens_per_batch)

    def head_gradients(self, prompts: Sequence[Prompt], responses: Sequence[Response], dim: int) -> Tensor:
        """Sketch the gradient of each response; see `GradientEngine.head_gradients`."""
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


def sample_tokens(logits: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """Sample one token per row by inverse transform sampling; int64 [rows].

    Args:
        logits: unnormalized log-probabilities; shape [rows, vocabulary].
        uniforms: one random number in [0, 1) per row; shape [rows].
        top_p: sample from the smallest set of most probable tokens with at least this probability, in (0, 1].

    Raises:
        ValueError: if the logits of a row define no distribution: NaN, +inf, or all -inf.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32).double()
    if top_p < 1.0:
        ordered, index = probabilities.sort(-1, descending=True)
        # a token is outside if the more probable tokens alone reach top_p
        # mass before token k = cumsum_k - p_k; it is 0 for the most probable token, which is thus always kept
        outside = ordered.cumsum(-1) - ordered >= top_p
        # [rows, vocabulary], back from the sorted order to that of token ids
        probabilities = probabilities.scatter(-1, index, ordered.masked_fill(outside, 0.0))
    # token = min {v: F(v) > u F(V)} with the cumulative sum F; in float64, since the rounding error of a float32 sum
    # over 100k tokens would bias the sample
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # softmax of a row with NaN, of +inf, or of -inf alone is NaN, which the cumulative sum carries to its end
    if not bool(total.isfinite().all()):
        raise ValueError(
            "the logits to decode from are not finite; the policy may have diverged (lower the learning rate, or use "
            "bfloat16 instead of float16), or the tilt favors tokens that the reference forbids (lower the tilt)"
        )
    # u F(V) instead of u: the probabilities that top-p keeps need no renormalization
    threshold = uniforms.to(cumulative.device)[:, None] * total
    # right=True: F(v) > threshold, so that u = 0 cannot return a leading token of probability 0
    # clamp: with a threshold rounded up to the total, the search ends behind the last token
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.size(-1) - 1)


def with_logps(
    model: PreTrainedModel,
    name: Literal["policy_logps", "reference_logps"],
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    tokens_per_batch: int,
    temperature: float = 1.0,
) -> list[Response]:
    """Add log-probabilities under a model to the responses that have none; consecutive equal prompts run once.

    Args:
        model: policy or reference.
        name: field of `Response` to set.
        prompts: the prompt of each response.
        responses: responses to score.
        tokens_per_batch: token positions per forward pass.
        temperature: divides the logits, > 0.
    """
    missing = [i for i, response in enumerate(responses) if getattr(response, name) is None]
    groups = []
    # rows of equal adjacent prompts form one group (prompt ids, [response ids, ...])
    for ids, members in groupby(missing, key=lambda i: prompts[i].ids):
        groups.append((ids, [responses[i].ids for i in members]))
    with evaluating(model.modules()):
        scored = response_logps(model, groups, tokens_per_batch=tokens_per_batch, temperature=temperature)
    result = list(responses)
    for i, logps in zip(missing, scored, strict=True):
        result[i] = replace(result[i], **{name: tuple(logps.tolist())})  # type: ignore[arg-type]
    return result


MIN_TOKENS_PER_PASS = 256
"""Lower bound on the token positions per forward pass after out-of-memory errors."""

_FITTING_SIZES: WeakKeyDictionary[PreTrainedModel, tuple[int, int]] = WeakKeyDictionary()
"""Rows and token positions per forward pass that fit into memory, by policy: each round makes a new engine."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of a GPU or a CPU."""
    # on a CPU torch raises a plain RuntimeError, with a text that depends on the platform
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error).lower() for word in words)


def free_memory() -> None:
    """Collect garbage and empty the CUDA cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits of a causal LM."""
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]


def names_of(rows: Iterable[Row]) -> set[Name]:
    """Models that some row needs."""
    names: set[Name] = set()
    for row in rows:
        names.update(row.names)
    return names


def lanes_of(rows: Sequence[Row], lanes: AbstractLanes, by_name: dict[Name, AbstractLanes]) -> list[Lane]:
    """New lanes of the rows that belong to one batch: one per row and model, row by row."""
    added: list[Lane] = []
    for row in rows:
        added.extend(Lane(row, name) for name in row.names if by_name[name] is lanes)
    return added


def pilaf_logits(active: Sequence[Row], by_name: dict[Name, AbstractLanes]) -> Tensor:
    """Next-token logits of every active row, mixed with the coefficient of its request; shape [rows, vocabulary].

    PILAF (arXiv 2502.04270, section 5)::

        h = (1 + mix) h_theta - mix h_ref       mix = +beta: pi+    mix = -beta: pi-    0: policy    -1: reference

    Args:
        active: rows of the batch.
        by_name: lanes of policy and reference, with the logits of their next tokens.
    """
    # (row, model) -> place in its batch, found anew at each step, since `release` may reorder lanes
    index_of: dict[tuple[int, Name], int] = {}
    for lanes in set(by_name.values()):
        index_of |= {(id(lane.row), lane.name): i for i, lane in enumerate(lanes.lanes)}

    def under(name: Name, instead: Name) -> Tensor:
        """Logits of each row under a model; rows that do not run it have coefficient 0 and get the other model's."""
        own = [name if (id(row), name) in index_of else instead for row in active]
        if len(set(own)) == 1:
            index = [index_of[id(row), own[0]] for row in active]
            logits = by_name[own[0]].logits
            # no copy if the lanes are in the order of the rows
            return logits if index == list(range(len(logits))) else logits[torch.tensor(index, device=logits.device)]
        # rows of both models: one [vocabulary] vector per row -> [rows, vocabulary]
        return torch.stack([by_name[n].logits[index_of[id(row), n]] for row, n in zip(active, own, strict=True)])

    if all(row.request.mix == 0 for row in active):
        return under("policy", "policy")
    policy, reference = under("policy", "reference"), under("reference", "policy")
    mix = torch.tensor([row.request.mix for row in active], device=policy.device)
    # h = (1 + mix) h_theta - mix h_ref, in float32
    return mix_logits(policy, reference, mix)


def tempered_logits(logits: Tensor, active: Sequence[Row], default: float) -> Tensor:
    """Divide the logits of every active row by the temperature of its request; shape [rows, vocabulary].

    Args:
        logits: next-token logits, [rows, vocabulary].
        active: rows of the batch.
        default: temperature of requests that have none of their own, > 0.
    """
    own = [row.request.temperature for row in active]
    if all(temperature is None for temperature in own):
        return logits / default
    # one temperature per row, [rows, 1]
    temperatures = [default if temperature is None else temperature for temperature in own]
    return logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[:, None]

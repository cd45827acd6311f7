"""The data types of the framework: prompt, response, comparison, label, preference, rollout.

The flow is *prompt -> sampler -> labeler -> store -> collate -> module -> loss -> callback*. Everything here is plain
data that pickles and converts to JSON, without Lightning or models. Token ids are kept as sampled and never re-derived
from text; lengths, never pad ids, define masks. Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias


State: TypeAlias = dict[str, Any]
"""State of an object for the checkpoint, as plain data: numbers, strings, lists, dictionaries and tensors."""

Message = dict[str, Any]
"""One chat turn, ``{"role": "user" | "assistant" | "system" | ..., "content": "..."}``.

``content`` is text, or None where the turn holds something else. Other fields, such as ``tool_calls``, are passed to
the chat template as they are.
"""

FinishReason = Literal["eos", "length"]
LabelStatus = Literal[
    "ok", "invalid", "refused", "truncated", "rate_limited", "timeout", "skipped", "tie", "both_bad", "routed"
]
FINAL_STATUSES = frozenset({"skipped", "tie", "both_bad"})
"""Answers of people that give no label, and are not asked for again: a skip, and ties where a run drops them."""
ROUTED: LabelStatus = "routed"
"""Verdict of a first labeler on a pair that waits for a second one (`MixedLabeler`): no label, and no failure."""


@dataclass(frozen=True)
class RecordedPair:
    """Two completions of a data row with their label, or a single one (the unpaired format of KTO).

    Args:
        chosen: text of the preferred completion, or of the single one, without the prompt.
        rejected: text of the other completion; empty for a single one.
        probability: P(chosen preferred) in [0, 1], 1 for an ordinary preference row; of a single one P(desirable).
        weight: weight of the pair in the loss, >= 0.
    """

    chosen: str
    rejected: str
    probability: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class PromptRow:
    """One row of a data source, parsed but not tokenized.

    Exactly one of ``text`` and ``messages`` (last turn not by the assistant) is set.

    Args:
        source: where the row came from, for error messages: ``"file.jsonl row 12"`` (rows count from 1).
        text: plain prompt, used as it stands.
        messages: conversational prompt, rendered with the chat template of the policy.
        pair: recorded completions, for preference rows.
        completion: text of the one recorded completion, for supervised rows; with ``pair`` it is a labeled response.
        template_options: arguments of the chat template besides the messages, such as ``tools``.
        answers: the recorded completions as messages, chosen before rejected, where they hold more than text; empty
            otherwise.
        finish_reasons: why the recorded completions ended, in the same order; empty if all of them ended by
            themselves.
        subset: name of the part of the data that the row belongs to, for metrics by source; empty if it has none.
        columns: other columns of the row, for rewards; they play no part in the identity of a row.
    """

    source: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    pair: RecordedPair | None = None
    completion: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    answers: tuple[Message, ...] = ()
    finish_reasons: tuple[FinishReason, ...] = ()
    subset: str = ""
    columns: Mapping[str, object] = field(default_factory=dict, compare=False)

    @property
    def is_single(self) -> bool:
        """Whether the row is one response with a label that says whether it is desirable, as KTO reads them."""
        return self.pair is not None and self.completion is not None


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Args:
        index: position in its data set; names the prompt in seeds, in the ledger and in error messages.
        ids: token ids, with BOS and template tokens; may be empty.
        text: the rendered text behind ``ids``.
        messages: the conversation behind ``text``, when the row was conversational; labelers and rewards read it.
        pair: tokenized recorded pair (chosen, rejected), for offline preference rows; (response, `NO_RESPONSE`) for
            rows of single responses.
        recorded: ``pair`` as text, with its label.
        completion: tokenized recorded completion, for supervised rows; ledgers do not keep it.
        template_options: arguments of the chat template besides the messages, such as ``tools``.
        subset: name of the part of the data that the row belongs to; empty if it has none. Ledgers do not keep it.
        columns: other columns of the row, such as the right answer, for rewards; ledgers do not keep them, and
            collectors put them back by ``index``.
    """

    index: int
    ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...] | None = None
    pair: tuple[Response, Response] | None = None
    recorded: RecordedPair | None = None
    completion: Response | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    subset: str = ""
    # read-only, and shared with the row; two prompts that differ in it alone are the same to a ledger
    columns: Mapping[str, object] = field(default_factory=dict, compare=False)

    @property
    def is_single(self) -> bool:
        """Whether a single labeled response is recorded, and no pair."""
        return self.pair is not None and not self.pair[1].ids


@dataclass(frozen=True)
class Response:
    """A completion of a prompt.

    Args:
        ids: token ids, EOS included when it was sampled; empty in `NO_RESPONSE` alone.
        text: decoded text without special tokens; of a recorded response, the text of the row to the letter.
        finish_reason: ``"eos"``, or ``"length"`` when the token limit cut it.
        policy_logps: log pi_theta of each token at sampling time, untempered, nats; None when not computed.
        reference_logps: log pi_ref of each token, nats; None when not computed.
        source: distribution it was sampled from: ``"policy"``, ``"reference"``, ``"plus"``, ``"minus"``, ``"dataset"``.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    policy_logps: tuple[float, ...] | None = None
    reference_logps: tuple[float, ...] | None = None
    source: str = "policy"

    def log_ratio(self) -> float:
        """Sum over tokens of log pi_theta - log pi_ref, nats; the implicit reward is beta times this."""
        if self.policy_logps is None or self.reference_logps is None:
            raise ValueError(
                "this response carries no log-probabilities of policy and reference; "
                "ask the engine for them with reference_logps=True"
            )
        return sum(self.policy_logps) - sum(self.reference_logps)


NO_RESPONSE = Response((), "", "eos", policy_logps=(), reference_logps=(), source="none")
"""The second response of a comparison that holds a single one; its log-probability is that of no token, 0."""


@dataclass(frozen=True)
class Comparison:
    """A prompt and two responses without a label, or a single response.

    Args:
        prompt: the prompt.
        a: first response.
        b: second response; `NO_RESPONSE` where ``a`` is judged by itself, as KTO has it.
        branch: how the pair was sampled: ``"base"``, ``"tilt"``, ``"best_of_n"``, ``"hybrid"``, ``"offline"``, ...
        weight: importance of the pair in the loss, >= 0 (w(x) of T-PILAF).
        passes: model forward passes per token position spent on the pair (Table 1 of PILAF).
        meta: other entries, e.g. ``{"delta": r_theta(a) - r_theta(b)}``; JSON scalars only.
    """

    prompt: Prompt
    a: Response
    b: Response
    branch: str = "base"
    weight: float = 1.0
    passes: float = 2.0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def has_equal_responses(self) -> bool:
        """Whether the responses are the same: in their tokens, or in their text.

        Invalid bytes all decode to the same replacement character; with it, only tokens are compared.
        """
        if self.is_single:
            return False
        return self.a.ids == self.b.ids or (self.a.text == self.b.text and "\ufffd" not in self.a.text)

    @property
    def is_single(self) -> bool:
        """Whether there is one response alone; a label then says P(a desirable)."""
        return not self.b.ids

    def swap(self) -> Comparison:
        """The same comparison with the two responses exchanged; entries of ``meta`` on their order are inverted."""
        meta = dict(self.meta)
        if "delta" in meta:
            meta["delta"] = -meta["delta"]
        if "recorded_first" in meta:
            meta["recorded_first"] = not meta["recorded_first"]
        return replace(self, a=self.b, b=self.a, meta=meta)


@dataclass(frozen=True)
class Label:
    """A verdict on a comparison.

    Args:
        probability: P(a preferred) in [0, 1], of a single response P(desirable); None unless ``status`` is ``"ok"``.
            A failed label is never a tie.
        status: ``"ok"``, or why there is no verdict.
        cost: price of the label in the labeler's own unit (1 per human or oracle label, money for a server).
        meta: other entries, e.g. ``{"reward_a": 0.3, "reward_b": -0.1}``; JSON scalars only.
    """

    probability: float | None
    status: LabelStatus = "ok"
    cost: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def is_free_tie(self) -> bool:
        """Whether this is the label of equal responses, see `free_tie`."""
        return self.meta.get(FREE_TIE) is True

    @property
    def weight(self) -> float:
        """Weight that the labeler gives the pair, >= 0; 1 unless ``meta`` has an entry `PAIR_WEIGHT`."""
        return float(self.meta.get(PAIR_WEIGHT, 1.0))

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.probability is not None):
            raise ValueError(
                f"a label has a probability if and only if its status is 'ok'; got {self.status!r}, {self.probability}"
            )
        if self.probability is not None and not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"P(a preferred) must lie in [0, 1]; got {self.probability}")
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(
                f"meta[{PAIR_WEIGHT!r}], the weight of a pair in the loss, must be >= 0; got {self.weight}"
            )


PAIR_WEIGHT = "pair_weight"
"""Entry of a label's ``meta``: the factor on the weight of its pair in the loss."""


def pair_rows(comparisons: Sequence[Comparison]) -> tuple[list[Prompt], list[Response]]:
    """Prompts and responses of pairs, in the order a_0, b_0, a_1, b_1, ...; [2 * comparisons] each."""
    prompts: list[Prompt] = []
    responses: list[Response] = []
    for comparison in comparisons:
        prompts += [comparison.prompt] * 2
        responses += [comparison.a, comparison.b]
    return prompts, responses


FREE_TIE = "free_tie"
"""Entry of a label's ``meta`` that marks free ties."""


def free_tie() -> Label:
    """The label of a pair of equal responses: P = 0.5, given without the labeler, at no cost."""
    return Label(0.5, cost=0.0, meta={FREE_TIE: True})


@dataclass(frozen=True)
class Preference:
    """A labeled comparison: one training example.

    Args:
        comparison: the pair.
        label: its label, with status ``"ok"``.
        round: the round in which it was sampled, from 0.
    """

    comparison: Comparison
    label: Label
    round: int = 0

    @property
    def probability(self) -> float:
        """P(a preferred) in [0, 1], of a single response P(desirable)."""
        assert self.label.probability is not None
        return self.label.probability

    @property
    def weight(self) -> float:
        """Weight in the loss, >= 0: that of the comparison times that of the label."""
        return self.comparison.weight * self.label.weight


@dataclass(frozen=True)
class Rollout:
    """A response that the policy sampled, with its reward.

    Args:
        prompt: the prompt.
        response: the response, with log-probabilities under the policy and the reference at ``temperature``.
        temperature: softmax temperature of sampling, > 0.
        values: V of the state before each token, at sampling time; None without a value model.
        reward: output of the reward function, not normalized; None until it is scored.
        std: standard deviation of the reward; None where the reward function gives none.
    """

    prompt: Prompt
    response: Response
    temperature: float = 1.0
    values: tuple[float, ...] | None = None
    reward: float | None = None
    std: float | None = None

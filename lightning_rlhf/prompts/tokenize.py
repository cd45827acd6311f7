"""Rows of text to prompts of token ids, with the recorded completions of each.

The rules are the same for every tokenizer:

- A plain prompt gets the special tokens that the tokenizer puts in front (BOS), never those it puts behind, and never a
  second BOS. A plain prompt that ends with the generation prompt of the chat template was rendered beforehand: it gets
  BOS only if the template writes one.
- A conversational prompt is rendered with the chat template; the template writes BOS, so the tokenizer adds none.
- Prompt and completion are tokenized as one text, and the completion is the part behind the prompt's own ids. Where a
  token would span the border, the prompt keeps the ids that the policy sees in generation, and the completion is
  tokenized so that both together still decode to the text.
- A completion ends as a sampled one does: with the end-of-turn token of the chat template, or EOS, unless the token
  limit cut it. Text of the template behind that token is left out.
- Answers are written by the chat template. Where it would leave a part out, such as the reasoning, the answer follows
  the prompt verbatim, as a sampled one would.
- Fields of messages that the template does not write are errors. Those that only link messages (``tool_call_id``) are
  counted instead.

Known limits: text inside a turn that looks like a special token (``"<|im_end|>"``) becomes that token, as everywhere
with ``apply_chat_template``; clean prompts from untrusted sources first. Templates that write today's date change
prompts from day to day; give such a tokenizer a template without a date.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Literal, TypeAlias, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.prompts.dataset import EMPTY, IDENTICAL
from lightning_rlhf.prompts.encode import TEXTS_AT_ONCE, Encoded, Ids, TextEncoder, encode_all
from lightning_rlhf.prompts.messages import TOOLS, field_error, holds_text_alone
from lightning_rlhf.prompts.shaped_template import shaped_template
from lightning_rlhf.prompts.template import TurnFormat, shared_length, turn_format
from lightning_rlhf.types import NO_RESPONSE, FinishReason, Message, Prompt, PromptRow, Response


CHAT_TEMPLATES = {
    # the transcript format of HH-RLHF, for models without a chat format
    "human_assistant": (
        "{{ bos_token or '' }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
        "{% else %}{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
}
"""Chat templates with a name."""

Options: TypeAlias = Mapping[str, object]
"""Options of a chat template beside the messages, e.g. ``tools``."""

LONG_PROMPT = "long prompts dropped"
TRUNCATED_PROMPT = "long prompts truncated"
TRUNCATED_COMPLETION = "truncated completions"
ENDED_INSIDE = "completions cut at an end of turn inside"
TO_THE_LETTER = "answers taken to the letter, which the chat template would shorten"
WITHOUT_OPENING = "prompts without the end of the generation prompt, as their answers are written"
PAST_REASONING = "reasoning of earlier turns, which the chat template leaves out"
IGNORED_LINK = "message fields that the chat template leaves out: "

LINKS = ("tool_call_id", "id", "index")
"""Fields that only link messages; templates may leave them out."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields with the reasoning of the assistant; templates may leave them out of earlier turns."""


def tokenize_rows(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    on_long_prompt: Literal["error", "drop", "truncate"] = "error",
    system_prompt: str | None = None,
    chat_template: str | None = None,
    end_ids: Collection[int] = (),
    chat: bool = False,
) -> tuple[list[Prompt], dict[str, int]]:
    """Turn rows into tokenized prompts, and count dropped and truncated rows.

    ``Prompt.index`` is the position of the row in ``rows``, so that it does not depend on dropped rows.

    Args:
        rows: rows of a prompt source.
        tokenizer: tokenizer of the policy.
        max_prompt_tokens: longest prompt in tokens, template included, >= 1.
        max_response_tokens: longest recorded completion in tokens, EOS included, >= 1; longer ones lose their end.
        on_long_prompt: treatment of longer prompts: "error"; "drop", counted; or "truncate", counted, which cuts the
            beginning except BOS.
        system_prompt: system message for conversations that have none.
        chat_template: Jinja chat template to use instead of the tokenizer's own, or the name "human_assistant".
        end_ids: token ids at which generation stops, beside EOS and the template's end of turn.
        chat: take a plain prompt as the user's turn of a conversation.

    Raises:
        ValueError: if a prompt is empty, or too long (and ``on_long_prompt`` is "error"), if there are conversations
            and no chat template, if the template does not fit or leaves a part out, or if no row is left.
    """
    counts: Counter[str] = Counter()
    settings = TokenLimits(max_prompt_tokens, max_response_tokens, on_long_prompt)
    prompts = list(
        tokenized(
            rows,
            tokenizer,
            settings,
            counts=counts,
            system_prompt=system_prompt,
            chat_template=chat_template,
            end_ids=end_ids,
            chat=chat,
        )
    )
    counts = +counts  # without zeros
    check_some_left(len(prompts), len(rows), counts)
    return prompts, dict(counts)


def check_some_left(prompts: int, rows: int, counts: Mapping[str, int]) -> None:
    """Check that there are prompts.

    Args:
        prompts: number of prompts.
        rows: number of rows that they were made of.
        counts: numbers of dropped and truncated rows, by reason.

    Raises:
        ValueError: if there are none.
    """
    if not prompts:
        raise ValueError(
            f"no prompts are left of {rows} rows ({dict(counts)}): raise max_prompt_tokens and "
            f"max_response_tokens, or check the data"
        )


@dataclass(frozen=True)
class TokenLimits:
    """Limits of prompts and responses.

    Args:
        max_prompt_tokens: longest prompt in tokens, template included, >= 1.
        max_response_tokens: longest recorded completion in tokens, EOS included, >= 1; longer ones lose their end.
        on_long_prompt: treatment of longer prompts, as in `tokenize_rows`.

    Raises:
        ValueError: if a limit is below 1, or the treatment has another name.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    on_long_prompt: Literal["error", "drop", "truncate"] = "error"

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1 or self.max_response_tokens < 1:
            raise ValueError(
                f"limits must be at least 1 token; got max_prompt_tokens={self.max_prompt_tokens} and "
                f"max_response_tokens={self.max_response_tokens}"
            )
        if self.on_long_prompt not in ("error", "drop", "truncate"):
            raise ValueError(f"on_long_prompt must be 'error', 'drop' or 'truncate'; got {self.on_long_prompt!r}")


def tokenized(
    rows: Iterable[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    *,
    counts: Counter[str],
    system_prompt: str | None = None,
    chat_template: str | None = None,
    end_ids: Collection[int] = (),
    chat: bool = False,
    encoder: TextEncoder | None = None,
    first: int = 0,
) -> Iterator[Prompt]:
    """The prompts of `tokenize_rows`, one after another: rows are read and tokenized in portions.

    Args:
        rows: rows of a prompt source.
        tokenizer: tokenizer of the policy.
        limits: limits of prompts and responses.
        counts: receives the numbers of dropped and truncated rows, by reason.
        system_prompt: see `tokenize_rows`, like the arguments below.
        chat_template: see there.
        end_ids: see there.
        chat: see there.
        encoder: encoder with the tokenizer, which keeps what it knows from one call to the next.
        first: number of the first row in its data set, from 0.
    """
    renderer = _Renderer(tokenizer, system_prompt, CHAT_TEMPLATES.get(chat_template or "", chat_template), counts)
    encoder = encoder or TextEncoder(tokenizer)
    stream = iter(rows)
    while part := list(islice(stream, TEXTS_AT_ONCE)):
        first, start = first + len(part), first
        written = [as_turn(row) for row in part] if chat else part
        drafts = _drafts(written, renderer, encoder, limits, start, counts)
        completions = _completions(drafts, encoder)
        for draft in drafts:
            # before any `continue`: dropped rows must take their completions from the shared iterator too
            answers = [next(completions) for _ in draft.written.rests]
            prompt = _finished(draft, answers, renderer, end_ids, limits, counts)
            if prompt is not None:
                yield prompt


def _finished(
    draft: _Draft,
    answers: Sequence[tuple[int, ...]],
    renderer: _Renderer,
    end_ids: Collection[int],
    limits: TokenLimits,
    counts: Counter[str],
) -> Prompt | None:
    """A prompt with its recorded completions; None, counted, if they cannot be used."""
    recorded = _recorded(draft, answers, renderer, end_ids, limits.max_response_tokens, counts)
    if recorded is None:
        return None
    prompt = draft.prompt
    if draft.row.pair is not None:
        prompt = replace(prompt, pair=(recorded[0], NO_RESPONSE if draft.row.is_single else recorded[1]))
    elif recorded:
        prompt = replace(prompt, completion=recorded[0])
    # cut only now, since the completions are tokenized behind the whole prompt
    if len(prompt.ids) > limits.max_prompt_tokens:
        counts[TRUNCATED_PROMPT] += 1
        ids, text = renderer.truncated(prompt.ids, prompt.text, limits.max_prompt_tokens)
        prompt = replace(prompt, ids=ids, text=text)
    return prompt


def as_turn(row: PromptRow) -> PromptRow:
    """A row whose plain prompt is the user's turn; conversations stay as they are."""
    if row.messages is not None:
        return row
    return replace(row, text=None, messages=({"role": "user", "content": row.text or ""},))


@dataclass(frozen=True)
class _Draft:
    """A prompt whose recorded completions are not tokenized yet.

    Args:
        row: the data row.
        prompt: the prompt, not truncated.
        encoded: token ids of the prompt's text, without special tokens in front.
        written: the row as text.
    """

    row: PromptRow
    prompt: Prompt
    encoded: Encoded
    written: _Written


def _drafts(
    rows: Sequence[PromptRow],
    renderer: _Renderer,
    encoder: TextEncoder,
    limits: TokenLimits,
    first: int,
    counts: Counter[str],
) -> list[_Draft]:
    """Tokenize the prompts; long ones are errors, or dropped and counted, or kept to be truncated later.

    The first row has the number ``first`` in its data set.
    """
    max_prompt_tokens, on_long_prompt = limits.max_prompt_tokens, limits.on_long_prompt
    written = [renderer.write(row) for row in rows]
    encoded = encoder.encode_open([one.text for one in written])
    drafts: list[_Draft] = []
    for index, (row, one, bare) in enumerate(zip(rows, written, encoded, strict=True), start=first):
        ids = renderer.with_front(bare.ids, conversational=one.messages is not None)
        if not ids:
            problem = "is empty, and the tokenizer puts no token in front of it"
            raise field_error(row.source, "prompt", problem, "write a prompt, or drop the row")
        if len(ids) > max_prompt_tokens and on_long_prompt == "error":
            raise ValueError(
                f"{row.source}: prompt has {len(ids)} tokens, and max_prompt_tokens is {max_prompt_tokens}: raise "
                f"max_prompt_tokens, or set on_long_prompt to 'drop' or to 'truncate'"
            )
        if len(ids) > max_prompt_tokens and on_long_prompt == "drop":
            counts[LONG_PROMPT] += 1
            continue
        prompt = Prompt(
            index,
            ids,
            one.text,
            one.messages,
            recorded=row.pair,
            template_options=row.template_options,
            subset=row.subset,
            columns=row.columns,
        )
        drafts.append(_Draft(row, prompt, bare, one))
    return drafts


def _recorded(
    draft: _Draft,
    answers: Sequence[tuple[int, ...]],
    renderer: _Renderer,
    end_ids: Collection[int],
    max_response_tokens: int,
    counts: Counter[str],
) -> list[Response] | None:
    """The recorded completions of a row as responses; None, counted, if one is empty or two are the same."""
    row, written = draft.row, draft.written
    if not all(written.rests):
        counts[EMPTY] += 1
        return None
    recorded: list[Response] = []
    for number, (ids, text) in enumerate(zip(answers, written.answers, strict=True)):
        # a plain prompt that was rendered beforehand is a chat as well
        chat = written.messages is not None or renderer.format.asks(draft.encoded.ids)
        reason = row.finish_reasons[number] if row.finish_reasons else "eos"
        ended, inside = renderer.ended(ids, end_ids, chat, reason, row.source)
        counts[ENDED_INSIDE] += inside
        # None where text behind an end of turn was dropped: the text of the row would say more than the ids
        recorded.append(_response(renderer, ended, max_response_tokens, reason, None if inside else text))
    ends = renderer.ends(end_ids)
    if any(ends.issuperset(response.ids) for response in recorded):  # nothing but EOS
        counts[EMPTY] += 1
        return None
    # they differed in the part beyond the limit, or in white space that is trimmed
    if len(recorded) == 2 and recorded[0].ids == recorded[1].ids:
        counts[IDENTICAL] += 1
        return None
    for response in recorded:
        counts[TRUNCATED_COMPLETION] += len(response.ids) == max_response_tokens and response.finish_reason == "length"
    return recorded


Reading = Literal["template", "end_of_sequence"]


def encode_answers(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    reading: Reading = "template",
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of prompts and answers under another tokenizer, from their texts.

    A conversation gets exactly the ids of ``apply_chat_template``; only an answer that was cut off has no end. A plain
    prompt and its answer are one text that ends with EOS.

    Args:
        prompts: the prompt of each answer.
        responses: the answers.
        tokenizer: the other tokenizer.
        chat_template: Jinja chat template to use instead of the tokenizer's own, or the name "human_assistant".
        reading: ``end_of_sequence`` ends answers with EOS in place of the text of the template behind a turn, as this
            library did before it read reward models at the end of the template.
    """
    renderer = _Renderer(tokenizer, None, CHAT_TEMPLATES.get(chat_template or "", chat_template), None)
    texts, wholes = [], []
    for prompt, answer in zip(prompts, responses, strict=True):
        if prompt.messages is None:
            texts.append(prompt.text)
            wholes.append(prompt.text + answer.text)
            continue
        source = f"prompt {prompt.index}"
        messages = (*prompt.messages, {"role": "assistant", "content": answer.text})
        texts.append(renderer.render(prompt.messages, prompt.template_options, source))
        wholes.append(renderer.render(messages, prompt.template_options, source))
        renderer.check(prompt.messages, prompt.template_options, texts[-1], source)
    encoded, together = encode_all(tokenizer, texts), encode_all(tokenizer, wholes)
    cases = [
        # take all ids of a conversation, and of plain text those behind the prompt
        (bare, whole, answer.text) if prompt.messages is None else ((), whole, "")
        for prompt, answer, bare, whole in zip(prompts, responses, encoded, together, strict=True)
    ]
    pairs = []
    for prompt, answer, bare, ids in zip(prompts, responses, encoded, _after(tokenizer, cases), strict=True):
        if prompt.messages is not None:
            whole = renderer.read(ids, answer.finish_reason, reading)
            # 1 <= start <= len(whole) - 1, since neither prompt nor answer may be empty
            start = max(1, min(shared_length(bare, whole), len(whole) - 1))
            pairs.append((whole[:start], whole[start:]))
            continue
        chat = reading == "template" and renderer.format.asks(bare)
        ended, _ = renderer.ended(ids, (), chat, answer.finish_reason, f"prompt {prompt.index}")
        front = renderer.with_front(bare, conversational=False)
        pairs.append((front, renderer.format.closed(bare, ended) if chat else ended))
    return pairs


@dataclass(frozen=True)
class _Written:
    """A row as text.

    Args:
        text: the prompt.
        messages: the conversation behind it.
        rests: text behind the prompt, one per recorded completion; empty for a blank one.
        answers: the completions verbatim; None for a message with more than text.
    """

    text: str
    messages: tuple[Message, ...] | None
    rests: tuple[str, ...]
    answers: tuple[str | None, ...]


class _Renderer:
    """Writes prompts and answers as text, conversations with one chat template.

    Args:
        tokenizer: the tokenizer.
        system_prompt: system message for conversations that have none.
        template: chat template in place of the tokenizer's own.
        counts: receives the counts. Without it, a part that the template leaves out is a warning instead of an error.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None,
        template: str | None,
        counts: Counter[str] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.template = template
        self.counts = counts
        self.leading = leading_special_ids(tokenizer)
        # attributes of a tokenizer take microseconds each
        self.bos, self.eos = cast(tuple[int | None, int | None], (tokenizer.bos_token_id, tokenizer.eos_token_id))
        self._ends: dict[tuple[int, ...], frozenset[int]] = {}
        self._spelled: dict[int, str] = {}
        self._unwritten: str | None = None
        self._shaped = shaped_template(tokenizer, template)

    @cached_property
    def format(self) -> TurnFormat:
        """Format of the assistant's turn in the template."""
        return turn_format(self.tokenizer, self.template)

    def write(self, row: PromptRow) -> _Written:
        """Write a row as text."""
        messages = self.conversation(row)
        answers = _answers(row)
        texts = tuple(a["content"] if holds_text_alone(a) else None for a in answers)
        if messages is None:
            return _Written(row.text or "", None, tuple(text or "" for text in texts), texts)
        text = self.render(messages, row.template_options, row.source)
        self.check(messages, row.template_options, text, row.source)
        blank = [holds_text_alone(answer) and not answer["content"].strip() for answer in answers]
        # empty rests let `_recorded` drop and count a row with a blank answer
        if not answers or any(blank):
            return _Written(text, messages, ("",) * len(answers), texts)
        text, rests = self._rests(messages, row.template_options, text, answers, row.source)
        return _Written(text, messages, tuple(rests), texts)

    def conversation(self, row: PromptRow) -> tuple[Message, ...] | None:
        """Put the system prompt before the messages of a row, unless they have their own; None for a plain prompt."""
        if self.system_prompt is None or (row.messages is not None and row.messages[0]["role"] in _SYSTEM):
            return row.messages
        if row.messages is None:
            raise ValueError(
                f"{row.source}: a plain prompt has no place for system_prompt: write the prompt as messages, or set "
                f"data.prompt_options.chat=true to take plain prompts as the user's turns"
            )
        return ({"role": "system", "content": self.system_prompt}, *row.messages)

    def render(self, messages: Sequence[Message], options: Options, source: str) -> str:
        """Write a conversation as text; with the generation prompt, unless the last turn is the assistant's."""
        if self.template is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"{source}: the prompt is a conversation, and the tokenizer has no chat template: set chat_template to "
                f"one (or to the name 'human_assistant'), use an instruction-tuned model, or use plain prompts"
            )
        if all(message["content"] is not None for message in messages):
            if options or self._shaped is None:
                return self._applied(messages, options, source)
            return self._shaped.render(messages, lambda same_shape: self._applied(same_shape, options, source))
        silent = [{**m, "content": ""} if m["content"] is None else m for m in messages]
        # some templates distinguish "no text" from an empty text, others write the word None
        as_empty = self._applied(silent, options, source)
        try:
            as_null = self._applied(messages, options, source)
        except ValueError:
            return as_empty
        return as_empty if as_null.count("None") > as_empty.count("None") else as_null

    def _applied(self, messages: Sequence[Message], options: Options, source: str) -> str:
        try:
            # its options are those of the template
            apply = cast(Callable[..., object], self.tokenizer.apply_chat_template)
            text = apply(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=messages[-1]["role"] != "assistant",
                tokenize=False,
                **options,
            )
        # a template is a program: fields that it does not expect may raise any of these
        except (TemplateError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{source}: the chat template refuses the conversation ({error}): change the turns of the row, or set "
                f"chat_template to one that takes them"
            ) from error
        assert isinstance(text, str)
        return text

    def check(self, messages: Sequence[Message], options: Options, text: str, source: str, first: int = 0) -> None:
        """Check that a template has written all parts of the messages, from message ``first`` on.

        Raises:
            ValueError: naming the row and the missing part.
        """
        for number, message in enumerate(messages[first:], start=first):
            content = message["content"]
            # most templates write a text as it is; else it is left out if another text makes no difference
            if (
                content
                and content.strip() not in text
                and self._same(messages, number, {"content": PLACEHOLDER}, options, text)
            ):
                self._leaves_out(source, f"content of message {number + 1}, by {message['role']!r}")
            if message["role"] not in _USUAL_ROLES and self._same(messages, number, {"role": UNKNOWN}, options, text):
                self._leaves_out(source, f"role {message['role']!r} of message {number + 1}")
            for name in message.keys() - {"role", "content"}:
                if self._same(messages, number, {name: None}, options, text):
                    self._check_field(messages, number, name, options, source)
        for name in options:
            # options that the template reads, such as enable_thinking, may make no difference to a row
            if name == TOOLS or name not in self._template_text():
                fewer = {key: value for key, value in options.items() if key != name}
                if self.render(messages, fewer, source) == text:
                    self._leaves_out(source, f"{name!r}, which the row gives to the chat template")

    def _check_field(self, messages: Sequence[Message], number: int, name: str, options: Options, source: str) -> None:
        """Report that a field of a message is not written, unless templates leave it out by convention."""
        role = messages[number]["role"]
        if name in LINKS or (name == "name" and role in ("tool", "function", "ipython")):
            if self.counts is not None:
                self.counts[f"{IGNORED_LINK}{name}"] += 1
            return
        if name in REASONING and number < len(messages) - 1:
            # templates of reasoning models write the reasoning of the last turn only
            last = messages[: number + 1]
            if not self._same(last, number, {name: None}, options, self.render(last, options, source)):
                if self.counts is not None:
                    self.counts[PAST_REASONING] += 1
                return
        self._leaves_out(source, f"field {name!r} of message {number + 1}, by {role!r}")

    def _same(self, messages: Sequence[Message], number: int, change: Options, options: Options, text: str) -> bool:
        """Whether a change in one message makes no difference to the template; a None leaves the field out."""
        changed = {name: value for name, value in {**messages[number], **change}.items() if value is not None}
        # `render` reads the content of every message
        changed.setdefault("content", None)
        try:
            return self.render([*messages[:number], changed, *messages[number + 1 :]], options, "") == text
        # a template that refuses the change has read the changed part
        except ValueError:
            return False

    def _leaves_out(self, source: str, part: str) -> None:
        problem = f"{source}: the chat template does not write {part}"
        if self.counts is None:
            # one warning for a column, not one per row
            if self._unwritten != part:
                warnings.warn(f"{problem}; it is lost on the model that reads this", stacklevel=4)
            self._unwritten = part
            return
        raise ValueError(
            f"{problem}: set chat_template to one that does, drop it from the data, or name it in ignored_fields"
        )

    def _template_text(self) -> str:
        return self.template or str(self.tokenizer.chat_template)

    def _rests(
        self,
        messages: tuple[Message, ...],
        options: Options,
        text: str,
        answers: Sequence[Message],
        source: str,
    ) -> tuple[str, list[str]]:
        """The prompt, and the text of each answer behind it, up to the end of the turn or further."""
        wholes = [self.render((*messages, answer), options, source) for answer in answers]
        for answer, whole in zip(answers, wholes, strict=True):
            # text alone needs no check: `_holds` finds it missing, and then it follows the prompt verbatim
            if not holds_text_alone(answer):
                self.check((*messages, answer), options, whole, source, first=len(messages))
        if all(whole.startswith(text) for whole in wholes):
            rests = [whole[len(text) :] for whole in wholes]
            return text, [
                self._trimmed(rest) if _holds(rest, answer) else self._to_the_letter(answer)
                for rest, answer in zip(rests, answers, strict=True)
            ]
        # in a conversation with an answer, the template omits a part of the generation prompt, e.g. "<think>"
        start = self._without_opening(messages, options, text, source)
        opening = text[len(start) :]
        if not all(whole.startswith(start) for whole in wholes):
            self._rewrites(text, source)
        held = [_holds(whole[len(start) :], answer) for whole, answer in zip(wholes, answers, strict=True)]
        # no answer is written whole: keep the generation prompt as in generation
        if not any(held):
            return text, [self._to_the_letter(answer, opening.strip()) for answer in answers]
        if self.counts is not None:
            self.counts[WITHOUT_OPENING] += 1
        return start, [
            # the prompt ends at `start` for all answers of the row: a verbatim one brings the opening itself
            self._trimmed(whole[len(start) :]) if kept else opening + self._to_the_letter(answer, opening.strip())
            for whole, answer, kept in zip(wholes, answers, held, strict=True)
        ]

    def _without_opening(self, messages: tuple[Message, ...], options: Options, text: str, source: str) -> str:
        """The part of the prompt that the template writes before every answer."""
        # the common prefix of two different answers
        written = [self.render((*messages, {"role": "assistant", "content": c}), options, source) for c in ("a", "b")]
        start = written[0][: shared_length(*written)]
        if not start or not text.startswith(start):
            self._rewrites(text, source)
        return start

    def _rewrites(self, text: str, source: str) -> None:
        raise ValueError(
            f"{source}: the chat template writes the prompt differently once it is answered, so that the answer "
            f"cannot be cut off: set chat_template to one that only appends (prompt ends {text[-60:]!r})"
        )

    def _trimmed(self, rest: str) -> str:
        """An answer as the template writes it; without white space at its end where no token ends the turn."""
        return rest.rstrip() if self.format.end is None else rest

    def _to_the_letter(self, answer: Message, opening: str = "") -> str:
        """An answer as it would be sampled, with the end of the turn; without an opening that the prompt has."""
        if self.counts is not None:
            self.counts[TO_THE_LETTER] += 1
        text = str(answer["content"])
        if opening and text.lstrip().startswith(opening):
            text = text.lstrip()[len(opening) :].lstrip("\n")
        end = self.format.end
        return text if end is None else text + str(self.tokenizer.convert_ids_to_tokens(end))

    def with_front(self, bare: tuple[int, ...], *, conversational: bool) -> tuple[int, ...]:
        """Ids of a prompt with the special tokens in front, and one BOS even if the text begins with BOS."""
        bos, eos = self.bos, self.eos
        has_front = bool(bare) and (bare[0] == bos or bare[: len(self.leading)] == self.leading)
        rendered = not conversational and self.format.asks(bare) and not self.format.writes_bos
        ids = bare if conversational or has_front or rendered else self.leading + bare
        while bos is not None and bos != eos and ids[:2] == (bos, bos):
            ids = ids[1:]
        return ids

    def ends(self, end_ids: Collection[int]) -> frozenset[int]:
        """Token ids that end a completion."""
        key = tuple(end_ids)
        if key not in self._ends:
            known = (self.eos, self.format.end, *key)
            self._ends[key] = frozenset(id_ for id_ in known if isinstance(id_, int))
        return self._ends[key]

    def spelled(self, id_: int) -> str:
        """Name of a token."""
        if id_ not in self._spelled:
            self._spelled[id_] = str(self.tokenizer.convert_ids_to_tokens(id_))
        return self._spelled[id_]

    def ended(
        self, ids: tuple[int, ...], end_ids: Collection[int], chat: bool, reason: FinishReason, source: str
    ) -> tuple[tuple[int, ...], bool]:
        """Ids of a completion up to the first token that ends one; where there is none, one is appended.

        Args:
            ids: ids of the completion.
            end_ids: token ids that end one, beside EOS and the template's end of turn.
            chat: whether the prompt is a conversation, whose turns end as the template ends them.
            reason: ``length`` leaves the end out.
            source: origin of the row.

        Returns:
            The ids, and whether text behind the end is lost.
        """
        eos = self.eos
        if not isinstance(eos, int):
            raise ValueError(f"{source}: the tokenizer has no EOS to end the completions: set tokenizer.eos_token")
        ends = self.ends(end_ids)
        first = len(ids)
        if not ends.isdisjoint(ids):
            first = next(place for place, id_ in enumerate(ids) if id_ in ends)
        end = self.format.end if chat and self.format.end is not None else eos
        # ids = kept + last + behind; `last` is the first end among the ids, or the one appended
        kept, last = ids[:first], ids[first : first + 1] or (end,)
        behind = ids[first + 1 :]
        # the template writes these behind the end of turn, such as a newline: no text is lost with them
        if chat and self.format.closing and behind[-len(self.format.closing) :] == self.format.closing:
            behind = behind[: -len(self.format.closing)]
        inside = bool(behind) and bool(decode(self.tokenizer, behind, skip_special_tokens=True).strip())
        # a completion of no token cannot be scored: an empty one keeps its end even if it was cut
        return (kept if reason == "length" and kept else kept + last), inside

    def read(self, ids: tuple[int, ...], reason: FinishReason, reading: Reading) -> tuple[int, ...]:
        """Ids of an answered conversation as a reward model reads them; see `encode_answers`."""
        end, closing, eos = self.format.end, self.format.closing, self.tokenizer.eos_token_id
        cut = reason == "length"
        if end is None:
            return ids if reading == "template" or cut or eos is None else (*ids, eos)
        ending = (end, *closing)
        body = ids[: -len(ending)] if ids[-len(ending) :] == ending else ids
        if cut:
            return body
        return ids if reading == "template" else body + ((end,) if end == eos or eos is None else (end, eos))

    def truncated(self, ids: tuple[int, ...], text: str, length: int) -> tuple[tuple[int, ...], str]:
        """Keep the end of a prompt, and its text, from which a plain prompt gets the same ids again.

        Args:
            ids: ids of the prompt.
            text: its text.
            length: maximum number of ids; fewer where the text would be tokenized differently.
        """
        kept = truncate_left(ids, length, self.tokenizer.bos_token_id, self.leading)
        head = front_length(kept, self.tokenizer.bos_token_id, self.leading)
        front, tail = kept[:head], kept[head:]
        places = self._places(text)
        # a text that begins inside a word may be tokenized differently: try later starts until ids match
        for start in range(min(len(tail), _ATTEMPTS)):
            candidate, length = front + tail[start:], len(tail) - start
            texts = [text[places[-length] :]] if length <= len(places) else []
            # SentencePiece tokenizers put a space in front of a text themselves
            texts += [end[1:] for end in texts if end.startswith(" ")]
            for end in (*texts, decode(self.tokenizer, tail[start:]), decode(self.tokenizer, candidate)):
                (bare,) = encode_all(self.tokenizer, [end])
                if self.with_front(bare, conversational=False) == candidate:
                    return candidate, end
        # no text gives the same ids again: the ids count, the text is as near as possible
        return kept, decode(self.tokenizer, tail)

    def _places(self, text: str) -> list[int]:
        """Character offsets of the tokens of a text; empty for tokenizers without offsets."""
        if not self.tokenizer.is_fast:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in cast(list[tuple[int, int]], encoded["offset_mapping"])]


_SYSTEM = ("system", "developer")
_USUAL_ROLES = ("system", "user", "assistant")
_ATTEMPTS = 16
UNKNOWN = "unknown_role"
PLACEHOLDER = "Elbe"


def _holds(written: str, answer: Message) -> bool:
    """Whether a template has written the whole answer; white space does not count."""
    content = answer["content"]
    if not content or content.strip() in written:
        return True
    return "".join(content.split()) in "".join(written.split())


def _answers(row: PromptRow) -> tuple[Message, ...]:
    """The recorded completions of a row as messages: a pair, one, or none."""
    if row.answers:
        return row.answers
    if row.pair is not None and not row.is_single:
        texts: tuple[str, ...] = (row.pair.chosen, row.pair.rejected)
    else:
        texts = () if row.completion is None else (row.completion,)
    return tuple({"role": "assistant", "content": text} for text in texts)


def _completions(drafts: Sequence[_Draft], encoder: TextEncoder) -> Iterator[Ids]:
    """Token ids of the recorded completions of the rows, in order, chosen before rejected."""
    flat: list[tuple[Encoded, str]] = []
    for draft in drafts:
        flat.extend((draft.encoded, rest) for rest in draft.written.rests)
    # in portions, since prompt and completion together are long
    for start in range(0, len(flat), TEXTS_AT_ONCE):
        part = flat[start : start + TEXTS_AT_ONCE]
        # the ids in front of the tail are the same with and without the completion
        wholes = encoder.encode([prompt.tail + rest for prompt, rest in part])
        yield from _behind(encoder.tokenizer, part, wholes)


def _behind(
    tokenizer: PreTrainedTokenizerBase, part: Sequence[tuple[Encoded, str]], wholes: Sequence[Ids]
) -> list[Ids]:
    """Token ids of completions, from those of the tails of their prompts and the completions as one."""
    found = [
        whole[len(prompt.tail_ids) :] if whole[: len(prompt.tail_ids)] == prompt.tail_ids else None
        for (prompt, _), whole in zip(part, wholes, strict=True)
    ]
    merged = [place for place, ids in enumerate(found) if ids is None]
    cases = [(part[place][0].ids, part[place][0].whole(wholes[place]), part[place][1]) for place in merged]
    for place, ids in zip(merged, _after(tokenizer, cases), strict=True):
        found[place] = ids
    return [ids or () for ids in found]


def _after(
    tokenizer: PreTrainedTokenizerBase, cases: Sequence[tuple[tuple[int, ...], tuple[int, ...], str]]
) -> list[tuple[int, ...]]:
    """Token ids that follow a prompt.

    Args:
        tokenizer: the tokenizer.
        cases: ids of the prompt, ids of prompt and rest in one piece, and the rest as text.
    """
    found = [whole[len(bare) :] if whole[: len(bare)] == bare else None for bare, whole, _ in cases]
    open_ = [place for place, ids in enumerate(found) if ids is None]
    if open_:
        # a token spans the border: tokenize the rest behind a neutral context, until both parts decode to the whole
        specials = [token for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) if token]
        alone = encode_all(tokenizer, [cases[place][2] for place in open_])
        for context in ("", *specials, "\n", ":", "0"):
            if not open_:
                break
            (before,) = encode_all(tokenizer, [context])
            texts = [context + cases[place][2] for place in open_]
            left = []
            for place, ids in zip(open_, encode_all(tokenizer, texts) if context else alone, strict=True):
                bare, whole, _ = cases[place]
                # compare from 4 tokens before the first difference: the part before it is the same in both
                same = max(0, shared_length(bare, whole) - 4)
                rest = ids[len(before) :]
                expected = decode(tokenizer, whole[same:])
                # the context must not merge with the rest, and prompt and rest must decode to the whole text
                if ids[: len(before)] == before and decode(tokenizer, bare[same:] + rest) == expected:
                    found[place] = rest
                else:
                    left.append(place)
            open_ = left
        for place in open_:  # the tokenizer does not decode to the text, so that no way is better than another
            (found[place],) = encode_all(tokenizer, [cases[place][2]])
    return [ids or () for ids in found]


def decode(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], *, skip_special_tokens: bool = False) -> str:
    """Text of token ids, with all white space."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Special tokens that a tokenizer puts in front of a text, usually BOS."""
    for probe in ("a", "the", "1"):
        (body,) = encode_all(tokenizer, [probe])
        whole = tuple(tokenizer(probe)["input_ids"])
        # whole = front + body + end: the position of the body tells the front from EOS at the end
        for start in range(len(whole) - len(body) + 1):
            if body and whole[start : start + len(body)] == body:
                return whole[:start]
    # the tokenizer knows none of the probes: the special tokens of an empty text, without EOS
    added = tuple(tokenizer("")["input_ids"])
    return added[:1] if added[:1] == (tokenizer.bos_token_id,) else ()


def front_length(ids: tuple[int, ...], bos_id: int | None, leading: tuple[int, ...]) -> int:
    """Number of special tokens in front of a prompt."""
    if leading and ids[: len(leading)] == leading:
        return len(leading)
    return int(ids[:1] == (bos_id,))


def truncate_left(
    ids: tuple[int, ...], length: int, bos_id: int | None, leading: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Keep the last ``length`` ids, with the special tokens in front and one BOS.

    Args:
        ids: ids of a prompt.
        length: number of ids to keep.
        bos_id: BOS.
        leading: special tokens that the tokenizer puts in front.
    """
    head = front_length(ids, bos_id, leading)
    # no room for a token of the prompt beside the special ones: keep the last ids alone
    if length <= head:
        head = 0
    # kept = first `head` ids + last `length - head` ids
    tail = ids[len(ids) - (length - head) :]
    while head and len(tail) > 1 and tail[0] == bos_id:
        tail = tail[1:]
    return ids[:head] + tail


def _response(
    renderer: _Renderer,
    ids: tuple[int, ...],
    max_tokens: int,
    reason: FinishReason,
    written: str | None,
) -> Response:
    """Make a response of recorded ids, cut after ``max_tokens``.

    Args:
        renderer: knows the tokenizer.
        ids: ids, with the end.
        max_tokens: maximum number of ids.
        reason: finish reason in the row.
        written: text of the row; None to decode the ids.
    """
    kept = ids[:max_tokens]
    whole = len(kept) == len(ids)
    # a text that spells out its end token is replaced by the decoded one, which leaves it out
    if whole and written is not None and renderer.spelled(ids[-1]) not in written:
        return Response(kept, written, reason, source="dataset")
    text = decode(renderer.tokenizer, kept, skip_special_tokens=True)
    if whole:
        return Response(kept, text, reason, source="dataset")
    if written is not None and written.lstrip().startswith(text.lstrip()):
        # some tokenizers drop the leading space
        text = written[: len(written) - len(written.lstrip())] + text.lstrip()
    return Response(kept, text, "length", source="dataset")

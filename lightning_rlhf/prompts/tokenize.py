"""Rows of text to prompts of token ids, with the recorded completions of each.

The rules, the same for every tokenizer:

- A plain prompt gets the special tokens that the tokenizer puts in front (BOS), never those it puts behind.
- A conversational prompt is rendered with the chat template; the template writes BOS, so the tokenizer adds none.
- A completion is tokenised apart from its prompt and ids are concatenated: no token ever spans the border.
- A completion ends with the tokenizer's EOS, unless the token limit cut it. Chat models stop at their end-of-turn
  token, so ``tokenizer.eos_token`` should be that token; what a template writes behind it is left out.

Known: text inside a turn that looks like a special token (``"<|im_end|>"``) becomes that token, as it does with
``apply_chat_template`` everywhere; clean prompts from untrusted sources beforehand. And templates that write today's
date make prompts change from day to day; give such a tokenizer a template without a date.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.prompts.dataset import EMPTY, IDENTICAL
from lightning_rlhf.types import Message, Prompt, PromptRow, Response


CHAT_TEMPLATES = {
    # the transcript format of HH-RLHF, for models that were never taught a chat format
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
"""Chat templates that can be given by name."""

LONG_PROMPT = "long prompts dropped"
TRUNCATED_PROMPT = "long prompts truncated"
TRUNCATED_COMPLETION = "truncated completions"

TEXTS_AT_ONCE = 1024
"""Texts that the tokenizer gets in one call."""


def tokenize_rows(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    on_long_prompt: Literal["error", "drop", "truncate"] = "error",
    system_prompt: str | None = None,
    chat_template: str | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """Turn rows into tokenised prompts, and count what was dropped or truncated.

    ``Prompt.index`` is the position of the row in ``rows``, so that it does not depend on what is dropped.

    Args:
        rows: what a prompt source loaded.
        tokenizer: tokenizer of the policy.
        max_prompt_tokens: longest prompt in tokens, template included, >= 1.
        max_response_tokens: longest recorded completion in tokens, EOS included, >= 1; longer ones lose their end.
        on_long_prompt: what to do with longer prompts: "error"; "drop", counted; or "truncate", counted, which cuts
            the beginning except BOS.
        system_prompt: system message for conversations that have none.
        chat_template: Jinja chat template to use instead of the tokenizer's own, or the name "human_assistant".

    Raises:
        ValueError: if a prompt is too long (and ``on_long_prompt`` is "error"), if there are conversations and no chat
            template, if the template does not fit, or if no row is left.
    """
    if max_prompt_tokens < 1 or max_response_tokens < 1:
        raise ValueError(f"limits must be at least 1 token; got {max_prompt_tokens=} and {max_response_tokens=}")
    if on_long_prompt not in ("error", "drop", "truncate"):
        raise ValueError(f"on_long_prompt must be 'error', 'drop' or 'truncate'; got {on_long_prompt!r}")
    renderer = _Renderer(tokenizer, system_prompt, CHAT_TEMPLATES.get(chat_template or "", chat_template))
    leading = leading_special_ids(tokenizer)
    counts: Counter[str] = Counter()
    conversations = [renderer.conversation(row) for row in rows]
    texts = [
        (row.text or "") if messages is None else renderer.render(messages, row.source)
        for row, messages in zip(rows, conversations, strict=True)
    ]
    encoded = encode_all(tokenizer, texts)
    drafts = []
    for index, (row, messages, text, bare_ids) in enumerate(zip(rows, conversations, texts, encoded, strict=True)):
        ids = bare_ids if messages is not None else leading + bare_ids
        if len(ids) > max_prompt_tokens and on_long_prompt == "error":
            raise ValueError(
                f"{row.source}: prompt has {len(ids)} tokens, and max_prompt_tokens is {max_prompt_tokens}: raise "
                f"max_prompt_tokens, or set on_long_prompt to 'drop' or to 'truncate'"
            )
        if len(ids) > max_prompt_tokens and on_long_prompt == "drop":
            counts[LONG_PROMPT] += 1
        else:
            drafts.append(Prompt(index=index, ids=ids, text=text, messages=messages, recorded=row.pair))

    prompts = []
    completions = _completions(drafts, rows, renderer)
    for draft in drafts:
        prompt = draft
        answers = [next(completions) for _ in _answers(rows[draft.index])]
        if any(len(ids) == 1 for ids in answers):  # nothing but EOS
            counts[EMPTY] += 1
            continue
        recorded = [response(tokenizer, ids, max_response_tokens) for ids in answers]
        if len(recorded) == 2:
            if recorded[0].ids == recorded[1].ids:  # they differ in what was cut off, or in white space that is trimmed
                counts[IDENTICAL] += 1
                continue
            prompt = replace(prompt, pair=(recorded[0], recorded[1]))
        elif recorded:
            prompt = replace(prompt, completion=recorded[0])
        counts[TRUNCATED_COMPLETION] += sum(one.finish_reason == "length" for one in recorded)

        if len(draft.ids) > max_prompt_tokens:
            counts[TRUNCATED_PROMPT] += 1
            ids = truncate_left(draft.ids, max_prompt_tokens, tokenizer.bos_token_id)
            prompt = replace(prompt, ids=ids, text=decode(tokenizer, ids, skip_special_tokens=False))
        prompts.append(prompt)
    counts = +counts  # without zeros
    if not prompts:
        raise ValueError(
            f"no prompts are left of {len(rows)} rows ({dict(counts)}): raise max_prompt_tokens and "
            f"max_response_tokens, or check the data"
        )
    return prompts, dict(counts)


def encode_answers(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of prompts and answers under another tokenizer than the one they were made with, from their texts.

    By the rules above; an answer that was cut off gets no EOS.

    Args:
        prompts: the prompt of each answer.
        responses: the answers.
        tokenizer: the other tokenizer.
        chat_template: Jinja chat template to use instead of the tokenizer's own, or the name "human_assistant".
    """
    renderer = _Renderer(tokenizer, None, CHAT_TEMPLATES.get(chat_template or "", chat_template))
    leading = leading_special_ids(tokenizer)
    texts, answers = [], []
    for prompt, answer in zip(prompts, responses, strict=True):
        source = f"prompt {prompt.index}"
        text = prompt.text if prompt.messages is None else renderer.render(prompt.messages, source)
        texts.append(text)
        answers.append(renderer.completion(prompt.messages, text, answer.text, source))
    pairs = []
    encoded = zip(prompts, responses, encode_all(tokenizer, texts), encode_all(tokenizer, answers), strict=True)
    for prompt, answer, bare, written in encoded:
        ids = bare if prompt.messages is not None else leading + bare
        ended = until_eos(tokenizer, written, f"prompt {prompt.index}")
        cut = answer.finish_reason == "length" and len(ended) > 1
        pairs.append((ids, ended[:-1] if cut else ended))
    return pairs


class _Renderer:
    """Writes prompts and answers as text, conversations with one chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.template = template

    def conversation(self, row: PromptRow) -> tuple[Message, ...] | None:
        """Put the system prompt before the messages of a row, unless they have their own; None for a plain prompt."""
        if self.system_prompt is None or (row.messages is not None and row.messages[0]["role"] == "system"):
            return row.messages
        if row.messages is None:
            raise ValueError(
                f"{row.source}: a plain prompt has no place for system_prompt: write the prompt as messages"
            )
        return ({"role": "system", "content": self.system_prompt}, *row.messages)

    def render(self, messages: tuple[Message, ...], source: str) -> str:
        """Write a conversation as text; up to where the assistant speaks, unless the assistant has spoken last."""
        if self.template is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"{source}: the prompt is a conversation, and the tokenizer has no chat template: set chat_template to "
                f"one (or to the name 'human_assistant'), use an instruction-tuned model, or use plain prompts"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=messages[-1]["role"] != "assistant",
                tokenize=False,
            )
        except TemplateError as error:
            raise ValueError(
                f"{source}: the chat template refuses the conversation ({error}): change the turns of the row, or set "
                f"chat_template to one that takes them"
            ) from error
        assert isinstance(text, str)
        return text

    def completion(self, messages: tuple[Message, ...] | None, prompt: str, answer: str, source: str) -> str:
        """Write an answer as text, from the end of the prompt up to EOS, which is left out; blank answers are empty."""
        if messages is None or not answer.strip():
            return answer if messages is None else ""
        whole = self.render((*messages, {"role": "assistant", "content": answer}), source)
        if not whole.startswith(prompt):
            raise ValueError(
                f"{source}: the chat template writes the prompt differently once it is answered, so that the answer "
                f"cannot be cut off: set chat_template to one that only appends (prompt ends {prompt[-60:]!r})"
            )
        written = whole[len(prompt) :]
        eos = self.tokenizer.eos_token
        # EOS is searched behind the answer only: one inside is the business of `until_eos`
        start = written.rfind(answer.strip())
        behind = start + len(answer.strip()) if start >= 0 else 0
        end = written.find(eos, behind) if eos else -1
        return written[:end] if end >= 0 else written.rstrip()


def _answers(row: PromptRow) -> tuple[str, ...]:
    """Texts of the recorded completions of a row: a pair, one, or none."""
    if row.pair is not None:
        return row.pair.chosen, row.pair.rejected
    return () if row.completion is None else (row.completion,)


def _completions(drafts: Sequence[Prompt], rows: Sequence[PromptRow], renderer: _Renderer) -> Iterator[tuple[int, ...]]:
    """Token ids of the recorded completions of the rows, in order, chosen before rejected."""
    texts, sources = [], []
    for draft in drafts:
        source = rows[draft.index].source
        for answer in _answers(rows[draft.index]):
            texts.append(renderer.completion(draft.messages, draft.text, answer, source))
            sources.append(source)
    for ids, source in zip(encode_all(renderer.tokenizer, texts), sources, strict=True):
        yield until_eos(renderer.tokenizer, ids, source)


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of texts, without special tokens that a text does not spell out.

    Texts go to the tokenizer in lists, over which fast tokenizers use all cores.
    """
    ids: list[tuple[int, ...]] = []
    # in portions: what a fast tokenizer returns beside the ids (offsets, strings) takes 100 bytes per token and more
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        # verbose=False: no warning about texts longer than the model's context, for lengths are checked here
        encoding = tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), add_special_tokens=False, verbose=False)
        ids.extend(map(tuple, encoding["input_ids"]))
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], *, skip_special_tokens: bool) -> str:
    """Text of token ids."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)
    return text


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Find the special tokens that a tokenizer puts in front of a text, BOS as a rule."""
    for probe in ("a", "the", "1"):
        (body,) = encode_all(tokenizer, [probe])
        whole = tuple(tokenizer(probe)["input_ids"])
        for start in range(len(whole) - len(body) + 1):
            if body and whole[start : start + len(body)] == body:
                return whole[:start]
    # a tokenizer that knows none of the probes: what it adds to nothing, less EOS
    added = tuple(tokenizer("")["input_ids"])
    return added[:1] if added[:1] == (tokenizer.bos_token_id,) else ()


def truncate_left(ids: tuple[int, ...], length: int, bos_id: int | None) -> tuple[int, ...]:
    """Keep the last ``length`` ids; a BOS at the beginning stays there."""
    if ids[0] == bos_id and length > 1:
        return ids[:1] + ids[len(ids) - length + 1 :]
    return ids[len(ids) - length :]


def until_eos(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], source: str) -> tuple[int, ...]:
    """Ids of a completion up to the first EOS; where it spells out none, one is appended."""
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise ValueError(f"{source}: the tokenizer has no EOS to end the completions: set tokenizer.eos_token")
    ids = (*ids, eos_id)
    return ids[: ids.index(eos_id) + 1]


def response(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], max_tokens: int) -> Response:
    """Make a response of recorded ids, cut after ``max_tokens``; the text is decoded as that of drawn responses is."""
    kept = ids[:max_tokens]
    text = decode(tokenizer, kept, skip_special_tokens=True)
    return Response(ids=kept, text=text, finish_reason="eos" if len(kept) == len(ids) else "length", source="dataset")

"""`ShapedTemplate`: conversations of one shape are those of the template, whatever contents they have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import pytest

from lightning_rlhf.prompts import shaped_template, tokenize, tokenize_rows
from lightning_rlhf.prompts.shaped_template import PROBES, ShapedTemplate, shape_of
from lightning_rlhf.types import Message, PromptRow, RecordedPair

from .families import FAMILIES, QWEN2


SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EACH = "{{% for m in messages %}}{}{{% endfor %}}"
WRITES = {
    "written": EACH.format("{{ m.role }}: {{ m['content'] }}\n"),
    "added": EACH.format("{% set c = '[' + m.content + ']' %}{{ c + '\n' + eos_token }}"),
    "stripped": EACH.format("{{ '[' + m.content | trim + ']' + m.content.strip() }}"),
    "stripped twice": EACH.format("{{ (m.content | trim).strip() + '|' }}"),
    "empty or not": EACH.format("{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}"),
    "a default": EACH.format("{{ m['content'] or 'none' }}{{ m.content | default('') }}{{ m.name | default('x') }}"),
    "tests of its type": EACH.format("{% if m.content is string and m.role is not none %}{{ m.content }}{% endif %}"),
    "turns in reverse": "{% for m in messages[::-1] %}{% if m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}",
    "a namespace": "{% set n = namespace(x='') %}" + EACH.format("{% set n.x = n.x + m.content %}") + "{{ n.x }}",
    "items": EACH.format("{% for k, v in m.items() %}{{ k }}={{ v }} {% endfor %}"),
    "a filter of turns": "{% for m in messages if m.role != 'system' and m.content %}{{ m.content }}{% endfor %}",
    "only roles": EACH.format("{{ m.role | upper }}{{ messages | length }}"),
}
READS = {
    "a search": EACH.format("{{ 'yes' if 'a' in m.content else m.content }}"),
    "a search in a text": EACH.format("{{ 'yes' if m.content in ' a 0 None' else m.content }}"),
    "an equality": EACH.format("{{ 'zero' if m.content == '0' else m.content }}"),
    "an inequality": EACH.format("{{ 'zero' if '0' != m.content else 1 }}"),
    "a place in a list": EACH.format("{{ 'zero' if m.content in ['0', '1'] else m.content }}"),
    "an order": EACH.format("{{ m.content if m.content < 'f' else '' }}"),
    "a length": EACH.format("{{ m.content if m.content | length > 3 else '' }}"),
    "a letter": EACH.format("{{ 'space' if m.content[0] == ' ' else m.content }}"),
    "a slice": EACH.format("{{ m.content[:4] }}"),
    "letters": EACH.format("{% for c in m.content %}{{ c }}.{% endfor %}"),
    "a method": EACH.format("{{ m.content.split('</think>')[-1] }}"),
    "white space on the left": EACH.format("{{ m.content.lstrip() }}"),
    "characters that are stripped": EACH.format("{{ m.content.strip('\n') }}{{ m.content | trim('a') }}"),
    "a sum that is stripped": EACH.format("{{ (m.content + ' ') | trim }}"),
    "empty when stripped": EACH.format("{% if m.content | trim %}{{ m.content }}{% else %}blank{% endif %}"),
    "a filter": EACH.format("{{ m.content | upper }}"),
    "a conversion": EACH.format("{{ m.content | int }}"),
    "another filter": EACH.format("{{ m.content | wordcount }}"),
    "a filter that replaces": EACH.format("{{ m.content | replace('a', 'b') }}"),
    "JSON": "{{ messages | tojson }}",
    "the whole list": "{{ messages }}",
    "a join": "{{ [messages[0].content, 'x'] | join(' ') | trim }}",
    "a concatenation": EACH.format("{{ (m.content ~ '') | trim }}"),
    "a format": EACH.format("{{ '{} '.format(m.content) | trim }}{{ '%s' % m.content }}"),
    "a format with a conversion": EACH.format("{{ '{!s:.3}'.format(m.content) }}"),
    "a block that is set": EACH.format("{% set c %}{{ m.content }}{% endset %}{{ c | trim }}"),
    "a macro": "{% macro w(c) %}{{ c }}{% endmacro %}" + EACH.format("{{ w(m.content) | trim }}"),
    "a block with a filter": EACH.format("{% filter upper %}{{ m.content }}{% endfilter %}"),
    "a recursive loop": "{% for m in messages recursive %}{{ m.content }}{% if loop.first and messages[1:] %}"
    "{{ loop(messages[1:]) | trim }}{% endif %}{% endfor %}",
    "a change": EACH.format("{% if loop.changed(m.content) %}{{ m.content }}{% endif %}"),
    "a repetition": EACH.format("{{ m.content * 2 }}"),
    "a case": EACH.format("{{ 'low' if m.content is lower else m.content }}"),
    "an identity": EACH.format("{{ 'same' if m.content is sameas messages[0].content else m.content }}"),
    "a key": EACH.format("{{ {'0': 'zero'}[m.content] }}"),
    "an attribute by name": EACH.format("{{ m.content | attr('strip') }}"),
    "an exception": EACH.format("{% if '0' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"),
    "a date": EACH.format("{{ strftime_now('%Y') }}{{ m.content }}"),
    "escapes": "{% autoescape true %}" + EACH.format("{{ m.content }}") + "{% endautoescape %}",
    "assistant's turns": EACH.format("{% generation %}{{ m.content }}{% endgeneration %}"),
}
TEXTS = (*PROBES, "", " ", "plain text", "\u00e4 \U0001f600", "content0;", "{% raw %}", "yes\n\nHuman: no", "1")
LIMITS: dict[str, Any] = {"max_prompt_tokens": 20_000, "max_response_tokens": 20_000}


class Plain:
    """The template by itself, which counts its conversations."""

    def __init__(self, template: str) -> None:
        self.tokenizer = FAMILIES["qwen2"].tokenizer()
        self.tokenizer.chat_template = template
        self.count = 0

    def __call__(self, messages: Sequence[Message]) -> str:
        self.count += 1
        ask = messages[-1]["role"] != "assistant"
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))


def conversations(count: int, seed: int) -> list[list[Message]]:
    numbers = random.Random(seed)
    found = []
    for _ in range(count):
        roles = (["system"] if numbers.random() < 0.3 else []) + ["user", "assistant"] * numbers.randint(1, 2)
        roles = roles[: len(roles) - numbers.randint(0, 1)]
        found.append([Message(role=role, content=numbers.choice(TEXTS)) for role in roles])
    return found


def outcome(write: Any, *arguments: Any) -> str:
    """The text, or the error of a template that refuses it."""
    try:
        return str(write(*arguments))
    except RecursionError:
        # the function that the stack ends in depends on the depth of the caller
        return "RecursionError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("template", [*WRITES.values(), SMOL, QWEN2], ids=[*WRITES, "SmolLM", "Qwen"])
def test_a_template_that_writes_contents_runs_once_for_each_shape(template: str) -> None:
    plain = Plain(template)
    shaped = ShapedTemplate(template, plain.tokenizer.special_tokens_map)
    many = conversations(600, 1)
    expected = [plain(messages) for messages in many]
    plain.count = 0
    assert [shaped.render(messages, plain) for messages in many] == expected
    # the shapes, each compared on all probes, and every 256th conversation
    shapes = {shape_of(messages) for messages in many}
    assert plain.count == len(shapes) * len(PROBES) + len(many) // shaped_template.CHECK_EVERY


@pytest.mark.parametrize("kind", READS)
def test_a_template_that_reads_contents_is_run_for_each_row(kind: str) -> None:
    plain = Plain(READS[kind])
    shaped = ShapedTemplate(READS[kind], plain.tokenizer.special_tokens_map)
    # a shape must not be taken for known although the probes do not show the difference
    many = [messages for messages in conversations(60, 2) if any(m["content"] for m in messages)]
    assert [outcome(shaped.render, m, plain) for m in many] == [outcome(plain, m) for m in many]
    full: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    outcome(shaped.render, full, plain)
    assert shaped._known.get(shape_of(full)) is None


def test_the_probes_are_not_needed_to_find_what_a_template_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped_template, "PROBES", ("x",))
    full: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    for kind, template in READS.items():
        plain = Plain(template)
        shaped = ShapedTemplate(template, plain.tokenizer.special_tokens_map)
        outcome(shaped.render, full, plain)
        assert shaped._known.get(shape_of(full)) is None, kind


def test_more_than_texts_has_no_shape() -> None:
    for message in (
        {"role": "user", "content": None},
        {"content": "a", "role": "user"},
        {"role": "user", "content": "a", "name": "b"},
        {"role": "user", "content": type("Text", (str,), {})("a")},
    ):
        assert shape_of([message]) is None  # type: ignore[list-item]


def test_a_template_that_goes_another_way_later_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped_template, "CHECK_EVERY", 4)
    plain = Plain(SMOL)
    shaped = ShapedTemplate(SMOL, plain.tokenizer.special_tokens_map)
    turn: list[Message] = [{"role": "user", "content": "a"}]
    shaped.render(turn, plain)
    plain.tokenizer.chat_template = SMOL.replace("helpful", "rude")
    with pytest.raises(RuntimeError, match="please report it with the template"):
        [shaped.render(turn, plain) for _ in range(4)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].template])
def test_rows_are_those_that_the_template_alone_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(name)
    texts = [text for text in TEXTS if text.strip()]
    rows = []
    for number in range(60):
        roles = ["user"] + ["assistant", "user"] * numbers.randint(0, 2)
        roles = ["system", *roles] if FAMILIES[name].system and numbers.random() < 0.3 else roles
        turns = tuple(Message(role=role, content=numbers.choice(texts)) for role in roles)
        pair = RecordedPair(f"{numbers.choice(texts)} 1", f"2 {numbers.choice(texts)}")
        rows.append(PromptRow(f"row {number}", messages=turns, pair=pair))

    def prompts() -> list[Any]:
        # a template that refuses or rewrites a conversation names it as before
        found: list[Any] = []
        for row in rows:
            try:
                (prompt,), counts = tokenize_rows([row], FAMILIES[name].tokenizer(), **LIMITS)
                found.append((astuple(prompt), counts))
            except ValueError as error:
                found.append(str(error))
        return found

    shaped = prompts()
    monkeypatch.setattr(tokenize, "shaped_template", lambda *_: None)
    assert shaped == prompts()

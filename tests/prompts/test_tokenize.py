"""`tokenize_rows`: special tokens, the border between prompt and completion, limits and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.prompts import CHAT_TEMPLATES, tokenize, tokenize_rows
from lightning_rlhf.types import Message, Prompt, PromptRow, RecordedPair


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ 'U' if m['role'] == 'user' else 'A' }} {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}{% if add_generation_prompt %}A{% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", "U", "A", "red", "blue", "green", "sea", "sky"]
HELLO: tuple[Message, ...] = ({"role": "user", "content": "red sky"},)


def wrap(core: Tokenizer, chat_template: str | None, **special: str) -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer: PreTrainedTokenizerFast = make(tokenizer_object=core, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def template_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
    """What transformers itself makes of a conversation."""
    encoded: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    return tuple(encoded["input_ids"])


def word_tokenizer(chat_template: str | None = WITH_BOS) -> PreTrainedTokenizerFast:
    """One id per word, in the order of WORDS; adds BOS in front and, like T5, EOS behind."""
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return wrap(core, chat_template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_tokenizer(eos: str = "<|im_end|>", chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes with the merges "e r" and "er s"; no BOS, nothing added."""
    vocab = {char: k for k, char in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "er", "ers"])}
    core = Tokenizer(models.BPE(vocab, [("e", "r"), ("er", "s")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    return wrap(core, chat_template, eos_token=eos)


def ids_of(*words: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in words)


def one(row: PromptRow, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Prompt:
    (prompt,), counts = tokenize_rows(
        [row], tokenizer, **{"max_prompt_tokens": 99, "max_response_tokens": 99, **options}
    )
    assert counts == {}
    return prompt


def test_plain_prompt_gets_bos_but_no_eos() -> None:
    prompt = one(PromptRow("r", text="red sky"), word_tokenizer())
    assert (prompt.ids, prompt.text) == (ids_of("<s>", "red", "sky"), "red sky")
    assert one(PromptRow("r", text=""), word_tokenizer()).ids == ids_of("<s>")
    # an EOS that the text spells out stays
    assert one(PromptRow("r", text="red </s>"), word_tokenizer()).ids == ids_of("<s>", "red", "</s>")


def test_plain_prompt_of_a_tokenizer_without_bos() -> None:
    tokenizer = byte_tokenizer()
    prompt = one(PromptRow("r", text="hers"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(prompt.ids)) == ["h", "ers"]
    with pytest.raises(ValueError, match="row 2: field 'prompt' is empty, and the tokenizer puts no token in front"):
        one(PromptRow("row 2", text=""), tokenizer)


def test_conversation_is_rendered_and_bos_is_not_doubled() -> None:
    prompt = one(PromptRow("r", messages=HELLO), word_tokenizer())
    assert prompt.text == "<s>U red sky A"
    assert prompt.ids == ids_of("<s>", "U", "red", "sky", "A")
    assert prompt.messages == HELLO
    assert prompt.ids == template_ids(word_tokenizer(), HELLO, add_generation_prompt=True)


def test_the_prompt_keeps_its_ids_where_a_token_would_span_the_border() -> None:
    # "hers" in one piece would be ["h", "ers"]; the border after "he", which a policy is asked with, must survive
    tokenizer = byte_tokenizer()
    prompt = one(PromptRow("r", text="he", pair=RecordedPair("rs", "y", probability=0.9)), tokenizer)
    assert prompt.pair is not None
    tokens = [
        tokenizer.convert_ids_to_tokens(list(ids)) for ids in (prompt.ids, prompt.pair[0].ids, prompt.pair[1].ids)
    ]
    assert tokens == [["h", "e"], ["r", "s", "<|im_end|>"], ["y", "<|im_end|>"]]
    assert [(r.text, r.finish_reason, r.source) for r in prompt.pair] == [
        ("rs", "eos", "dataset"),
        ("y", "eos", "dataset"),
    ]
    assert prompt.recorded == RecordedPair("rs", "y", probability=0.9)
    chosen = one(PromptRow("r", text="sky", pair=RecordedPair("blue", "red")), word_tokenizer()).pair
    assert chosen is not None
    assert [r.ids for r in chosen] == [ids_of("blue", "</s>"), ids_of("red", "</s>")]  # no BOS in the middle


def test_conversational_completion_ends_with_the_end_of_turn() -> None:
    row = PromptRow("r", messages=HELLO, pair=RecordedPair("hers", "no"))
    tokenizer = byte_tokenizer()
    prompt = one(row, tokenizer)
    assert prompt.text == "<|im_start|>user\nred sky<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.pair is not None
    # the newline that the template writes behind <|im_end|> is not part of the response
    assert tokenizer.convert_ids_to_tokens(list(prompt.pair[0].ids)) == ["h", "ers", "<|im_end|>"]
    assert prompt.pair[0].text == "hers"
    # prompt and response together are the template's own tokens
    whole = template_ids(tokenizer, [*HELLO, {"role": "assistant", "content": "hers"}])
    assert prompt.ids + prompt.pair[0].ids == whole[:-1]


def test_a_turn_ends_with_the_templates_end_of_turn_alone() -> None:
    # end of turn and EOS differ: generation stops at the former, so it ends what is recorded, and nothing follows
    tokenizer = byte_tokenizer(eos="<|endoftext|>")
    pair = one(PromptRow("r", messages=HELLO, pair=RecordedPair("h", "no")), tokenizer).pair
    assert pair is not None
    assert tokenizer.convert_ids_to_tokens(list(pair[0].ids)) == ["h", "<|im_end|>"]


def test_template_without_an_end_gets_eos() -> None:
    # what the template writes is kept, without trailing white space, and EOS ends it
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m['content'] + '!\n\n' }}{% endfor %}")
    pair = one(PromptRow("r", messages=HELLO, pair=RecordedPair("h", "no")), tokenizer).pair
    assert pair is not None
    assert tokenizer.convert_ids_to_tokens(list(pair[0].ids)) == ["h", "!", "<|im_end|>"]


def test_eos_inside_a_completion_ends_it_as_it_would_have_ended_a_sampled_one() -> None:
    for row in (PromptRow("r", text="sky"), PromptRow("r", messages=HELLO)):
        row = replace(row, pair=RecordedPair("red </s> blue", "green </s>"))
        (prompt,), counts = tokenize_rows([row], word_tokenizer(), max_prompt_tokens=9, max_response_tokens=9)
        assert prompt.pair is not None
        assert [r.ids for r in prompt.pair] == [ids_of("red", "</s>"), ids_of("green", "</s>")]
        assert [r.text for r in prompt.pair] == ["red", "green"]
        assert counts == {"completions cut at an end of turn inside": 1}


def test_special_tokens_spelt_out_by_a_user_become_special_tokens() -> None:
    # known and documented: rendering is text, so that this cannot be told from the template's own tokens
    tokenizer = byte_tokenizer()
    prompt = one(PromptRow("r", messages=({"role": "user", "content": "x<|im_end|>"},)), tokenizer)
    assert prompt.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_human_assistant_template_serves_models_without_one() -> None:
    row = PromptRow("f.jsonl row 3", messages=HELLO, pair=RecordedPair("yes", "no"))
    tokenizer = byte_tokenizer(eos="<|endoftext|>", chat_template=None)
    with pytest.raises(
        ValueError, match=r"f\.jsonl row 3: .*no chat template: set chat_template.*'human_assistant'.*plain"
    ):
        one(row, tokenizer)
    prompt = one(row, tokenizer, chat_template="human_assistant")
    assert prompt.text == "\n\nHuman: red sky\n\nAssistant:"
    assert prompt.pair is not None
    assert prompt.pair[0].text == "yes"  # to the letter, without the space that the template writes
    assert tokenizer.decode(prompt.pair[0].ids, skip_special_tokens=True) == " yes"
    assert prompt.pair[0].ids[-1] == tokenizer.eos_token_id
    assert one(row, tokenizer, chat_template=CHAT_TEMPLATES["human_assistant"]) == prompt


def test_system_prompt_goes_first_unless_there_is_one() -> None:
    own = ({"role": "system", "content": "own"}, *HELLO)
    prompt = one(PromptRow("r", messages=HELLO), byte_tokenizer(), system_prompt="Be brief.")
    assert prompt.messages == ({"role": "system", "content": "Be brief."}, *HELLO)
    assert prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert one(PromptRow("r", messages=own), byte_tokenizer(), system_prompt="Be brief.").messages == own
    with pytest.raises(ValueError, match="row 9: a plain prompt has no place for system_prompt"):
        one(PromptRow("row 9", text="x"), byte_tokenizer(), system_prompt="Be brief.")


def test_template_that_does_not_fit_is_named_with_the_row() -> None:
    with pytest.raises(ValueError, match=r"row 4: the chat template refuses the conversation \(no system role\)"):
        one(PromptRow("row 4", messages=HELLO), word_tokenizer(), system_prompt="red")
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="row 4: the chat template writes the prompt differently once it is answered"):
        one(PromptRow("row 4", messages=HELLO, pair=RecordedPair("red", "sky")), word_tokenizer(rewriting))


def test_long_prompts_are_errors_dropped_or_truncated() -> None:
    rows = [
        PromptRow("f row 1", text="red red red sky"),
        PromptRow("f row 2", text="red sky"),
        PromptRow("f row 3", text="sea sky blue green"),
    ]
    limits: dict[str, Any] = {"max_prompt_tokens": 3, "max_response_tokens": 5}
    message = (
        r"f row 1: prompt has 5 tokens, and max_prompt_tokens is 3: raise max_prompt_tokens, "
        r"or set on_long_prompt to 'drop' or to 'truncate'"
    )
    with pytest.raises(ValueError, match=message):
        tokenize_rows(rows, word_tokenizer(), **limits)
    prompts, counts = tokenize_rows(rows, word_tokenizer(), on_long_prompt="drop", **limits)
    assert [(p.index, p.ids) for p in prompts] == [(1, ids_of("<s>", "red", "sky"))]
    assert counts == {"long prompts dropped": 2}
    prompts, counts = tokenize_rows(rows, word_tokenizer(), on_long_prompt="truncate", **limits)
    assert [(p.index, p.ids) for p in prompts] == [
        (0, ids_of("<s>", "red", "sky")),  # the beginning goes, BOS stays
        (1, ids_of("<s>", "red", "sky")),
        (2, ids_of("<s>", "blue", "green")),
    ]
    assert prompts[2].text == "blue green"  # BOS is not in the text: the tokenizer adds it
    assert counts == {"long prompts truncated": 2}
    (prompt,), _ = tokenize_rows(
        [PromptRow("r", text="abcd")],
        byte_tokenizer(),
        max_prompt_tokens=3,
        max_response_tokens=1,
        on_long_prompt="truncate",
    )
    assert prompt.text == "bcd"
    with pytest.raises(ValueError, match=r"no prompts are left of 1 rows \({'long prompts dropped': 1}\)"):
        tokenize_rows(rows[:1], word_tokenizer(), on_long_prompt="drop", **limits)


def test_long_completions_lose_their_end_and_are_counted() -> None:
    rows = [
        PromptRow("r", text="sky", pair=RecordedPair("red blue green", "sea sea")),
        PromptRow(
            "r", text="sky", pair=RecordedPair("red blue green sea", "red blue green sky")
        ),  # differ behind the cut
        PromptRow("r", text="sky", pair=RecordedPair("red  blue", "red blue")),  # differ in white space alone
        PromptRow("r", text="sky", pair=RecordedPair("  ", "red")),
        PromptRow("r", text="sky", pair=RecordedPair("</s>", "red")),
        PromptRow("r", text="sky", pair=RecordedPair("red", "blue")),
    ]
    prompts, counts = tokenize_rows(rows, word_tokenizer(), max_prompt_tokens=2, max_response_tokens=3)
    assert [prompt.index for prompt in prompts] == [0, 5]
    assert prompts[0].pair is not None
    chosen, rejected = prompts[0].pair
    assert (chosen.ids, chosen.finish_reason, chosen.text) == (
        ids_of("red", "blue", "green"),
        "length",
        "red blue green",
    )
    assert (rejected.ids, rejected.finish_reason) == (ids_of("sea", "sea", "</s>"), "eos")  # exactly at the limit
    assert counts == {"truncated completions": 1, "identical completions": 2, "empty completion": 2}


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        PromptRow("r", messages=HELLO, pair=RecordedPair("hers", "no")),
        PromptRow("r", text="y"),
        PromptRow("r", text="he" * 40),  # dropped: the completions behind it must not slip
        PromptRow("r", text="he", pair=RecordedPair("rs", "y")),
        PromptRow("r", text="x", pair=RecordedPair("", "y")),
        PromptRow("r", messages=HELLO, pair=RecordedPair("yes", "h<|im_end|>e")),
    ]
    limits: dict[str, Any] = {"max_prompt_tokens": 64, "max_response_tokens": 5, "on_long_prompt": "drop"}
    whole = tokenize_rows(rows, byte_tokenizer(), **limits)
    assert [prompt.index for prompt in whole[0]] == [0, 1, 3, 5]
    alone = [
        replace(prompt, index=prompt.index + k)
        for k in (0, 1, 3, 5)
        for prompt in tokenize_rows(rows[k : k + 1], byte_tokenizer(), **limits)[0]
    ]
    assert alone == whole[0]
    monkeypatch.setattr(tokenize, "TEXTS_AT_ONCE", 2)
    assert tokenize_rows(rows, byte_tokenizer(), **limits) == whole


def test_the_tokenizer_gets_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, text: Any, **options: Any) -> Any:
        if isinstance(text, list) and text not in ([""], ["a"], ["the"], ["1"]):  # the probes for BOS
            sizes.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    rows = [PromptRow("r", text="he", pair=RecordedPair("rs", "y")) for _ in range(7)]
    tokenize_rows(rows, byte_tokenizer(), max_prompt_tokens=9, max_response_tokens=9)
    assert sizes == [7, 14, 7]  # prompts, whole texts, and the completions whose border a token spans


def test_completions_need_an_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"row 7: the tokenizer has no EOS.*set tokenizer.eos_token"):
        one(PromptRow("row 7", text="x", pair=RecordedPair("a", "b")), tokenizer)
    assert len(one(PromptRow("row 7", text="x"), tokenizer).ids) == 1


def test_wrong_arguments_are_named() -> None:
    rows = [PromptRow("r", text="red")]
    with pytest.raises(ValueError, match="at least 1 token; got max_prompt_tokens=0"):
        tokenize_rows(rows, word_tokenizer(), max_prompt_tokens=0, max_response_tokens=1)
    with pytest.raises(ValueError, match="on_long_prompt must be"):
        tokenize_rows(rows, word_tokenizer(), max_prompt_tokens=1, max_response_tokens=1, on_long_prompt="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prompts are left of 0 rows"):
        tokenize_rows([], word_tokenizer(), max_prompt_tokens=1, max_response_tokens=1)

"""Border, end of turn, BOS and reward position over families of models, against `apply_chat_template`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim import AdamW
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_rlhf import PreferenceDataModule
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.generation.text import sampled_text
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.models.stops import add_stop_ids, stop_ids
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.prompts import CHAT_TEMPLATES, DatasetPrompts, tokenize_rows
from lightning_rlhf.prompts.tokenize import encode_answers
from lightning_rlhf.rewards import RewardModelReward
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Message, Prompt, PromptRow, RecordedPair, Response

from .families import FAMILIES


Tokenizer = PreTrainedTokenizerFast
LIMITS: dict[str, Any] = {"max_prompt_tokens": 400, "max_response_tokens": 400}
USER: Message = {"role": "user", "content": "name the river."}
TURNS: tuple[Message, ...] = (USER, {"role": "assistant", "content": "the Elbe."}, {"role": "user", "content": "one?"})
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
ANSWERS = ("The Elbe, Ärger \U0001f600.", "the Rhine.\nin two  lines", "\tnot <b>it</b>", "1")


def made(name: str) -> Tokenizer:
    tokenizer = FAMILIES[name].tokenizer()
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATES["human_assistant"]
    return tokenizer


def template_ids(tokenizer: Tokenizer, *messages: Message, **options: Any) -> tuple[int, ...]:
    encoded: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    return tuple(encoded["input_ids"])


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def conversations(name: str) -> list[tuple[Message, ...]]:
    system = ({"role": "system", "content": "a city"},) if FAMILIES[name].system else ()
    return [(USER,), (*system, *TURNS)]


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_prompt_and_completion_are_the_templates_ids_up_to_the_end_of_turn(name: str) -> None:
    tokenizer = made(name)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    for messages in conversations(name):
        pairs = zip(ANSWERS, (*ANSWERS[1:], "2"), strict=True)
        rows = [PromptRow("r", messages=messages, pair=RecordedPair(a, b)) for a, b in pairs]
        rows += [PromptRow("r", messages=messages, completion=a) for a in ANSWERS]
        for row, prompt in zip(rows, tokenize_rows(rows, tokenizer, **LIMITS)[0], strict=True):
            texts = (row.completion,) if row.pair is None else (row.pair.chosen, row.pair.rejected)
            for text, response in zip(texts, prompt.pair or (prompt.completion,), strict=True):
                assert text is not None
                assert response is not None
                whole = template_ids(tokenizer, *messages, answer(text))
                ours = prompt.ids + response.ids
                assert ours == whole[: len(ours)]
                assert response.ids.count(end) == 1
                assert response.ids[-1] == end
                assert tokenizer.decode(whole[len(ours) :], skip_special_tokens=True).strip() == ""
                assert (response.text, response.finish_reason) == (text, "eos")
            if name != "r1":  # asked, it begins a thought, which its answered form leaves out
                assert prompt.ids == template_ids(tokenizer, *messages, add_generation_prompt=True)


def test_plain_texts_are_tokenized_as_one(name: str) -> None:
    tokenizer = made(name)
    for text, completion in (
        ("name the river.", " The Elbe."),
        ("name the river.", "The Elbe."),
        ("name: ", "the Elbe"),
        ("name the riv", "er Elbe"),
        ("name\n", "\n the Elbe"),
        ("q", "\n\nA"),
    ):
        (prompt,), _ = tokenize_rows([PromptRow("r", text=text, completion=completion)], tokenizer, **LIMITS)
        assert prompt.completion is not None
        # what a policy is asked with, and the whole text behind it, without a space that nobody wrote
        assert prompt.ids == tuple(tokenizer(text)["input_ids"])
        assert prompt.completion.ids[-1] == tokenizer.eos_token_id
        whole = tuple(tokenizer(text + completion)["input_ids"])
        ours = prompt.ids + prompt.completion.ids[:-1]
        assert tokenizer.decode(ours, skip_special_tokens=True) == tokenizer.decode(whole, skip_special_tokens=True)
        if whole[: len(prompt.ids)] == prompt.ids:
            assert ours == whole
        assert prompt.completion.text == completion


def test_there_is_one_bos_whatever_a_prompt_contains(name: str) -> None:
    tokenizer, bos = made(name), FAMILIES[name].bos
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    texts = [rendered, "river " * 99, f"{bos or ''}the Elbe", f"{bos or ''}{bos or ''}the Elbe"]
    rows = [PromptRow("r", text=text, completion="the") for text in texts]
    rows += [PromptRow("r", messages=({"role": "user", "content": "river " * 99},), completion="the")]
    limits = {**LIMITS, "max_prompt_tokens": 60, "on_long_prompt": "truncate"}
    prompts, _ = tokenize_rows(rows, tokenizer, **limits)
    assert prompts[0].ids == template_ids(tokenizer, USER, add_generation_prompt=True)
    if bos is not None:
        assert all(p.ids.count(tokenizer.convert_tokens_to_ids(bos)) == 1 for p in prompts[1:4])
        assert {p.ids[0] for p in prompts[1:4]} == {tokenizer.convert_tokens_to_ids(bos)}
    # as exported, and read again
    again, _ = tokenize_rows([PromptRow("r", text=p.text, completion="the") for p in prompts], tokenizer, **LIMITS)
    assert [p.ids for p in again] == [p.ids for p in prompts]


def test_a_text_that_was_rendered_beforehand_ends_as_its_conversation_does(name: str) -> None:
    tokenizer = made(name)
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    end = FAMILIES[name].end
    for text in ("the Elbe.", f"the Elbe.{end}", f"the Elbe.{end}\n"):
        (prompt,), counts = tokenize_rows([PromptRow("r", text=rendered, completion=text)], tokenizer, **LIMITS)
        assert prompt.completion is not None
        ends = [i for i in prompt.completion.ids if i in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end))]
        assert ends == [tokenizer.convert_tokens_to_ids(end)]
        assert prompt.completion.ids[-1:] == tuple(ends)
        assert prompt.completion.text == "the Elbe."
        assert not counts


def test_a_reward_model_reads_the_whole_template(name: str, tmp_path: Path) -> None:
    tokenizer = made(name)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, vocab_size=len(tokenizer), num_labels=1, pad_token_id=0)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cases = [(messages, text) for messages in conversations(name) for text in ("The Elbe.", "", "two")]
    prompts = [Prompt(i, (1,), "x", messages) for i, (messages, _) in enumerate(cases)]
    responses = [Response((1,), text, "eos") for _, text in cases]
    expected = [template_ids(tokenizer, *messages, answer(text)) for messages, text in cases]
    encoded = encode_answers(prompts, responses, tokenizer)
    assert [prompt + ids for prompt, ids in encoded] == expected
    assert all(prompt and ids for prompt, ids in encoded)
    with torch.no_grad():
        states = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in expected]
        card = torch.cat([model.score(state) for state in states])
    torch.testing.assert_close(RewardModelReward(str(tmp_path)).score(prompts, responses).mean, card)
    # what was cut off has no end of turn
    ((prompt, ids),) = encode_answers(prompts[:1], [Response((1,), "The Elbe.", "length")], tokenizer)
    assert tokenizer.decode(prompt + ids, skip_special_tokens=True).rstrip().endswith("The Elbe.")
    assert ids[-1] not in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(FAMILIES[name].end))


@pytest.mark.parametrize("name", ["qwen2-base", "gemma3", "phi3"], indirect=True)
def test_a_trained_reward_model_is_read_where_it_was_trained(name: str, tmp_path: Path) -> None:
    """By this library and by transformers over the template; one of an earlier version where that one read it."""
    tokenizer, backbone = made(name), tmp_path / "backbone"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=len(tokenizer), max_position_embeddings=64)).save_pretrained(
        backbone
    )
    tokenizer.save_pretrained(backbone)
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": [USER], "chosen": [answer("The Elbe.")], "rejected": [answer("two")]}
    rows.write_text(json.dumps(row))
    data = PreferenceDataModule(
        DatasetPrompts(str(rows)),
        OfflineSampler(),
        RecordedLabeler(),
        heldout=DatasetPrompts(str(rows)),
        pairs_per_batch=1,
        rounds=PreferenceRoundOptions(epochs_per_round=None),
        decoding=Decoding(max_new_tokens=24),
    )
    module = RewardModule(str(backbone), optimizer=partial(AdamW, lr=1e-2, weight_decay=0.0))
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=1, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, datamodule=data)
    module.save_pretrained(tmp_path / "model")
    reward = RewardModelReward(str(tmp_path / "model"))
    texts = ("The Elbe.", "two")
    prompts, responses = [Prompt(0, (1,), "x", (USER,))] * 2, [Response((1,), text, "eos") for text in texts]
    ours = reward.score(prompts, responses).mean
    (trained,) = data._heldout
    assert trained.pair is not None
    with torch.no_grad():
        own = module._scores([(trained.ids, tuple(response.ids for response in trained.pair))]).view(-1)
        model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        ids = [template_ids(tokenizer, USER, answer(text)) for text in texts]
        states = [model.base_model(torch.tensor([one])).last_hidden_state[0, -1] for one in ids]
        card = torch.cat([model.score(state) for state in states])
    torch.testing.assert_close(ours, own)
    torch.testing.assert_close(ours, card)
    assert ours.mean().item() == pytest.approx(model.config.reward_mean, abs=1e-4)
    # a folder as earlier versions wrote it: EOS behind the end of turn, and nothing else
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.pop("reward_reading") == "template"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    end, eos = tokenizer.convert_tokens_to_ids(FAMILIES[name].end), tokenizer.eos_token_id
    earlier = [one[: len(one) - 1 - one[::-1].index(end)] + ((end,) if end == eos else (end, eos)) for one in ids]
    with torch.no_grad():
        states = [model.base_model(torch.tensor([one])).last_hidden_state[0, -1] for one in earlier]
        card = torch.cat([model.score(state) for state in states])
    torch.testing.assert_close(RewardModelReward(str(tmp_path / "model")).score(prompts, responses).mean, card)


def test_generation_stops_where_recorded_turns_end(name: str) -> None:
    tokenizer = made(name)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    assert set(stop_ids(config, tokenizer)) == {end, tokenizer.eos_token_id}
    add_stop_ids(config, tokenizer)  # so does the model that is saved
    saved = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert set(saved) == {end, tokenizer.eos_token_id}


def test_a_sampled_text_continues_a_plain_prompt(name: str) -> None:
    tokenizer = made(name)
    for text in (" the Elbe.", "\nthe Elbe", "s."):
        row = PromptRow("r", text="name the river", completion=text)
        (prompt,), _ = tokenize_rows([row], tokenizer, **LIMITS)
        assert prompt.completion is not None
        assert sampled_text(tokenizer, prompt, prompt.completion.ids, ended=True) == text


def test_reasoning_is_recorded_as_it_is_sampled() -> None:
    for name in ("qwen3", "r1"):
        tokenizer = made(name)
        asked = template_ids(tokenizer, USER, add_generation_prompt=True)
        text = "<think>\nwater is in the river.\n</think>\n\nThe Elbe."
        (prompt,), counts = tokenize_rows([PromptRow("r", messages=(USER,), completion=text)], tokenizer, **LIMITS)
        assert prompt.completion is not None
        assert prompt.ids == asked
        whole = tokenizer.decode(prompt.ids + prompt.completion.ids)
        assert whole.endswith(text + FAMILIES[name].end)  # once, with the thought that R1's template cuts off
        assert whole.count("<think>") == 1
        assert prompt.completion.text == text
        assert len(counts) == (name == "r1")
    # a pair of which one answer thinks: the prompt ends before the thought, which both may begin or not
    row = PromptRow("r", messages=(USER,), pair=RecordedPair(text, "The Rhine."))
    (prompt,), _ = tokenize_rows([row], tokenizer, **LIMITS)
    assert prompt.pair is not None
    assert tokenizer.decode(prompt.ids).endswith("<|Assistant|>")
    assert tokenizer.decode(prompt.pair[0].ids) == text + "<|end|>"
    assert tokenizer.decode(prompt.pair[1].ids) == "The Rhine.<|end|>"


CALL = {"type": "function", "function": {"name": "gauge", "arguments": {"river": "Elbe"}}}
TOOL = {"type": "function", "function": {"name": "gauge", "parameters": {}}}


def test_fields_of_messages_reach_the_template() -> None:
    tokenizer = made("qwen3")
    messages: tuple[Message, ...] = (
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "water", "tool_calls": [CALL]},
        {"role": "tool", "content": "2 m", "tool_call_id": "7"},
    )
    final = {"role": "assistant", "content": "two", "reasoning_content": "is it?"}
    row = PromptRow("r", messages=messages, completion="two", answers=(final,), template_options={"tools": [TOOL]})
    (prompt,), counts = tokenize_rows([row], tokenizer, **LIMITS)
    whole = template_ids(tokenizer, *messages, final, tools=[TOOL])
    assert prompt.completion is not None
    ours = prompt.ids + prompt.completion.ids
    assert ours == whole[: len(ours)]
    text = tokenizer.decode(ours)
    assert all(part in text for part in ("gauge", "2 m", "<tools>", "water", "is it?"))
    assert counts == {"message fields that the chat template leaves out: tool_call_id": 1}
    # an answer that is a call
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = PromptRow("r", messages=(USER,), pair=RecordedPair("call", "no"), answers=(call, answer("no")))
    (prompt,), _ = tokenize_rows([row], tokenizer, **LIMITS)
    assert prompt.pair is not None
    assert '<tool_call>{"name": "gauge"' in prompt.pair[0].text
    without = PromptRow("r", messages=(USER,), completion="x", template_options={"enable_thinking": False})
    (prompt,), _ = tokenize_rows([without], tokenizer, **LIMITS)
    assert prompt.ids == template_ids(tokenizer, USER, add_generation_prompt=True, enable_thinking=False)


@pytest.mark.parametrize(
    ("family", "messages", "options", "what"),
    [
        ("qwen2", ({**USER, "name": "Ann"},), {}, "field 'name' of message 1, by 'user'"),
        ("zephyr", (USER, {**answer("x"), "tool_calls": [CALL]}, USER), {}, "field 'tool_calls' of message 2"),
        ("gemma3", (USER, {**answer("x"), "reasoning_content": "y"}, USER), {}, "field 'reasoning_content'"),
        ("llama3", (USER,), {"tools": [TOOL]}, "'tools', which the row gives"),
        ("qwen2", (USER,), {"enable_thinking": False}, "'enable_thinking', which the row gives"),
        ("llama2", (USER, {"role": "tool", "content": "x"}), {}, "content of message 2, by 'tool'"),
        ("gpt2", (USER, {"role": "tool", "content": "x"}), {}, "role 'tool' of message 2"),
    ],
)
def test_what_a_template_leaves_out_is_named(
    family: str, messages: tuple[Message, ...], options: dict[str, Any], what: str
) -> None:
    row = PromptRow("f.jsonl row 3", messages=messages, completion="two", template_options=options)
    with pytest.raises(ValueError, match=f"f.jsonl row 3: the chat template does not write {what}.*ignored_fields"):
        tokenize_rows([row], made(family), **LIMITS)


def test_reasoning_of_earlier_turns_may_be_left_out_and_is_counted() -> None:
    thought = {**answer("x"), "reasoning_content": "water"}
    row = PromptRow("r", messages=(USER, thought, USER), completion="two")
    _, counts = tokenize_rows([row], made("qwen3"), **LIMITS)
    assert counts == {"reasoning of earlier turns, which the chat template leaves out": 1}


def test_a_reward_model_that_cannot_read_a_field_says_so() -> None:
    prompt = Prompt(0, (1,), "x", (USER, {**answer("x"), "tool_calls": [CALL]}, USER))
    with pytest.warns(UserWarning, match="prompt 0: the chat template does not write field 'tool_calls'"):
        encode_answers([prompt], [Response((1,), "a", "eos")], made("qwen2"))

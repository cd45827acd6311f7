"""Tokenizers and chat templates of the kinds that families of models come with, small and made here.

Templates are short forms of what the families publish: same turns, same ends, same quirks.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


WORDS = "the a river city name one two water answer question is are was in of to and not Elbe Rhine Berlin"
_random = random.Random(0)
CORPUS = [" ".join(_random.choice(WORDS.split()) for _ in range(10)) + "." for _ in range(200)]

LLAMA2 = (
    "{% set start = 1 if messages[0]['role'] == 'system' else 0 %}{% for m in messages[start:] %}"
    "{% set c = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + m['content'] if start and loop.first "
    "else m['content'] %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nthe water.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\\n<tools>' + tools | tojson + '</tools><|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set c = m['content'] or '' %}"
    "{% if m['role'] == 'assistant' %}{% set r = m['reasoning_content'] or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + r.strip() + '\\n</think>\\n\\n' }}{% endif %}{{ c }}"
    "{% for t in m['tool_calls'] or [] %}{{ '<tool_call>' + t['function'] | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% elif m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>' + c + '</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + c + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
    "+ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
    "+ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{% set c = m['content'].split('</think>')[-1] if '</think>' in m['content'] else m['content'] %}"
    "{{ '<|Assistant|>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)


def _special(tokenizer: Tokenizer, *tokens: str, **options: Any) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, **options) for t in tokens])
    return tokenizer


@cache
def _trained(kind: str) -> str:
    """Vocabulary and merges of a BPE model, as JSON."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        base = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=base, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.dumps(json.loads(tokenizer.to_str())["model"])


def byte_level() -> Tokenizer:
    """As of GPT-2, Qwen, Llama-3 and DeepSeek."""
    trained = json.loads(_trained("bytes"))
    tokenizer = Tokenizer(models.BPE(trained["vocab"], [tuple(merge) for merge in trained["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(prefix: str) -> Tokenizer:
    """As of Llama-2, Mistral, Phi-3 and Gemma; where a space is put in front: "first", "never", or "legacy", always."""
    trained = json.loads(_trained("pieces"))
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(trained["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts if prefix == "never" else [*parts, decoders.Strip(" ", 1, 0)])
    return _special(tokenizer, "<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Args:
        core: byte_level, or a prefix for sentencepiece.
        template: chat template.
        end: token that ends a turn.
        eos: end of sequence, where it is another.
        bos: what the tokenizer puts in front.
        specials: further special tokens.
        rstrip: special tokens that take the white space behind them.
        system: whether the template takes a system turn.
    """

    core: str
    template: str
    end: str
    eos: str
    bos: str | None = None
    specials: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    system: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        core = byte_level() if self.core == "bytes" else sentencepiece(self.core)
        known = {self.eos, self.end, *self.specials, *([self.bos] if self.bos else [])} - set(self.rstrip)
        _special(core, *sorted(known))
        _special(core, *self.rstrip, rstrip=True)
        if self.bos is not None:
            core.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A",
                pair=f"{self.bos} $A {self.bos} $B",
                special_tokens=[(self.bos, core.token_to_id(self.bos))],
            )
        make: Any = PreTrainedTokenizerFast
        tokenizer: PreTrainedTokenizerFast = make(tokenizer_object=core, eos_token=self.eos, bos_token=self.bos)
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>",)
TURN = ("<start_of_turn>",)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
FAMILIES = {
    "llama2": Family("first", LLAMA2, "</s>", "</s>", "<s>"),
    "llama2-legacy": Family("legacy", LLAMA2, "</s>", "</s>", "<s>"),
    "mistral": Family("first", MISTRAL, "</s>", "</s>", "<s>", system=False),
    "zephyr": Family("first", ZEPHYR, "</s>", "</s>", "<s>"),
    "zephyr-legacy": Family("legacy", ZEPHYR, "</s>", "</s>", "<s>"),
    "phi3": Family("first", PHI3, "<|end|>", "<|endoftext|>", "<s>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "phi3-rstrip": Family(
        "legacy", PHI3, "<|end|>", "<|endoftext|>", "<s>", rstrip=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    ),
    "qwen2": Family("bytes", QWEN2, "<|im_end|>", "<|im_end|>", specials=IM),
    "qwen2-base": Family("bytes", QWEN2, "<|im_end|>", "<|endoftext|>", specials=IM),
    "qwen3": Family("bytes", QWEN3, "<|im_end|>", "<|im_end|>", specials=IM),
    "gemma2": Family("never", GEMMA, "<end_of_turn>", "<eos>", "<bos>", TURN, system=False),
    "gemma3": Family("never", GEMMA3, "<end_of_turn>", "<eos>", "<bos>", TURN),
    "llama3": Family("bytes", LLAMA3, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", HEADERS),
    "llama3-base": Family("bytes", LLAMA3, "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", HEADERS),
    "r1": Family("bytes", R1, "<|end|>", "<|end|>", "<|begin|>", ("<|User|>", "<|Assistant|>")),
    "gpt2": Family("bytes", "", "<|endoftext|>", "<|endoftext|>"),
}

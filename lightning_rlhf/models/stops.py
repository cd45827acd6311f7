"""Where a sequence ends: the token ids that end a response, and the context window of the model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.models.checks import default_of
from lightning_rlhf.models.pretrained import embedding_rows, required_config
from lightning_rlhf.prompts.template import turn_format
from lightning_rlhf.runtime.hub_access import hub_or_cache


def end_of_sequence_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end a response: those of `stop_ids` that the model can write.

    Raises:
        ValueError: if there is none, or one outside of the model's embedding.
    """
    found = stop_ids(getattr(model, "generation_config", None), tokenizer)
    rows = embedding_rows(model)
    config = cast(PreTrainedConfig, model.config)
    # a small model often keeps the id of its family's first one, which it can never write
    found = tuple(i for i in found if rows is None or i < rows or i != default_of(config, "eos_token_id"))
    beyond = [i for i in found if rows is not None and not 0 <= i < rows]
    if beyond:
        raise ValueError(
            f"end-of-sequence id {beyond[0]} lies outside of the {rows} rows of the model's embedding; correct "
            f"eos_token_id in generation_config.json and config.json, or eos_token in tokenizer_config.json"
        )
    if not found:
        raise ValueError(
            "neither the tokenizer nor the generation config names an end-of-sequence token; set eos_token"
        )
    return found


def context_window(model_or_config: PreTrainedModel | PeftModel | PreTrainedConfig) -> int | None:
    """Longest sequence in tokens; None when the config states no limit."""
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    text = cast(PreTrainedConfig, config).get_text_config()
    # names differ by family: Llama, GPT-2, DBRX, and older ones
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def stop_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end a response: EOS, those of the generation config, and the end of turn of the chat template.

    Recorded turns end as the template ends them, so generation must stop there too. Many base models come with a chat
    template and a generation config that does not know it.

    Args:
        generation_config: of the model; None if it has none.
        tokenizer: its tokenizer.

    Raises:
        ValueError: if nothing would end a response.
    """
    configured = configured_ids(generation_config, tokenizer)
    end = turn_format(tokenizer).end
    found = configured if end is None or end in configured else (*configured, end)
    if not found:
        raise ValueError(
            "neither the tokenizer nor the generation config names an end-of-sequence token; set eos_token"
        )
    return found


def configured_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """EOS of the tokenizer, and the end-of-sequence ids of the generation config."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def saved_generation_config(checkpoint: Path | str, trust_remote_code: bool = False) -> GenerationConfig:
    """The generation config of a checkpoint, without its weights.

    Args:
        checkpoint: folder or Hub id, from `lightning_rlhf.models.resolve.resolve_checkpoint`.
        trust_remote_code: run code that comes with the checkpoint.
    """
    try:
        with hub_or_cache(checkpoint):
            return GenerationConfig.from_pretrained(checkpoint)
    except OSError:  # none saved: transformers derives it from the model's config
        config = required_config(checkpoint, str(checkpoint), trust_remote_code)
        return GenerationConfig.from_model_config(config)


def add_stop_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the ids that end a response into a generation config, where it stops at fewer.

    A saved model then stops in every inference engine where its training data ended.
    """
    if generation_config is None or turn_format(tokenizer).end is None:
        return
    known = configured_ids(generation_config, tokenizer)
    wanted = stop_ids(generation_config, tokenizer)
    if set(wanted) - set(known):
        generation_config.eos_token_id = list(wanted)

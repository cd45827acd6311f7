"""Where generation stops: which token ids end a response, known with or without the model's weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from lightning_rlhf.prompts.template import turn_format


def stop_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end a response: EOS, those of the generation config, and the end of turn of the chat template.

    Recorded turns end as the template ends them, so that generation must stop there too; many base models come with a
    chat template and a generation config that does not know of it.

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


def configured_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """EOS of the tokenizer, and what the generation config stops at."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def saved_generation_config(checkpoint: Any, trust_remote_code: bool = False) -> GenerationConfig:
    """The generation config of a checkpoint, without its weights.

    Args:
        checkpoint: what `lightning_rlhf.models.load.resolve_checkpoint` returned.
        trust_remote_code: run code that comes with the checkpoint.
    """
    try:
        return GenerationConfig.from_pretrained(checkpoint)
    except OSError:  # none saved: transformers makes it of the model's config
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


def add_stop_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the ids that end a response into a generation config, where it stops at fewer.

    So that a saved model stops, in whatever runs it, where its training data ended.
    """
    if generation_config is None or turn_format(tokenizer).end is None:
        return
    known = configured_ids(generation_config, tokenizer)
    wanted = stop_ids(generation_config, tokenizer)
    if set(wanted) - set(known):
        generation_config.eos_token_id = list(wanted)

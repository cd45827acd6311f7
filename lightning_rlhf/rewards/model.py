"""Rewards by a trained reward model, which reads texts with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.models.load import context_window, load_scorer, load_tokenizer, resolve_checkpoint, scalar_head
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.scores import response_scores
from lightning_rlhf.prompts.tokenize import encode_answers
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


class RewardModelReward(AbstractReward):
    """The scalar of a reward model: what `RewardModule` saved, or any decoder with ``num_labels=1``.

    Prompt and response are written anew with the reward model's tokenizer and chat template, from their texts, so that
    policy and reward model may differ in both. Equal prompts are computed once. The model is loaded at the first call.

    Args:
        path: a folder that ``AutoModelForSequenceClassification`` opens, or a Hub id.
        normalize: subtract the mean and divide by the standard deviation that the folder's config keeps.
        tokens_per_batch: tokens of one forward pass.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; a GPU if there is one when not given.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the model has no scalar head, or ``normalize`` is set and the config keeps no mean.
    """

    def __init__(
        self,
        path: str,
        normalize: bool = False,
        tokens_per_batch: int = 4096,
        dtype: str = "float32",
        device: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        resolve_checkpoint(path)  # a name that is wrong is better known before a policy is trained
        self.path, self.normalize, self.tokens_per_batch = path, normalize, tokens_per_batch
        self.dtype, self.chat_template = dtype, chat_template
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B]."""
        model, tokenizer = self._load()
        longest_answer = max((len(r.text) for r in responses), default=0)
        window = context_window(model)
        # a token has a character at least
        limit = 1_000_000 if window is None else max(window // 2, window - longest_answer - 1)
        pairs = encode_answers(prompts, responses, tokenizer, max_prompt_tokens=limit, chat_template=self.chat_template)
        groups = [(ids, [answer for _, answer in same]) for ids, same in groupby(pairs, key=lambda pair: pair[0])]
        with evaluating(model.modules()):
            scores = response_scores(
                model.base_model, scalar_head(model), groups, tokens_per_batch=self.tokens_per_batch
            )
        if self.normalize:
            scores = (scores - model.config.reward_mean) / model.config.reward_std
        return RewardOutput(scores.float().cpu())

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            model = load_scorer(self.path, dtype=self.dtype).requires_grad_(False)
            std = getattr(model.config, "reward_std", None)
            if self.normalize and not std:
                raise ValueError(
                    f"normalize needs reward_mean and reward_std in {self.path}/config.json, which RewardModule writes "
                    f"when it has validated; got {std}: train with data.heldout, or leave normalize out"
                )
            model.to(torch.device(self.device))  # type: ignore[arg-type]
            self._loaded = model, load_tokenizer(self.path)
        return self._loaded

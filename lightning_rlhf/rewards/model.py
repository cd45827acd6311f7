"""Rewards by a trained reward model, which reads texts with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models.load import context_window, load_tokenizer, resolve_checkpoint
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.scorer import Scorer, open_scorer
from lightning_rlhf.prompts.tokenize import (
    CHAT_TEMPLATES,
    Reading,
    encode_answers,
    leading_special_ids,
    truncate_left,
)
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.rewards.combine import CombineRule, check_rule, combine, disagreement, standardised
from lightning_rlhf.types import Prompt, Response


class RewardModelReward(AbstractReward):
    """The reward of a reward model: what `RewardModule` saved, or any decoder with ``num_labels=1``.

    Prompt and response are written anew with the reward model's tokenizer and chat template, from their texts, so that
    policy and reward model may differ in both. Equal prompts are computed once. The model is loaded at the first call.

    Of an ensemble, members are standardised by their held-out means and deviations before they are combined; the result
    is put back on the members' average scale unless ``normalize`` is set. `RewardOutput.members` and ``.std``, their
    disagreement, are on the scale of the result.

    Args:
        path: a folder that `RewardModule` wrote or ``AutoModelForSequenceClassification`` opens, or a Hub id.
        normalize: give rewards of mean 0 and deviation 1 on the held-out data that the folder knows of.
        combine: what an ensemble's reward is: ``mean``, ``lcb`` (mean less ``coefficient`` standard deviations),
            ``uwo`` (less ``coefficient`` variances), ``wco`` (the lowest).
        coefficient: how much disagreement costs, in units of a member's own deviation, >= 0.
        tokens_per_batch: tokens of one forward pass.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; a GPU if there is one when not given.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        reading: where the reward is read: at the last token of ``template``, as ``AutoModelForSequenceClassification``
            is used over ``apply_chat_template``, or at ``end_of_sequence``, EOS behind the end of turn. ``auto`` takes
            the latter for reward models that earlier versions of this library saved after a validation.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the model has no score head, or the folder lacks what ``normalize`` or ``combine`` needs.
    """

    def __init__(
        self,
        path: str,
        normalize: bool = False,
        combine: CombineRule = "mean",
        coefficient: float = 1.0,
        tokens_per_batch: int = 4096,
        dtype: str = "float32",
        device: str | None = None,
        chat_template: str | None = None,
        reading: Literal["auto", "template", "end_of_sequence"] = "auto",
    ) -> None:
        if reading not in ("auto", "template", "end_of_sequence"):
            raise ValueError(f"reading must be 'auto', 'template' or 'end_of_sequence'; got {reading!r}")
        self.reading: Literal["auto", "template", "end_of_sequence"] = reading
        resolve_checkpoint(path)  # a name that is wrong is better known before a policy is trained
        check_rule(combine, coefficient)
        self.path, self.normalize, self.tokens_per_batch = path, normalize, tokens_per_batch
        self.combine: CombineRule = combine
        self.coefficient = coefficient
        self.dtype, self.chat_template = dtype, chat_template
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[Scorer, PreTrainedTokenizerBase] | None = None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B]."""
        scorer, tokenizer = self._load()
        pairs = encode_answers(prompts, responses, tokenizer, reading=self._reading(scorer))
        window = context_window(scorer.config)
        if window is not None:
            leading = leading_special_ids(tokenizer)
            # each by itself: a score must not depend on what else is scored
            for index, (prompt, answer) in enumerate(pairs):
                if len(answer) >= window:
                    raise ValueError(
                        f"prompt {prompts[index].index}: the response has {len(answer)} tokens, and the window of the "
                        f"reward model {self.path!r} is {window}: lower max_new_tokens, or use a model with a longer "
                        f"window"
                    )
                if len(prompt) + len(answer) > window:
                    length = window - len(answer)
                    pairs[index] = truncate_left(prompt, length, tokenizer.bos_token_id, leading), answer
        groups = [(ids, [answer for _, answer in same]) for ids, same in groupby(pairs, key=lambda pair: pair[0])]
        with evaluating(scorer.modules()):
            members = scorer.scores(groups, tokens_per_batch=self.tokens_per_batch).float().cpu()
        return self._combined(members, scorer)

    def _reading(self, scorer: Scorer) -> Reading:
        """Where the model was trained to be read."""
        if self.reading != "auto":
            return self.reading
        known = getattr(scorer.config, "reward_reading", None)
        # statistics without a reading: saved by this library before it read at the end of the template
        earlier = scorer.means is not None or scorer.size > 1 or hasattr(scorer.config, "reward_mean")
        return "end_of_sequence" if known is None and earlier else "template"

    def _combined(self, members: Tensor, scorer: Scorer) -> RewardOutput:
        """From what the members say to what is reported."""
        if scorer.means is None or scorer.stds is None or (scorer.size == 1 and not self.normalize):
            mean, std = combine(members, self.combine, self.coefficient), disagreement(members)
        else:
            scale, shift = (1.0, 0.0) if self.normalize else (fmean(scorer.stds), fmean(scorer.means))
            members = standardised(members, scorer.means, scorer.stds)
            mean = scale * combine(members, self.combine, self.coefficient) + shift
            std, members = scale * disagreement(members), scale * members + shift
        return RewardOutput(mean, std, members) if scorer.size > 1 else RewardOutput(mean)

    def _load(self) -> tuple[Scorer, PreTrainedTokenizerBase]:
        if self._loaded is None:
            scorer = open_scorer(self.path, dtype=self.dtype).requires_grad_(False)
            if self.combine != "mean" and scorer.size == 1:
                raise ValueError(
                    f"combine={self.combine} needs an ensemble, and {self.path} holds a single reward model: train one "
                    f"with model.ensemble, or leave combine out"
                )
            known = scorer.stds is not None and min(scorer.stds) > 0
            if not known and (self.normalize or self.combine != "mean"):
                raise ValueError(
                    f"normalize and combine={self.combine} need the mean and deviation of the rewards on held-out "
                    f"data, which RewardModule keeps in {self.path} when it has validated; got deviations "
                    f"{scorer.stds}: train with data.heldout"
                )
            if not known:
                scorer.means = scorer.stds = None
            template = CHAT_TEMPLATES.get(self.chat_template or "", self.chat_template)
            self._loaded = scorer.to(self.device), load_tokenizer(self.path, template)
        return self._loaded

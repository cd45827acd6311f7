"""Rewards by a trained reward model, which reads texts with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models.load import context_window, load_tokenizer, resolve_checkpoint
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.scorer import ClassifierScorer, Scorer, open_scorer, read_statistics
from lightning_rlhf.prompts.tokenize import encode_answers, truncate_left
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.rewards.combine import CombineRule, check_rule, combine, disagreement, standardised
from lightning_rlhf.types import Prompt, Response


class RewardModelReward(AbstractReward):
    """The reward of a reward model: what `RewardModule` saved, or any classifier of transformers with ``num_labels=1``.

    Prompt and response are written anew with the reward model's tokenizer and chat template, from their texts, so that
    policy and reward model may differ in both. Equal prompts are computed once. The model is loaded at the first call.

    Of an ensemble, members are standardised by their held-out means and deviations before they are combined; the result
    is put back on the members' average scale unless ``normalize`` is set. `RewardOutput.members` and ``.std``, their
    disagreement, are on the scale of the result.

    Args:
        path: a folder that `RewardModule` wrote or ``AutoModelForSequenceClassification`` opens, with a decoder or an
            encoder, a peft adapter of one with its head, or a Hub id.
        normalize: give rewards of mean 0 and deviation 1 on the held-out data that the folder knows of.
        combine: what an ensemble's reward is: ``mean``, ``lcb`` (mean less ``coefficient`` standard deviations),
            ``uwo`` (less ``coefficient`` variances), ``wco`` (the lowest).
        coefficient: how much disagreement costs, in units of a member's own deviation, >= 0.
        tokens_per_batch: tokens of one forward pass.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; a GPU if there is one when not given.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the model has no trained score head, or more than one label, or the folder lacks what
            ``normalize`` or ``combine`` needs.
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
        trust_remote_code: bool = False,
    ) -> None:
        check_rule(combine, coefficient)
        self.path, self.normalize, self.tokens_per_batch = path, normalize, tokens_per_batch
        self.combine: CombineRule = combine
        self.coefficient = coefficient
        self.dtype, self.chat_template = dtype, chat_template
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.trust_remote_code = trust_remote_code
        self._loaded: tuple[Scorer | ClassifierScorer, PreTrainedTokenizerBase] | None = None
        # what is no reward model is better known before a policy is loaded
        if isinstance(resolve_checkpoint(path, trust_remote_code=trust_remote_code), Path):
            self._check_statistics(*read_statistics(path))
            scorer = open_scorer(path, trust_remote_code=trust_remote_code, meta=True)
            if is_plain_decoder(scorer):
                load_tokenizer(path, trust_remote_code=trust_remote_code, ends_texts=False)
            else:
                # only its numbers say whether it can be used
                self._load()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B]."""
        scorer, tokenizer = self._load()
        if isinstance(scorer, ClassifierScorer) and pairs_texts(tokenizer) and self.chat_template is None:
            return RewardOutput(self._score_text_pairs(scorer, tokenizer, prompts, responses))
        pairs = encode_answers(prompts, responses, tokenizer, chat_template=self.chat_template)
        window = scorer.window if isinstance(scorer, ClassifierScorer) else context_window(scorer.config)
        if window is not None:
            # each by itself: a score must not depend on what else is scored
            for index, (prompt, answer) in enumerate(pairs):
                if len(answer) >= window:
                    raise ValueError(
                        f"prompt {prompts[index].index}: the response has {len(answer)} tokens, and the window of the "
                        f"reward model {self.path!r} is {window}: lower max_new_tokens, or use a model with a longer "
                        f"window"
                    )
                if len(prompt) + len(answer) > window:
                    pairs[index] = truncate_left(prompt, window - len(answer), tokenizer.bos_token_id), answer
        groups = [(ids, [answer for _, answer in same]) for ids, same in groupby(pairs, key=lambda pair: pair[0])]
        with evaluating(scorer.modules()):
            members = scorer.scores(groups, tokens_per_batch=self.tokens_per_batch).float().cpu()
        return self._combined(members, scorer)

    def _score_text_pairs(
        self,
        scorer: ClassifierScorer,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
    ) -> Tensor:
        """Score prompt and response as the two texts of an encoder, each between its special tokens."""
        ids, types = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            encoded = tokenizer(prompt.text, response.text, verbose=False)
            excess = 0 if scorer.window is None else len(encoded["input_ids"]) - scorer.window
            if excess > 0:
                # the beginning of the prompt is left out, as everywhere
                shorter = tokenizer(prompt.text, add_special_tokens=False, verbose=False)["input_ids"]
                if excess >= len(shorter):
                    raise ValueError(
                        f"prompt {prompt.index}: the response is longer than the window of {scorer.window} tokens of "
                        f"the reward model {self.path!r}: lower max_new_tokens, or use a model with a longer window"
                    )
                tokenizer.truncation_side = "left"
                encoded = tokenizer(
                    prompt.text, response.text, truncation="only_first", max_length=scorer.window, verbose=False
                )
            ids.append(tuple(encoded["input_ids"]))
            types.append(list(encoded.get("token_type_ids", ())))
        groups = [(text[:1], [text[1:]]) for text in ids]
        given = types if all(map(len, types)) else []
        return scorer.scores(groups, tokens_per_batch=self.tokens_per_batch, types=given).view(-1).float().cpu()

    def _combined(self, members: Tensor, scorer: Scorer | ClassifierScorer) -> RewardOutput:
        """From what the members say to what is reported."""
        if scorer.means is None or scorer.stds is None or (scorer.size == 1 and not self.normalize):
            mean, std = combine(members, self.combine, self.coefficient), disagreement(members)
        else:
            scale, shift = (1.0, 0.0) if self.normalize else (fmean(scorer.stds), fmean(scorer.means))
            members = standardised(members, scorer.means, scorer.stds)
            mean = scale * combine(members, self.combine, self.coefficient) + shift
            std, members = scale * disagreement(members), scale * members + shift
        return RewardOutput(mean, std, members) if scorer.size > 1 else RewardOutput(mean)

    def _check_statistics(self, size: int, stds: Sequence[float] | None) -> bool:
        """Whether the deviations of the members are known, which some settings need."""
        if self.combine != "mean" and size == 1:
            raise ValueError(
                f"combine={self.combine} needs an ensemble, and {self.path} holds a single reward model: train one "
                f"with model.ensemble, or leave combine out"
            )
        known = stds is not None and min(stds) > 0
        if not known and (self.normalize or self.combine != "mean"):
            raise ValueError(
                f"normalize and combine={self.combine} need the mean and deviation of the rewards on held-out data, "
                f"which RewardModule keeps in {self.path} when it has validated; got deviations {stds}: train with "
                f"data.heldout"
            )
        return known

    def _load(self) -> tuple[Scorer | ClassifierScorer, PreTrainedTokenizerBase]:
        if self._loaded is None:
            scorer = open_scorer(self.path, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
            scorer.requires_grad_(False)
            if not self._check_statistics(scorer.size, scorer.stds):
                scorer.means = scorer.stds = None
            tokenizer = load_tokenizer(
                self.path,
                trust_remote_code=self.trust_remote_code,
                ends_texts=not isinstance(scorer, ClassifierScorer),
            )
            self._loaded = scorer.to(self.device), tokenizer
        return self._loaded


def is_plain_decoder(scorer: Scorer | ClassifierScorer) -> bool:
    """Whether a scorer is a linear ``score`` on a decoder by its names alone, of the class that its config names."""
    config: Any = scorer.config
    model = scorer.model
    named = (getattr(config, "architectures", None) or [type(model).__name__])[0]
    return named == type(model).__name__ and isinstance(getattr(model, "score", None), nn.Linear)


def pairs_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is an encoder's, which reads a question and an answer as two texts between special tokens."""
    if tokenizer.chat_template or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return False
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add())

"""Rewards by a trained reward model, which reads texts with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.models.load import context_window, load_tokenizer, resolve_checkpoint
from lightning_rlhf.models.scorer import ClassifierScorer, Scorer, open_scorer, read_statistics
from lightning_rlhf.prompts.tokenize import (
    CHAT_TEMPLATES,
    Reading,
    encode_answers,
    leading_special_ids,
    truncate_left,
)
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.rewards.combine import CombineRule, check_rule, combine, disagreement, standardised
from lightning_rlhf.types import Prompt, Response


@accepts_old_names("RewardModelReward")
class RewardModelReward(AbstractReward):
    """The reward of a reward model: of `RewardModule`, or any classifier of transformers with ``num_labels=1``.

    Prompt and response are written anew with the reward model's tokenizer and chat template, from their texts, so that
    policy and reward model may differ in both. Equal prompts are computed once. The model is loaded at the first call.

    Of an ensemble, members are standardised by their held-out means and deviations before they are combined; the result
    is put back on the members' average scale unless ``normalize`` is set. `RewardOutput.members` and ``.std``, their
    disagreement, are on the scale of the result.

    Args:
        path: a folder that `RewardModule` wrote or ``AutoModelForSequenceClassification`` opens, with a decoder or an
            encoder, a peft adapter of one with its head, or a Hub id.
        normalize: give rewards of mean 0 and deviation 1 on the held-out data that the folder knows of.
        combine: the reward of an ensemble: ``mean``, ``lcb`` (mean less ``coefficient`` standard deviations),
            ``uwo`` (less ``coefficient`` variances), ``wco`` (the lowest).
        coefficient: how much disagreement costs, in units of a member's own deviation, >= 0.
        scoring_batch_tokens: tokens per forward pass.
        dtype: data type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; default: a GPU if there is one.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        trust_remote_code: run code that comes with the checkpoint.
        reading: where the reward is read: at the last token of ``template``, as ``AutoModelForSequenceClassification``
            is used over ``apply_chat_template``, or at ``end_of_sequence``, EOS behind the end of turn. ``auto`` takes
            the latter for reward models that earlier versions of this library saved after a validation.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the model has no trained score head, or more than one label, or the folder lacks the
            statistics that ``normalize`` or ``combine`` need.
    """

    def __init__(
        self,
        path: str,
        normalize: bool = False,
        combine: CombineRule = "mean",
        coefficient: float = 1.0,
        scoring_batch_tokens: int = 4096,
        dtype: str = "float32",
        device: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        reading: Literal["auto", "template", "end_of_sequence"] = "auto",
    ) -> None:
        if reading not in ("auto", "template", "end_of_sequence"):
            raise ValueError(f"reading must be 'auto', 'template' or 'end_of_sequence'; got {reading!r}")
        self.reading: Literal["auto", "template", "end_of_sequence"] = reading
        # before the model is opened
        check_rule(combine, coefficient)
        self.path, self.normalize, self.scoring_batch_tokens = path, normalize, scoring_batch_tokens
        self.combine: CombineRule = combine
        self.coefficient = coefficient
        self.dtype, self.chat_template = dtype, chat_template
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.trust_remote_code = trust_remote_code
        self._loaded: tuple[Scorer | ClassifierScorer, PreTrainedTokenizerBase] | None = None
        # fails now, not after a policy is loaded, on a folder that is no reward model
        if isinstance(resolve_checkpoint(path, trust_remote_code=trust_remote_code), Path):
            self._check_statistics(*read_statistics(path))
            scorer = open_scorer(path, trust_remote_code=trust_remote_code, meta=True)
            self._check_reads_one_response(scorer)
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
        pairs = encode_answers(prompts, responses, tokenizer, reading=self._reading(scorer))
        window = scorer.window if isinstance(scorer, ClassifierScorer) else context_window(scorer.config)
        if window is not None:
            leading = leading_special_ids(tokenizer)
            # each by itself: a score must not depend on the other responses
            for index, (prompt, answer) in enumerate(pairs):
                # `pack` takes no empty prompt: one of its tokens has to fit
                if len(answer) >= window:
                    raise ValueError(
                        f"prompt {prompts[index].index}: the response has {len(answer)} tokens, and the window of the "
                        f"reward model {self.path!r} is {window}: lower max_new_tokens, or use a model with a longer "
                        f"window"
                    )
                if len(prompt) + len(answer) > window:
                    length = window - len(answer)
                    pairs[index] = truncate_left(prompt, length, tokenizer.bos_token_id, leading), answer
        # groupby joins neighbors only, so that the scores keep the order of the responses
        groups = [(ids, [answer for _, answer in same]) for ids, same in groupby(pairs, key=lambda pair: pair[0])]
        with evaluating(scorer.modules()):
            members = scorer.scores(groups, tokens_per_batch=self.scoring_batch_tokens).float().cpu()
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
                # "only_first" cuts the prompt alone: a cut response would be another response
                tokenizer.truncation_side = "left"
                encoded = tokenizer(
                    prompt.text, response.text, truncation="only_first", max_length=scorer.window, verbose=False
                )
            ids.append(tuple(encoded["input_ids"]))
            types.append(list(encoded.get("token_type_ids", ())))
        # `scores` takes prompts with responses, and puts each pair of them together again
        groups = [(text[:1], [text[1:]]) for text in ids]
        given = types if all(map(len, types)) else []
        return scorer.scores(groups, tokens_per_batch=self.scoring_batch_tokens, types=given).view(-1).float().cpu()

    def _reading(self, scorer: Scorer | ClassifierScorer) -> Reading:
        """Where the model was trained to be read."""
        if self.reading != "auto":
            return self.reading
        known = getattr(scorer.config, "reward_reading", None)
        # statistics without a reading: saved by this library before it read at the end of the template
        earlier = scorer.means is not None or scorer.size > 1 or hasattr(scorer.config, "reward_mean")
        return "end_of_sequence" if known is None and earlier else "template"

    def _combined(self, members: Tensor, scorer: Scorer | ClassifierScorer) -> RewardOutput:
        """One reward per response from the rewards of the members."""
        if scorer.means is None or scorer.stds is None or (scorer.size == 1 and not self.normalize):
            mean, std = combine(members, self.combine, self.coefficient), disagreement(members)
        else:
            # z_k = (r_k - mean_k) / std_k, reward = scale * combine(z) + shift
            scale, shift = (1.0, 0.0) if self.normalize else (fmean(scorer.stds), fmean(scorer.means))
            members = standardised(members, scorer.means, scorer.stds)
            mean = scale * combine(members, self.combine, self.coefficient) + shift
            std, members = scale * disagreement(members), scale * members + shift
        # a single model has a disagreement of 0, which would pass for certainty
        return RewardOutput(mean, std, members) if scorer.size > 1 else RewardOutput(mean)

    def _check_reads_one_response(self, scorer: Scorer | ClassifierScorer) -> None:
        # a difference model would give single responses numbers without a meaning
        if getattr(scorer.config, "reward_reading", None) == "pair":
            raise ValueError(
                f"{self.path!r} is a difference model, which compares two responses and scores no single one; use "
                f"DifferenceLabeler, or train a reward model with --config reward_model"
            )

    def _check_statistics(self, size: int, stds: Sequence[float] | None) -> bool:
        """Whether the stds of the members are known and positive; some settings need them.

        Raises:
            ValueError: naming the setting that this folder does not support.
        """
        # with a single member the rule would have no effect
        if self.combine != "mean" and size == 1:
            raise ValueError(
                f"combine={self.combine} needs an ensemble, and {self.path} holds a single reward model: train one "
                f"with model.ensemble, or leave combine out"
            )
        known = stds is not None and min(stds) > 0
        # statistics of single members cannot be guessed
        if not known and (self.normalize or self.combine != "mean"):
            raise ValueError(
                f"normalize and combine={self.combine} need mean and std of the rewards on held-out data, which "
                f"RewardModule stores in {self.path} after a validation; got stds {stds}: train with data.heldout"
            )
        return known

    def _load(self) -> tuple[Scorer | ClassifierScorer, PreTrainedTokenizerBase]:
        # at first use: a run that reads its rewards from the ledger loads nothing
        if self._loaded is None:
            scorer = open_scorer(self.path, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
            self._check_reads_one_response(scorer)
            scorer.requires_grad_(False)
            # a std of 0 would divide by zero in `standardised`
            if not self._check_statistics(scorer.size, scorer.stds):
                scorer.means = scorer.stds = None
            template = CHAT_TEMPLATES.get(self.chat_template or "", self.chat_template)
            tokenizer = load_tokenizer(
                self.path,
                template,
                trust_remote_code=self.trust_remote_code,
                ends_texts=not isinstance(scorer, ClassifierScorer),
            )
            self._loaded = scorer.to(self.device), tokenizer
        return self._loaded


def is_plain_decoder(scorer: Scorer | ClassifierScorer) -> bool:
    """Whether a scorer is a linear ``score`` on a decoder by its names alone, of the class that its config names."""
    config = scorer.config
    model = scorer.model
    named = (getattr(config, "architectures", None) or [type(model).__name__])[0]
    return named == type(model).__name__ and isinstance(getattr(model, "score", None), nn.Linear)


def pairs_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is an encoder's, which reads a question and an answer as two texts between special tokens."""
    if tokenizer.chat_template or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return False
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add())

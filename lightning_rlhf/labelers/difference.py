"""Weights of pairs from a difference model: Reward Difference Optimization (arXiv 2408.09385)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.estimators.difference import WeightRule, antisymmetric_difference, difference_weight
from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.labelers.recorded import RecordedLabeler
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.models.load import context_window, load_tokenizer, resolve_checkpoint
from lightning_rlhf.models.scorer import ClassifierScorer, Scorer, open_scorer
from lightning_rlhf.prompts.template import TurnFormat, turn_format
from lightning_rlhf.prompts.tokenize import CHAT_TEMPLATES, encode_answers, leading_special_ids, truncate_left
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.plugins import check_plugin, returned
from lightning_rlhf.types import PAIR_WEIGHT, Comparison, Label, Prompt


class DifferenceLabeler(AbstractLabeler):
    """Weighs each labeled pair by how much better its winner is (RDO, arXiv 2408.09385).

    Another labeler says which response is better. A model of `DifferenceModule` says by how much, D(a, b), and the
    weight of the pair is R / (mean R on held-out pairs), with R of `difference_weight`. Every preference loss is
    multiplied by it. ``meta`` of a label holds ``difference``, D(a, b), and ``pair_weight``. Responses are written anew
    with the model's tokenizer and chat template. Where prompt and responses exceed its window, the prompt is cut on the
    left, never a response. The model is loaded at the first call.

    Args:
        path: a folder that `DifferenceModule` wrote.
        labeler: labels the pairs. Default: `RecordedLabeler`, the labels of the data.
        rule: ``clip`` gives 0 to pairs whose label the model contradicts, and to ties; ``abs`` ignores the label;
            ``sigmoid`` lies between 0 and 1 before it is divided by the mean.
        scale: what R is divided by, > 0. Default: its mean on the held-out pairs of the model's last validation.
        scoring_batch_tokens: tokens per forward pass.
        dtype: data type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; default: a GPU if there is one.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no difference model, or no mean while ``scale`` is not set; or a setting is out of
            range.
    """

    def __init__(
        self,
        path: str,
        labeler: AbstractLabeler | None = None,
        rule: WeightRule = "clip",
        scale: float | None = None,
        scoring_batch_tokens: int = 4096,
        dtype: str = "float32",
        device: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if rule not in get_args(WeightRule):
            raise ValueError(f"rule must be one of {', '.join(get_args(WeightRule))}; got {rule!r}")
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"scale, which weights are divided by, must be > 0; got {scale}")
        if labeler is not None:
            check_plugin("DifferenceLabeler.labeler", labeler, AbstractLabeler)
        self.path, self.scoring_batch_tokens = path, scoring_batch_tokens
        self.labeler = labeler if labeler is not None else RecordedLabeler()
        self.rule: WeightRule = rule
        self.scale = scale
        self.dtype, self.chat_template, self.trust_remote_code = dtype, chat_template, trust_remote_code
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[Scorer, PreTrainedTokenizerBase, TurnFormat] | None = None
        # fails now, not after a policy is loaded
        if isinstance(resolve_checkpoint(path, trust_remote_code=trust_remote_code), Path):
            self._scale_of(open_scorer(path, trust_remote_code=trust_remote_code, meta=True))

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label the comparisons, and weigh those that have a verdict."""
        labels = returned(
            self.labeler, "label", self.labeler.label(comparisons, key), len(comparisons), Label, "comparisons"
        )
        judged = [place for place, label in enumerate(labels) if label.probability is not None]
        if not judged:
            return labels
        scorer = self._load()[0]
        differences = self.differences([comparisons[place] for place in judged])
        probabilities = torch.tensor([labels[place].probability for place in judged], dtype=torch.float64)
        # R / (mean R)
        weights = difference_weight(differences, probabilities, self.rule) / self._scale_of(scorer)
        for place, difference, weight in zip(judged, differences.tolist(), weights.tolist(), strict=True):
            meta = {**labels[place].meta, "difference": difference, PAIR_WEIGHT: weight}
            labels[place] = replace(labels[place], meta=meta)
        return labels

    def differences(self, comparisons: Sequence[Comparison]) -> Tensor:
        """D(a, b) of each comparison, the mean over members of an ensemble; float64, [comparisons]."""
        scorer, tokenizer, turns = self._load()
        prompts = [comparison.prompt for comparison in comparisons]
        responses = [comparison.a for comparison in comparisons] + [comparison.b for comparison in comparisons]
        # as `DifferenceModule` writes them from token ids
        written = encode_answers(prompts + prompts, responses, tokenizer)
        eos = int(tokenizer.eos_token_id)
        groups: list[Group] = []
        for prompt, (ids, a), (other, b) in zip(prompts, written[: len(prompts)], written[len(prompts) :], strict=True):
            # some templates write a prompt differently before different answers
            if ids != other:
                raise ValueError(
                    f"prompt {prompt.index}: the chat template of {self.path!r} writes the prompt differently before "
                    f"its two responses, which cannot be read together then; set data.labeler.chat_template"
                )
            both = turns.joined(ids, a, b, eos), turns.joined(ids, b, a, eos)
            groups.append((self._fitting(prompt, ids, max(map(len, both)), scorer, tokenizer), both))
        with evaluating(scorer.modules()):
            members = scorer.scores(groups, tokens_per_batch=self.scoring_batch_tokens).double().cpu()
        # [2 * comparisons, members] -> two of [comparisons, members]
        forward, backward = members.view(len(groups), 2, -1).unbind(1)
        return antisymmetric_difference(forward, backward).mean(1)

    def _fitting(
        self, prompt: Prompt, ids: tuple[int, ...], responses: int, scorer: Scorer, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[int, ...]:
        """Token ids of a prompt, cut on the left so that both responses fit into the window behind it."""
        window = context_window(scorer.config)
        if window is None or len(ids) + responses <= window:
            return ids
        # one of its tokens has to fit
        if responses >= window:
            raise ValueError(
                f"prompt {prompt.index}: its two responses have {responses} tokens together, and the window of the "
                f"difference model {self.path!r} is {window}: lower max_new_tokens, or use a model with a longer window"
            )
        return truncate_left(ids, window - responses, tokenizer.bos_token_id, leading_special_ids(tokenizer))

    def _scale_of(self, scorer: Scorer | ClassifierScorer) -> float:
        """What coefficients are divided by.

        Raises:
            ValueError: if this is no difference model, or its mean is not known.
        """
        if getattr(scorer.config, "reward_reading", None) != "pair":
            raise ValueError(
                f"{self.path!r} is no difference model: train one with --config difference_model, and name its model "
                f"folder as data.labeler.path"
            )
        if self.scale is not None:
            return self.scale
        means = getattr(scorer.config, "mean_coefficients", None) or {}
        mean = means.get(self.rule)
        # NaN and 0 are not > 0
        if mean is None or not mean > 0:
            raise ValueError(
                f"{self.path!r} has no positive mean of the coefficients on held-out pairs (got {mean}), so that "
                f"weights have no scale: train it with data.heldout, or set data.labeler.scale"
            )
        return float(mean)

    def _load(self) -> tuple[Scorer, PreTrainedTokenizerBase, TurnFormat]:
        # at first use: a run that reads its labels from the ledger loads nothing
        if self._loaded is None:
            scorer = open_scorer(self.path, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
            self._scale_of(scorer)
            assert isinstance(scorer, Scorer)  # `DifferenceModule` saves no other
            template = CHAT_TEMPLATES.get(self.chat_template or "", self.chat_template)
            tokenizer = load_tokenizer(self.path, template, trust_remote_code=self.trust_remote_code)
            scorer.requires_grad_(False)
            self._loaded = scorer.to(self.device), tokenizer, turn_format(tokenizer)
        return self._loaded

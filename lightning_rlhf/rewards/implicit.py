"""The implicit reward of a policy: how much likelier it makes a response than its reference does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.logprobs.compute import summed_logps
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.models.load import (
    context_window,
    end_of_sequence_ids,
    load_policy,
    load_tokenizer,
    resolve_checkpoint,
)
from lightning_rlhf.models.pretrained import embedding_rows
from lightning_rlhf.prompts.tokenize import CHAT_TEMPLATES, tokenize_rows
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, PromptRow, Response


NO_LIMIT = 2**31


class ImplicitReward(AbstractReward):
    """beta log pi(y | x) / pi_ref(y | x), nats: the reward whose optimum is the policy, up to a term of the prompt.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 5. Its differences are the margins of DPO, so that it ranks responses
    as a policy trained by DPO does: on pairs of RewardBench, or as the reward of another run. Without a reference it is
    beta log pi(y | x), the reward of losses without one (ORPO, CPO; with ``per_token`` SimPO). Texts are tokenized as
    in training. The models are loaded at the first call.

    Args:
        policy: checkpoint of the policy.
        reference: checkpoint of the policy that it was trained from, with the same tokenizer; default: none.
        beta: factor, > 0; the beta of the loss.
        per_token: divide by the number of tokens of the response, its end included.
        scoring_batch_tokens: tokens per forward pass, >= 1.
        dtype: data type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where the models run: ``cpu``, ``cuda``; default: a GPU if there is one.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; default: the tokenizer's own.
        trust_remote_code: run code that comes with the checkpoints.

    Raises:
        ValueError: if beta is out of range.
        FileNotFoundError: if there is no such checkpoint.
    """

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        beta: float = 0.1,
        per_token: bool = False,
        scoring_batch_tokens: int = 4096,
        dtype: str = "float32",
        device: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ValueError(f"ImplicitReward.beta must be > 0; got {beta}")
        self.names = [policy] if reference is None else [policy, reference]
        self.beta, self.per_token, self.scoring_batch_tokens = beta, per_token, scoring_batch_tokens
        self.dtype, self.trust_remote_code = dtype, trust_remote_code
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.chat_template = CHAT_TEMPLATES.get(chat_template or "", chat_template)
        # a folder that is not there is an error now, not after a policy has been trained
        for name in self.names:
            resolve_checkpoint(name, trust_remote_code=trust_remote_code)
        self._loaded: tuple[list[PreTrainedModel], PreTrainedTokenizerBase] | None = None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B].

        Raises:
            ValueError: if a response is empty, or does not fit into the window of a model with its prompt.
        """
        models, tokenizer = self._load()
        groups = self._encoded(prompts, responses, models, tokenizer)
        found: list[Tensor] = []
        for model in models:
            with torch.no_grad(), evaluating(list(model.modules())):
                found.append(summed_logps(model, groups, tokens_per_batch=self.scoring_batch_tokens).float().cpu())
        # r = beta (log pi(y | x) - log pi_ref(y | x))
        reward = self.beta * (found[0] - found[1] if len(found) == 2 else found[0])
        if self.per_token:
            reward = reward / torch.tensor([float(len(ids)) for _, (ids,) in groups])
        return RewardOutput(reward)

    def _encoded(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        models: Sequence[PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """Token ids of each prompt with its response."""
        rows = [
            PromptRow(
                f"prompt {prompt.index}",
                text=None if prompt.messages is not None else prompt.text,
                messages=prompt.messages,
                completion=response.text,
                template_options=prompt.template_options,
                finish_reasons=(response.finish_reason,),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        blank = [row.source for row in rows if not (row.completion or "").strip()]
        if blank:
            raise ValueError(f"{blank[0]}: an empty response has no log-probability; leave such responses out")
        encoded, _ = tokenize_rows(
            rows,
            tokenizer,
            max_prompt_tokens=NO_LIMIT,
            max_response_tokens=NO_LIMIT,
            end_ids=end_of_sequence_ids(models[0], tokenizer),
        )
        windows = [window for model in models if (window := context_window(model)) is not None]
        groups = []
        for prompt in encoded:
            assert prompt.completion is not None
            length = len(prompt.ids) + len(prompt.completion.ids)
            if windows and length > min(windows):
                raise ValueError(
                    f"{rows[prompt.index].source}: prompt and response have {length} tokens, and the window of "
                    f"{self.names[0]!r} is {min(windows)}; leave such rows out, or use a model with a longer window"
                )
            groups.append((prompt.ids, [prompt.completion.ids]))
        return groups

    def _load(self) -> tuple[list[PreTrainedModel], PreTrainedTokenizerBase]:
        if self._loaded is None:
            tokenizer = load_tokenizer(self.names[0], self.chat_template, self.trust_remote_code)
            models = []
            for name in self.names:
                model = load_policy(name, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
                model.requires_grad_(False)
                models.append(cast(PreTrainedModel, model.to(torch.device(self.device))))  # type: ignore[arg-type]
            if len({embedding_rows(model) for model in models}) > 1:
                raise ValueError(
                    f"{self.names[0]!r} and {self.names[1]!r} have vocabularies of different sizes; the reference is "
                    f"the checkpoint that the policy was trained from"
                )
            self._loaded = models, tokenizer
        return self._loaded

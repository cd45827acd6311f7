"""Discriminators of adversarial rewards: logits of "this response is a demonstration"."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import Pooling, pooled_states
from lightning_rlhf.models.dropout import without_dropout
from lightning_rlhf.models.load import context_window, load_policy, load_tokenizer
from lightning_rlhf.models.options import DEFAULT_OPTIONS, LoadArguments, ModelOptions
from lightning_rlhf.prompts.tokenize import encode_answers, leading_special_ids, truncate_left
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import Prompt, Response, State


class AbstractDiscriminator(KeepsArguments, ABC):
    """Gives responses a logit; `AdversarialReward` trains it.

    An untrained discriminator gives all responses the logit 0, so that it needs no random numbers.
    """

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """Responses as rows of a tensor without gradient, [responses, ...], from their texts."""

    @abstractmethod
    def logits(self, rows: Tensor) -> Tensor:
        """Logits of rows of `encode`, [responses]; carries gradient if enabled."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Parameters to train."""

    def start(self, rows: Tensor) -> None:
        """Called once, before training, with the rows of the first round, for statistics. Default: takes none."""
        del rows

    @abstractmethod
    def state_dict(self) -> State:
        """Trained state, for the checkpoint, as copies."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Restore the state of `state_dict`; an empty one makes it untrained again."""


class NGramDiscriminator(AbstractDiscriminator):
    """Logistic regression on the n-grams of the words of a response, for tiny worlds and tests.

    Features are hashed n-grams of 1 to ``n`` words, with start and end marked, and pairs of a word of the prompt and a
    word of the response: l = b + sum_f w_f.

    Args:
        n: longest n-gram, >= 1.
        prompt_words: pair words of the prompt with words of the response, which makes D depend on the prompt; for short
            prompts, since it gives as many features as the product of the lengths.
        buckets: hash buckets, >= 2.
    """

    def __init__(self, n: int = 2, prompt_words: bool = True, buckets: int = 16384) -> None:
        if n < 1 or buckets < 2:
            raise ValueError(f"NGramDiscriminator needs n >= 1 and buckets >= 2; got {n} and {buckets}")
        self.n, self.prompt_words, self.buckets = n, prompt_words, buckets
        self._weights = nn.Parameter(torch.zeros(buckets))
        self._bias = nn.Parameter(torch.zeros(1))

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """Buckets of the features of each response, padded with -1; int64, [responses, features]."""
        found = [torch.tensor(self._features(p, r)) for p, r in zip(prompts, responses, strict=True)]
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)

    def logits(self, rows: Tensor) -> Tensor:
        """Sums of the weights of the features, and the bias."""
        weights = torch.where(rows >= 0, self._weights[rows.clamp(min=0)], 0.0)
        return self._bias + weights.sum(-1)

    def parameters(self) -> list[nn.Parameter]:
        """Weights and bias."""
        return [self._weights, self._bias]

    def state_dict(self) -> State:
        """Weights and bias."""
        return {"weights": self._weights.detach().clone(), "bias": self._bias.detach().clone()}

    def load_state_dict(self, state: State) -> None:
        """Restore weights and bias, zero for an empty state."""
        with torch.no_grad():
            self._weights.copy_(state.get("weights", torch.zeros(self.buckets)))
            self._bias.copy_(state.get("bias", torch.zeros(1)))

    def _features(self, prompt: Prompt, response: Response) -> list[int]:
        words = ["<", *response.text.split(), *([">"] if response.finish_reason == "eos" else [])]
        found: list[int] = []
        for size in range(1, self.n + 1):
            for start in range(len(words) - size + 1):
                found.append(bucket(" ".join(words[start : start + size]), self.buckets))
        if self.prompt_words:
            asked = prompt.text if prompt.messages is None else str(prompt.messages[-1].get("content") or "")
            for theirs in asked.split():
                # a line break is in no word, so that pairs and n-grams differ
                found += [bucket(f"{theirs}\n{word}", self.buckets) for word in words]
        return found


@lru_cache(maxsize=65536)
def bucket(feature: str, buckets: int) -> int:
    """Hash bucket of a feature, the same in every process."""
    digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % buckets


class ModelDiscriminator(AbstractDiscriminator):
    """A linear head on the hidden states of a language model, which is frozen or trained along.

    Prompt and response are written anew with the tokenizer and the chat template of the model, from their texts. Frozen
    features are standardised by the responses of the first round: hidden states have a large common part.

    Args:
        model: a causal LM, as ``model.policy`` names one.
        train_trunk: train the model too, in float32; its weights are then part of every checkpoint.
        pooling: ``mean``, ``sum``, ``last`` or ``middle``: see `lightning_rlhf.logprobs.scores.pooled_states`.
        options: how the checkpoint is loaded; ``scoring_batch_tokens`` limits the tokens of a pass without gradient.
        device: where to compute: ``cpu``, ``cuda``; default: a GPU if there is one.
    """

    def __init__(
        self,
        model: str,
        train_trunk: bool = False,
        pooling: Pooling = "mean",
        options: ModelOptions = DEFAULT_OPTIONS,
        device: str | None = None,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}; got {pooling!r}")
        self.model, self.train_trunk, self.options = model, train_trunk, options
        self.pooling: Pooling = pooling
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._parts: tuple[PreTrainedModel, nn.Linear, PreTrainedTokenizerBase] | None = None
        self._scale: tuple[Tensor, Tensor] | None = None

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """Pooled hidden states, [responses, width]; of a trained model the token ids, see `padded_rows`."""
        groups = self._groups(prompts, responses)
        if self.train_trunk:
            return padded_rows(groups)
        with torch.no_grad():
            return self._pooled(groups, self.options.scoring_batch_tokens)

    def logits(self, rows: Tensor) -> Tensor:
        """The head on standardised features."""
        _, head, _ = self._load()
        limit = None if torch.is_grad_enabled() else self.options.scoring_batch_tokens
        features = self._pooled(groups_of_rows(rows), limit) if self.train_trunk else rows
        if self._scale is not None:
            mean, std = self._scale
            features = (features - mean) / std
        return cast(Tensor, head(features)).view(-1)

    def start(self, rows: Tensor) -> None:
        """Take mean and std of the features, once."""
        with torch.no_grad():
            features = (
                self._pooled(groups_of_rows(rows), self.options.scoring_batch_tokens) if self.train_trunk else rows
            )
            std = features.std(0, correction=0)
            # a feature that never changes carries nothing
            self._scale = features.mean(0), torch.where(std > 1e-6, std, torch.full_like(std, float("inf")))

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the head, and of the model where it is trained."""
        trunk, head, _ = self._load()
        return [*head.parameters(), *(trunk.parameters() if self.train_trunk else ())]

    def state_dict(self) -> State:
        """Head and statistics of the features, and the model where it is trained."""
        trunk, head, _ = self._load()
        state: State = {"head": _copies(head)}
        if self._scale is not None:
            state["scale"] = [values.to("cpu", copy=True) for values in self._scale]
        return {**state, "trunk": _copies(trunk)} if self.train_trunk else state

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`; an empty state opens the model anew at its next use."""
        self._parts, self._scale = None, None
        if not state:
            return
        trunk, head, _ = self._load()
        head.load_state_dict(state["head"])
        if "scale" in state:
            mean, std = (values.to(self.device) for values in state["scale"])
            self._scale = mean, std
        if self.train_trunk:
            trunk.load_state_dict(state["trunk"])

    def _load(self) -> tuple[PreTrainedModel, nn.Linear, PreTrainedTokenizerBase]:
        # at first use: a run that reads its rewards from the ledger loads nothing
        if self._parts is None:
            arguments: LoadArguments = self.options.load_arguments()
            if self.train_trunk:
                # small steps of the optimizer are lost in bfloat16
                arguments = {**arguments, "dtype": "float32"}
            policy = without_dropout(load_policy(self.model, **arguments)).eval()
            trunk = cast(PreTrainedModel, policy.base_model)
            trunk.requires_grad_(self.train_trunk)
            nn.Module.to(trunk, self.device)
            with torch.random.fork_rng(devices=[]):
                head = nn.Linear(trunk.config.get_text_config().hidden_size, 1)
            # an untrained discriminator knows nothing
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            tokenizer = load_tokenizer(
                self.model, self.options.chat_template, trust_remote_code=self.options.trust_remote_code
            )
            self._parts = trunk, head.to(self.device), tokenizer
        return self._parts

    def _groups(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Group]:
        trunk, _, tokenizer = self._load()
        window = context_window(trunk.config)
        groups: list[Group] = []
        for ids, answer in encode_answers(prompts, responses, tokenizer):
            if window is not None and len(ids) + len(answer) > window:
                # the beginning of the prompt is left out, as everywhere; one of its tokens has to stay
                answer = answer[: window - 1]
                ids = truncate_left(ids, window - len(answer), tokenizer.bos_token_id, leading_special_ids(tokenizer))
            groups.append((ids, (answer,)))
        return groups

    def _pooled(self, groups: Sequence[Group], tokens_per_batch: int | None) -> Tensor:
        trunk, _, _ = self._load()
        return pooled_states(trunk, groups, self.pooling, tokens_per_batch=tokens_per_batch).float()


def padded_rows(groups: Sequence[Group]) -> Tensor:
    """Prompts with one response each as rows of a tensor: length of the prompt, token ids, -1 as padding; int64."""
    rows = [torch.tensor([len(prompt), *prompt, *responses[0]]) for prompt, responses in groups]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def groups_of_rows(rows: Tensor) -> list[Group]:
    """The groups of `padded_rows`."""
    groups: list[Group] = []
    for row in rows.tolist():
        ids = tuple(id_ for id_ in row[1:] if id_ >= 0)
        groups.append((ids[: row[0]], (ids[row[0] :],)))
    return groups


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}

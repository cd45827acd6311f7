"""The linear head of reward and value models, and the test whether a model's scores are those of this head."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import nearly_equal


SCORE_HEADS = ("score", "classifier")
"""Names of the head in the sequence classifiers of transformers."""


def score_head(model: PreTrainedModel, num_scores: int = 1) -> nn.Linear:
    """The layer that maps a hidden state to scores.

    Raises:
        ValueError: if the model has no linear head with this number of outputs.
    """
    for name in SCORE_HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == num_scores:
            return head
    raise ValueError(
        f"{type(model).__name__} has no linear head with {num_scores} output(s) named {' or '.join(SCORE_HEADS)}; use "
        f"a decoder that AutoModelForSequenceClassification opens with num_labels={num_scores}"
    )


def in_score_head(key: str) -> bool:
    """Whether a weight belongs to the score head."""
    return key.partition(".")[0] in SCORE_HEADS


def reads_last_token(model: PreTrainedModel, num_scores: int = 1) -> bool:
    """Whether the scores of a classifier are its linear head on the last token's hidden state, on two short texts."""
    try:
        head = score_head(model, num_scores)
    except ValueError:
        return False
    with evaluating(model.modules()):
        for row in probe_rows(model.config):
            ids = torch.tensor([row], device=head.weight.device)
            whole = model(input_ids=ids).logits
            try:
                trunk = model.base_model
                # score = W h_T
                ours = head(trunk(input_ids=ids).last_hidden_state[:, -1])
            except (AttributeError, RuntimeError, TypeError, ValueError):
                # no hidden states of this width: the class has further layers between trunk and head
                return False
            if whole.shape != ours.shape or not nearly_equal(whole, ours):
                return False
    return True


def probe_rows(config: PreTrainedConfig) -> list[list[int]]:
    """Two short texts of tokens that are neither padding nor the end, since classifiers search for both."""
    text = config.get_text_config()
    avoided = {getattr(text, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    size = int(getattr(text, "vocab_size", 0)) or 1
    candidates = [j * 31 % size for j in range(1, 60)]
    # at least one id, where a tiny vocabulary has special tokens only
    ids = [id_ for id_ in candidates if id_ not in avoided] or [0]
    # 9 and 5 tokens that end alike; repeated, since a small vocabulary may give fewer than 9
    return [(ids * 9)[:9], (ids * 9)[4:9]]

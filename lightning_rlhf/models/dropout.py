"""The dropout of a checkpoint: switched off for training, and kept for the saved model.

Models of transformers drop in three ways: by ``nn.Dropout`` modules, by a probability that a module keeps as an
attribute, and by one that is read from the config at every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_rlhf.logprobs.eval_mode import evaluating


Model = TypeVar("Model", bound=nn.Module)

KEPT = "dropout_of_checkpoint"
"""Attribute of a model whose dropout is off: the original values of its configs."""


def without_dropout(model: Model) -> Model:
    """Switch off all dropout of a model but that of LoRA adapters, in place; `saved_dropout` puts the config back.

    Args:
        model: a model of transformers, or one with such models inside.
    """
    for name, module in model.named_modules():
        # set by the user, unlike that of the checkpoint
        if "lora_dropout" in name.split("."):
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # attention modules keep a probability as an attribute
        for attribute, value in vars(module).items():
            if _drops(attribute, value):
                setattr(module, attribute, 0.0)
        # and some models read the config at every forward pass
        # a second call finds no value above 0, and must not overwrite the original values
        if isinstance(module, PreTrainedModel) and (kept := config_dropout(module.config)):
            for part, attribute, _ in kept:
                setattr(part, attribute, 0.0)
            vars(module)[KEPT] = kept
    return model


@contextmanager
def saved_dropout(model: nn.Module) -> Iterator[None]:
    """Restore the dropout of the checkpoint in the configs of a model, while it is saved."""
    entries: list[tuple[PreTrainedConfig, str, float]] = []
    for module in model.modules():
        entries.extend(vars(module).get(KEPT, ()))
    try:
        for config, attribute, value in entries:
            setattr(config, attribute, value)
        yield
    finally:
        for config, attribute, _ in entries:
            setattr(config, attribute, 0.0)


def config_dropout(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str, float]]:
    """Every probability above 0 by which a model of this config drops something: config or part of it, name, value."""
    found = []
    for attribute, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found += config_dropout(value)
        elif _drops(attribute, value):
            found.append((config, attribute, float(value)))
    return found


def train_mode_difference(model: nn.Module, ids: Tensor) -> float:
    """Largest difference between the log-probabilities of a model in train mode and in eval mode, nats.

    Dropout of LoRA adapters is left out. The random streams of the run do not change.

    Args:
        model: a causal LM in train mode; not sharded, or gathered.
        ids: token ids of a few sequences without padding, [sequences, tokens].
    """
    adapters = [m for n, m in model.named_modules() if n.rpartition(".lora_dropout.")[1]]
    devices = [ids.device] if ids.device.type == "cuda" else []

    def logps() -> Tensor:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return cast(Tensor, logits).float().log_softmax(-1)

    # dropout masks must not change the random numbers of the run
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        with evaluating(adapters):
            train = logps()
        with evaluating(list(model.modules())):
            # max |log pi_train - log pi_eval| over all positions and the vocabulary
            return float((train - logps()).abs().max())


def _drops(name: str, value: object) -> bool:
    """Whether an attribute is a probability of dropping something."""
    # bool is a subclass of int, and flags are no probabilities
    return "drop" in name.lower() and isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1

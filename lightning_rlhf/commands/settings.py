"""Which settings decide the results of a run, as plain data: its fingerprint."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from jsonargparse import (
    Namespace,
)

from lightning_rlhf.runtime.fingerprint import FREE_OF_MODELS, FREE_OF_SERVERS, decisive


def fingerprint(config: Namespace, model: L.LightningModule, datamodule: L.LightningDataModule) -> dict[str, object]:
    """Settings that change samples, labels or updates, as plain data; the classes name those that do not."""
    settings = {name: _plain(config[name]) for name in ("model", "data")}
    return {**decisive(settings, model, datamodule), "seed_everything": config.get("seed_everything")}


FREE_OF_COMMANDS = {
    *FREE_OF_SERVERS,
    *FREE_OF_MODELS,
    *("run_dir", "out", "rows", "label_attempts", "chunk", "config"),  # where results go, and how much is asked for
    *("limit", "compile", "processes"),
}
"""Settings of a command, or of the objects it is given, that may change when it is called again."""


def _plain(value: object) -> Any:
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    # through JSON, so that it equals the stored settings: tuples become lists, paths texts
    return json.loads(json.dumps(value, default=str))

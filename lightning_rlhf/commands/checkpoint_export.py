"""``lightning-rlhf export --checkpoint=... --out=model``: the model folder of any checkpoint of a run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.utilities.load import _load_distributed_checkpoint  # has no public name
from lightning.pytorch.cli import instantiate_module

from lightning_rlhf.batching.batches import StepBatch
from lightning_rlhf.callbacks.average import WeightAverage
from lightning_rlhf.callbacks.export import HFExport
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.card import RunFacts, card_name, class_name, write_cards
from lightning_rlhf.modules.base import AbstractStepModule
from lightning_rlhf.protocols import TrainedModule
from lightning_rlhf.renamed import renamed_config
from lightning_rlhf.runtime.checkpoints import checked, meta
from lightning_rlhf.runtime.fingerprint import CLASS_PATH, Settings
from lightning_rlhf.runtime.run_record import RunRecord, last_start
from lightning_rlhf.types import State


def export_checkpoint(checkpoint: str, out: str) -> int:
    """Write the model of a checkpoint as a folder that transformers opens, and return the step it was saved at.

    The folder has a model card, as that of the end of a run: facts that are not known at this checkpoint are left out.

    The module is built from the class and the arguments in the checkpoint (those of version 0.1 from ``run.json``
    beside it), on the CPU, and gets the weights: the average where `WeightAverage` kept one, since that was evaluated.

    Args:
        checkpoint: a file, or a folder of shards, of any callback; or a run folder, for its newest.
        out: folder to write, empty or not there yet.

    Raises:
        ValueError: if the checkpoint is damaged or is none of this package, or ``out`` is in use.
    """
    path, folder = Path(checkpoint), Path(out)
    if (path / "checkpoints" / "last.ckpt").exists():
        path = path / "checkpoints" / "last.ckpt"
    elif not path.exists():
        raise ValueError(
            f"--checkpoint={checkpoint}: no such file or folder (relative paths count from {Path.cwd()}): name a "
            f"checkpoint, or the run_dir of a run"
        )
    elif path.is_dir() and (path / "run.json").exists():
        raise ValueError(f"--checkpoint={checkpoint}: this run has no checkpoint yet (checkpoints/last.ckpt)")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--out={out} is not empty: name a folder that is not there yet")
    checked(path)
    content = meta(path)
    # the tensors of shards are read only now: the index alone holds no weights
    whole = _load_distributed_checkpoint(path.resolve()) if path.is_dir() else content
    module = build_module(content, path)
    module.configure_model()
    module.on_load_checkpoint(whole)
    module.load_state_dict(whole["state_dict"], strict=module.strict_loading)
    state = content.get("callbacks", {}).get(WeightAverage.__qualname__)
    if state is not None:
        average = WeightAverage()
        average.load_state_dict(state)
        average.finish(module)
    cast(TrainedModule, module).save_pretrained(folder)
    run = run_folder(path)
    write_cards(folder, facts_of(content, path, module, run), card_name(folder, run))
    return int(content.get("global_step", 0))


def run_folder(path: Path) -> Path | None:
    """The run folder above a checkpoint, which holds ``run.json``; None if there is none."""
    return next((folder for folder in path.resolve().parents if (folder / "run.json").is_file()), None)


def facts_of(content: State, path: Path, module: AbstractStepModule[StepBatch], run: Path | None) -> RunFacts:
    """Facts of a run up to a checkpoint, for the model card.

    Settings are those of ``run.json``, labels those of the ledger in the rounds before the checkpoint, and results
    those of the latest validation before it. Without a run folder only the module and its step are known.

    Args:
        content: content of the checkpoint.
        path: its path.
        module: the module that was built from it.
        run: the run folder.
    """
    steps = int(content.get("global_step", 0))
    start = None if run is None else last_start(run)
    if run is None or start is None:
        kind, arguments = described_module(content, path)
        return RunFacts(module.checkpoint, {"model": {"class_path": kind, "init_args": arguments}}, steps=steps)
    settings = renamed_config({name: start["config"].get(name) or {} for name in ("model", "data")})
    labels, cost = _labels(content, run, settings)
    metrics, validated_at = _validation(content)
    return RunFacts(
        base=module.checkpoint,
        settings=settings,
        metrics=metrics,
        validated_at=validated_at,
        steps=steps,
        labels=labels,
        cost=cost,
        versions=start["versions"],
        license=_license(start["config"].get("trainer") or {}),
    )


def _labels(content: State, run: Path, settings: Settings) -> tuple[int, float | None]:
    """Labels and their cost in the rounds that a checkpoint has seen; (0, None) if its ledger is not there."""
    # the state of the DataModule, which is stored under the name of its class
    state = next((part for part in content.values() if isinstance(part, Mapping) and "observed" in part), None)
    ledger = Path((settings["data"].get("init_args") or {}).get("ledger_path") or run / "ledger.sqlite")
    if state is None or not ledger.is_file():
        return 0, None
    with PreferenceStore(ledger, read_only=True) as store:
        if store.run_id != state["run_id"]:
            return 0, None
        before = int(state["observed"])
        labels = store.count_labels(before=before) + RolloutTable(store).count_scores(before=before)
        return labels, store.cost(before=before)


def _validation(content: State) -> tuple[dict[str, float], int | None]:
    """Metrics of the latest validation before a checkpoint, and its step; checkpoints of 0.1 have none."""
    stored = content.get("callbacks", {}).get(RunRecord.__qualname__, {}).get("validation")
    if stored is None:
        return {}, None
    found: Settings = json.loads(stored)
    return dict(found["metrics"]), int(found["step"])


def _license(trainer: Settings) -> str | None:
    """The license that `HFExport` was given."""
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if class_name(callback) == HFExport.__name__:
            found: str | None = (callback.get("init_args") or {}).get("license")
            return found
    return None


def build_module(content: State, path: Path) -> AbstractStepModule[StepBatch]:
    """Build the module that a checkpoint was saved by, without its weights.

    Args:
        content: content of the checkpoint.
        path: its path, for messages and to find the run folder.

    Raises:
        ValueError: if its class or an argument is not known.
    """
    name, arguments = described_module(content, path)
    module, _, kind_name = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), kind_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} was saved by {name}, which cannot be imported here ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, AbstractStepModule)):
        raise ValueError(f"{path} was saved by {name}, which is no module of lightning_rlhf")
    # the checkpoint holds what the policy became since it was moved there
    arguments.pop("start", None)
    try:
        return instantiate_module(kind, arguments)
    except ArgumentError as error:
        raise ValueError(
            f"{name} cannot be built from the arguments in {path} ({error}): an argument that is a function or a local "
            f"class is not kept; load it in Python by {kind_name}.load_from_checkpoint(path, argument=...), and call "
            f"its save_pretrained"
        ) from error


def described_module(content: State, path: Path) -> tuple[str, Settings]:
    """Class and arguments of the module that a checkpoint was saved by.

    Raises:
        ValueError: if neither the checkpoint nor a ``run.json`` above it has them.
    """
    if CLASS_PATH in content:
        arguments = content.get(L.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
        return content[CLASS_PATH], {k: v for k, v in arguments.items() if not k.startswith("_")}
    run = run_folder(path)
    start = None if run is None else last_start(run)
    if start is not None:
        model = renamed_config({"model": start["config"]["model"]})["model"]
        return model["class_path"], dict(model.get("init_args", {}))
    raise ValueError(
        f"{path} does not say of which module it is, and there is no run.json above it: export a checkpoint of "
        f"lightning_rlhf, in its run folder"
    )

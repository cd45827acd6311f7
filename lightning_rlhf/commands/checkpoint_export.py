"""``lightning-rlhf export --checkpoint=... --out=model``: the model folder of any checkpoint of a run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import cast

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.utilities.load import _load_distributed_checkpoint  # has no public name
from lightning.pytorch.cli import instantiate_module

from lightning_rlhf.batching.batches import StepBatch
from lightning_rlhf.callbacks.average import WeightAverage
from lightning_rlhf.modules.base import AbstractStepModule
from lightning_rlhf.protocols import TrainedModule
from lightning_rlhf.renamed import renamed_config
from lightning_rlhf.runtime.checkpoints import checked, meta
from lightning_rlhf.runtime.fingerprint import CLASS_PATH, Settings
from lightning_rlhf.types import State


def export_checkpoint(checkpoint: str, out: str) -> int:
    """Write the model of a checkpoint as a folder that transformers opens, and return the step it was saved at.

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
    return int(content.get("global_step", 0))


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
    for folder in path.resolve().parents:
        if (folder / "run.json").is_file():
            start = json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"][-1]
            model = renamed_config({"model": start["config"]["model"]})["model"]
            return model["class_path"], dict(model.get("init_args", {}))
    raise ValueError(
        f"{path} does not say of which module it is, and there is no run.json above it: export a checkpoint of "
        f"lightning_rlhf, in its run folder"
    )

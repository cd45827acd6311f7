"""Model cards: the facts of a run in the README of a model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lightning_rlhf.runtime.fingerprint import Settings


METHODS = {
    "BCOModule": ("BCO", "https://arxiv.org/abs/2404.04656"),
    "DPOModule": ("DPO", "https://arxiv.org/abs/2305.18290"),
    "DRLAIFModule": ("direct RLAIF", "https://arxiv.org/abs/2309.00267"),
    "KTOModule": ("KTO", "https://arxiv.org/abs/2402.01306"),
    "PolicyGradientModule": ("policy gradients", None),
    "RewardModule": ("a reward model", "https://arxiv.org/abs/1706.03741"),
    "SFTModule": ("supervised fine-tuning", None),
}
"""Name and paper of the method of a module."""

SHOWN = re.compile(
    r"val/(reward|reward_stderr|kl|objective/j|loss|accuracy|brier|ece|perplexity|token_accuracy|response_length|eos_rate"
    r"|rewards/\w+)"
)
"""Metrics that a card lists."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run.

    Args:
        base: the model that was trained, as the user named it.
        settings: ``model`` and ``data``, each ``class_path`` and ``init_args``, as in ``run.json``.
        metrics: held-out metrics, by name.
        steps: optimizer steps.
        validated_at: optimizer steps before the validation with these metrics; None if that was the last one.
        labels: labels or scores that were bought.
        cost: price of these labels in the labeler's unit; None where nothing is labeled.
        versions: versions of packages, by name.
        license: SPDX identifier of the license of the weights; None if the user did not name one.
    """

    base: str
    settings: Settings
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    validated_at: int | None = None
    labels: int = 0
    cost: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None


def model_card(facts: RunFacts, name: str, adapter: bool = False) -> str:
    """Write the card of a model.

    Args:
        facts: facts of its run.
        name: name of the model.
        adapter: whether the folder holds an adapter for the base model, rather than a whole model.
    """
    model = facts.settings.get("model", {})
    kind = class_name(model)
    method, paper = METHODS.get(kind, (kind, None))
    cited = f"[{method}]({paper})" if paper else method
    what = f"An adapter for `{facts.base}`, trained" if adapter else f"Trained from `{facts.base}`"
    parts = [
        _front_matter(facts, kind, adapter),
        f"# {name}",
        f"{what}{f' by {cited}' if cited else ''} with `lightning_rlhf`.",
        "## Method\n\n" + _table("setting", _method(facts)),
        "## Data\n\n" + _table("", _data(facts)),
    ]
    shown = {name: value for name, value in facts.metrics.items() if SHOWN.fullmatch(name)}
    if shown:
        rows = {name: f"{value:.4g}" for name, value in sorted(shown.items())}
        when = "at the end" if facts.validated_at in (None, facts.steps) else f"after {facts.validated_at} steps"
        parts.append(f"## Results\n\nOn held-out rows, {when} of training.\n\n" + _table("metric", rows))
    parts += ["## Use\n\n" + _usage(facts, kind, adapter), "## License\n\n" + _license(facts)]
    if facts.versions:
        versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
        parts.append(f"## Versions\n\n{versions}")
    return "\n\n".join(parts) + "\n"


def write_cards(folder: Path, facts: RunFacts, name: str) -> None:
    """Write the card of a model folder, and one for each adapter in it, in place of peft's draft.

    Args:
        folder: folder that `AbstractStepModule.save_pretrained` has written.
        facts: facts of the run.
        name: name of the model.
    """
    for place in (folder, folder / "adapter", *sorted(folder.glob("adapters/*"))):
        if place.is_dir():
            is_adapter = (place / "adapter_config.json").is_file()
            (place / "README.md").write_text(model_card(facts, name, is_adapter), encoding="utf-8")


def card_name(folder: Path, run: Path | None) -> str:
    """Name of a model: that of its folder, or of the run for a folder called ``model``."""
    if folder.name != "model":
        return folder.name
    return (folder.parent if run is None else run).resolve().name


def class_name(part: object) -> str:
    """Name of the class of a part of the settings, without its module; empty if there is none."""
    path = part.get("class_path", "") if isinstance(part, Mapping) else ""
    return str(path).rpartition(".")[2]


def is_hub_id(name: str) -> bool:
    """Whether the name of a model may be an id on the Hub, rather than a folder or a name of this library."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).expanduser().exists()


def _arguments(part: object) -> Settings:
    return dict(part.get("init_args") or {}) if isinstance(part, Mapping) else {}


def _method(facts: RunFacts) -> dict[str, object]:
    """Rows of the table on the method; settings that are off are left out."""
    model = facts.settings.get("model", {})
    arguments = _arguments(model)
    found: dict[str, object] = {"module": class_name(model), "base model": facts.base}
    for name in ("loss", "advantage"):
        if class_name(arguments.get(name)):
            found[name] = class_name(arguments[name])
    found["beta"] = arguments.get("beta")
    for name in ("lora", "kl"):
        group = arguments.get(name)
        if isinstance(group, Mapping):
            found[name] = ", ".join(f"{key} {value}" for key, value in group.items() if value is not None)
    optimizer = arguments.get("optimizer")
    found["optimizer"] = class_name(optimizer)
    found["learning rate"] = _arguments(optimizer).get("lr")
    found["optimizer steps"] = facts.steps
    return {name: value for name, value in found.items() if value not in (None, "")}


def _data(facts: RunFacts) -> dict[str, object]:
    """Rows of the table on prompts, responses and labels."""
    arguments = _arguments(facts.settings.get("data", {}))
    found: dict[str, object] = {}
    for name in ("prompts", "heldout", "sampler", "labeler", "reward"):
        part = arguments.get(name)
        if not class_name(part):
            continue
        given = _arguments(part)
        keys = ("path", "split", "judge", "task", "rule")
        named = [str(given[key]) for key in keys if isinstance(given.get(key), str)]
        inner = class_name(given.get("reward"))
        found[name] = " ".join([class_name(part), *named, *([inner] if inner else [])])
    if facts.labels:
        found["labels"] = facts.labels
        if facts.cost:
            found["cost of the labels"] = f"{facts.cost:.6g}, in the unit of the labeler"
    return found


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {title} | |", "|---|---|"]
    # a bar in a value would begin another column
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(lines)


def _front_matter(facts: RunFacts, kind: str, adapter: bool) -> str:
    """Fields that the Hub reads; those that are not known are left out."""
    task = "text-classification" if kind == "RewardModule" else "text-generation"
    fields: dict[str, object] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "tags": ["lightning-rlhf", kind.removesuffix("Module").lower() or "rlhf"],
    }
    if facts.license is not None:
        fields["license"] = facts.license
    if is_hub_id(facts.base):
        fields["base_model"] = facts.base
    path = _arguments(_arguments(facts.settings.get("data", {})).get("prompts")).get("path")
    # a data set on the Hub has an owner; a file has an ending
    if isinstance(path, str) and re.fullmatch(r"[\w-]+/[\w-]+", path) and not Path(path).exists():
        fields["datasets"] = [path]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _usage(facts: RunFacts, kind: str, adapter: bool) -> str:
    if adapter:
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(facts.base)})",
            'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
        ]
    else:
        head = "AutoModelForSequenceClassification" if kind == "RewardModule" else "AutoModelForCausalLM"
        lines = [
            f"from transformers import {head}, AutoTokenizer",
            "",
            "",
            f'model = {head}.from_pretrained("path/of/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _license(facts: RunFacts) -> str:
    stated = f"`{facts.license}`." if facts.license else "Not stated yet: add `license` to the fields above."
    return f"{stated} The licenses of `{facts.base}` and of the data apply as well."

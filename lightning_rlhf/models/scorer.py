"""Reward models of one member or several: building, scoring, saving and opening.

Parameters of k members, with M in the backbone, L in a head and A in an adapter: ``linear`` M + kL, ``lora``
M + kL + kA, ``independent`` k(M + L); see "Efficient reward model ensemble" (arXiv 2401.16635), section 3.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.logprobs.compute import Layout
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import head_outputs
from lightning_rlhf.models.adapters import fit_adapters
from lightning_rlhf.models.checks import read_json
from lightning_rlhf.models.dropout import saved_dropout
from lightning_rlhf.models.heads import probe_rows, reads_last_token, score_head
from lightning_rlhf.models.load import load_scorer, open_classifier
from lightning_rlhf.models.lora import PLAIN_SETTINGS, LoRA, is_plain, lora_config
from lightning_rlhf.models.resolve import resolve_checkpoint
from lightning_rlhf.models.save import base_state_dict, merged_state_dict, whole_folder
from lightning_rlhf.models.sharding import shard_scorer
from lightning_rlhf.models.stops import context_window


Kind = Literal["linear", "lora", "independent"]

MANIFEST = "ensemble.json"
"""File in the folder of a reward model of several members: kind, size, and statistics of the members."""


class Manifest(TypedDict):
    """Content of `MANIFEST`; means and stds are None before they are known."""

    kind: Kind
    size: int
    means: list[float] | None
    stds: list[float] | None


class _OpenOptions(TypedDict):
    """Arguments of `open_classifier` and `load_scorer`."""

    dtype: str
    trust_remote_code: bool
    meta: bool


class _LoadOptions(_OpenOptions):
    """Further arguments of `load_scorer`."""

    attn_implementation: str | None
    gradient_checkpointing: bool


@dataclass
class Ensemble:
    """Several reward models in one; their disagreement measures uncertainty (arXiv 2401.16635).

    Args:
        kind: ``linear`` puts several heads on one backbone, all of it trained; ``lora`` gives each member an adapter
            and a head on a frozen backbone, which should be a ``linear`` ensemble that was trained before; and
            ``independent`` makes whole models that differ by their heads at the start.
        size: number of members, >= 2.
        loss: ``members`` trains each member on the labels, ``mean`` the mean of their rewards, which leaves members
            free to differ (UP-RLHF, arXiv 2401.00243).
        diversity: weight of a bonus for ``lora`` members whose adapters read different directions, >= 0 (UP-RLHF).
        turn_epochs: epochs for which a single ``lora`` member is trained before the next one has its turn, >= 1: the
            members are trained one after another, at the cost of one. Default: all are trained together.
    """

    kind: Kind = "linear"
    size: int = 3
    loss: Literal["members", "mean"] = "members"
    diversity: float = 0.0
    turn_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"model.ensemble.kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        if self.loss not in ("members", "mean"):
            raise ValueError(f"model.ensemble.loss must be 'members' or 'mean'; got {self.loss!r}")
        if self.size < 2:
            raise ValueError(f"model.ensemble.size must be at least 2; got {self.size}: leave model.ensemble out")
        if self.diversity < 0 or (self.diversity > 0 and self.kind != "lora"):
            raise ValueError(
                f"model.ensemble.diversity must be >= 0, and is about the adapters of kind 'lora'; got "
                f"{self.diversity} with kind {self.kind!r}"
            )
        if self.turn_epochs is None:
            return
        if self.turn_epochs < 1 or self.kind != "lora" or self.loss != "members":
            raise ValueError(
                f"model.ensemble.turn_epochs must be >= 1, and trains members of kind 'lora' on losses of their own "
                f"(loss 'members'); got {self.turn_epochs} with kind {self.kind!r} and loss {self.loss!r}"
            )

    def turn(self, epoch: int) -> int | None:
        """Number of the turn, from 0, that an epoch belongs to; None where all members are trained together."""
        return None if self.turn_epochs is None else epoch // self.turn_epochs


class Scorer(nn.Module):
    """A reward model of one member or several; `build_scorer` and `open_scorer` make it.

    Args:
        models: decoders with a linear head: one with an output per member, or one model per member.
        kind: see `Ensemble`; a single member is ``linear``.
        adapted: the trunk of the one model in the wrapper of peft, where it has adapters.

    Attributes:
        means: mean of each member's rewards on held-out data; None before they are known.
        stds: standard deviation of each member's rewards on held-out data; None before they are known.
    """

    def __init__(
        self, models: Sequence[PreTrainedModel], kind: Kind = "linear", adapted: PeftModel | None = None
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.kind: Kind = kind
        self._adapted = (adapted,)  # in a tuple: the same modules are registered above
        self.means: list[float] | None = None
        self.stds: list[float] | None = None
        # collected once, since `scores` switches their adapters for each member
        self._layers = tuple(module for module in self.modules() if isinstance(module, LoraLayer))

    @property
    def model(self) -> PreTrainedModel:
        """The first model, which is the only one unless the members are independent."""
        return cast(PreTrainedModel, self.models[0])

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the backbone."""
        return self.model.config

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.models) if self.kind == "independent" else int(cast(int, self.config.num_labels))

    def scores(
        self,
        groups: Sequence[Group],
        *,
        layout: Layout = "auto",
        tokens_per_batch: int | None = None,
        member: int | None = None,
    ) -> Tensor:
        """Rewards of responses by every member, [responses, members]; by a single one of ``lora``, [responses, 1].

        Adapters are switched between members, so that ``lora`` makes a forward pass per member, as ``independent``
        does; ``linear`` makes one.

        Args:
            groups: prompts with their responses, as token ids.
            layout: how sequences are batched, as in `head_outputs`.
            tokens_per_batch: maximum number of tokens per forward pass. Default: one pass.
            member: the member of a ``lora`` ensemble that is asked. Default: all.
        """
        if self.kind == "linear":
            # r_m = w_m^T h for all members m in one product: [responses, members]
            head = score_head(self.model, self.size)
            return head_outputs(self.model.base_model, head, groups, layout=layout, tokens_per_batch=tokens_per_batch)
        # r_m = w_m^T h_m, where the adapter or model of member m computes h_m: [responses, 1]
        columns = []
        # one column of rewards per member
        for asked in range(self.size) if member is None else (member,):
            if self.kind == "lora":
                self._use_adapter(asked)
                columns.append(
                    head_outputs(
                        self.model.base_model,
                        _Row(score_head(self.model, self.size), asked),
                        groups,
                        layout=layout,
                        tokens_per_batch=tokens_per_batch,
                    )
                )
            else:
                model = cast(PreTrainedModel, self.models[asked])
                head = score_head(model)
                columns.append(
                    head_outputs(model.base_model, head, groups, layout=layout, tokens_per_batch=tokens_per_batch)
                )
        return torch.cat(columns, 1)

    def stacked_down_projections(self) -> list[Tensor]:
        """The down-projections of all members, one below the other, of every adapted layer; [members * r, inputs]."""
        names = [adapter_name(member) for member in range(self.size)]
        stacked: list[Tensor] = []
        for layer in self._layers:
            factors = [cast(nn.Linear, layer.lora_A[name]) for name in names]
            stacked.append(torch.cat([factor.weight for factor in factors]))
        return stacked

    def adapters_but(self, member: int) -> list[nn.Parameter]:
        """Weights of the adapters of all members but one."""
        own = f".{adapter_name(member)}."
        return [p for name, p in self.named_parameters() if ".lora_" in name and own not in f"{name}."]

    @contextmanager
    def heads_kept_but(self, member: int) -> Iterator[None]:
        """Keep the heads of all members but one through a step of the optimizer, which sees one weight for all."""
        weights = list(score_head(self.model, self.size).parameters())
        before = [weight.detach().clone() for weight in weights]
        yield
        others = [place for place in range(self.size) if place != member]
        with torch.no_grad():
            # weight decay moves rows whose gradient is 0, too
            for weight, old in zip(weights, before, strict=True):
                weight[others] = old[others]

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard backbone and heads over processes (FSDP2), in place.

        Raises:
            ValueError: if members have adapters or models of their own.
        """
        if self.kind != "linear":
            raise ValueError(
                f"an ensemble of kind {self.kind!r} does not run sharded; use trainer/ddp, or one process, or "
                f"model.ensemble.kind=linear"
            )
        shard_scorer(self.model, score_head(self.model, self.size), mesh)

    def save(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a folder that `open_scorer` opens, completely or not at all; call it on one rank.

        ``AutoModelForSequenceClassification`` opens it too where there is one head or several on one backbone, and
        gives a logit per member; adapters of a single model are merged, and lie beside it in ``adapter/``. Of other
        ensembles the folder holds ``backbone/`` and ``adapters/``, or ``members/``, which transformers and peft open.

        Args:
            folder: output folder.
            tokenizer: tokenizer of the backbone, saved with it.
            state_dict: full tensors under the names of ``state_dict()``, for one that is sharded.
        """
        # only `linear` scorers are sharded, which have one model
        state = None if state_dict is None else {k.removeprefix("models.0."): v for k, v in state_dict.items()}
        adapted = self._adapted[0]
        for name in ("reward_mean", "reward_std"):
            vars(self.config).pop(name, None)  # statistics of the initial checkpoint
        # one member has its statistics in the config, several have them in the manifest
        if self.size == 1 and self.means is not None and self.stds is not None:
            self.config.reward_mean, self.config.reward_std = self.means[0], self.stds[0]
        with whole_folder(folder) as scratch, saved_dropout(self):
            if self.kind == "linear":
                weights = merged_state_dict(self.model, state) if adapted is not None else state
                self.model.save_pretrained(scratch, state_dict=weights)
                if adapted is not None:
                    trunk = f"{self.model.base_model_prefix}."
                    # peft names weights from the trunk, under its own prefix
                    own = state and {f"base_model.model.{k.removeprefix(trunk)}": v for k, v in state.items()}
                    adapted.save_pretrained(str(scratch / "adapter"), state_dict=own, save_embedding_layers=False)
            else:
                # no weights at the top level: opening them alone would silently leave members out
                self.config.save_pretrained(scratch)
            if self.kind == "lora":
                assert adapted is not None
                # the frozen trunk and the heads of all members, under the names of a model without adapters
                backbone = base_state_dict(self.model.state_dict())
                self.model.save_pretrained(scratch / "backbone", state_dict=backbone)
                adapted.save_pretrained(str(scratch / "adapters"), save_embedding_layers=False)
            if self.kind == "independent":
                for number, model in enumerate(self.models):
                    cast(PreTrainedModel, model).save_pretrained(scratch / "members" / str(number))
            if self.size > 1:
                content = {"kind": self.kind, "size": self.size, "means": self.means, "stds": self.stds}
                (scratch / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            tokenizer.save_pretrained(scratch)

    def _use_adapter(self, member: int) -> None:
        """Let the layers compute with one member's adapter; peft's own switch would also freeze the others."""
        for layer in self._layers:
            layer._active_adapter = [adapter_name(member)]


class ClassifierScorer(nn.Module):
    """A reward model that is more than a linear head on the last token: it runs on each text as a whole.

    Examples are encoders, whose classifier follows a pooler, and classes with code of their own. They give rewards, and
    are not trained here.

    Args:
        model: a model that ``AutoModelForSequenceClassification`` opened.
        name: name of the model in errors.

    Attributes:
        means: always None; such a model has no statistics of held-out rewards.
        stds: as ``means``.
    """

    size = 1

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        self.model = model
        self.means: list[float] | None = None
        self.stds: list[float] | None = None
        # scored once here, so that an unsuitable class is refused on opening and not in the middle of a run
        try:
            # some classes take the hidden state at EOS
            eos = model.config.eos_token_id
            # where EOS is the padding token, classifiers skip it
            end = (eos,) if isinstance(eos, int) and eos != model.config.pad_token_id else ()
            probe = self.scores([((ids[0],), [(*ids[1:], *end)]) for ids in probe_rows(model.config)])
            shape = tuple(probe.shape)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name!r} is a {type(model).__name__}, which scores no texts ({error}); {_USE}"
            ) from error
        # two texts, and one number for each
        if shape != (2, 1):
            raise ValueError(f"{name!r} is a {type(model).__name__} whose scores have shape {shape}; {_USE}")

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def window(self) -> int | None:
        """Longest text in tokens; None where the model sets no limit."""
        window = context_window(self.config)
        positions = [
            m for n, m in self.model.named_modules() if n.endswith("position_embeddings") and hasattr(m, "weight")
        ]
        # families after RoBERTa count positions from behind the padding token's id
        offsets = [1 + m.padding_idx for m in positions if getattr(m, "padding_idx", None) is not None]
        # positions run from padding_idx + 1, so that as many rows of the table hold no token
        return window if window is None else window - max(offsets, default=0)

    def scores(
        self, groups: Sequence[Group], *, tokens_per_batch: int | None = None, types: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """Rewards of responses, [responses, 1], without gradient.

        A batch has texts of one length, so that there is no padding, and no text depends on another.

        Args:
            groups: prompts with their responses, as token ids.
            tokens_per_batch: maximum number of tokens per forward pass. Default: one text.
            types: token types of each text, in order, for tokenizers that have them.
        """
        texts: list[tuple[int, ...]] = []
        for prompt, responses in groups:
            texts.extend((*prompt, *response) for response in responses)
        device = next(self.model.parameters()).device
        # scores by the place of the text in the arguments, whose order the result restores
        found: dict[int, Tensor] = {}
        with evaluating(self.modules()):
            # longest first: if memory does not suffice, the first batch shows it
            for length in sorted(set(map(len, texts)), reverse=True):
                alike = [i for i, text in enumerate(texts) if len(text) == length]
                # a decoder without a padding token takes one text at a time
                rows = max(1, (tokens_per_batch or length) // length) if self.config.pad_token_id is not None else 1
                for start in range(0, len(alike), rows):
                    part = alike[start : start + rows]
                    inputs = {"input_ids": torch.tensor([texts[i] for i in part], device=device)}
                    if types:
                        inputs["token_type_ids"] = torch.tensor([list(types[i]) for i in part], device=device)
                    found |= dict(zip(part, self.model(**inputs).logits, strict=True))
        return torch.stack([found[i] for i in range(len(texts))]) if texts else torch.zeros(0, 1)


_USE = (
    "use a reward model that AutoModelForSequenceClassification opens with num_labels=1, and that gives each text one "
    "number"
)


class _Row:
    """One row of a head."""

    def __init__(self, head: nn.Linear, row: int) -> None:
        self.head, self.row = head, slice(row, row + 1)

    def __call__(self, states: Tensor) -> Tensor:
        # r_m = w_m^T h + b_m
        bias = self.head.bias
        return F.linear(states, self.head.weight[self.row], None if bias is None else bias[self.row])


def adapter_name(member: int) -> str:
    """Name of a member's adapter, and of its folder."""
    return f"member{member}"


def build_scorer(
    checkpoint: str,
    ensemble: Ensemble | None = None,
    lora: LoRA | None = None,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    meta: bool = False,
) -> Scorer:
    """Build a reward model for training, in train mode; new weights use torch's global generator.

    Args:
        checkpoint: as for `resolve_checkpoint`: a causal LM, a reward model, or an ensemble of the kind asked for. A
            ``lora`` ensemble takes backbone and heads of a ``linear`` one of its size.
        ensemble: members. Default: a single one.
        lora: train adapters and heads only. Of a ``lora`` ensemble: the settings of each member's adapter.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``. Adapters are float32.
        attn_implementation: attention of transformers, e.g. ``sdpa``. Default: its own choice.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        trust_remote_code: run code that comes with the checkpoint.
        meta: leave the weights out: all tensors are on the meta device.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the checkpoint is an ensemble of another kind or size, or the settings contradict each other.
    """
    kind: Kind = "linear" if ensemble is None else ensemble.kind
    size = 1 if ensemble is None else ensemble.size
    saved = read_manifest(checkpoint)
    if saved is not None and (saved["size"] != size or (saved["kind"], kind) not in CONTINUATIONS):
        raise ValueError(
            f"{checkpoint!r} is a {saved['kind']} ensemble of {saved['size']} members, from which no "
            f"{'single reward model' if size == 1 else f'{kind} ensemble of {size}'} can be trained: set "
            f"model.ensemble.kind={saved['kind']} and model.ensemble.size={saved['size']}, or name another backbone"
        )
    if kind == "lora" and gradient_checkpointing:
        raise ValueError(
            "layers that are computed anew in the backward pass would find another member's adapter in use; leave "
            "gradient_checkpointing out with model.ensemble.kind=lora"
        )
    if kind == "independent" and lora is not None:
        raise ValueError("independent members are trained whole; leave model.lora out, or set model.ensemble.kind=lora")
    options: _LoadOptions = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "gradient_checkpointing": gradient_checkpointing,
        "trust_remote_code": trust_remote_code,
        "meta": meta,
    }
    # members in folders of their own, unlike those of a linear ensemble, which is one checkpoint
    if saved is not None and saved["kind"] != "linear":
        return _open_parts(Path(checkpoint).expanduser(), saved, options).train()
    if kind == "independent":
        return Scorer([_new_head(load_scorer(checkpoint, **options)) for _ in range(size)], kind).train()
    model = load_scorer(checkpoint, num_scores=size, new_head=saved is None, **options)
    if size > 1 and saved is None:
        _new_head(model)
    # from here on the trunk is frozen under adapters
    if kind == "linear" and lora is None:
        return Scorer([model], kind).train()
    if kind == "lora" and saved is None:
        warnings.warn(
            f"{checkpoint!r} has not learned rewards, and adapters on a frozen backbone learn them badly "
            f"(arXiv 2401.16635): train with model.ensemble.kind=linear first, and name its model as the backbone",
            stacklevel=2,
        )
    trunk = cast(PreTrainedModel, model.base_model)
    if lora is not None and lora.adapter is not None:
        raise ValueError("reward models start from whole checkpoints: leave model.lora.adapter out")
    config = lora_config(trunk, lora or LoRA(), checkpoint)
    if not is_plain(config):
        raise ValueError(
            f"reward models take plain LoRA; of model.lora.peft they take {', '.join(sorted(PLAIN_SETTINGS))}"
        )
    names = [adapter_name(member) for member in range(size)] if kind == "lora" else ["default"]
    # without weights, those of the adapter are on the meta device too
    adapted = cast(PeftModel, get_peft_model(trunk, config, adapter_name=names[0], low_cpu_mem_usage=meta))
    for name in names[1:]:
        adapted.add_adapter(name, config)
    _train_all_adapters(adapted)
    return Scorer([model], kind, adapted).train()


CONTINUATIONS = {("linear", "linear"), ("linear", "lora"), ("lora", "lora"), ("independent", "independent")}
"""Kinds of ensembles that can be trained further: the kind in the checkpoint, and the kind of the run."""


def open_scorer(
    path: str, *, dtype: str = "float32", trust_remote_code: bool = False, meta: bool = False
) -> Scorer | ClassifierScorer:
    """Open a reward model: a folder of `Scorer.save`, or one for ``AutoModelForSequenceClassification``.

    Args:
        path: folder, or Hub id.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run code that comes with the checkpoint.
        meta: leave the weights out, to check that they are all there.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it holds no reward model: weights are missing or left over, or there is more than one label.
    """
    options: _OpenOptions = {"dtype": dtype, "trust_remote_code": trust_remote_code, "meta": meta}
    saved = read_manifest(path)
    if saved is None:
        model = open_classifier(path, **options)
        # without weights there is nothing to compare
        if not meta and not reads_last_token(model):
            return ClassifierScorer(model, path)
        scorer = Scorer([model])
        mean, std = getattr(scorer.config, "reward_mean", None), getattr(scorer.config, "reward_std", None)
        scorer.means, scorer.stds = (None, None) if mean is None or std is None else ([mean], [std])
        return scorer
    if saved["kind"] == "linear":
        scorer = Scorer([load_scorer(path, num_scores=saved["size"], new_head=False, **options)])
    else:
        scorer = _open_parts(Path(path).expanduser(), saved, options)
    scorer.means, scorer.stds = saved["means"], saved["stds"]
    return scorer


def read_manifest(path: str) -> Manifest | None:
    """The `MANIFEST` of a folder; None where there is only one member.

    Raises:
        ValueError: if the file cannot be read, or lacks kind or size.
    """
    source = resolve_checkpoint(path)
    manifest = Path(source) / MANIFEST
    if not manifest.is_file():
        return None
    content = read_json(manifest)
    if content.get("kind") not in get_args(Kind) or not isinstance(content.get("size"), int):
        raise ValueError(
            f"{manifest} does not say which members there are ({content}); it needs kind and size: take the whole "
            f"folder that the run wrote"
        )
    return cast(Manifest, {"means": None, "stds": None, **content})


def read_statistics(path: str) -> tuple[int, list[float] | None]:
    """Number of members of a folder, and the stds of their rewards on held-out data, without the weights."""
    saved = read_manifest(path)
    if saved is not None:
        return int(saved["size"]), saved["stds"]
    # a Hub id has no local folder to read
    config = Path(resolve_checkpoint(path)) / "config.json"
    std = read_json(config).get("reward_std") if config.is_file() else None
    return 1, [float(std)] if isinstance(std, int | float) else None


def _open_parts(folder: Path, saved: Manifest, options: _OpenOptions) -> Scorer:
    """Open a folder with members in several places."""
    if saved["kind"] == "independent":
        paths = [str(folder / "members" / str(i)) for i in range(saved["size"])]
        return Scorer([load_scorer(path, new_head=False, **options) for path in paths], "independent")
    model = load_scorer(str(folder / "backbone"), num_scores=saved["size"], new_head=False, **options)
    # only the weights of the backbone are checked then
    if options["meta"]:
        return Scorer([model], "lora")
    names = [adapter_name(member) for member in range(saved["size"])]
    folders = {name: folder / "adapters" / name for name in names}
    adapted = fit_adapters(model.base_model, folders, str(folder / "backbone"), trained=True)
    _train_all_adapters(adapted)
    return Scorer([model], "lora", adapted)


def _train_all_adapters(adapted: PeftModel) -> None:
    """Train all adapters, and no other weights of the trunk; peft would train only those in use."""
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _new_head(model: PreTrainedModel) -> PreTrainedModel:
    """Initialize the head again: members that are equal at the start would stay equal."""
    # w ~ N(0, sigma^2) with sigma = initializer_range
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    nn.init.normal_(score_head(model, cast(int, model.config.num_labels)).weight, std=std)
    return model

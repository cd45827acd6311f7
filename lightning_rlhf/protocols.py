"""The contracts between modules, DataModules and callbacks, in one place.

A module and a DataModule meet only through the Trainer, which types neither. Each side asks for the other by the
functions at the end, and so gets an object with the methods below or a clear error. The classes that fulfil a contract
say so where they are defined (`if TYPE_CHECKING`), so that mypy compares both sides.

============================  ==============================================  =========================================
contract                      asked by                                        fulfilled by
============================  ==============================================  =========================================
`StepModule`                  `AbstractStepDataModule`                        `AbstractStepModule`
`RoundModule`                 `AbstractRoundDataModule`                       `AbstractRoundModule`
`SilverModule`                `PreferenceDataModule`, with silver labels      `AbstractRoundModule`
`RolloutModule`               `RolloutDataModule`                             `PolicyGradientModule`
`StepData`                    `AbstractStepModule`, its callbacks             `AbstractStepDataModule`
`RoundData`                   `AbstractRoundModule`                           `AbstractRoundDataModule`
`PricedSource`                `LabelBudget`, `Summary`                        `PreferenceDataModule`
`PreferenceSource`, `Round`   callbacks                                       `AbstractStepDataModule`, rounds
`TrainedModule`               callbacks                                       all modules
`PolicyLike`                  callbacks                                       policy and reward modules
============================  ==============================================  =========================================
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.batching.batches import RolloutGroup
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.generation.rollouts import RolloutGenerator
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.rewards.base import AbstractReward
from lightning_rlhf.types import Preference, Rollout


@runtime_checkable
class StepModule(Protocol):
    """A module as a DataModule of recorded rows sees it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; available before the model is loaded."""

    @property
    def context_window(self) -> int | None:
        """Longest sequence in tokens; None when the model sets no limit."""

    @property
    def configured_end_ids(self) -> tuple[int, ...]:
        """Token ids at which generation stops by tokenizer and generation config."""


@runtime_checkable
class RoundModule(StepModule, Protocol):
    """A module as a DataModule sees it that collects rounds with the current policy."""

    def gathered(self) -> AbstractContextManager[None]:
        """Hold sharded models whole while responses are sampled and scored; every rank must enter."""

    def start_round(self, index: int) -> None:
        """Prepare for round ``index``, e.g. move the reference; called before anything of the round is sampled."""

    def engine(self, decoding: Decoding) -> PolicyEngine | None:
        """Make the engine that samples responses; None where there is no policy, and pairs must be recorded ones."""


@runtime_checkable
class SilverModule(RoundModule, Protocol):
    """A module as a preference model sees it that labels pairs of its policy."""

    checkpoint: str
    options: ModelOptions

    @property
    def device(self) -> torch.device:
        """Device of the model."""


@runtime_checkable
class RolloutModule(RoundModule, Protocol):
    """A module as `RolloutDataModule` sees it."""

    def rollout_generator(self, decoding: Decoding) -> RolloutGenerator:
        """Make the generator of rollouts from the current policy."""

    def compute_advantages(self, groups: Sequence[Sequence[Rollout]], rewards: Sequence[float]) -> list[RolloutGroup]:
        """Give every token of a round its advantage; on every rank alike."""

    def observe_round(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Adapt to a new round, e.g. the KL coefficient; called once per round, on every rank alike."""


@runtime_checkable
class StepData(Protocol):
    """A DataModule as modules and their callbacks see it."""

    seed: int

    def planned_steps(self) -> int | None:
        """Optimizer steps of the run if they are known in advance, for learning-rate schedules; else None."""


@runtime_checkable
class RoundData(StepData, Protocol):
    """A DataModule as modules see it that sample in validation, or collect rounds."""

    decoding: Decoding
    heldout_reward: AbstractReward | None

    @property
    def answers_heldout(self) -> bool:
        """Whether validation generates answers to held-out prompts."""

    def sample_only(self, rounds: list[int]) -> None:
        """Sample rounds into the ledger and buy no label."""


class Round(Protocol):
    """One round of a DataModule: items that were sampled and labeled together."""

    @property
    def index(self) -> int:
        """Number of the round, from 0."""

    @property
    def preferences(self) -> Sequence[Preference]:
        """The labeled pairs; none in a round of rollouts."""

    @property
    def failed(self) -> Mapping[str, int]:
        """Items without a label, by the status of their last attempt."""

    @property
    def ties(self) -> int:
        """Pairs of equal responses, which cost no label."""

    @property
    def sampling_seconds(self) -> float:
        """Wall time of sampling in this process."""

    @property
    def labeling_seconds(self) -> float:
        """Wall time of labeling in this process."""

    @property
    def labels_bought(self) -> int:
        """Labels paid for in this process: 0 on ranks other than zero."""


@runtime_checkable
class PricedSource(Protocol):
    """A DataModule whose labels have a price."""

    cost_budget: float | None

    def cost(self) -> float:
        """Cost of the label attempts so far, from the ledger on rank zero: every rank must ask."""

    def feedback(self) -> Mapping[str, object]:
        """Where the labels come from, as JSON, from the ledger on rank zero: every rank must ask."""


@runtime_checkable
class PreferenceSource(Protocol):
    """A DataModule as callbacks see it."""

    UNIT: ClassVar[str]
    epochs_per_round: int | None
    label_budget: int | None

    @property
    def round(self) -> Round | None:
        """The newest round; None before the first, and where there are no rounds."""

    @property
    def num_labels(self) -> int:
        """Labels bought so far, from the ledger on rank zero: every rank must ask."""

    @property
    def num_ties(self) -> int:
        """Pairs of equal responses so far, from the ledger on rank zero: every rank must ask."""

    @property
    def num_silver_pairs(self) -> int:
        """Pairs with a label by a preference model so far, from the ledger on rank zero: every rank must ask."""

    @property
    def passes_per_pair(self) -> float:
        """Model forward passes per token position and pair; NaN before the first pair. Every rank must ask."""

    def ends_round(self, epoch: int) -> bool:
        """Whether an epoch is the last that trains on its round."""


@runtime_checkable
class TrainedModule(Protocol):
    """A module as callbacks see it."""

    step_metrics: dict[str, Tensor]

    def save_pretrained(self, folder: Path) -> None:
        """Write the trained model as a folder; every rank calls, rank zero writes."""


@runtime_checkable
class PolicyLike(TrainedModule, Protocol):
    """A module with a reference as callbacks see it."""

    @property
    def beta(self) -> float:
        """Price of a nat of KL in units of the reward, > 0."""


Contract = TypeVar("Contract")


def module_of(trainer: Trainer, contract: type[Contract], asking: str) -> Contract:
    """The LightningModule of a run, checked against a contract.

    Args:
        trainer: the Trainer.
        contract: a Protocol of this file.
        asking: who asks, for the message.

    Raises:
        TypeError: if the module lacks a method of the contract, naming the method.
    """
    return _checked(trainer.lightning_module, contract, asking)


def datamodule_of(trainer: Trainer, contract: type[Contract], asking: str) -> Contract:
    """The DataModule of a run, checked against a contract; see `module_of`.

    Raises:
        ValueError: if the run has none, as after ``trainer.fit(module, dataloader)``.
        TypeError: if the DataModule lacks a method of the contract, naming the method.
    """
    datamodule: object = getattr(trainer, "datamodule", None)
    if datamodule is None:
        raise ValueError(
            f"{asking} reads rounds, seeds and the ledger from a DataModule of this package, but the Trainer was given "
            f"plain dataloaders; call trainer.fit(module, datamodule=...)"
        )
    return _checked(datamodule, contract, asking)


def _checked(found: object, contract: type[Contract], asking: str) -> Contract:
    # not isinstance: it reads every property, and some of them wait for all ranks
    missing = sorted(name for name in _members(contract) if not _has(found, name))
    if missing:
        raise TypeError(
            f"{asking} needs a {contract.__name__} (see lightning_rlhf/protocols.py); {type(found).__name__} lacks "
            f"{', '.join(missing)}: use a class of this package, or implement the missing names"
        )
    return cast(Contract, found)


def _members(contract: type) -> set[str]:
    """Names of the methods, properties and attributes of a Protocol."""
    names: set[str] = set()
    for base in contract.__mro__:
        if getattr(base, "_is_protocol", False) and base is not Protocol:
            names |= {*vars(base), *inspect.get_annotations(base)}
    return {name for name in names if not name.startswith("_")}


def _has(found: object, name: str) -> bool:
    try:
        inspect.getattr_static(found, name)
    except AttributeError:
        return False
    return True


def beta_of(pl_module: LightningModule) -> float:
    """The price of a nat of KL in units of the reward, of a module with a reference."""
    return float(_checked(pl_module, PolicyLike, "the callback").beta)

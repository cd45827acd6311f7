"""The base of all DataModules: it reads the rows, and serves batches that are optimizer steps.

Lightning asks for the training loader again in every epoch. This is the hook at which rounds are collected, see
`lightning_rlhf.datamodules.rounds`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.batching.batches import StepBatch
from lightning_rlhf.batching.loader import AbstractEpochItems, RankSampler, ResumableLoader, StepDataset
from lightning_rlhf.batching.steps import EpochPlan, Step, epoch_order, group_by_length, plan
from lightning_rlhf.collectors.progress import restore_other_bars, silence_other_bars
from lightning_rlhf.datamodules.options import BatchOptions, PromptOptions, at_least_one
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.ledger.row_digest import RowDigest, digest_of_rows
from lightning_rlhf.ledger.same_run import row_differences
from lightning_rlhf.prompts import AbstractPromptSource, DatasetCompletions, DatasetPrompts
from lightning_rlhf.prompts.files import RowData, holds_rows
from lightning_rlhf.prompts.mixture import SOURCE_COLUMN
from lightning_rlhf.prompts.portions import Tokenization
from lightning_rlhf.prompts.table import PromptTable, load_prompts
from lightning_rlhf.prompts.template import turn_format
from lightning_rlhf.prompts.tokenize import TokenLimits
from lightning_rlhf.protocols import PreferenceSource, Round, StepData, StepModule, module_of
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.rewards.base import check_rows, columns_read
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, State


Item = TypeVar("Item")
"""A pair, a prompt with its rollouts, or a prompt with its completion."""

DEFAULT_DECODING = Decoding()


class AbstractStepDataModule(KeepsArguments, L.LightningDataModule, Generic[Item], ABC):
    """Serves batches that are optimizer steps, of one or more micro-batches; resumes exactly.

    Implement `items`, `length` and `collate`.

    Args:
        prompts: where training rows come from.
        heldout: rows for validation; default: no validation.
        decoding: length, temperature and batch of decoding.
        items_per_batch: items per optimizer step over all processes, >= 1; times ``trainer.accumulate_grad_batches``.
        batching: how an optimizer step is split into micro-batches.
        prompt_options: how prompts become tokens.
        seed: decides order and samples.

    Attributes:
        FREE_SETTINGS: arguments that change speed or metrics, but neither samples nor updates.
        ITEMS: the argument that ``items_per_batch`` comes from, for errors.
        UNIT: name of an item in progress bars and speeds.
        RESPONSE_LIMIT: the argument that limits responses, for errors.
        ROW_SOURCE: reads rows that are given as they are, as a list of dictionaries or a `datasets.Dataset`.
        ROWS_ON_DISK: whether ``prompt_options.rows`` counts for training rows; else they stay in memory.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        {"heldout", "batching.max_tokens_per_micro_batch", "prompt_options.rows"}
    )
    ITEMS: ClassVar[str] = "items_per_batch"
    UNIT: ClassVar[str] = "pair"
    RESPONSE_LIMIT: ClassVar[str] = "decoding.max_new_tokens"
    ROW_SOURCE: ClassVar[type[DatasetPrompts] | type[DatasetCompletions]] = DatasetPrompts
    ROWS_ON_DISK: ClassVar[bool] = False

    def __init__(
        self,
        *,
        prompts: AbstractPromptSource,
        heldout: AbstractPromptSource | None,
        decoding: Decoding,
        items_per_batch: int,
        batching: BatchOptions,
        prompt_options: PromptOptions,
        seed: int,
    ) -> None:
        super().__init__()
        self.trainer: L.Trainer
        at_least_one(**{self.ITEMS: items_per_batch})
        self.prompt_source = self._source("prompts", prompts)
        self.heldout_source = None if heldout is None else self._source("heldout", heldout)
        self.heldout_reward: AbstractReward | None = None
        """Scores held-out responses."""
        self.decoding = decoding
        self.items_per_batch = items_per_batch
        self.batching, self.prompt_options = batching, prompt_options
        self.seed = seed
        self.fingerprint: dict[str, Any] = {}
        """Settings that a continued run must share with the ledger; default: those that the objects of the run
        describe. The command line sets it."""
        self.round: Round | None = None
        """The newest round, for callbacks; None where there are no rounds."""
        self.epochs_per_round: int | None = None
        self.label_budget: int | None = None
        """Most labels that may be bought in total; the last round is cut to it. The `LabelBudget` callback sets it."""
        self._prompts: Sequence[Prompt] = []
        self._heldout: Sequence[Prompt] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rows: RowDigest = digest_of_rows([])
        self._accumulate = 1
        self._silenced_bars = False

    def _source(self, name: str, given: object) -> AbstractPromptSource:
        """The source of rows that an argument gives: one, rows (dictionaries or `datasets.Dataset`), or their path.

        Raises:
            TypeError: if it is neither.
        """
        if isinstance(given, AbstractPromptSource):
            return given
        path = str(given) if isinstance(given, str | Path) else None
        if path is not None or holds_rows(given):
            source = self.ROW_SOURCE(cast(RowData, given) if path is None else path)
            # the digest of the rows names them in a ledger, where the rows themselves would fill it
            self.__dict__["_arguments"][name] = source
            return source
        check_plugin(f"data.{name}", given, AbstractPromptSource)
        return cast(AbstractPromptSource, given)

    @abstractmethod
    def items(self, epoch: int) -> Sequence[Item]:
        """Items of an epoch, equal on all ranks; a second call does not sample again."""

    @abstractmethod
    def length(self, item: Item) -> int:
        """Token positions of an item in a forward pass."""

    @abstractmethod
    def collate(self, items: Sequence[Item], step: Step) -> StepBatch:
        """Make the batch of one rank in one optimizer step.

        Args:
            items: items of this rank, micro-batch after micro-batch.
            step: micro-batches and counts of the step.
        """

    def setup(self, stage: str) -> None:
        """Read and check the rows, before any model is loaded."""
        self._silenced_bars = silence_other_bars(self.trainer) or self._silenced_bars
        if stage == "fit":
            # the hook that resamples: Lightning asks for the training loader anew in every epoch
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
            self._take_over_accumulation()
        if stage == "validate" and self.heldout_source is None and self.trainer.state.fn == TrainerFn.VALIDATING:
            raise ValueError(
                "there is nothing to validate on: set data.heldout to the rows that are held out, e.g. "
                "--data.heldout=DatasetPrompts --data.heldout.path=heldout.jsonl"
            )
        tokenizer = module_of(self.trainer, StepModule, type(self).__name__).tokenizer
        # token ids belong to one tokenizer: another module needs the rows tokenized again
        if not self._prompts or self._tokenizer is not tokenizer:
            self._tokenizer = tokenizer
            self._prompts = self._load(self.prompt_source, "training", self.ROWS_ON_DISK)
            self._rows = digest_of_rows(self._prompts)
            if self.heldout_source is not None:
                self._heldout = self._load(self.heldout_source, "held-out")
            self.check_rewards()

    def check_rewards(self) -> None:
        """Let the rewards check that the rows have the columns that they read; before any model is loaded."""
        if self.heldout_reward is not None:
            # often those of the config, where the training rows are the user's own
            rows = f"{self._named_source(self.heldout_source, 'held-out rows')} (data.heldout)"
            check_rows(self.heldout_reward, self._heldout, rows)

    def state_dict(self) -> State:
        """A digest of the rows, for the checkpoint: a resumed run must have the same rows."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: if a run would go on with other rows.
        """
        rows: RowDigest | None = state_dict.get("rows")
        # only a fit goes on with the rows of the checkpoint; validation may use others
        if rows is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        lines = row_differences(rows, self._rows, self._prompts, self._named_source(), "in the checkpoint")
        if lines:
            raise ValueError(
                "the checkpoint was trained on other rows:\n"
                + "\n".join(lines)
                + "\nRestore the data; or start another run in another folder, which can begin with these weights."
            )

    def _named_source(self, source: AbstractPromptSource | None = None, what: str = "training rows") -> str:
        """Rows and the file they come from, for messages."""
        found = source if source is not None else self.prompt_source
        return f"{what} of {source_name(found)}"

    def planned_steps(self) -> int | None:
        """Optimizer steps of the run if they are known in advance, for learning-rate schedules; else None."""
        epochs, items = self.trainer.max_epochs, self._items_per_epoch()
        if items is None or epochs is None or epochs < 1:
            return None
        # the last step of an epoch may have fewer items
        return epochs * math.ceil(items / (self.items_per_batch * self._accumulate))

    def _items_per_epoch(self) -> int | None:
        """Items of an epoch if every epoch has as many; else None."""
        return None

    @property
    def key(self) -> Key:
        """Key of the run."""
        return Key((self.seed,))

    @property
    def num_labels(self) -> int:
        """Labels bought for the rounds up to the newest one; 0 where nothing is labeled. Every rank must ask."""
        return 0

    @property
    def num_ties(self) -> int:
        """Pairs of equal responses, whose labels are free; 0 where nothing is labeled. Every rank must ask."""
        return 0

    @property
    def num_silver_pairs(self) -> int:
        """Pairs with a label by a preference model; 0 where there is none. Every rank must ask."""
        return 0

    def ends_round(self, epoch: int) -> bool:
        """Whether an epoch is the last that trains on its round; never where nothing is sampled again."""
        return self.epochs_per_round is not None and (epoch + 1) % self.epochs_per_round == 0

    def _items_per_step(self, items: Sequence[Item]) -> int:
        """Items of an optimizer step over all processes."""
        del items
        return self.items_per_batch * self._accumulate

    @property
    def passes_per_pair(self) -> float:
        """Model forward passes per token position and pair; NaN where no pairs are sampled. Every rank must ask."""
        return float("nan")

    def train_dataloader(self) -> DataLoader[Any]:
        """Serve the items of this epoch; a second call does not sample again."""
        epoch = self.trainer.current_epoch
        items = self.items(epoch)
        # every rank makes the same plan from the same items, and keeps its own share of each step
        world, rank = self.trainer.world_size, self.trainer.global_rank
        lengths = self.lengths(items)
        per_step = self._items_per_step(items)
        order = epoch_order(len(items), self.key.fold(Stream.ORDER, epoch))
        order = group_by_length(
            order, lengths, per_step, self.batching.length_window, self.key.fold(Stream.WINDOWS, epoch)
        )
        one_step = partial(
            plan,
            lengths=lengths,
            pairs_per_step=per_step,
            max_tokens=self._max_tokens_per_micro_batch(),
            rank=rank,
            world=world,
            # accumulate_grad_batches=k runs at least k backward passes, so that it still saves memory
            min_micro_batches=self._accumulate,
        )
        steps = EpochPlan(order, per_step, one_step)
        return ResumableLoader(
            StepDataset(items, steps, partial(self.before_step, steps)),
            # all steps on every rank: a step has already divided its items among the ranks
            sampler=RankSampler(list(range(len(steps))), rank, world),
            collate_fn=self._collate,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def lengths(self, items: Sequence[Item]) -> Sequence[int]:
        """Token positions of all items of an epoch."""
        if isinstance(items, AbstractEpochItems):
            return items.lengths
        return [self.length(item) for item in items]

    def before_step(self, steps: EpochPlan, number: int) -> None:
        """Called on every rank before the batch of a step is made, in order; nothing by default.

        Args:
            steps: steps of the epoch.
            number: number of the step in the epoch, from 0.
        """

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Serve held-out prompts in batches of ``decoding.rows``."""
        if not self._heldout:
            # a run without held-out rows is meant to have none
            warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
            return []
        world, rank = self.trainer.world_size, self.trainer.global_rank
        # rows r, r + world, r + 2 world, ...; no row is repeated to give every rank as many,
        # since it would count twice in the mean over the rows
        indices = list(range(rank, len(self._heldout), world))
        sampler = RankSampler(indices, rank, world)
        return DataLoader(self._heldout, batch_size=self.decoding.rows, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the numbers of a training batch; prompts are plain data and stay."""
        del dataloader_idx
        # Lightning also passes the lists of prompts of validation here
        return batch.to(device) if isinstance(batch, StepBatch) else batch

    def teardown(self, stage: str) -> None:
        """Give the accumulation back to the Trainer."""
        self._restore_bars()
        if stage == "fit":
            # a second fit with this Trainer takes over the same number again
            self.trainer.accumulate_grad_batches, self._accumulate = self._accumulate, 1

    def on_exception(self, exception: BaseException) -> None:
        """Leave the process as it was: a notebook goes on."""
        super().on_exception(exception)
        self._restore_bars()

    def _restore_bars(self) -> None:
        if self._silenced_bars:
            restore_other_bars()
        self._silenced_bars = False

    def _collate(self, items: list[tuple[list[Item], Step]]) -> StepBatch:
        ((mine, step),) = items
        return self.collate(mine, step)

    def _load(self, source: AbstractPromptSource, what: str, on_disk: bool = False) -> Sequence[Prompt]:
        module = module_of(self.trainer, StepModule, type(self).__name__)
        window = module.context_window
        limit = self.prompt_options.max_prompt_tokens
        # prompt and response share the context window: max_prompt_tokens = window - max_new_tokens
        if limit is None:
            limit = window - self.decoding.max_new_tokens if window is not None else 1_000_000
            if limit < 1:
                raise ValueError(
                    f"responses of {self.decoding.max_new_tokens} tokens leave no room for a prompt in the policy's "
                    f"window of {window} tokens; lower data.{self.RESPONSE_LIMIT}"
                )
        elif window is not None and limit + self.decoding.max_new_tokens > window:
            raise ValueError(
                f"data.prompt_options.max_prompt_tokens {limit} and data.{self.RESPONSE_LIMIT} "
                f"{self.decoding.max_new_tokens} exceed the policy's window of {window} tokens together; lower one of "
                f"them"
            )
        how = Tokenization(
            module.tokenizer,
            TokenLimits(limit, self.decoding.max_new_tokens, self.prompt_options.on_long_prompt),
            system_prompt=self.prompt_options.system_prompt,
            end_ids=tuple(module.configured_end_ids),
            chat=self.prompt_options.chat,
        )
        prompts, found = load_prompts(
            source, how, self.prompt_options.rows if on_disk else "memory", self.prompt_options.workers
        )
        table = prompts if isinstance(prompts, PromptTable) else None
        end = turn_format(module.tokenizer).end
        chats = any(p.messages is not None for p in prompts) if table is None else table.facts["has_messages"]
        if end is not None and end not in module.configured_end_ids and chats:
            token = module.tokenizer.convert_ids_to_tokens(end)
            rank_zero_info(
                f"{what} prompts: turns end with {token!r}, which the checkpoint does not stop at; responses end there "
                f"from now on, and the saved model does"
            )
        counts = {reason: n for reason, n in found.items() if n}
        form = getattr(source, "format_name", None)
        rank_zero_info(
            f"{what} prompts: {len(prompts)} of {source_name(source)}"
            + (f", read as {form}" if form else "")
            + (f"; dropped or truncated: {counts}" if counts else "")
        )
        unread = self._unread(source, prompts)
        if unread:
            rank_zero_info(f"{what} prompts: nothing reads the columns {', '.join(unread)}")
        return prompts

    def _unread(self, source: AbstractPromptSource, prompts: Sequence[Prompt]) -> list[str]:
        """Columns of the rows that neither the source nor a reward reads."""
        names = dict.fromkeys(getattr(source, "unread_columns", ()))
        if isinstance(prompts, PromptTable):
            names |= dict.fromkeys(prompts.facts["column_names"])
        else:
            for prompt in prompts:
                names |= dict.fromkeys(prompt.columns)
        read: set[str] = set()
        for reward in self.rewards():
            read |= columns_read(reward, list(names))
        return [name for name in names if name not in read and name not in (SOURCE_COLUMN, "source")]

    def rewards(self) -> list[AbstractReward]:
        """Rewards of the run, which may read columns of the rows."""
        return [] if self.heldout_reward is None else [self.heldout_reward]

    def _max_tokens_per_micro_batch(self) -> int | None:
        limit = self.batching.max_tokens_per_micro_batch
        if limit == "auto":
            return 1024 if self.trainer.strategy.root_device.type == "cpu" else 8192
        return limit

    def _take_over_accumulation(self) -> None:
        """Serve the items of all accumulated batches as one: only then can the loss be the mean over them."""
        # it would change trainer.accumulate_grad_batches in the middle of the run
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                raise ValueError(
                    f"GradientAccumulationScheduler does not run with {type(self).__name__}, whose batches are "
                    f"optimizer steps; set data.{self.ITEMS}, and data.batching.max_tokens_per_micro_batch to fit into "
                    f"memory"
                )
        self._accumulate, self.trainer.accumulate_grad_batches = self.trainer.accumulate_grad_batches, 1


def source_name(source: object) -> str:
    """Where rows come from, for messages: the path of a source, or its class."""
    return f"{getattr(source, 'path', type(source).__name__)!s:.100}"


# mark of a module that a fit has trained
_TRAINED = "_trained_in_rounds"


if TYPE_CHECKING:

    def _fulfils(datamodule: AbstractStepDataModule[Item]) -> StepData:
        return datamodule

    def _is_read_by_callbacks(datamodule: AbstractStepDataModule[Item]) -> PreferenceSource:
        return datamodule

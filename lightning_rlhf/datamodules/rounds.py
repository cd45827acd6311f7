"""The DataModule base whose on-epoch hook collects a round: sampled, labeled or scored, read from the ledger."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_rlhf.batching.loader import RankSampler
from lightning_rlhf.batching.steps import epoch_order
from lightning_rlhf.collectors.progress import Bar, bar_of
from lightning_rlhf.datamodules.base import _TRAINED, AbstractStepDataModule, Item
from lightning_rlhf.datamodules.options import BatchOptions, PromptOptions, RoundOptions
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.ledger.same_run import check_same_run, note_code, note_columns, note_heldout
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.protocols import RoundData, RoundModule, module_of
from lightning_rlhf.randomness import Stream
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.fingerprint import code_of_plugins, run_settings
from lightning_rlhf.types import Prompt, State


class AbstractRoundDataModule(AbstractStepDataModule[Item]):
    """Collects its items in rounds, with the current policy, through the ledger.

    Implement `buffer`, `sample_round` and `labels_before`.

    Args:
        prompts: where training prompts come from.
        heldout: prompts for validation; default: no validation.
        decoding: length, temperature and batch of decoding.
        rounds: how rounds are cut.
        items_per_batch: as in `AbstractStepDataModule`, like the arguments below.
        batching: see there.
        prompt_options: see there.
        seed: decides prompt order, samples and labels.

    Attributes:
        ROUND_ITEMS: name of the items of a round in messages.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = AbstractStepDataModule.FREE_SETTINGS | {"rounds.ledger"}
    ROUND_ITEMS: ClassVar[str] = "comparisons"

    def __init__(
        self,
        *,
        prompts: AbstractPromptSource,
        heldout: AbstractPromptSource | None,
        decoding: Decoding,
        rounds: RoundOptions,
        items_per_batch: int,
        batching: BatchOptions,
        prompt_options: PromptOptions,
        seed: int,
    ) -> None:
        super().__init__(
            prompts=prompts,
            heldout=heldout,
            decoding=decoding,
            items_per_batch=items_per_batch,
            batching=batching,
            prompt_options=prompt_options,
            seed=seed,
        )
        self.prompts_per_round, self.epochs_per_round = rounds.prompts_per_round, rounds.epochs_per_round
        self.ledger_path = rounds.ledger
        self.cost_budget: float | None = None
        """Cost of labels from which on no further round is begun. The `LabelBudget` callback sets it."""
        self._observed = 0
        self._store: PreferenceStore | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @abstractmethod
    def buffer(self, due: int, epoch: int) -> Sequence[Item]:
        """Finish round ``due`` unless it is finished, and return the items to train on in an epoch.

        Called with sharded models gathered, in the precision of training.
        """

    @abstractmethod
    def sample_round(self, index: int) -> None:
        """Sample a round into the ledger without labels; called with sharded models gathered."""

    @abstractmethod
    def labels_before(self, store: PreferenceStore, index: int) -> int:
        """Labels bought in rounds before ``index``; called on rank zero."""

    def failure_causes(self, index: int) -> str:
        """Reasons of failed labels of a round, as a clause of an error; every rank must ask. Default: none."""
        del index
        return ""

    @property
    def label_fraction(self) -> float:
        """Fraction of the prompts of a round that are labeled, in (0, 1]."""
        return 1.0

    @property
    def labels_per_prompt(self) -> int:
        """Labels that a prompt of a round costs."""
        return 1

    @property
    def answers_heldout(self) -> bool:
        """Whether validation generates answers to held-out prompts."""
        return True

    @abstractmethod
    def forget_rounds(self) -> None:
        """Forget the rounds of an earlier fit and all state from them: a fit reads its own rounds from its ledger."""

    def setup(self, stage: str) -> None:
        """Read and check the rows, before any model is loaded, and open the ledger.

        Raises:
            ValueError: if the ledger holds the rounds of another run; the message names the difference.
        """
        super().setup(stage)
        if stage == "fit":
            self._observed = 0
            self.forget_rounds()
        if stage in ("fit", "predict"):
            # one process writes the ledger; an error on it is raised on all ranks
            distributed.from_rank_zero(self._open_ledger)

    @property
    def num_labels(self) -> int:
        """Labels bought for the rounds up to the newest one; every rank must ask."""
        return self._labels_before(self.round.index + 1 if self.round is not None else 0)

    @property
    def label_cost(self) -> float:
        """Price of all labels so far, in the labeler's unit; 0 without a ledger. Every rank must ask."""
        return distributed.from_rank_zero(lambda: 0.0 if self._store is None else self._store.total_cost)

    @property
    def ledger(self) -> Path:
        """Path of the ledger; under ``fast_dev_run`` in a folder that is gone when the run ends."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="fast_dev_run-")
            return Path(self._scratch.name) / "ledger.sqlite"
        return Path(self.ledger_path or Path(self.trainer.default_root_dir) / "ledger.sqlite")

    def items(self, epoch: int) -> Sequence[Item]:
        """Items of the due round, sampled at the first call; a run that is over samples none and reads the ledger."""
        due = self._due_round(epoch)
        if self._is_over(epoch) and not self._all_closed(due):
            return []
        module = self._module()
        # Lightning's precision context covers its own steps only; sampling and scoring need the same precision
        with module.gathered(), self.trainer.precision_plugin.forward_context():
            items = self.buffer(due, epoch)
        if not items:
            failed = {} if self.round is None else self.round.failed
            remedy = "a larger data.rounds.label_attempts asks the labeler again" if failed else "raise the budget"
            raise RuntimeError(
                f"round {due} has no labeled {self.UNIT} to train on "
                f"(failed labels: {failed or 'none'}; label budget: {self.label_budget}){self.failure_causes(due)}; "
                f"{remedy}"
            )
        return items

    def predict_dataloader(self) -> DataLoader[Any]:
        """Serve the index of the one round that ``lightning-rlhf sample`` samples, to every rank."""
        return DataLoader([0], sampler=RankSampler([0]), collate_fn=list)  # type: ignore[arg-type]

    def sample_only(self, rounds: list[int]) -> None:
        """Sample rounds into the ledger, without labels."""
        with self._module().gathered():
            for index in rounds:
                self.sample_round(index)

    def teardown(self, stage: str) -> None:
        """Close the ledger."""
        super().teardown(stage)
        if stage == "fit" and self.trainer.global_step > 0:
            # `_open_ledger` warns if a later fit takes these weights into a ledger that began with others
            vars(self.trainer.lightning_module)[_TRAINED] = True
        if stage in ("fit", "predict"):
            self._close_ledger()

    def on_exception(self, exception: BaseException) -> None:
        """Close the ledger, so that another run in this process can open it."""
        super().on_exception(exception)
        self._close_ledger()

    def state_dict(self) -> State:
        """Id of the ledger and number of observed rounds, for the checkpoint; the rounds are in the ledger."""
        run_id = self._store.run_id if self._store is not None else None
        return {**super().state_dict(), "run_id": run_id, "observed": self._observed}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: if the checkpoint belongs to another ledger than the one in the run folder, or to other rows.
        """
        super().load_state_dict(state_dict)
        is_trial = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        # only rank zero has a store; the scratch ledger of a trial has an id of its own
        if self._store is not None and state_dict["run_id"] != self._store.run_id and not is_trial:
            raise ValueError(
                f"the checkpoint belongs to ledger {state_dict['run_id']}, but {self.ledger} is "
                f"{self._store.run_id}; put the run's own ledger back, or start over in an empty run folder"
            )
        self._observed = state_dict["observed"]

    def _open_ledger(self) -> None:
        if self._store is not None:
            return
        settings = self.fingerprint or run_settings(self.trainer.lightning_module, self)
        self._store = PreferenceStore(self.ledger)
        try:
            restores_weights = self.trainer.ckpt_path is not None
            check_same_run(
                self._store, {"seed": self.seed, **settings}, self._prompts, self._named_source(), restores_weights
            )
            if _TRAINED in vars(self.trainer.lightning_module) and not restores_weights and self._store.has_samples():
                rank_zero_warn(
                    f"the model in memory has been trained before, and this fit begins at round 0 of {self.ledger}, "
                    f"which was sampled with the model as it was then; pass ckpt_path to go on, or use another folder"
                )
            note_code(self._store, code_of_plugins(self.trainer.lightning_module, self))
            note_columns(self._store, self._prompts, self._named_source())
            note_heldout(self._store, self._heldout, self._named_source(self.heldout_source, "held-out rows"))
        except BaseException:
            # else the ledger would stay locked, and a corrected fit in this process could not open it
            self._close_ledger()
            raise

    def _close_ledger(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _is_over(self, epoch: int) -> bool:
        """Whether the run has ended before this epoch; Lightning asks for a loader even then."""
        steps_over = self.trainer.max_steps != -1 and self.trainer.global_step >= self.trainer.max_steps
        # None and -1 set no limit
        return steps_over or (self.trainer.max_epochs not in (None, -1) and epoch >= (self.trainer.max_epochs or 0))

    def _all_closed(self, due: int) -> bool:
        """Whether the ledger holds the rounds up to ``due`` as they ended; every rank must ask."""
        return distributed.from_rank_zero(
            lambda: self._store is not None and set(range(due + 1)) <= set(self._store.rounds())
        )

    def _due_round(self, epoch: int) -> int:
        """Round that an epoch trains on; for a run that has ended, the last one."""
        if self._is_over(epoch):
            # this epoch is not trained: it takes the round of the one before
            epoch = max(epoch - 1, 0)
        due = self._round_of(epoch)
        budget = self.label_budget
        # a spent budget buys no further round: train on the last one
        while budget is not None and due > 0 and self._labels_before(due) >= budget:
            due -= 1
        while self.cost_budget is not None and due > 0 and self._cost_before(due) >= self.cost_budget:
            due -= 1
        return due

    def _round_of(self, epoch: int) -> int:
        """Round that an epoch trains on, however many labels the budget leaves."""
        # round = floor(epoch / epochs_per_round)
        return 0 if self.epochs_per_round is None else epoch // self.epochs_per_round

    def _items_per_epoch(self) -> int | None:
        """Prompts of a round, where a budget does not end the run and every prompt becomes an item."""
        if self.label_budget is not None or self.cost_budget is not None or self.label_fraction < 1:
            return None
        return self.prompts_per_round or len(self._prompts)

    def _round_prompts(self, index: int) -> list[Prompt]:
        """Prompts of a round, see `_round_rows`."""
        return [self._prompts[row] for row in self._round_rows(index)]

    def _round_rows(self, index: int) -> list[int]:
        """Rows of a round: the next piece of an endless stream of shuffled epochs over the data set."""
        total = len(self._prompts)
        size = self.prompts_per_round or total
        trial = int(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        if trial:  # only as many as its batches need, since samples and labels of a trial are thrown away
            size = min(size, trial * self.items_per_batch * self._accumulate)
        if self.label_budget is not None:
            if self.label_budget % self.labels_per_prompt:
                raise ValueError(
                    f"a budget of {self.label_budget} labels is no multiple of the {self.labels_per_prompt} that a "
                    f"prompt costs; take {self.label_budget // self.labels_per_prompt * self.labels_per_prompt}"
                )
            # not the labels in the ledger: after a restart it may hold later rounds already
            left = self.label_budget - self._labels_before(index)
            # prompts that the rest of the budget pays for; the epsilon: an exact quotient must not round down
            size = max(0, min(size, int(left // self.labels_per_prompt / self.label_fraction + 1e-9)))
        # place p of the stream is row order_k[p mod N] of pass k = floor(p / N) over the N rows
        orders: dict[int, list[int]] = {}
        rows = []
        # start = index * full size, also after a round that was cut: the number alone decides the prompts
        start = index * (self.prompts_per_round or total)
        for position in range(start, start + size):
            passed, place = divmod(position, total)
            if passed not in orders:
                orders[passed] = epoch_order(total, self.key.fold(Stream.PROMPTS, passed))
            rows.append(orders[passed][place])
        return rows

    def _labels_before(self, index: int) -> int:
        return distributed.from_rank_zero(lambda: 0 if self._store is None else self.labels_before(self._store, index))

    def _cost_before(self, index: int) -> float:
        return distributed.from_rank_zero(lambda: 0.0 if self._store is None else self._store.cost(index))

    def _module(self) -> RoundModule:
        return module_of(self.trainer, RoundModule, type(self).__name__)

    def _engine(self) -> PolicyEngine | None:
        return self._module().engine(self.decoding)

    def _progress(self, description: str, total: int) -> AbstractContextManager[Bar]:
        return bar_of(self.trainer, description, total, self.UNIT)


if TYPE_CHECKING:

    def _fulfils(datamodule: AbstractRoundDataModule[Item]) -> RoundData:
        return datamodule

"""The DataModule whose on-epoch hook resamples: prompts -> sampler -> labeler -> ledger -> batches.

Online DPO is a round of one batch, iterative DPO a round of many, offline DPO a round that never changes. The buffer of
a round is read from the ledger, so that a killed run continues with the pairs and labels it had paid for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_rlhf import ranks
from lightning_rlhf.collate import PreferenceBatch, collate_preferences
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import AbstractLabeler, RewardLabeler
from lightning_rlhf.loading import RankSampler, ResumableLoader, Step, epoch_order, group_by_length, plan
from lightning_rlhf.models.sharding import gathered
from lightning_rlhf.prompts import AbstractPromptSource, tokenize_rows
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.rounds import Round, RoundCollector, refreshed
from lightning_rlhf.samplers import AbstractPairSampler
from lightning_rlhf.store import PreferenceStore
from lightning_rlhf.types import Preference, Prompt


DEFAULT_DECODING = Decoding()


class PreferenceDataModule(L.LightningDataModule):
    """Collects preferences in rounds, with the current policy, and serves them as batches.

    Args:
        prompts: where training prompts (or recorded pairs) come from.
        sampler: which pair of responses is shown to the labeler.
        labeler: who says which response is better.
        heldout: prompts for validation; no validation when not given.
        reward: scores held-out answers; the labeler's own reward when it has one and this is not given.
        decoding: length, temperature and batch of decoding.
        prompts_per_round: prompts drawn per round; the whole data set when not given. One batch makes online DPO.
        epochs_per_round: epochs that train on a round before the next one is drawn; null never draws again (offline).
        pairs_per_batch: pairs per optimizer step over all processes, >= 1; times ``trainer.accumulate_grad_batches``.
        tokens_per_batch: most token positions of one forward and backward pass per process, a prompt counted once per
            pair, >= 1: an optimizer step whose pairs need more is done in several passes; the gradient is that of the
            whole. ``auto`` is 1024 on a CPU, whose caches hold that much, and 8192 elsewhere; null makes one pass.
        length_window: group pairs of about one length within windows of this many batches of the shuffled epoch, >= 1;
            1 leaves the batches as they were drawn.
        replay: ``last`` trains on the newest round, ``all`` on all rounds so far, a number on that many newest rounds.
        label_attempts: times that a comparison is shown to the labeler until it is dropped, >= 1.
        max_prompt_tokens: longest prompt; what the context window leaves beside the response when not given.
        on_long_prompt: ``error`` stops, ``drop`` leaves the row out, ``truncate`` keeps the end of the prompt.
        system_prompt: system turn put before conversational prompts.
        ledger: path of the ledger; ``ledger.sqlite`` in the run folder when not given.
        seed: decides prompt order, draws and labels.
    """

    def __init__(
        self,
        prompts: AbstractPromptSource,
        sampler: AbstractPairSampler,
        labeler: AbstractLabeler,
        heldout: AbstractPromptSource | None = None,
        reward: AbstractReward | None = None,
        decoding: Decoding = DEFAULT_DECODING,
        prompts_per_round: int | None = None,
        epochs_per_round: int | None = 1,
        pairs_per_batch: int = 8,
        tokens_per_batch: int | Literal["auto"] | None = "auto",
        length_window: int = 1,
        replay: int | Literal["last", "all"] = "last",
        label_attempts: int = 1,
        max_prompt_tokens: int | None = None,
        on_long_prompt: Literal["error", "drop", "truncate"] = "error",
        system_prompt: str | None = None,
        ledger: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.trainer: L.Trainer
        for name, value in (
            ("prompts_per_round", prompts_per_round),
            ("epochs_per_round", epochs_per_round),
            ("pairs_per_batch", pairs_per_batch),
            ("tokens_per_batch", None if tokens_per_batch == "auto" else tokens_per_batch),
            ("length_window", length_window),
            ("label_attempts", label_attempts),
            ("max_prompt_tokens", max_prompt_tokens),
            ("replay", replay if isinstance(replay, int) else 1),
        ):
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1; got {value}")
        self.prompt_source, self.heldout_source = prompts, heldout
        self.sampler, self.labeler = sampler, labeler
        self.heldout_reward = reward or (labeler.reward if isinstance(labeler, RewardLabeler) else None)
        self.decoding = decoding
        self.prompts_per_round, self.epochs_per_round = prompts_per_round, epochs_per_round
        self.pairs_per_batch, self.replay, self.label_attempts = pairs_per_batch, replay, label_attempts
        self.tokens_per_batch, self.length_window = tokens_per_batch, length_window
        self.max_prompt_tokens, self.on_long_prompt, self.system_prompt = (
            max_prompt_tokens,
            on_long_prompt,
            system_prompt,
        )
        self.ledger_path, self.seed = ledger, seed

        self.round: Round | None = None
        """The newest round, for callbacks."""
        self.label_budget: int | None = None
        """Most labels that may be bought in total; the last round is cut to it. The `LabelBudget` callback sets it."""
        self.fingerprint: dict[str, Any] = {}
        """Settings that a continued run must share with the ledger; the command line fills it in."""
        self._prompts: list[Prompt] = []
        self._heldout: list[Prompt] = []
        self._rounds: dict[int, list[Preference]] = {}
        self._observed = 0
        self._accumulate = 1
        self._store: PreferenceStore | None = None

    def setup(self, stage: str) -> None:
        """Read and check the rows, before any model is loaded, and open the ledger."""
        if stage == "fit":
            # the hook that resamples: Lightning asks for the training loader anew in every epoch
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
            self._take_over_accumulation()
        if not self._prompts:
            self._prompts = self._load(self.prompt_source, "training")
            if self.heldout_source is not None:
                self._heldout = self._load(self.heldout_source, "held-out")
        if stage in ("fit", "predict"):
            self._open_ledger()

    @property
    def key(self) -> Key:
        """Key of the run."""
        return Key((self.seed,))

    @property
    def num_labels(self) -> int:
        """Labels bought for the rounds up to the newest one; every rank must ask."""
        return self._labels_before(self.round.index + 1 if self.round is not None else 0)

    @property
    def passes_per_pair(self) -> float:
        """Model forward passes per token position and pair, counted over all pairs drawn; every rank must ask."""
        return ranks.from_rank_zero(self._store.mean_passes() if self._store is not None else None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Draw the round that is due and serve its pairs; asking twice draws nothing."""
        epoch = self.trainer.current_epoch
        due = self._due_round(epoch)
        preferences = self._buffer(due)
        if not preferences:
            assert self.round is not None
            raise RuntimeError(
                f"round {due} has no labelled pair to train on (failed labels: {self.round.failed or 'none'}; "
                f"label budget: {self.label_budget}); check the labeler, or raise the budget"
            )
        world, rank = self.trainer.world_size, self.trainer.global_rank
        pairs = [preference.comparison for preference in preferences]
        lengths = [len(pair.prompt.ids) + len(pair.a.ids) + len(pair.b.ids) for pair in pairs]
        pairs_per_step = self.pairs_per_batch * self._accumulate
        order = epoch_order(len(preferences), self.key.fold(_ORDER, epoch))
        order = group_by_length(order, lengths, pairs_per_step, self.length_window, self.key.fold(_WINDOWS, epoch))
        steps = plan(order, lengths, pairs_per_step, self._tokens_per_pass(), rank, world, min_passes=self._accumulate)
        return ResumableLoader(
            [([preferences[i] for i in step.indices], step) for step in steps],  # type: ignore[arg-type]
            sampler=RankSampler(list(range(len(steps))), rank, world),
            collate_fn=_collate,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Serve held-out prompts in batches of ``decoding.rows``."""
        if not self._heldout:
            return []
        world, rank = self.trainer.world_size, self.trainer.global_rank
        indices = list(range(rank, len(self._heldout), world))
        sampler = RankSampler(indices, rank, world)
        return DataLoader(self._heldout, batch_size=self.decoding.rows, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Serve the number of the one round that ``lightning-rlhf sample`` draws, to every rank."""
        return DataLoader([0], sampler=RankSampler([0]), collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the numbers of a training batch; prompts are plain data and stay."""
        del dataloader_idx
        return batch.to(device) if isinstance(batch, PreferenceBatch) else batch

    def sample_only(self, rounds: list[int]) -> None:
        """Draw the comparisons of rounds into the ledger and buy no label."""
        module: Any = self.trainer.lightning_module
        with gathered(module.policy):
            for index in rounds:
                self._collector().sample(index, self._round_prompts(index), self._engine(), self._chunk())

    @property
    def ledger(self) -> Path:
        """Path of the ledger."""
        return Path(self.ledger_path or Path(self.trainer.default_root_dir) / "ledger.sqlite")

    def teardown(self, stage: str) -> None:
        """Close the ledger."""
        if stage == "fit":
            self.trainer.accumulate_grad_batches, self._accumulate = self._accumulate, 1
        if stage in ("fit", "predict") and self._store is not None:
            self._store.close()
            self._store = None

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps: which ledger, and what the sampler has learnt. The pairs are in the ledger."""
        return {
            "run_id": self._store.run_id if self._store is not None else None,
            "observed": self._observed,
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: if the checkpoint belongs to another ledger than the one in the run folder.
        """
        if self._store is not None and state_dict["run_id"] != self._store.run_id:
            raise ValueError(
                f"the checkpoint belongs to ledger {state_dict['run_id']}, but {self.ledger} is "
                f"{self._store.run_id}; put the run's own ledger back, or start over in an empty run folder"
            )
        self._observed = state_dict["observed"]
        self.sampler.load_state_dict(state_dict["sampler"])

    def _load(self, source: AbstractPromptSource, what: str) -> list[Prompt]:
        module: Any = self.trainer.lightning_module
        rows = source.load()
        window = module.context_window
        limit = self.max_prompt_tokens
        if limit is None:
            limit = window - self.decoding.max_new_tokens if window is not None else 1_000_000
        elif window is not None and limit + self.decoding.max_new_tokens > window:
            raise ValueError(
                f"data.max_prompt_tokens {limit} and data.decoding.max_new_tokens {self.decoding.max_new_tokens} "
                f"exceed the policy's window of {window} tokens together; lower one of them"
            )
        prompts, report = tokenize_rows(
            rows,
            module.tokenizer,
            max_prompt_tokens=limit,
            max_response_tokens=self.decoding.max_new_tokens,
            on_long_prompt=self.on_long_prompt,
            system_prompt=self.system_prompt,
        )
        counts = {reason: n for reason, n in {**source.report, **report}.items() if n}
        rank_zero_info(f"{what} prompts: {len(prompts)}" + (f"; dropped or truncated: {counts}" if counts else ""))
        return prompts

    def _tokens_per_pass(self) -> int | None:
        if self.tokens_per_batch == "auto":
            return 1024 if self.trainer.strategy.root_device.type == "cpu" else 8192
        return self.tokens_per_batch

    def _take_over_accumulation(self) -> None:
        """Serve the pairs of all accumulated batches as one: only then can the loss be the mean over them."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                raise ValueError(
                    "GradientAccumulationScheduler does not run with PreferenceDataModule, whose batches are optimizer "
                    "steps; set data.pairs_per_batch, and data.tokens_per_batch to what fits into memory"
                )
        self._accumulate, self.trainer.accumulate_grad_batches = self.trainer.accumulate_grad_batches, 1

    def _open_ledger(self) -> None:
        if self._store is None and self.trainer.global_rank == 0:
            self._store = PreferenceStore(self.ledger)
            self._store.check_fingerprint({"seed": self.seed, **self.fingerprint})

    def _buffer(self, due: int) -> list[Preference]:
        """Preferences of the rounds that are trained on now, oldest first."""
        kept = self.replay if isinstance(self.replay, int) else {"last": 1, "all": due + 1}[self.replay]
        first = max(due - kept + 1, 0)
        module: Any = self.trainer.lightning_module
        # Lightning's precision covers its own steps only; pairs are drawn and scored in the precision of training
        with gathered(module.policy), self.trainer.precision_plugin.forward_context():
            for index in range(first, due + 1):
                if index not in self._rounds:
                    self._collect(index)
            # kept as refreshed, so that the later epochs of a round find nothing stale
            engine = self._engine()
            self._rounds = {i: refreshed(self._rounds[i], engine) for i in range(first, due + 1)}
        return [preference for preferences in self._rounds.values() for preference in preferences]

    def _due_round(self, epoch: int) -> int:
        """Round that an epoch trains on; the last one for a run that is over, which Lightning asks for once more."""
        steps_over = self.trainer.max_steps != -1 and self.trainer.global_step >= self.trainer.max_steps
        epochs_over = self.trainer.max_epochs not in (None, -1) and epoch >= (self.trainer.max_epochs or 0)
        if steps_over or epochs_over:
            epoch = max(epoch - 1, 0)
        due = 0 if self.epochs_per_round is None else epoch // self.epochs_per_round
        budget = self.label_budget
        while budget is not None and due > 0 and self._labels_before(due) >= budget:
            due -= 1
        return due

    def _collect(self, index: int) -> None:
        module: Any = self.trainer.lightning_module
        module.start_round(index)
        result = self._collector().collect(index, self._round_prompts(index), self._engine(), self._chunk())
        self._rounds[index] = result.preferences
        self.round = result
        if index >= self._observed:
            self.sampler.observe(result.comparisons)
            self._observed = index + 1

    def _round_prompts(self, index: int) -> list[Prompt]:
        """Prompts of a round: consecutive pieces of an endless stream of shuffled passes over the data set."""
        total = len(self._prompts)
        size = self.prompts_per_round or total
        if self.label_budget is not None:
            # not the labels in the ledger: after a restart it may hold later rounds already
            size = max(0, min(size, self.label_budget - self._labels_before(index)))
        orders: dict[int, list[int]] = {}
        prompts = []
        start = index * (self.prompts_per_round or total)
        for position in range(start, start + size):
            passed, place = divmod(position, total)
            if passed not in orders:
                orders[passed] = epoch_order(total, self.key.fold(_PROMPTS, passed))
            prompts.append(self._prompts[orders[passed][place]])
        return prompts

    def _labels_before(self, index: int) -> int:
        return ranks.from_rank_zero(0 if self._store is None else self._store.count_labels(before=index))

    def _collector(self) -> RoundCollector:
        return RoundCollector(
            self._store,
            self.sampler,
            self.labeler,
            self.key,
            label_attempts=self.label_attempts,
            progress=self._progress,
        )

    def _engine(self) -> Any:
        module: Any = self.trainer.lightning_module
        return module.engine(self.decoding)

    def _chunk(self) -> int:
        return max(self.decoding.rows // 2, 1) * self.trainer.world_size

    @contextmanager
    def _progress(self, description: str, total: int) -> Iterator[Any]:
        bar = self.trainer.progress_bar_callback
        disable = self.trainer.global_rank > 0 or bar is None or not getattr(bar, "is_enabled", True)
        with tqdm(total=total, desc=description, unit="pair", leave=False, disable=disable) as progress:
            yield progress


def _collate(items: list[tuple[list[Preference], Step]]) -> PreferenceBatch:
    ((preferences, step),) = items
    batch = collate_preferences(preferences)
    batch.weight[len(batch) - step.num_idle :] = 0.0
    return replace(batch, num_global=step.num_global, passes=step.passes, num_idle=step.num_idle)


# key paths below the run seed
_PROMPTS, _ORDER, _WINDOWS = 3, 4, 5

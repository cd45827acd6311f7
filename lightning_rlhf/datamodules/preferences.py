"""The DataModule whose on-epoch hook resamples: prompts -> sampler -> labeler -> ledger -> batches.

Online DPO is a round of one batch, iterative DPO a round of many, offline DPO a round that never changes. The buffer of
a round is read from the ledger, so that a killed run continues with the pairs and labels it had paid for.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.batching.steps import EpochPlan, Step
from lightning_rlhf.collectors.preferences import Round, RoundCollector
from lightning_rlhf.collectors.recorded import RecordedPairs, all_have_pairs
from lightning_rlhf.collectors.reference_ahead import ReferenceScorer, is_late
from lightning_rlhf.collectors.reference_logps import refreshed
from lightning_rlhf.collectors.silver import Forecast, SilverCollector, SilverOptions
from lightning_rlhf.datamodules.base import DEFAULT_DECODING
from lightning_rlhf.datamodules.options import (
    DEFAULT_BATCHING,
    DEFAULT_PREFERENCE_ROUNDS,
    DEFAULT_PROMPTS,
    BatchOptions,
    PreferenceRoundOptions,
    PromptOptions,
)
from lightning_rlhf.datamodules.replay import ReplayedPairs, ReplayedRound, is_stale, stored_round
from lightning_rlhf.datamodules.rounds import AbstractRoundDataModule
from lightning_rlhf.evaluation.feedback import Feedback, feedback_summary
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import AbstractLabeler, RecordedLabeler, RewardLabeler, ThumbsLabeler
from lightning_rlhf.ledger.labeled import LabeledTable, StoredRound
from lightning_rlhf.ledger.recorded import RecordedRound, RecordedTable
from lightning_rlhf.ledger.row_digest import digest_of_rows
from lightning_rlhf.ledger.silver import SilverTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.reference_cache import ReferenceCache
from lightning_rlhf.preference_models.base import UsesPreferenceModel
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.prompts.formats import format_of
from lightning_rlhf.prompts.table import PromptTable
from lightning_rlhf.protocols import SilverModule, module_of
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.rewards.base import check_rows
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers import AbstractPairSampler, AbstractSelectiveSampler, MixtureSampler, OfflineSampler
from lightning_rlhf.types import Preference, Prompt, State


MOST_COPIES = 2_000
"""Recorded pairs up to which the ledger of an offline run holds copies of them, unless a setting says otherwise."""


@accepts_old_names("data")
class PreferenceDataModule(AbstractRoundDataModule[Preference]):
    """Collects preferences in rounds, with the current policy, and serves them as batches.

    Args:
        prompts: where training prompts (or recorded pairs) come from.
        sampler: generates the pair of responses that is shown to the labeler.
        labeler: labels which response is better.
        heldout: rows for validation: recorded pairs are evaluated by the loss, prompts are answered by the policy;
            default: no validation.
        reward: scores generated answers to held-out prompts; default: the labeler's own reward if it has one.
        decoding: length, temperature and batch of decoding.
        rounds: how rounds are cut, labeled and replayed. One batch per round is online DPO.
        pairs_per_batch: pairs per optimizer step over all processes, >= 1; times ``trainer.accumulate_grad_batches``.
        batching: how an optimizer step is split into micro-batches.
        prompt_options: how prompts become tokens.
        seed: decides prompt order, samples and labels.
        silver: a preference model that learns from all labels, and labels further pairs; default: none.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = AbstractRoundDataModule.FREE_SETTINGS | {
        "reward",
        "rounds.label_attempts",
        "rounds.heldout_generate",
        # the same values at another time, and the same pairs in another place
        "rounds.reference_logps",
        "rounds.ledger_pairs",
    }
    ITEMS: ClassVar[str] = "pairs_per_batch"
    ROWS_ON_DISK: ClassVar[bool] = True

    def __init__(
        self,
        prompts: AbstractPromptSource,
        sampler: AbstractPairSampler,
        labeler: AbstractLabeler,
        heldout: AbstractPromptSource | None = None,
        reward: AbstractReward | None = None,
        decoding: Decoding = DEFAULT_DECODING,
        rounds: PreferenceRoundOptions = DEFAULT_PREFERENCE_ROUNDS,
        pairs_per_batch: int = 8,
        batching: BatchOptions = DEFAULT_BATCHING,
        prompt_options: PromptOptions = DEFAULT_PROMPTS,
        seed: int = 0,
        silver: SilverOptions | None = None,
    ) -> None:
        super().__init__(
            prompts=prompts,
            heldout=heldout,
            decoding=decoding,
            rounds=rounds,
            items_per_batch=pairs_per_batch,
            batching=batching,
            prompt_options=prompt_options,
            seed=seed,
        )
        check_plugin("data.sampler", sampler, AbstractPairSampler)
        check_plugin("data.labeler", labeler, AbstractLabeler)
        if reward is not None:
            check_plugin("data.reward", reward, AbstractReward)
        self.sampler, self.labeler = sampler, labeler
        self.heldout_reward = reward or (labeler.reward if isinstance(labeler, RewardLabeler | ThumbsLabeler) else None)
        self.replay, self.label_attempts = rounds.replay, rounds.label_attempts
        self.heldout_generate = rounds.heldout_generate
        self.reference_logps, self.ledger_pairs = rounds.reference_logps, rounds.ledger_pairs
        self.round: Round | None = None
        """The newest round, for callbacks."""
        self._rounds: dict[int, Sequence[Preference]] = {}
        # rounds that are replayed from the ledger
        self._stored: dict[int, StoredRound] = {}
        self._scorer: ReferenceScorer | None = None
        _check_silver(silver, rounds, sampler)
        self.silver = silver
        self._silver: SilverCollector | None = None
        self._silver_state: State = {}
        # the round from which on there are labels enough for silver ones; None until it is known
        self._first_silver_round: int | None = None
        # a copy: `observe` may change the lists and tensors of the state in place
        self._initial_sampler = copy.deepcopy(sampler.state_dict())

    @property
    def passes_per_pair(self) -> float:
        """Model forward passes per token position and pair, averaged over all sampled pairs; every rank must ask."""
        return distributed.from_rank_zero(
            lambda: self._store.mean_passes() if self._store is not None else float("nan")
        )

    @property
    def num_ties(self) -> int:
        """Pairs of equal responses in the rounds up to the newest one; every rank must ask."""
        before = self.round.index + 1 if self.round is not None else 0
        return distributed.from_rank_zero(lambda: self._store.count_ties(before) if self._store is not None else 0)

    def cost(self) -> float:
        """Cost of the label attempts up to the newest round, in the unit of the labeler; every rank must ask."""
        return self._cost_before(self.round.index + 1 if self.round is not None else 0)

    def feedback(self) -> Feedback:
        """Where the labels so far come from, and how far their sources agree; every rank must ask."""
        return distributed.from_rank_zero(
            lambda: feedback_summary(self._store) if self._store is not None else Feedback()
        )

    @property
    def answers_heldout(self) -> bool:
        """Whether validation generates answers to held-out prompts."""
        if self.heldout_generate is not None:
            return self.heldout_generate
        # an offline run decodes nothing, unless there is nothing else to look at
        return self.sampler.needs_engine or all(prompt.pair is None for prompt in self._heldout)

    def failure_causes(self, index: int) -> str:
        """Address of the judge and its most frequent fault in a round; every rank must ask."""
        faults = Counter(
            distributed.from_rank_zero(lambda: self._store.faults(index) if self._store is not None else [])
        )
        if not faults:
            return ""
        address = getattr(getattr(self.labeler, "server", None), "base_url", None)
        (fault, count), *others = faults.most_common()
        more = f" ({len(others)} other reasons are in the ledger)" if others else ""
        return f"; {count} times{f' {address}' if address else ''}: {fault}{more}"

    def setup(self, stage: str) -> None:
        """Read and check the rows, before any model is loaded, and open the ledger.

        Raises:
            ValueError: if there is nothing to evaluate in the held-out rows, among others.
        """
        super().setup(stage)
        self._check_recorded()
        if self._heldout and not self.answers_heldout and all(prompt.pair is None for prompt in self._heldout):
            raise ValueError(
                f"{self._named_source(self.heldout_source, 'held-out rows')} have no recorded pairs, and with "
                f"data.rounds.heldout_generate=false their prompts are not answered: give rows with 'chosen' and "
                f"'rejected', or leave the setting out"
            )
        self._check_singles()

    def _check_singles(self) -> None:
        """Check that module and labeler take single responses, where there are any, and pairs, where there are any.

        Raises:
            ValueError: naming the setting that does not fit.
        """
        recorded = [] if self.sampler.needs_engine else _single_or_pair(self._prompts)
        module, judges = self.trainer.lightning_module, self.labeler.judges
        singles = self.sampler.makes_singles or any(recorded)
        held_out = any(prompt.is_single for prompt in self._heldout)
        if (singles or held_out) and not getattr(module, "TRAINS_SINGLES", False):
            raise ValueError(
                f"{type(module).__name__} learns from pairs, and the {'responses' if singles else 'held-out rows'} of "
                f"this run are single ones with labels of their own: set model=KTOModule or model=BCOModule, or give "
                f"rows with 'chosen' and 'rejected' and a sampler of pairs"
            )
        pairs = not self.sampler.makes_singles and not (recorded and all(recorded))
        for found, other, remedy in (
            (singles, "pairs", "RecordedLabeler for recorded labels, or ThumbsLabeler"),
            (pairs, "singles", "SingleSampler, or a labeler of pairs such as RewardLabeler"),
        ):
            if found and judges == other:
                raise ValueError(
                    f"{type(self.labeler).__name__} judges {'pairs' if other == 'pairs' else 'single responses'}, and "
                    f"{type(self.sampler).__name__} gives {'single responses' if other == 'pairs' else 'pairs'}: use "
                    f"{remedy}"
                )
        if singles and self.silver is not None:
            raise ValueError("data.silver labels pairs, and this run has single responses: leave data.silver out")

    @property
    def label_fraction(self) -> float:
        """Fraction of the pairs of a round that are labeled."""
        return self.sampler.label_fraction if isinstance(self.sampler, AbstractSelectiveSampler) else 1.0

    @property
    def forecast(self) -> Forecast | None:
        """How well the preference model predicted the newest round; None without one, or before its first fit."""
        return None if self._silver is None else self._silver.forecast

    @property
    def num_silver_pairs(self) -> int:
        """Pairs that the preference model has labeled in the epochs so far; every rank must ask."""
        before = self.trainer.current_epoch + 1
        return distributed.from_rank_zero(lambda: SilverTable(self._store).count(before) if self._store else 0)

    def ends_round(self, epoch: int) -> bool:
        """Whether an epoch is the last that trains on its round."""
        if self.silver is None:
            return super().ends_round(epoch)
        return self._round_of(epoch + 1) > self._round_of(epoch)

    def _round_of(self, epoch: int) -> int:
        if self.silver is None:
            return super()._round_of(epoch)
        first = self._known_first_silver_round(epoch)
        # one epoch for each round before the first fit, then `epochs_per_round`
        if first is None or epoch <= first:
            return epoch
        return first + (epoch - first) // self.silver.epochs_per_round

    def _known_first_silver_round(self, epoch: int) -> int | None:
        """First round after which there are labels enough to fit the model, if it is finished."""
        assert self.silver is not None
        if self._first_silver_round is None:
            closed = distributed.from_rank_zero(lambda: self._store.rounds() if self._store is not None else [])
            labels, collector = 0, self._collector()
            for index in range(min(len(closed), epoch + 1)):
                # as the round was closed: labels that arrive later do not move it
                labels += distributed.from_rank_zero(partial(collector.count_labels, index))
                if labels >= self.silver.min_labels:
                    self._first_silver_round = index
                    break
        return self._first_silver_round

    def _items_per_step(self, items: Sequence[Preference]) -> int:
        if self.silver is None or not any(_is_silver(preference) for preference in items):
            return super()._items_per_step(items)
        # silver and real pairs in the proportion of the epoch
        return max(len(items) // self.silver.steps_per_sampling, 1)

    def _items_per_epoch(self) -> int | None:
        if self.silver is not None:
            return None
        # replayed rounds make epochs grow
        return super()._items_per_epoch() if self.replay in ("last", 1) or self.epochs_per_round is None else None

    def length(self, item: Preference) -> int:
        """Token positions of a pair, its prompt counted once."""
        pair = item.comparison
        return len(pair.prompt.ids) + len(pair.a.ids) + len(pair.b.ids)

    def collate(self, items: Sequence[Preference], step: Step) -> PreferenceBatch:
        """Make a batch of pairs."""
        batch = collate_preferences(items)
        if self._scorer is not None:
            batch = _with_reference(batch, items, self._scorer.totals[step.indices])
        # padding pairs have weight 0; [-num_padding:] would be the whole batch where there are none
        batch.weight[len(batch) - step.num_padding :] = 0.0
        return replace(
            batch, num_global=step.num_global, micro_batches=step.micro_batches, num_padding=step.num_padding
        )

    def _check_recorded(self) -> None:
        """Check that rows have pairs where they are not sampled, before any model is loaded.

        Raises:
            ValueError: naming the config or the setting that reads such rows.
        """
        # of a table on the disk the first row alone, since each one would be read
        rows = self._prompts[:1] if isinstance(self._prompts, PromptTable) else self._prompts
        if not isinstance(self.sampler, OfflineSampler) or not rows or any(row.pair is not None for row in rows):
            return
        columns = {*self._unread(self.prompt_source, self._prompts), "prompt"}
        pairs = format_of(columns, pairs=True)
        if {"completion", "label"} <= columns:
            remedy = "rows with 'completion' and 'label' are for --config kto"
        elif "completion" in columns:
            remedy = "rows with 'completion' alone are for --config sft"
        elif pairs is not None:
            remedy = f"they look like {pairs.name}, whose pairs --data.prompts.kind=preference reads"
        else:
            remedy = "give rows with 'chosen' and 'rejected', or name these columns by chosen_column, rejected_column"
        raise ValueError(
            f"{self._named_source()} have no recorded pairs, which data.sampler=OfflineSampler needs: {remedy}; or set "
            f"a sampler that decodes, such as --data.sampler=VanillaSampler"
        )

    def rewards(self) -> list[AbstractReward]:
        """Rewards of the run, which may read columns of the rows."""
        labels = [self.labeler.reward] if isinstance(self.labeler, RewardLabeler | ThumbsLabeler) else []
        # best-of-N and others score their candidates
        own = getattr(self.sampler, "reward", None)
        return [*labels, *([own] if isinstance(own, AbstractReward) else []), *super().rewards()]

    def check_rewards(self) -> None:
        """Let the rewards check the rows that they score."""
        if isinstance(self.labeler, RewardLabeler | ThumbsLabeler):
            check_rows(self.labeler.reward, self._prompts, self._named_source())
        super().check_rewards()

    def forget_rounds(self) -> None:
        """Forget all rounds, and reset the sampler to its initial state."""
        self.round, self._rounds, self._stored, self._scorer = None, {}, {}, None
        self._silver, self._silver_state, self._first_silver_round = None, {}, None
        # copied again: the sampler may keep the state and change it, and the next fit needs it once more
        self.sampler.load_state_dict(copy.deepcopy(self._initial_sampler))

    def buffer(self, due: int, epoch: int) -> Sequence[Preference]:
        """Preferences to train on: of the rounds that are replayed, oldest first, or silver and real ones."""
        if self.silver is not None:
            return self._silver_buffer(self.silver, due, epoch)
        kept = self.replay if isinstance(self.replay, int) else {"last": 1, "all": due + 1}[self.replay]
        if kept > 1:
            return self._replayed(max(due - kept + 1, 0), due)
        self._keep_rounds(due, due)
        # not as a list: pairs of many rows are made when they are asked for
        return self._rounds[due]

    def _replayed(self, first: int, due: int) -> ReplayedPairs:
        """The rounds ``first, ..., due``; those before the newest stay in the ledger if it has their values."""
        for index in range(first, due + 1):
            if index in self._rounds or index in self._stored:
                continue
            # a resumed run reads no pair of a round that it had finished
            if index < min(due, self._observed) and self._keep_stored(index):
                self._module().start_round(index)
            else:
                self._collect(index)
        for index in range(first, due):
            if index not in self._stored:
                self._keep_stored(index)
        engine = self._engine()
        kept: dict[int, Sequence[Preference]] = {}
        rounds: list[ReplayedRound] = []
        for index in range(first, due + 1):
            stored = self._stored.get(index)
            # the ledger has log-probabilities of the reference of its round, which may have moved since
            if stored is not None and not is_stale(stored, engine):
                rounds.append(stored)
                continue
            pairs = self._rounds[index] if index in self._rounds or stored is None else self._read_pairs(stored.ids)
            kept[index] = refreshed(pairs, engine)
            rounds.append(kept[index])
        self._rounds = kept
        self._stored = {index: stored for index, stored in self._stored.items() if first <= index}
        return ReplayedPairs(rounds, read=self._read_pairs, length=self.length)

    def _keep_stored(self, index: int) -> bool:
        """Take note of the pairs of a round in the ledger, if it is closed; every rank must ask."""
        # lengths come from the ledger, which does not know those of a subclass
        if type(self).length is not PreferenceDataModule.length:
            return False
        found = distributed.from_rank_zero(lambda: None if self._store is None else stored_round(self._store, index))
        if found is not None:
            self._stored[index] = found
        return found is not None

    def _read_pairs(self, ids: Sequence[int]) -> list[Preference]:
        return distributed.from_rank_zero(lambda: [] if self._store is None else LabeledTable(self._store).read(ids))

    def _keep_rounds(self, first: int, due: int) -> None:
        """Keep the rounds ``first, ..., due``; rounds that are missing are collected, or read from the ledger."""
        for index in range(first, due + 1):
            if index not in self._rounds:
                self._collect(index)
        # kept as refreshed, so that the later epochs of a round find nothing stale
        engine = self._engine()
        self._rounds = {i: refreshed(self._rounds[i], engine) for i in range(first, due + 1)}

    def _silver_buffer(self, silver: SilverOptions, due: int, epoch: int) -> Sequence[Preference]:
        """Pairs of the newest round until the model is fitted, then silver pairs with real pairs of all rounds."""
        collector = self._silver_collector(silver)
        if due not in self._rounds and due > 0:
            # the sampler of the new round asks the model that is fitted to the rounds before it
            self._keep_rounds(0, due - 1)
            collector.update(self._rounds, due - 1)
        for sampler in _asking(self.sampler):
            sampler.preference_model = collector.model
        self._keep_rounds(0, due)
        collector.update(self._rounds, due)
        # a run that is over samples nothing more
        if collector.model is None or not silver.steps_per_round or self._is_over(epoch):
            return self._rounds[due]
        real = list(chain.from_iterable(self._rounds.values()))
        engine = self._engine()
        assert engine is not None  # refused by `_silver_collector`
        per_step = self.items_per_batch * self._accumulate
        return collector.items(epoch, real, self._prompts, engine, self._store, per_step)

    def _silver_collector(self, silver: SilverOptions) -> SilverCollector:
        if self._silver is None:
            engine = self._engine()
            if engine is None or engine.reference is None:
                raise ValueError(
                    f"data.silver labels samples of the policy, and {type(self.trainer.lightning_module).__name__} has "
                    f"no policy with a reference; leave data.silver out"
                )
            self._silver = SilverCollector(silver, self.key)
            module = module_of(self.trainer, SilverModule, type(self).__name__)
            self._silver.start(module, self._prompts, engine, self._store, self._silver_state)
        return self._silver

    def _collect(self, index: int) -> None:
        # first of all: it may move the reference, from which responses are sampled and scored
        self._module().start_round(index)
        if self._names_rows(index):
            result = self._recorded_round(index)
        else:
            result = self._collector().collect(index, self._round_prompts(index), self._engine(), self._chunk())
        self._rounds[index] = result.preferences
        self.round = result
        # once per round, also if a resumed run reads the round again
        if index >= self._observed:
            self.sampler.observe(result.comparisons)
            self._observed = index + 1
        self._scorer = self._late_scorer(index, result.preferences)

    @property
    def _is_offline(self) -> bool:
        """Whether the one round of the run is the recorded pairs with their recorded labels."""
        kinds = (type(self.sampler), type(self.labeler))
        return kinds == (OfflineSampler, RecordedLabeler) and self.epochs_per_round is None and self.silver is None

    def _names_rows(self, index: int) -> bool:
        """Whether the ledger names the rows of a round rather than hold its pairs; every rank must ask.

        Raises:
            ValueError: if it is to name them and cannot.
        """
        budget = self.label_budget is not None or self.cost_budget is not None
        named, copied = distributed.from_rank_zero(partial(self._ledger_pairs, index))
        if named and budget:
            raise ValueError(
                f"{self.ledger} names the recorded rows of its round, all of them, and a label budget counts pairs: "
                f"leave the budget out, or set data.rounds.ledger_pairs=copies in another run folder"
            )
        # a ledger goes on as it was begun
        if named or copied:
            return named
        fits = self._is_offline and not budget and all_have_pairs(self._prompts)
        if self.ledger_pairs == "rows" and not fits:
            raise ValueError(
                "data.rounds.ledger_pairs=rows is for recorded pairs with their recorded labels and no label budget, "
                "in one round: set data.sampler=OfflineSampler, data.labeler=RecordedLabeler and "
                "data.rounds.epochs_per_round=null, or leave data.rounds.ledger_pairs out"
            )
        large = self.ledger_pairs == "auto" and self._pairs_of_round > MOST_COPIES
        return fits and (large or self.ledger_pairs == "rows")

    def _ledger_pairs(self, index: int) -> tuple[bool, bool]:
        """Whether the ledger names the rows of a round, and whether it holds pairs of it; on rank zero."""
        assert self._store is not None
        return RecordedTable(self._store).read(index) is not None, bool(self._store.positions(index))

    @property
    def _pairs_of_round(self) -> int:
        return self.prompts_per_round or len(self._prompts)

    def _recorded_round(self, index: int) -> Round:
        """The round of the recorded pairs, which are read from their rows."""
        rows = np.array(self._round_rows(index), np.int32)
        pairs = RecordedPairs(self._prompts, rows, self.key, index)
        start = time.perf_counter()
        distributed.from_rank_zero(partial(self._close_recorded, index, pairs))
        return Round(index, pairs, pairs.comparisons, labeling_seconds=time.perf_counter() - start)

    def _close_recorded(self, index: int, pairs: RecordedPairs) -> None:
        assert self._store is not None
        if self._store.round_info(index) is None:
            recorded = RecordedRound(digest_of_rows(self._prompts)["digest"], pairs.rows, pairs.ties)
            RecordedTable(self._store).close_round(index, recorded)

    def _late_scorer(self, index: int, pairs: Sequence[Preference]) -> ReferenceScorer | None:
        """Scores the pairs of an offline round that have no reference log-probabilities yet; None if all have."""
        engine = self._engine()
        if not self._is_offline or engine is None or engine.reference is None:
            return None
        # those of a closed round were scored when it was sampled, or not at all
        if not isinstance(pairs, RecordedPairs) and all(p.comparison.a.reference_logps is not None for p in pairs):
            return None
        cache = ReferenceCache.from_environment()
        return ReferenceScorer(pairs, index, self._store, self.reference_logps, self._chunk(), self._scoring, cache)

    @contextmanager
    def _scoring(self) -> Iterator[PolicyEngine]:
        """The engine, with sharded models gathered, in the precision of training; every rank must enter."""
        with self._module().gathered(), self.trainer.precision_plugin.forward_context():
            engine = self._engine()
            assert engine is not None  # asked by `_late_scorer`
            yield engine

    def before_step(self, steps: EpochPlan, number: int) -> None:
        """Score pairs under the reference that this step and those ahead of it need."""
        if self._scorer is None:
            return
        # a run that ends before the epoch does needs no more
        left = self.trainer.max_steps - self.trainer.global_step
        last = len(steps) if self.trainer.max_steps < 0 else min(number + max(left, 1), len(steps))
        batches = self.trainer.num_training_batches
        self._scorer.prepare(steps, number, int(min(last, max(batches, number + 1))))

    def sample_round(self, index: int) -> None:
        """Sample the comparisons of a round."""
        self._collector().sample(index, self._round_prompts(index), self._engine(), self._chunk())

    def labels_before(self, store: PreferenceStore, index: int) -> int:
        """Labels with a verdict in rounds before ``index``, and pairs of the last one that may still get a label."""
        # a budget must hold when the late labels have come
        return store.count_labels(before=index) + int((store.round_info(index - 1) or {}).get("open", 0))

    def state_dict(self) -> State:
        """Id of the ledger and state of the sampler, for the checkpoint; the pairs are in the ledger."""
        state = {**super().state_dict(), "sampler": self.sampler.state_dict()}
        if self.silver is not None:
            state["silver"] = self._silver_state if self._silver is None else self._silver.state_dict()
        return state

    def load_state_dict(self, state_dict: State) -> None:
        """Restore `state_dict`; raises as the base class does."""
        # first, since it raises for another run: the sampler then keeps its state
        super().load_state_dict(state_dict)
        self.sampler.load_state_dict(state_dict["sampler"])
        self._silver_state = state_dict.get("silver", {})

    def _collector(self) -> RoundCollector:
        return RoundCollector(
            self._store,
            self.sampler,
            self.labeler,
            self.key,
            label_attempts=self.label_attempts,
            progress=self._progress,
            score_reference=not self._scores_late,
        )

    @property
    def _scores_late(self) -> bool:
        """Whether pairs are not scored under the reference when they are sampled, but some steps before their own."""
        per_step = self.items_per_batch * self._accumulate
        return self._is_offline and is_late(self.reference_logps, self._pairs_of_round / per_step)

    def _chunk(self) -> int:
        # two responses per pair fill a decoding batch on every rank
        return max(self.decoding.rows // 2, 1) * self.trainer.world_size


def _single_or_pair(prompts: Sequence[Prompt]) -> list[bool]:
    """Whether recorded rows are single responses: one entry per row, or, of a table, one per kind that it has."""
    if isinstance(prompts, PromptTable):
        singles = prompts.facts["singles"]
        return [True] * (singles > 0) + [False] * (singles < len(prompts))
    return [prompt.is_single for prompt in prompts]


def _with_reference(
    batch: PreferenceBatch, items: Sequence[Preference], totals: NDArray[np.float64]
) -> PreferenceBatch:
    """A batch with reference log-probabilities of responses a and b, nats, [pairs, 2]."""
    # as `collate_preferences` chooses: the chosen response is the more probable winner
    first = torch.tensor([item.probability >= 0.5 or item.comparison.is_single for item in items])
    a, b = torch.from_numpy(totals).unbind(1)
    return replace(
        batch,
        reference_chosen_logps=torch.where(first, a, b),
        reference_rejected_logps=torch.where(first, b, a),
    )


def _is_silver(preference: Preference) -> bool:
    return preference.label.meta.get("kind") == "silver"


def _asking(sampler: AbstractPairSampler) -> list[UsesPreferenceModel]:
    """The sampler, or those of a mixture, that ask a preference model."""
    if isinstance(sampler, MixtureSampler):
        return list(chain.from_iterable(_asking(member) for member in sampler.samplers))
    return [sampler] if isinstance(sampler, UsesPreferenceModel) else []


def _check_silver(silver: SilverOptions | None, rounds: PreferenceRoundOptions, sampler: AbstractPairSampler) -> None:
    """Check that the settings of rounds and sampler go with silver labels, or with none."""
    if silver is None:
        asking = _asking(sampler)
        if asking:
            raise ValueError(
                f"{type(asking[0]).__name__} asks a preference model for its choice: set data.silver.model, and "
                f"data.silver.steps_per_round=0 to train on real pairs alone"
            )
        return
    if rounds.epochs_per_round != 1 or rounds.replay not in ("last", 1):
        raise ValueError(
            f"with data.silver, data.silver.steps_per_round says how long a round lasts, and real pairs of all rounds "
            f"are replayed: leave data.rounds.epochs_per_round=1 and data.rounds.replay=last; got "
            f"{rounds.epochs_per_round} and {rounds.replay}"
        )

"""The DataModule whose on-epoch hook resamples: prompts -> sampler -> labeler -> ledger -> batches.

Online DPO is a round of one batch, iterative DPO a round of many, offline DPO a round that never changes. The buffer of
a round is read from the ledger, so that a killed run continues with the pairs and labels it had paid for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.batching.steps import Step
from lightning_rlhf.collectors.preferences import Round, RoundCollector
from lightning_rlhf.collectors.reference_logps import refreshed
from lightning_rlhf.datamodules.base import DEFAULT_DECODING
from lightning_rlhf.datamodules.options import (
    DEFAULT_BATCHING,
    DEFAULT_PREFERENCE_ROUNDS,
    DEFAULT_PROMPTS,
    BatchOptions,
    PreferenceRoundOptions,
    PromptOptions,
)
from lightning_rlhf.datamodules.rounds import AbstractRoundDataModule
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import AbstractLabeler, RewardLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers import AbstractPairSampler, AbstractSelectiveSampler
from lightning_rlhf.types import Preference, State


@accepts_old_names("data")
class PreferenceDataModule(AbstractRoundDataModule[Preference]):
    """Collects preferences in rounds, with the current policy, and serves them as batches.

    Args:
        prompts: where training prompts (or recorded pairs) come from.
        sampler: generates the pair of responses that is shown to the labeler.
        labeler: labels which response is better.
        heldout: prompts for validation; default: no validation.
        reward: scores held-out responses; default: the labeler's own reward if it has one.
        decoding: length, temperature and batch of decoding.
        rounds: how rounds are cut, labeled and replayed. One batch per round is online DPO.
        pairs_per_batch: pairs per optimizer step over all processes, >= 1; times ``trainer.accumulate_grad_batches``.
        batching: how an optimizer step is split into micro-batches.
        prompt_options: how prompts become tokens.
        seed: decides prompt order, samples and labels.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = AbstractRoundDataModule.FREE_SETTINGS | {
        "reward",
        "rounds.label_attempts",
    }
    ITEMS: ClassVar[str] = "pairs_per_batch"

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
        self.heldout_reward = reward or (labeler.reward if isinstance(labeler, RewardLabeler) else None)
        self.replay, self.label_attempts = rounds.replay, rounds.label_attempts
        self.round: Round | None = None
        """The newest round, for callbacks."""
        self._rounds: dict[int, list[Preference]] = {}
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

    @property
    def label_fraction(self) -> float:
        """Fraction of the pairs of a round that are labeled."""
        return self.sampler.label_fraction if isinstance(self.sampler, AbstractSelectiveSampler) else 1.0

    def _items_per_epoch(self) -> int | None:
        # replayed rounds make epochs grow
        return super()._items_per_epoch() if self.replay in ("last", 1) or self.epochs_per_round is None else None

    def length(self, item: Preference) -> int:
        """Token positions of a pair, its prompt counted once."""
        pair = item.comparison
        return len(pair.prompt.ids) + len(pair.a.ids) + len(pair.b.ids)

    def collate(self, items: Sequence[Preference], step: Step) -> PreferenceBatch:
        """Make a batch of pairs."""
        batch = collate_preferences(items)
        # padding pairs have weight 0; [-num_padding:] would be the whole batch where there are none
        batch.weight[len(batch) - step.num_padding :] = 0.0
        return replace(
            batch, num_global=step.num_global, micro_batches=step.micro_batches, num_padding=step.num_padding
        )

    def forget_rounds(self) -> None:
        """Forget all rounds, and reset the sampler to its initial state."""
        self.round, self._rounds = None, {}
        # copied again: the sampler may keep the state and change it, and the next fit needs it once more
        self.sampler.load_state_dict(copy.deepcopy(self._initial_sampler))

    def buffer(self, due: int) -> list[Preference]:
        """Preferences of the rounds that are trained on now, oldest first."""
        kept = self.replay if isinstance(self.replay, int) else {"last": 1, "all": due + 1}[self.replay]
        # rounds due - kept + 1, ..., due, from round 0 on; a resumed run reads them from the ledger
        first = max(due - kept + 1, 0)
        for index in range(first, due + 1):
            if index not in self._rounds:
                self._collect(index)
        # kept as refreshed, so that the later epochs of a round find nothing stale
        engine = self._engine()
        self._rounds = {i: refreshed(self._rounds[i], engine) for i in range(first, due + 1)}
        return [preference for preferences in self._rounds.values() for preference in preferences]

    def _collect(self, index: int) -> None:
        # first of all: it may move the reference, from which responses are sampled and scored
        self._module().start_round(index)
        result = self._collector().collect(index, self._round_prompts(index), self._engine(), self._chunk())
        self._rounds[index] = result.preferences
        self.round = result
        # once per round, also if a resumed run reads the round again
        if index >= self._observed:
            self.sampler.observe(result.comparisons)
            self._observed = index + 1

    def sample_round(self, index: int) -> None:
        """Sample the comparisons of a round."""
        self._collector().sample(index, self._round_prompts(index), self._engine(), self._chunk())

    def labels_before(self, store: PreferenceStore, index: int) -> int:
        """Labels with a verdict in rounds before ``index``, and pairs of the last one that may still get a label."""
        # a budget must hold when the late labels have come
        return store.count_labels(before=index) + int((store.round_info(index - 1) or {}).get("open", 0))

    def state_dict(self) -> State:
        """Id of the ledger and state of the sampler, for the checkpoint; the pairs are in the ledger."""
        return {**super().state_dict(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore `state_dict`; raises as the base class does."""
        # first, since it raises for another run: the sampler then keeps its state
        super().load_state_dict(state_dict)
        self.sampler.load_state_dict(state_dict["sampler"])

    def _collector(self) -> RoundCollector:
        return RoundCollector(
            self._store,
            self.sampler,
            self.labeler,
            self.key,
            label_attempts=self.label_attempts,
            progress=self._progress,
        )

    def _chunk(self) -> int:
        # two responses per pair fill a decoding batch on every rank
        return max(self.decoding.rows // 2, 1) * self.trainer.world_size

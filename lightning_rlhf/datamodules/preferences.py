"""The DataModule whose on-epoch hook resamples: prompts -> sampler -> labeler -> ledger -> batches.

Online DPO is a round of one batch, iterative DPO a round of many, offline DPO a round that never changes. The buffer of
a round is read from the ledger, so that a killed run continues with the pairs and labels it had paid for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.batching.steps import Step
from lightning_rlhf.collectors.preferences import Round, RoundCollector
from lightning_rlhf.collectors.reference_logps import refreshed
from lightning_rlhf.datamodules.base import DEFAULT_DECODING, at_least_one
from lightning_rlhf.datamodules.rounds import AbstractRoundDataModule
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import AbstractLabeler, RewardLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers import AbstractPairSampler
from lightning_rlhf.types import Preference


class PreferenceDataModule(AbstractRoundDataModule):
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

    FREE_SETTINGS: ClassVar[frozenset[str]] = AbstractRoundDataModule.FREE_SETTINGS | {"reward", "label_attempts"}
    ITEMS: ClassVar[str] = "pairs_per_batch"

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
        super().__init__(
            prompts,
            heldout,
            decoding,
            prompts_per_round,
            epochs_per_round,
            pairs_per_batch,
            tokens_per_batch,
            length_window,
            max_prompt_tokens,
            on_long_prompt,
            system_prompt,
            ledger,
            seed,
        )
        at_least_one(label_attempts=label_attempts, replay=replay if isinstance(replay, int) else 1)
        check_plugin("data.sampler", sampler, AbstractPairSampler)
        check_plugin("data.labeler", labeler, AbstractLabeler)
        if reward is not None:
            check_plugin("data.reward", reward, AbstractReward)
        self.sampler, self.labeler = sampler, labeler
        self.heldout_reward = reward or (labeler.reward if isinstance(labeler, RewardLabeler) else None)
        self.replay, self.label_attempts = replay, label_attempts
        self.round: Round | None = None
        """The newest round, for callbacks."""
        self._rounds: dict[int, list[Preference]] = {}
        self._untaught = copy.deepcopy(sampler.state_dict())

    @property
    def passes_per_pair(self) -> float:
        """Model forward passes per token position and pair, counted over all pairs drawn; every rank must ask."""
        return distributed.from_rank_zero(
            lambda: self._store.mean_passes() if self._store is not None else float("nan")
        )

    @property
    def num_ties(self) -> int:
        """Pairs of equal responses in the rounds up to the newest one; every rank must ask."""
        before = self.round.index + 1 if self.round is not None else 0
        return distributed.from_rank_zero(lambda: self._store.count_ties(before) if self._store is not None else 0)

    @property
    def label_share(self) -> float:
        """Share of a round's pairs that the sampler has labelled."""
        return self.sampler.label_share

    def length(self, item: Preference) -> int:
        """Token positions of a pair, its prompt counted once."""
        pair = item.comparison
        return len(pair.prompt.ids) + len(pair.a.ids) + len(pair.b.ids)

    def collate(self, items: Sequence[Preference], step: Step) -> PreferenceBatch:
        """Make a batch of pairs."""
        batch = collate_preferences(items)
        batch.weight[len(batch) - step.num_idle :] = 0.0
        return replace(batch, num_global=step.num_global, passes=step.passes, num_idle=step.num_idle)

    def forget_rounds(self) -> None:
        """Forget all rounds, and let the sampler be as it was given."""
        self.round, self._rounds = None, {}
        self.sampler.load_state_dict(copy.deepcopy(self._untaught))

    def buffer(self, due: int) -> list[Preference]:
        """Preferences of the rounds that are trained on now, oldest first."""
        kept = self.replay if isinstance(self.replay, int) else {"last": 1, "all": due + 1}[self.replay]
        first = max(due - kept + 1, 0)
        for index in range(first, due + 1):
            if index not in self._rounds:
                self._collect(index)
        # kept as refreshed, so that the later epochs of a round find nothing stale
        engine = self._engine()
        self._rounds = {i: refreshed(self._rounds[i], engine) for i in range(first, due + 1)}
        return [preference for preferences in self._rounds.values() for preference in preferences]

    def _collect(self, index: int) -> None:
        module: Any = self.trainer.lightning_module
        module.start_round(index)
        result = self._collector().collect(index, self._round_prompts(index), self._engine(), self._chunk())
        self._rounds[index] = result.preferences
        self.round = result
        if index >= self._observed:
            self.sampler.observe(result.comparisons)
            self._observed = index + 1

    def draw_only(self, index: int) -> None:
        """Draw the comparisons of a round."""
        self._collector().sample(index, self._round_prompts(index), self._engine(), self._chunk())

    def labels_before(self, store: PreferenceStore, index: int) -> int:
        """Labels with a verdict in rounds before ``index``."""
        return store.count_labels(before=index)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps: which ledger, and what the sampler has learnt. The pairs are in the ledger."""
        return {**super().state_dict(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`; raises as the base class does."""
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
        return max(self.decoding.rows // 2, 1) * self.trainer.world_size

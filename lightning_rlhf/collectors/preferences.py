"""One round of preferences: sample, store, label, store; a chunk is in the ledger before the next one begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from lightning_rlhf.collectors.base import AbstractRoundCollector
from lightning_rlhf.collectors.memory import LedgerMemory
from lightning_rlhf.collectors.progress import Progress
from lightning_rlhf.collectors.recorded import RecordedPairs
from lightning_rlhf.collectors.reference_logps import with_reference_logps
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.labelers.base import AbstractLabeler, Answer, Question, booked_once
from lightning_rlhf.ledger.labeled import LabeledTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.reference_cache import ReferenceCache
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.runtime import distributed, preemption
from lightning_rlhf.runtime.plugins import returned
from lightning_rlhf.samplers.base import AbstractPairSampler, AbstractSelectiveSampler
from lightning_rlhf.types import FINAL_STATUSES, ROUTED, Comparison, Label, Preference, Prompt


LedgerRow: TypeAlias = tuple[int, Comparison, Label | None]
"""Id of a comparison in the ledger, the comparison, and its label if it has one."""
_Open: TypeAlias = tuple[int, Comparison]


@dataclass
class Round:
    """One round: pairs that were sampled and labeled together.

    Args:
        index: number of the round, from 0.
        preferences: the labeled comparisons, in prompt order.
        comparisons: all comparisons, labeled or not, in prompt order.
        failed: comparisons without a label, by the status of their last attempt.
        sampling_seconds: wall time of sampling in this process.
        labeling_seconds: wall time of labeling in this process.
        labels_bought: labels paid for in this process; those read back from the ledger are not counted.
    """

    index: int
    preferences: Sequence[Preference]
    comparisons: Sequence[Comparison] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    sampling_seconds: float = 0.0
    labeling_seconds: float = 0.0
    labels_bought: int = 0

    @property
    def ties(self) -> int:
        """Free ties: pairs of equal responses. They are among the preferences."""
        if isinstance(self.preferences, RecordedPairs):
            return self.preferences.ties
        return sum(preference.label.is_free_tie for preference in self.preferences)


class RoundCollector(AbstractRoundCollector[PolicyEngine | None, Comparison, Round]):
    """Samples rounds and buys their labels, through the ledger.

    Two equal responses are a free tie: the labeler is not asked, and no label is counted. The pair stays in its round
    with P = 0.5: the loss is a mean over all pairs, and the gradient of this one is zero.

    `collect` and `sample` take an engine, or None if the sampler needs none and the pairs have reference
    log-probabilities.

    Args:
        store: the ledger; None on ranks other than zero.
        sampler: samples pairs.
        labeler: labels them, on rank zero.
        key: key of the run; rounds and purposes are folded in.
        label_attempts: most times that a comparison is shown to the labeler, >= 1.
        progress: makes progress bars, as `tqdm` does: ``progress(description, total)`` is a context that yields one.
        reference_cache: keeps reference log-probabilities of recorded responses; default: the cache that the
            environment names.
        score_reference: whether pairs are scored under the reference when they are sampled.
    """

    def __init__(
        self,
        store: PreferenceStore | None,
        sampler: AbstractPairSampler,
        labeler: AbstractLabeler,
        key: Key,
        *,
        label_attempts: int = 1,
        progress: Progress | None = None,
        reference_cache: ReferenceCache | None = None,
        score_reference: bool = True,
    ) -> None:
        super().__init__(store, key, progress)
        self.score_reference = score_reference
        self.sampler, self.labeler = sampler, labeler
        self.label_attempts = label_attempts
        self.reference_cache = reference_cache or ReferenceCache.from_environment()
        self._remembered = LedgerMemory()

    def _new_round(self, index: int) -> Round:
        return Round(index, [])

    def _held(self, index: int) -> list[int]:
        return self._ledger.positions(index)

    def _engine(self, source: PolicyEngine | None) -> PolicyEngine | None:
        if source is None and self.sampler.needs_engine:
            raise ValueError(
                f"{type(self.sampler).__name__} samples responses, and this module has no policy to sample from: set "
                f"data.sampler=OfflineSampler, and give rows with recorded pairs; or, for a reward model, name the "
                f"policy that responses are sampled from as model.policy"
            )
        return source

    def _doing(self, engine: PolicyEngine | None) -> str:
        # the policy decodes nothing, its reference scores the recorded responses
        if engine is None or self.sampler.needs_engine:
            return super()._doing(engine)
        return f"{'scoring' if self.score_reference else 'reading'} recorded rows"

    def _sample_chunk(self, prompts: Sequence[Prompt], source: PolicyEngine | None, key: Key) -> list[Comparison]:
        # between chunks: all earlier chunks are in the ledger and nothing is lost
        preemption.check()
        # the last chunk may have fewer prompts than there are ranks
        made = self.sampler.sample(prompts, source, key) if prompts else []  # type: ignore[arg-type]
        sampled = returned(self.sampler, "sample", made, len(prompts), Comparison, "prompts")
        if source is None or not self.score_reference:
            return sampled
        return with_reference_logps(sampled, source, self.reference_cache)

    def _keep(self, index: int, items: Sequence[Comparison], positions: Sequence[int]) -> None:
        self._ledger.add_comparisons(index, items, positions)

    def _finish(self, index: int, num_prompts: int, chunk: int) -> int:
        bought = self.label(index, chunk, num_prompts)
        failed = self._ledger.failed(index)
        # a round without a single label cannot be trained on: it stays open for more attempts
        if not failed or self._has_label(index, num_prompts):
            info = {"prompts": num_prompts, "failed": failed, "upto": self._ledger.last_attempt()}
            # pairs that may still get a label, which then belongs to a later round
            awaited = self._awaited(index, num_prompts) if getattr(self.labeler, "whole_rounds", False) else []
            self._ledger.close_round(index, {**info, "open": len(awaited)} if awaited else info)
        return bought

    def _has_label(self, index: int, num_prompts: int) -> bool:
        """Whether a comparison of a round has a label that is no free tie."""
        return any(label and not label.is_free_tie for _, _, label in self._rows(index, num_prompts))

    def label(self, index: int, chunk: int, num_prompts: int | None = None) -> int:
        """Buy the labels that a round lacks, chunk by chunk, on rank zero; returns how many.

        Pairs of equal responses become free ties first, and are not shown to the labeler.

        Args:
            index: number of the round.
            chunk: comparisons that are labeled together, >= 1.
            num_prompts: size of the round, which a label budget may have cut since it was sampled; default: all.
        """
        assert self.store is not None
        bought = 0
        key = self.key.fold(Stream.LABELING, index)
        rows = self._rows(index, num_prompts)
        to_label = self._to_label(rows)
        # before the labeler is asked: a tie then counts as labeled and costs nothing
        ties = [id_ for id_, c, label in rows if id_ in to_label and label is None and c.has_equal_responses]
        self.store.add_ties(ties)
        if getattr(self.labeler, "whole_rounds", False):
            # closed rounds only: labels of this one are there after a restart, and not when it is begun
            upto = int((self._ledger.round_info(index - 1) or {}).get("upto", 0))
            self.labeler.recall(self._remembered.upto(self._ledger, upto))
        for attempt in range(self.label_attempts):
            # the ledger counts attempts, so that a restart does not exceed label_attempts
            asked = self.store.attempts(index)
            # read again only if it may have changed: a round may be the whole data set
            if attempt and not self.store.failed(index):
                break
            if attempt or ties:
                rows = self._rows(index, num_prompts)
            open_ = [
                (id_, c)
                for id_, c, label in rows
                if id_ in to_label
                and label is None
                and asked.get(id_, 0) == attempt
                and not self._is_final(id_, attempt)
            ]
            late = self._late(index) if attempt == 0 else []
            if not open_ and not late:
                continue
            with self.progress(f"round {index}: labeling", len(open_)) as bar:
                # a restart counts skipped pairs, too: they have their answer
                answered = sum(id_ in to_label for id_, _, _ in rows) - len(open_)
                for ids, answers in self._answers(open_, late, answered, chunk, key.fold(attempt)):
                    labels = [answer.label for answer in answers]
                    # the cost of earlier attempts is added once
                    if attempt:
                        earlier = [self.store.history(id_) for id_ in ids]
                        labels = [booked_once(label, before) for label, before in zip(labels, earlier, strict=True)]
                    # answer by answer: a run that is killed has lost one chunk of paid labels at most
                    guidelines = {name: text for answer in answers for name, text in answer.guidelines.items()}
                    self.store.add_labels(ids, labels, [answer.votes for answer in answers], guidelines)
                    bought += sum(label.status == "ok" for label in labels)
                    bar.update(sum(label.status != ROUTED for label in labels))
        return bought

    def _answers(
        self, open_: Sequence[_Open], late: Sequence[_Open], answered: int, chunk: int, key: Key
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Ids and their answers: chunk by chunk, or of a whole round as they come."""
        if not getattr(self.labeler, "whole_rounds", False):
            for start in range(0, len(open_), chunk):
                preemption.check()
                part = open_[start : start + chunk]
                pairs_of_rows = [replace(pair, prompt=self._with_columns(pair.prompt)) for _, pair in part]
                labels = labeled(self.sampler, self.labeler, pairs_of_rows, key)
                yield [id_ for id_, _ in part], [Answer(label) for label in labels]
            return
        # labels that came with the responses are not asked for
        verdicts = getattr(self.sampler, "verdicts", None)
        known = verdicts([comparison for _, comparison in open_]) if verdicts is not None else [None] * len(open_)
        given = [(id_, Answer(label)) for (id_, _), label in zip(open_, known, strict=True) if label is not None]
        if given:
            yield [id_ for id_, _ in given], [answer for _, answer in given]
        own = [pair for pair, label in zip(open_, known, strict=True) if label is None]
        pairs = [*own, *late]
        run, questions = self._ledger.run_id, []
        for place, (id_, comparison) in enumerate(pairs):
            earlier = tuple(self._ledger.history(id_))
            # a pair keeps its name while it waits for a second labeler
            attempt = sum(label.status != ROUTED for label in earlier)
            questions.append(Question(f"{run}/{id_}/{attempt}", comparison, place >= len(own), earlier))
        for answers in self.labeler.stream(questions, answered + len(given), key):
            yield [pairs[place][0] for place, _ in answers], [answer for _, answer in answers]

    def _is_final(self, id_: int, attempt: int) -> bool:
        """Whether people gave an answer that is no label, and will not be asked again."""
        return attempt > 0 and self._ledger.history(id_)[-1].status in FINAL_STATUSES

    def _late(self, index: int) -> list[_Open]:
        """Pairs of the last closed rounds that were asked about and have no answer yet."""
        lag = self.labeler.max_lag if getattr(self.labeler, "whole_rounds", False) else 0
        found = []
        for earlier in range(max(index - lag, 0), index):
            found += self._awaited(earlier, (self._ledger.round_info(earlier) or {}).get("prompts"))
        return found

    def _awaited(self, index: int, num_prompts: int | None) -> list[_Open]:
        rows, asked = self._rows(index, num_prompts), self._ledger.attempts(index)
        to_label = self._to_label(rows)
        return [(id_, c) for id_, c, label in rows if id_ in to_label and label is None and id_ not in asked]

    def _to_label(self, rows: Sequence[LedgerRow]) -> set[int]:
        """Ids of the comparisons of a round that are labeled: all, unless the sampler selects some."""
        if not isinstance(self.sampler, AbstractSelectiveSampler):
            return {id_ for id_, _, _ in rows}
        chosen = set(self.sampler.select_for_labeling([comparison for _, comparison, _ in rows]))
        name, strange = type(self.sampler).__name__, chosen - set(range(len(rows)))
        if strange:
            raise ValueError(
                f"{name}.select_for_labeling returned {min(strange)} for a round of {len(rows)} comparisons; return "
                f"positions from 0 to {len(rows) - 1}"
            )
        most = self.sampler.most_labels(len(rows))
        if len(chosen) > most:
            raise ValueError(
                f"{name}.select_for_labeling wants {len(chosen)} labels for {len(rows)} comparisons, more than the "
                f"{most} that its label_fraction of {self.sampler.label_fraction:g} allows; budgets count on it"
            )
        return {rows[position][0] for position in chosen}

    def _rows(self, index: int, num_prompts: int | None) -> list[LedgerRow]:
        """The comparisons of a round, without those that a smaller budget has cut off since."""
        places, rows = self._ledger.positions(index), self._ledger.comparisons(index)
        return [row for place, row in zip(places, rows, strict=True) if num_prompts is None or place < num_prompts]

    def _read(self, result: Round, index: int) -> None:
        result.preferences, result.comparisons, result.failed = distributed.from_rank_zero(lambda: self._kept(index))

    def count_labels(self, index: int) -> int:
        """Labels that a closed round is trained on, free ties left out; on rank zero."""
        return sum(not preference.label.is_free_tie for preference in self._kept(index)[0])

    def _kept(self, index: int) -> tuple[list[Preference], list[Comparison], dict[str, int]]:
        info = self._ledger.round_info(index) or {}
        rows, upto = self._rows(index, info.get("prompts")), info.get("upto")
        preferences = [Preference(comparison, label, index) for _, comparison, label in rows if label is not None]
        if upto is not None:
            # a label that arrived after the round was closed must not change it, whenever it is read
            numbers = self._ledger.label_attempts(index)
            preferences = [
                Preference(comparison, label, index)
                for id_, comparison, label in rows
                # free ties have no attempt
                if label is not None and numbers.get(id_, 0) <= upto
            ]
            after = (self._ledger.round_info(index - 1) or {}).get("upto")
            if after is not None:
                preferences += LabeledTable(self._ledger).read(self._ledger.late_ids(index, after, upto))
        return preferences, [comparison for _, comparison, _ in rows], self._ledger.failed(index)


def labeled(
    sampler: AbstractPairSampler, labeler: AbstractLabeler, comparisons: Sequence[Comparison], key: Key
) -> list[Label]:
    """Label comparisons: by the labels that came with the responses, and by the labeler where there is none.

    Raises:
        TypeError: if the labeler did not return labels.
        ValueError: if it did not return one label per comparison.
    """
    verdicts = getattr(sampler, "verdicts", None)
    labels: list[Label | None] = verdicts(comparisons) if verdicts is not None else [None] * len(comparisons)
    # the labeler would be paid again for pairs that the sampler had judged while it sampled
    asked = [place for place, label in enumerate(labels) if label is None]
    if asked:
        made = labeler.label([comparisons[place] for place in asked], key)
        for place, label in zip(asked, returned(labeler, "label", made, len(asked), Label, "comparisons"), strict=True):
            labels[place] = label
    return [label for label in labels if label is not None]

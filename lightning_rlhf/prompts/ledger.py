"""The pairs of another run, from its ledger."""

from __future__ import annotations

from lightning_rlhf.ledger.recorded import check_holds_pairs
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.dataset import unusable_pair, unusable_response
from lightning_rlhf.types import PromptRow, RecordedPair


class LedgerPrompts(AbstractPromptSource):
    """The comparisons in the ledger of a run, as recorded pairs.

    The first response of a comparison becomes the recorded ``chosen``, and the label P(a preferred) its probability.
    Pairs with empty or equal responses, and pairs without a label where labels are wanted, are left out and counted.
    The run may go on meanwhile: new pairs come behind the old ones as long as rounds are labeled one after another.

    Args:
        path: path of the ledger.
        labels: take labeled pairs only, with their labels; false takes all pairs, in arbitrary order within a pair.
        limit: take only the first pairs, >= 1; null takes all.
    """

    def __init__(self, path: str, labels: bool = True, limit: int | None = None) -> None:
        self.path = path
        self.labels = labels
        self.limit = limit

    def load(self) -> list[PromptRow]:
        """Read the pairs, round by round.

        Raises:
            ValueError: if the file is no ledger, or no pair can be used.
        """
        self.report.clear()
        rows: list[PromptRow] = []
        # a snapshot, since the run may still write
        with PreferenceStore(self.path, read_only=True) as store, store.snapshot():
            check_holds_pairs(store)
            for round_, position, comparison, label in store.walk():
                if self.limit is not None and len(rows) >= self.limit:
                    break
                if self.labels and label is None:
                    self.report["without a label"] += 1
                    continue
                # without labels the first response counts as chosen, since a pair needs some order
                probability = 1.0 if label is None or not self.labels else label.probability
                assert probability is not None
                weight = comparison.weight * (1.0 if label is None or not self.labels else label.weight)
                pair = RecordedPair(comparison.a.text, comparison.b.text, probability, weight)
                reason = unusable_response(pair) if comparison.is_single else unusable_pair(pair)
                if reason is not None:
                    self.report[reason] += 1
                    continue
                prompt = comparison.prompt
                reasons = (comparison.a.finish_reason, comparison.b.finish_reason)[: 2 - comparison.is_single]
                rows.append(
                    PromptRow(
                        f"{self.path} round {round_} position {position}",
                        # messages are rendered anew, by the template of the run that reads them
                        text=prompt.text if prompt.messages is None else None,
                        messages=prompt.messages,
                        pair=pair,
                        completion=comparison.a.text if comparison.is_single else None,
                        template_options=prompt.template_options,
                        finish_reasons=reasons if "length" in reasons else (),
                    )
                )
        if not rows:
            raise ValueError(
                f"{self.path}: none of its pairs can be used ({dict(self.report) or 'it holds none'}): wait until the "
                f"run has labels, or set labels=false to take pairs that nobody has labeled"
            )
        return rows

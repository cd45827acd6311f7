"""Groups of options that DataModules share: rounds, batching, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def at_least_one(**settings: int | None) -> None:
    """Check settings by name, with dots written as double underscores; None is no limit.

    Raises:
        ValueError: naming the first that is below 1.
    """
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name.replace('__', '.')} must be at least 1; got {value}")


@dataclass(frozen=True)
class RoundOptions:
    """How rounds are cut.

    Args:
        prompts_per_round: prompts sampled per round, >= 1; default: the whole data set. One batch per round is online.
        epochs_per_round: epochs that train on a round before the next one is sampled, >= 1; null never samples again
            (offline).
        ledger: path of the ledger; default: ``ledger.sqlite`` in the run folder.
    """

    prompts_per_round: int | None = None
    epochs_per_round: int | None = 1
    ledger: str | None = None

    def __post_init__(self) -> None:
        at_least_one(rounds__prompts_per_round=self.prompts_per_round, rounds__epochs_per_round=self.epochs_per_round)


@dataclass(frozen=True)
class PreferenceRoundOptions(RoundOptions):
    """How rounds of preferences are cut, labeled and replayed.

    Args:
        prompts_per_round: prompts sampled per round, >= 1; default: the whole data set. One batch makes online DPO.
        epochs_per_round: epochs that train on a round before the next one is sampled, >= 1; null never samples again
            (offline).
        ledger: path of the ledger; default: ``ledger.sqlite`` in the run folder.
        replay: ``last`` trains on the newest round, ``all`` on all rounds so far, a number on that many newest rounds.
        label_attempts: times that a comparison is shown to the labeler until it is dropped, >= 1.
        heldout_generate: whether validation generates answers to held-out prompts, for reward, KL and J; recorded
            held-out pairs are evaluated in any case. Default: not in offline runs, whose sampler decodes nothing,
            unless the held-out rows have no pairs.
        reference_logps: when recorded pairs of an offline run are scored under the reference: ``ahead``, at most 64
            steps before they are trained on; ``all``, before the first step; ``live``, in every step again.
        ledger_pairs: the ledger of an offline run holds ``copies`` of all recorded pairs and labels, or the numbers of
            their ``rows``; ``auto``: copies up to 2,000 pairs, and where labels are bought.
    """

    replay: int | Literal["last", "all"] = "last"
    label_attempts: int = 1
    heldout_generate: bool | None = None
    reference_logps: Literal["ahead", "all", "live"] = "ahead"
    ledger_pairs: Literal["auto", "copies", "rows"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_logps not in ("ahead", "all", "live"):
            raise ValueError(
                f"data.rounds.reference_logps must be 'ahead', 'all' or 'live'; got {self.reference_logps!r}"
            )
        if self.ledger_pairs not in ("auto", "copies", "rows"):
            raise ValueError(f"data.rounds.ledger_pairs must be 'auto', 'copies' or 'rows'; got {self.ledger_pairs!r}")
        # "last" and "all" are no numbers; 1 passes the check
        replay = self.replay if isinstance(self.replay, int) else 1
        at_least_one(rounds__label_attempts=self.label_attempts, rounds__replay=replay)


@dataclass(frozen=True)
class PrincipleRoundOptions(PreferenceRoundOptions):
    """How rounds are cut, labeled and replayed, and how principles are sampled in an epoch (arXiv 2310.05910).

    Args:
        prompts_per_round, epochs_per_round, replay, label_attempts, ledger, heldout_generate, reference_logps,
            ledger_pairs: as in `PreferenceRoundOptions`.
        stop: parameter of the geometric distribution of the number of principles of a pair, in (0, 1).
        most_principles: largest number, >= 1.
        negated: probability that a principle is negated, in [0, 1].
        flipped: probability that a label is taken to be wrong, in [0, 1/2): labels are 1 - flipped or flipped.
    """

    stop: float = 0.2
    most_principles: int = 8
    negated: float = 0.5
    flipped: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(rounds__most_principles=self.most_principles)
        if not (0 < self.stop < 1 and 0 <= self.negated <= 1 and 0 <= self.flipped < 0.5):
            raise ValueError(
                f"data.rounds.stop must be in (0, 1), negated in [0, 1] and flipped in [0, 0.5); got {self.stop}, "
                f"{self.negated} and {self.flipped}"
            )


@dataclass(frozen=True)
class BatchOptions:
    """How an optimizer step is split into micro-batches.

    Args:
        max_tokens_per_micro_batch: token positions of one forward and backward pass per process, a prompt counted once
            for its responses, >= 1: a step that needs more is accumulated over several micro-batches, with the gradient
            of the whole. ``auto`` is 1024 on a CPU, whose caches hold that much, and 8192 elsewhere; null: no limit.
        length_window: group items of similar length within windows of this many batches of the shuffled epoch, >= 1; 1
            keeps the shuffled order.
    """

    max_tokens_per_micro_batch: int | Literal["auto"] | None = "auto"
    length_window: int = 1

    def __post_init__(self) -> None:
        limit = self.max_tokens_per_micro_batch
        at_least_one(
            batching__max_tokens_per_micro_batch=None if limit == "auto" else limit,
            batching__length_window=self.length_window,
        )


@dataclass(frozen=True)
class PromptOptions:
    """How prompts become tokens.

    Args:
        max_prompt_tokens: longest prompt; default: the context window less the longest response.
        on_long_prompt: ``error`` stops, ``drop`` leaves the row out, ``truncate`` keeps the end of the prompt.
        system_prompt: system turn put before conversational prompts; default: none.
        chat: take plain prompts as the user's turns, and render them with the chat template.
        rows: where tokenized training rows of preference runs are: ``memory``; ``disk``, in a table that later runs
            open again; or ``auto``, on disk from files of 1 MB or 2,000 other rows on.
        workers: processes that tokenize rows for the disk, >= 1; default: one per core from 5,000 rows on.
    """

    max_prompt_tokens: int | None = None
    on_long_prompt: Literal["error", "drop", "truncate"] = "error"
    system_prompt: str | None = None
    chat: bool = False
    rows: Literal["auto", "memory", "disk"] = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        at_least_one(prompt_options__max_prompt_tokens=self.max_prompt_tokens, prompt_options__workers=self.workers)


# frozen, so that all DataModules can share them as default arguments
DEFAULT_ROUNDS, DEFAULT_PREFERENCE_ROUNDS = RoundOptions(), PreferenceRoundOptions()
DEFAULT_PRINCIPLE_ROUNDS = PrincipleRoundOptions(epochs_per_round=None)
DEFAULT_BATCHING, DEFAULT_PROMPTS = BatchOptions(), PromptOptions()

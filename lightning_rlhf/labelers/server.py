"""Labels by a language model behind an OpenAI-compatible endpoint (RLAIF vs. RLHF, arXiv 2309.00267, section 2.1)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_rlhf.judging.options import ChainOfThought
from lightning_rlhf.judging.prompts import Sample, fitted, sample_of
from lightning_rlhf.judging.replies import Reading
from lightning_rlhf.judging.server import JudgeServer, Session, UnansweredError, Usage
from lightning_rlhf.judging.task import Style
from lightning_rlhf.labelers.base import cost_parts
from lightning_rlhf.labelers.judge import AbstractJudgeLabeler, both_orders
from lightning_rlhf.labelers.reward import comparison_key
from lightning_rlhf.randomness import Key
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.types import Comparison, Label, LabelStatus


@dataclass(frozen=True)
class _Judgment:
    """The result of one chain of requests: one order, one rationale."""

    usage: Usage
    reading: Reading | None = None
    rationale: str = ""
    status: LabelStatus = "ok"
    fault: str = ""


@accepts_old_names("ServerLabeler", chain_of_thought=ChainOfThought)
class ServerLabeler(AbstractJudgeLabeler):
    """A judge on a server reads both responses, in both orders; the likelihood of its answers says which is better.

    P(a preferred) is the mean of two distributions over the labels, one per order, each normalized over the labels
    (section 2.1.1), so that a judge which looks at positions only gives exactly 1/2. With a chain of thought two
    requests per order and sample are made: one for a rationale, one that reads the labels behind it.

    **Labels that are not listed.** A server lists the ``top_logprobs`` most probable tokens only. All spellings of a
    label that are listed are summed. A label with none listed gets an upper bound: the probability that the list
    leaves, and not more than the least probable token listed. The verdict is so never surer than the list. If the
    listed probability of both labels together is less than ``min_mass``, there is no verdict.

    ``meta`` of a label holds ``first_forward`` and ``first_reverse``, P(the label of the first response) with a and
    with b shown first; ``mass``, the smaller probability, of the two orders, that the judge answers with a label;
    ``rationale_forward`` and ``rationale_reverse``, the first ones; ``tokens_in``, ``tokens_out`` and ``requests``; and
    ``fault`` where there is no verdict. The cost of a label is the price of its tokens when they were bought: a second
    run finds them in the journal, pays nothing, and notes the same cost. Attempts at one comparison of a ledger book a
    reply once, also where a part of the answer is in the journal: ``cost_parts`` lists its parts.

    Statuses: those of `JudgeServer`; also ``invalid`` where the label mass is below ``min_mass`` or the judge answers
    with nothing, and ``truncated`` where the responses alone are longer than ``max_prompt_chars``, or where the judge
    had used up its tokens, e.g. by thinking, before it wrote a word of its answer.

    Args:
        server: the endpoint.
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        shots: judged examples in the prompt, from those of the task, >= 0.
        chain_of_thought: let the judge write rationales before it answers; default: none.
        min_mass: label mass below which there is no verdict, in [0, 1).
        max_candidate_chars: longest response in characters; the rest is cut off and marked.
        max_prompt_chars: longest prompt in characters, a longer one loses a part of its context; default:
            unlimited. Set it to about three times the tokens that the server's context has room for.

    Raises:
        FileNotFoundError: if there is no such task.
        ValueError: if an option is out of range, or the task does not compare responses.
    """

    def __init__(
        self,
        server: JudgeServer,
        task: str = "helpful",
        style: Style = "base",
        shots: int = 0,
        chain_of_thought: ChainOfThought | None = None,
        min_mass: float = 0.05,
        max_candidate_chars: int = 8000,
        max_prompt_chars: int | None = None,
    ) -> None:
        super().__init__(
            task=task,
            style=style,
            shots=shots,
            chain_of_thought=chain_of_thought,
            min_mass=min_mass,
            max_candidate_chars=max_candidate_chars,
        )
        # 0 characters fit no prompt
        if max_prompt_chars is not None and max_prompt_chars < 1:
            raise ValueError(f"max_prompt_chars must be >= 1; got {max_prompt_chars}")
        self.server, self.max_prompt_chars = server, max_prompt_chars

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Judge each comparison in both orders.

        Raises:
            ServerError: if the endpoint cannot be used as it is set up; earlier replies are in the journal.
        """
        chains, asked = [], []
        for place, comparison in enumerate(comparisons):
            sample = self._fitted(sample_of(comparison.prompt, comparison.a.text, comparison.b.text))
            if sample is None:
                continue
            asked.append(place)
            # random numbers of the comparison, whatever else is in the batch
            own = comparison_key(key, comparison)
            for order, shown in enumerate(both_orders(sample)):
                for number in range(self.num_rationales):
                    chains.append(functools.partial(self._judge, shown, own.fold(order, number)))
        judged = self.server.ask(chains)
        per_pair = 2 * self.num_rationales
        # without a request there is no cost
        too_long = Label(None, "truncated", 0.0, {"fault": "the responses alone are longer than max_prompt_chars"})
        labels = [too_long] * len(comparisons)
        for number, place in enumerate(asked):
            labels[place] = self._label(judged[number * per_pair : (number + 1) * per_pair])
        return labels

    async def _judge(self, sample: Sample, key: Key, session: Session) -> _Judgment:
        usage, rationale = Usage(), None
        try:
            if self.chain_of_thought is not None:
                rationale, usage = await session.write(
                    self.prompt(sample),
                    max_tokens=self.chain_of_thought.max_tokens,
                    temperature=self.chain_of_thought.temperature,
                    top_p=self.chain_of_thought.top_p,
                    seed=key.seed(),
                )
            reading, used = await session.read(self.prompt(sample, rationale), self.task.asked_for_pairs().labels)
        except UnansweredError as error:
            # tokens of the rationale are paid for, also where the reading failed
            return _Judgment(usage + error.usage, None, rationale or "", error.status, error.fault)
        return _Judgment(usage + used, reading, rationale or "")

    def _fitted(self, sample: Sample) -> Sample | None:
        # the server itself refuses a prompt that is too long, as `truncated`
        if self.max_prompt_chars is None:
            return sample
        most = self.max_prompt_chars
        return fitted(sample, self.task.dialogue, lambda shown: len(self.prompt(shown, "").text) - most)

    def _label(self, judged: Sequence[_Judgment]) -> Label:
        """Label of a comparison, from the judgments with a first and then those with b first."""
        # `Usage` adds by the name of a reply: requests that are equal in both orders are paid for once
        usage = sum((each.usage for each in judged), Usage())
        prices = self.server.costs(usage)
        cost = sum(prices.values())
        meta: dict[str, float | int | str] = {
            "tokens_in": usage.tokens_in,
            "tokens_out": usage.tokens_out,
            "requests": usage.requests,
            **cost_parts(prices),
        }
        if self.chain_of_thought is not None:
            first_reverse = judged[self.num_rationales]
            meta |= {"rationale_forward": judged[0].rationale, "rationale_reverse": first_reverse.rationale}
        # one failed order is no verdict: the other alone would carry its position bias
        for each in judged:
            if each.status != "ok":
                return Label(None, each.status, cost, meta | {"fault": each.fault})
        readings = [each.reading for each in judged if each.reading is not None]
        # [orders, rationales], in the order of the chains in `label`
        masses = torch.tensor([reading.mass for reading in readings]).view(2, self.num_rationales)
        logps = torch.stack([reading.logps for reading in readings]).view(2, self.num_rationales, 2)
        probability, metrics = self.verdict(logps, masses)
        meta |= metrics
        if probability is None:
            return Label(None, "invalid", cost, meta | {"fault": self.fault(metrics)})
        return Label(probability, "ok", cost, meta)

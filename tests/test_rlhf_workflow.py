"""RLHF Workflow (arXiv 2405.07863): online iterative DPO on best and worst of 8, and the pairwise preference model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_rlhf.cli import main
from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.labelers import LLMLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.losses import dpo_loss
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.samplers import BestWorstSampler
from lightning_rlhf.types import Prompt, Response


# -- online and offline at equal numbers of pairs ----------------------------------------------------------------------

ETA, FEATURES, CANDIDATES, ROUND, ROUNDS, HELDOUT = 0.1, 16, 256, 200, 3, 200


class LinearWorld(AbstractEngine, AbstractReward):
    """Policies softmax(phi^T theta) over 256 responses per prompt, as engine; the proxy reward that ranks, as reward.

    The reference is uniform. The gold reward is phi^T w with |w| = 1, the proxy adds to it a standard normal error of
    each response. The first feature makes responses longer.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.beta, self.theta = ETA, torch.zeros(FEATURES, dtype=torch.float64)
        shape = (ROUND * ROUNDS + HELDOUT, CANDIDATES)
        self.phi = torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)
        gold = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        # length is worth something
        gold[0] = gold[0].abs() + 1.0
        self.gold = self.phi @ (gold / gold.norm())
        self.proxy = self.gold + torch.randn(*shape, generator=generator, dtype=torch.float64)
        # characters, 20 on average
        self.lengths = (20 + 5 * self.phi[..., 0]).round().clamp_min(3.0)

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Sample one response per request, at its temperature."""
        del reference_logps
        places = torch.tensor([request.prompt.index for request in requests])
        temperatures = torch.tensor([request.temperature or 1.0 for request in requests], dtype=torch.float64)
        cumulative = ((self.phi[places] @ self.theta) / temperatures[:, None]).softmax(-1).cumsum(-1)
        uniforms = torch.stack([request.key.uniforms(1) for request in requests])
        chosen = torch.searchsorted(cumulative, uniforms).clamp_max(CANDIDATES - 1)[:, 0].tolist()
        lengths = [int(self.lengths[i, candidate]) for i, candidate in zip(places.tolist(), chosen, strict=True)]
        return [Response((c,), "x" * length, "eos") for c, length in zip(chosen, lengths, strict=True)]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """The proxy reward."""
        pairs = zip(prompts, responses, strict=True)
        return RewardOutput(torch.stack([self.proxy[p.index, r.ids[0]] for p, r in pairs]))

    def pairs(self, sampler: BestWorstSampler, prompts: range, key: Key) -> Tensor:
        """phi(chosen) - phi(rejected) of the pairs of a round that get a label; [pairs, features]."""
        comparisons = sampler.sample([Prompt(i, (1,), "x") for i in prompts], self, key)
        labels = sampler.verdicts(comparisons)
        kept = [c for c, label in zip(comparisons, labels, strict=True) if label is not None and label.status == "ok"]
        rows = [self.phi[c.prompt.index, c.a.ids[0]] - self.phi[c.prompt.index, c.b.ids[0]] for c in kept]
        return torch.stack(rows)

    def fit(self, differences: Tensor) -> None:
        """Move the policy to the minimum of the DPO loss on hard labels, with a small ridge."""
        theta = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")
        ones = torch.ones(len(differences), dtype=torch.float64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            # the uniform reference and both normalizers cancel in the margin
            loss = dpo_loss(differences @ theta, ones, ETA).mean() + 1e-5 * theta.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.theta = theta.detach()

    def held_out(self) -> dict[str, float]:
        """J = E[gold] - eta KL on held-out prompts, its reward, and the mean length in characters."""
        logps = (self.phi[-HELDOUT:] @ self.theta).log_softmax(-1)
        policy = logps.exp()
        gold = (policy * self.gold[-HELDOUT:]).sum(-1).mean().item()
        kl = math.log(CANDIDATES) + (policy * logps).sum(-1).mean().item()
        length = (policy * self.lengths[-HELDOUT:]).sum(-1).mean().item()
        return {"j": gold - ETA * kl, "gold": gold, "length": length}


@dataclass(frozen=True)
class Arm:
    """A way to get 600 pairs.

    Args:
        n: candidates per pair.
        rounds: rounds that they are sampled in; one is offline, from the reference.
        length_penalty: as in `BestWorstSampler`.
    """

    n: int
    rounds: int
    length_penalty: float = 0.0


ARMS = {
    "offline": Arm(n=2, rounds=1),
    "online, 2": Arm(n=2, rounds=ROUNDS),
    "offline, 8": Arm(n=8, rounds=1),
    "online, 8": Arm(n=8, rounds=ROUNDS),
    "online, 8, concise": Arm(n=8, rounds=ROUNDS, length_penalty=0.1),
}


def outcome(seed: int, arm: Arm) -> dict[str, float]:
    """What the policy of an arm reaches; pairs of all rounds are replayed and the reference stays."""
    world = LinearWorld(seed)
    sampler = BestWorstSampler(world, n=arm.n, temperatures=[1.0, 0.7], length_penalty=arm.length_penalty)
    seen: list[Tensor] = []
    per_round = ROUND * ROUNDS // arm.rounds
    for index in range(arm.rounds):
        seen.append(world.pairs(sampler, range(index * per_round, (index + 1) * per_round), Key((seed, index))))
        world.fit(torch.cat(seen))
    return world.held_out()


def outcomes(seeds: int) -> dict[str, dict[str, Tensor]]:
    """Outcomes of all arms by seed; [seeds] each."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, arm in ARMS.items():
        rows = [outcome(seed, arm) for seed in range(seeds)]
        found[name] = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    return found


def test_online_pairs_of_best_and_worst_teach_more() -> None:
    found = outcomes(3)
    j = {name: values["j"].mean().item() for name, values in found.items()}
    assert j["online, 8"] > j["online, 2"] + 0.05
    assert j["online, 2"] > j["offline"] + 0.05
    concise, usual = found["online, 8, concise"], found["online, 8"]
    assert (concise["length"] < usual["length"]).all()
    assert (concise["gold"] < usual["gold"]).all()


# -- runs --------------------------------------------------------------------------------------------------------------

SMALL = [
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
    *("--trainer.strategy=auto", "--data.decoding.max_new_tokens=5"),
]


def test_the_config_trains_on_all_rounds(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "last_byte_of_workflow.py").write_text(
        "import torch\nfrom lightning_rlhf.rewards import AbstractReward, RewardOutput\n\n\n"
        "class Parity(AbstractReward):\n    def score(self, prompts, responses):\n"
        "        return RewardOutput(torch.tensor([float(r.ids[0] % 3) for r in responses]))\n"
    )
    main(
        [
            *("fit", "--config=rlhf_workflow", *SMALL, f"--model.policy={tiny_policy}", "--data.heldout=null"),
            *("--data.sampler.reward=last_byte_of_workflow.Parity", "--data.sampler.n=3", "--data.prompts.limit=12"),
            *("--data.rounds.prompts_per_round=6", "--data.pairs_per_batch=6", "--trainer.max_epochs=4"),
            f"--run_dir={tmp_path / 'run'}",
        ]
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        rows = [(comparison, label) for _, _, comparison, label in store.walk()]
        kept = [store.count_labels(before=index) for index in (1, 2)]
    for comparison, label in rows:
        assert comparison.branch == "best_worst"
        # the pairs that are left have different rewards, and the first response is the better one
        if label is not None and not label.is_free_tie:
            assert label.probability == 1.0
            assert comparison.a.ids[0] % 3 > comparison.b.ids[0] % 3
    assert 0 < kept[0] < kept[1] <= 12
    # two epochs on the pairs of the first round, then two on those of both
    assert summary["steps"] == 2 * math.ceil(kept[0] / 6) + 2 * math.ceil(kept[1] / 6)


def test_a_preference_model_is_trained_and_ranks_candidates(
    tmp_path: Path, tiny_judge: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": f"No{i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    main(
        [
            *("fit", "--config=preference_model", *SMALL, f"--model.policy={tiny_judge}", "--run_dir=judge"),
            *("--data.prompts.path=rows.jsonl", "--data.pairs_per_batch=2", "--trainer.max_epochs=30"),
            *("--data.heldout=DatasetPrompts", "--data.heldout.path=rows.jsonl", "--model.optimizer.lr=2e-2"),
            *("--model.lr_scheduler.warmup_steps=0", "--trainer.check_val_every_n_epoch=30"),
        ]
    )
    assert json.loads((tmp_path / "judge" / "summary.json").read_text())["accuracy"] > 0.9
    main(
        [
            *("fit", "--config=rlhf_workflow", *SMALL, f"--model.policy={tiny_policy}", "--run_dir=run"),
            *("--data.sampler.labeler=LLMLabeler", "--data.sampler.labeler.judge=judge/model", "--data.sampler.n=3"),
            *("--data.sampler.reward=null", "--data.sampler.labeler.min_mass=0", "--data.prompts.limit=4"),
            *("--data.rounds.prompts_per_round=2", "--data.pairs_per_batch=2", "--trainer.max_steps=2"),
            "--data.heldout=null",
        ]
    )
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        compared = [comparison for _, _, comparison, label in store.walk() if label is not None]
    judge = LLMLabeler("judge/model", min_mass=0.0)
    assert compared
    for comparison in compared:
        # the best against the worst is one of the two verdicts behind each mean
        (label,) = judge.label([comparison], Key((0,)))
        a, b = comparison.meta["reward_a"], comparison.meta["reward_b"]
        assert label.probability is not None
        assert label.probability / 2 <= a <= (label.probability + 1) / 2
        assert (1 - label.probability) / 2 <= b <= (2 - label.probability) / 2
        assert a >= b


def report(seeds: int = 10) -> None:
    """Print the table of docs/systems.md."""
    for name, values in outcomes(seeds).items():
        shown = [f"{key} {x.mean():.3f} ± {x.std() / math.sqrt(seeds):.3f}" for key, x in values.items()]
        print(f"{name:20}", ", ".join(shown))


if __name__ == "__main__":
    report()

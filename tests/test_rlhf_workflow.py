"""RLHF Workflow (arXiv 2405.07863): online iterative DPO on best and worst of 8, and the pairwise preference model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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

ETA, LENGTH, TOKENS, PAIRS, ROUNDS = 0.2, 8, 16, 600, 3


class TokenWorld(AbstractEngine, AbstractReward):
    """Responses of 8 tokens of 16 kinds; the policy has a distribution for each place, so that J is exact.

    The reference samples tokens by Zipf's law, in another order at each place: good ones may be rare. The gold reward
    adds up a worth of each token; long words are worth more on average. As engine it samples from the policy, as reward
    it is the proxy that ranks: gold and a standard normal error of each response.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed, self.beta = seed, ETA
        ranks = torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(LENGTH)]) + 1
        # log pi_ref of each token at each place, [places, tokens]
        self.reference = (-1.5 * ranks.double().log()).log_softmax(-1)
        # characters of each token: 1, 3 or 5
        self.characters = 1 + 2 * (torch.arange(TOKENS) % 3)
        worth = torch.randn(LENGTH, TOKENS, generator=generator, dtype=torch.float64)
        self.worth = worth + 0.2 * (self.characters - 3)
        self.theta = torch.zeros(LENGTH, TOKENS, dtype=torch.float64)

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Sample one response per request, at its temperature."""
        del reference_logps
        temperatures = torch.tensor([request.temperature or 1.0 for request in requests], dtype=torch.float64)
        logits = (self.reference + self.theta) / temperatures[:, None, None]
        uniforms = torch.stack([request.key.uniforms(LENGTH) for request in requests])
        # by inverse transform, [requests, places]
        tokens = torch.searchsorted(logits.softmax(-1).cumsum(-1), uniforms[..., None])[..., 0].clamp_max(TOKENS - 1)
        texts = ["".join("abcdefghijklmnop"[t] * int(self.characters[t]) for t in row) for row in tokens.tolist()]
        return [Response(tuple(row), text, "eos") for row, text in zip(tokens.tolist(), texts, strict=True)]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """The proxy reward: the same for the same response to the same prompt."""
        tokens = torch.tensor([response.ids for response in responses])
        gold = self.worth[torch.arange(LENGTH), tokens].sum(-1)
        keys = [Key((self.seed, p.index, *r.ids)) for p, r in zip(prompts, responses, strict=True)]
        errors = [torch.randn(1, generator=key.generator(), dtype=torch.float64) for key in keys]
        return RewardOutput(gold + torch.cat(errors))

    def pairs(self, sampler: BestWorstSampler, prompts: range, key: Key) -> Tensor:
        """Counts of tokens at places, chosen less rejected, of the pairs that get a label; [pairs, places * tokens]."""
        comparisons = sampler.sample([Prompt(i, (1,), "x") for i in prompts], self, key)
        rows = []
        for comparison, label in zip(comparisons, sampler.verdicts(comparisons), strict=True):
            if label is not None and label.status == "ok":
                chosen, rejected = (F.one_hot(torch.tensor(r.ids), TOKENS) for r in (comparison.a, comparison.b))
                rows.append((chosen - rejected).double().flatten())
        return torch.stack(rows)

    def fit(self, differences: Tensor) -> None:
        """Move the policy to the minimum of the DPO loss, with a standard normal prior on eta theta, the reward."""
        theta = torch.zeros(LENGTH * TOKENS, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")
        ones = torch.ones(len(differences), dtype=torch.float64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            # the reference cancels in log pi / pi_ref = theta, and the normalizer in the margin
            loss = dpo_loss(differences @ theta, ones, ETA).sum() + (ETA * theta).square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        self.theta = theta.detach().view(LENGTH, TOKENS)

    def outcome(self) -> dict[str, float]:
        """J = E[gold] - eta KL of the policy, its gold reward, KL in nats, and mean length in characters."""
        logps = (self.reference + self.theta).log_softmax(-1)
        policy = logps.exp()
        gold, kl = (policy * self.worth).sum().item(), (policy * (logps - self.reference)).sum().item()
        length = (policy @ self.characters.double()).sum().item()
        return {"j": gold - ETA * kl, "gold": gold, "kl": kl, "length": length}


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
    "offline, 2": Arm(n=2, rounds=1),
    "offline, 8": Arm(n=8, rounds=1),
    "online, 2": Arm(n=2, rounds=ROUNDS),
    "online, 8": Arm(n=8, rounds=ROUNDS),
    "online, 8, concise": Arm(n=8, rounds=ROUNDS, length_penalty=0.3),
}


def outcome(seed: int, arm: Arm) -> dict[str, float]:
    """What the policy of an arm reaches; pairs of all rounds are replayed and the reference stays."""
    world = TokenWorld(seed)
    sampler = BestWorstSampler(world, n=arm.n, temperatures=[1.0, 0.7], length_penalty=arm.length_penalty)
    seen: list[Tensor] = []
    per_round = PAIRS // arm.rounds
    for index in range(arm.rounds):
        seen.append(world.pairs(sampler, range(index * per_round, (index + 1) * per_round), Key((seed, index))))
        world.fit(torch.cat(seen))
    return world.outcome()


def outcomes(seeds: int) -> dict[str, dict[str, Tensor]]:
    """Outcomes of all arms by seed; [seeds] each."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, arm in ARMS.items():
        rows = [outcome(seed, arm) for seed in range(seeds)]
        found[name] = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    return found


def test_pairs_of_the_moving_policy_teach_more_than_those_of_the_reference() -> None:
    """At equal numbers of pairs: +0.75 +- 0.18 of two candidates and +0.69 +- 0.34 of eight, in 10 seeds."""
    found = outcomes(3)
    j = {name: values["j"].mean().item() for name, values in found.items()}
    assert j["online, 2"] > j["offline, 2"] + 0.05
    assert j["online, 8"] > j["offline, 2"] + 0.05
    concise, usual = found["online, 8, concise"], found["online, 8"]
    assert (concise["length"] < 0.8 * usual["length"]).all()
    assert concise["gold"].mean() < usual["gold"].mean()


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
    """Print the table of docs/systems.md: means over seeds with one standard error, and J less that of an arm."""
    found = outcomes(seeds)
    for name, values in found.items():
        shown = [f"{key} {x.mean():.2f} ± {x.std() / math.sqrt(seeds):.2f}" for key, x in values.items()]
        for other in ("offline, 2", "online, 2"):
            # paired by seed
            gain = values["j"] - found[other]["j"]
            wins = int((gain > 0).sum())
            shown.append(f"above {other!r} {gain.mean():.2f} ± {gain.std() / math.sqrt(seeds):.2f} ({wins})")
        print(f"{name:20}", ", ".join(shown))


if __name__ == "__main__":
    report()

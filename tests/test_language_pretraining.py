"""Language-reward-modulated pretraining, after LAMP (arXiv 2308.12270): alignment and novelty, mixed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rlhf.cli import main
from lightning_rlhf.prompts import TemplatePrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import (
    AbstractEmbedder,
    AbstractReward,
    CountNoveltyReward,
    HashEmbedder,
    LanguageAlignmentReward,
    ModelEmbedder,
    RewardOutput,
    RNDNoveltyReward,
    WeightedReward,
)
from lightning_rlhf.rewards.base import RoundSamples
from lightning_rlhf.types import Prompt, Response, Rollout


def rollouts(*texts: str, prompt: str = "say") -> list[Rollout]:
    """Responses to one prompt."""
    return [Rollout(Prompt(0, (1,), prompt), Response((i + 1,), text, "eos")) for i, text in enumerate(texts)]


def learn(reward: AbstractReward, rounds: Sequence[Sequence[Rollout]], index: int) -> Tensor:
    """Let a reward learn a round, and score its responses."""
    samples = RoundSamples(index, rounds[index], rounds.__getitem__, Key((index,)))
    reward.learn(samples)
    return reward.score(samples.prompts, samples.responses).mean


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_counts_of_earlier_rounds_lower_the_novelty() -> None:
    rounds = [rollouts("a b c", "a b"), rollouts("a b c", "x y"), rollouts("a b", "x")]
    reward = CountNoveltyReward(n=2)
    # nothing was seen before; the two responses of one round do not lower each other
    assert learn(reward, rounds, 0).tolist() == [1.0, 1.0]
    # "a b" was seen twice, "b c" once
    assert learn(reward, rounds, 1).tolist() == pytest.approx([(3**-0.5 + 2**-0.5) / 2, 1.0])
    state = reward.state_dict()
    assert learn(reward, rounds, 2).tolist() == pytest.approx([4**-0.5, 1.0])
    again = CountNoveltyReward(n=2)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert learn(again, rounds, 2).tolist() == pytest.approx([4**-0.5, 1.0])
    whole = CountNoveltyReward(n=0)
    learn(whole, rounds, 0)
    assert learn(whole, rounds, 1).tolist() == pytest.approx([2**-0.5, 1.0])


def test_a_predictor_knows_the_responses_of_earlier_rounds() -> None:
    rounds = [rollouts("the red house"), rollouts("the red house", "a green boat")]
    reward = RNDNoveltyReward(HashEmbedder(), steps=200)
    learn(reward, rounds, 0)
    known, new = learn(reward, rounds, 1).tolist()
    assert known < 0.2 * new
    again = RNDNoveltyReward(HashEmbedder(), steps=200)
    again.load_state_dict(reward.state_dict())
    found = again.score([r.prompt for r in rounds[1]], [r.response for r in rounds[1]]).mean
    assert found.tolist() == [known, new]
    # as at the start of a run
    again.load_state_dict({})
    assert learn(again, rounds, 0).tolist() == learn(RNDNoveltyReward(HashEmbedder()), rounds, 0).tolist()


def test_alignment_is_the_cosine_with_the_instruction() -> None:
    reward = LanguageAlignmentReward(HashEmbedder(4096))
    asked = rollouts("The house, red.", "Boats are green.", "", prompt="the red house")
    found = reward.score([r.prompt for r in asked], [r.response for r in asked]).mean
    assert found[0].item() == pytest.approx(1.0, abs=1e-5)
    assert found[1].item() == pytest.approx(0.0, abs=0.1)
    assert found[2].item() == 0.0
    turn = Prompt(0, (1,), "<user>", ({"role": "user", "content": "red house"},))
    column = Prompt(0, (1,), "say", columns={"goal": "red house"})
    for prompt, name in ((turn, None), (column, "goal")):
        reward = LanguageAlignmentReward(HashEmbedder(4096), name)
        score = reward.score([prompt], [Response((1,), "house red", "eos")]).mean
        assert score.item() == pytest.approx(1.0, abs=1e-5)
    reward = LanguageAlignmentReward(HashEmbedder(), "goal")
    assert reward.columns_read(["goal", "other"]) == {"goal"}
    with pytest.raises(ValueError, match="column 'goal' holds None"):
        reward.check_prompts([turn])
    # the state at the start is subtracted
    changed = LanguageAlignmentReward(HashEmbedder(4096), baseline="house")
    score = changed.score([Prompt(0, (1,), "red")], [Response((1,), "house", "eos")])
    assert score.mean.item() == 0.0


def test_a_model_embeds_texts_alike_in_any_batch(tiny_policy: Path) -> None:
    embedder = ModelEmbedder(str(tiny_policy))
    texts = ["one", "another text", "", "x" * 400]
    together = embedder.embed(texts)
    alone = torch.cat([embedder.embed([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    # the origin is the mean of the centers
    centered = ModelEmbedder(str(tiny_policy), centers=texts[:2]).embed(texts[:2])
    torch.testing.assert_close(centered.mean(0), torch.zeros(centered.shape[1]), atol=1e-5, rtol=0)


class Given(AbstractReward):
    """The number in the response times a factor; counts what it is asked."""

    def __init__(self, factor: float) -> None:
        self.factor, self.asked = factor, 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        self.asked += len(responses)
        return RewardOutput(torch.tensor([self.factor * float(r.text) ** self.factor for r in responses]))


def test_rewards_are_standardized_over_all_rounds_so_far() -> None:
    small, large = Given(1.0), Given(3.0)
    reward = WeightedReward({"small": small, "large": large}, {"large": 0.5}, standardize=True)
    rounds = [rollouts("1", "2", "4"), rollouts("2", "7", "1", "0")]
    seen = torch.zeros(0, dtype=torch.float64)
    for index, round_ in enumerate(rounds):
        found = learn(reward, rounds, index)
        values = torch.tensor([float(r.response.text) for r in round_], dtype=torch.float64)
        seen = torch.cat([seen, values])
        cubes = 3 * seen**3
        expected = (values - seen.mean()) / seen.std(correction=0)
        expected = expected + 0.5 * (3 * values**3 - cubes.mean()) / cubes.std(correction=0)
        assert found.tolist() == pytest.approx(expected.tolist())
    # a response of the round is scored once
    assert small.asked == large.asked == 7
    # the curves show the rewards as they are
    new = reward.score([Prompt(9, (1,), "else")], [Response((1,), "5", "eos")])
    assert small.asked == 8
    assert new.parts["small"].item() == 5.0
    assert new.mean.item() == pytest.approx(
        ((5 - seen.mean()) / seen.std(correction=0) + 0.5 * (375 - cubes.mean()) / cubes.std(correction=0)).item()
    )
    assert reward.metrics()["large/running_std"] == pytest.approx(cubes.std(correction=0).item())
    again = WeightedReward({"small": small, "large": large}, {"large": 0.5}, standardize=True)
    again.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    assert again.metrics() == reward.metrics()


def test_a_reward_that_never_varies_adds_nothing() -> None:
    reward = WeightedReward({"same": Given(0.0)}, standardize=True)
    assert learn(reward, [rollouts("3", "5")], 0).tolist() == [0.0, 0.0]
    single = WeightedReward({"same": Given(1.0)}, standardize=True)
    learn(single, [rollouts("2")], 0)
    assert single.state_dict()["moments"] == {"same": [1.0, 2.0, 0.0]}
    with pytest.raises(ValueError, match=r"WeightedReward\.rewards\.bad returned a reward that is not finite"):
        learn(WeightedReward({"bad": Given(math.nan)}, standardize=True), [rollouts("3")], 0)
    plain = WeightedReward({"same": Given(1.0)})
    assert not plain.learns_from_samples
    assert plain.score([Prompt(0, (1,), "")], [Response((1,), "3", "eos")]).mean.item() == 3.0


def test_templates_give_every_combination() -> None:
    source = TemplatePrompts(
        ["Go to {place} by {means}.", "Stay.", "Stay."], {"place": ["a", "b"], "means": ["c", "d"]}
    )
    texts = [row.messages[0]["content"] for row in source.load() if row.messages]
    assert texts == ["Go to a by c.", "Go to a by d.", "Go to b by c.", "Go to b by d.", "Stay."]
    assert source.report["repeated text"] == 1
    plain = TemplatePrompts(["{{x}}"], conversational=False).load()
    assert plain[0].text == "{x}"
    with pytest.raises(ValueError, match="has the slot 'place'; give slots its values"):
        TemplatePrompts(["Go to {place}."])
    with pytest.raises(ValueError, match="has a slot without a name"):
        TemplatePrompts(["Go to {}."])
    with pytest.raises(ValueError, match="is no template"):
        TemplatePrompts(["Go to {place."])


# -- a gridworld -------------------------------------------------------------------------------------------------------

SIZE, WIDTH, STEPS, GAMMA = 11, 16, 40, 0.95
START = (5, 5)
LANDMARKS = ((0, 0), (0, 5), (0, 10), (5, 0), (5, 10), (10, 0), (10, 5), (10, 10))
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
GOAL = 7
Step = tuple[int, int, int]
"""Cell, move and next cell."""


class GridEmbedder(AbstractEmbedder):
    """Frozen, noisy embeddings of cells, ``4 7``, and of instructions, ``go to landmark 3``.

    Args:
        seed: decides the vectors.
        related: whether instructions have the vectors of their landmarks, or others.
    """

    def __init__(self, seed: int, related: bool = True) -> None:
        random = np.random.default_rng(seed)
        landmarks = random.normal(size=(len(LANDMARKS), WIDTH))
        landmarks /= np.linalg.norm(landmarks, axis=1, keepdims=True)
        cells = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), -1).reshape(-1, 1, 2)
        near = np.exp(-np.square(cells - np.array(LANDMARKS)).sum(-1) / 16)
        self.cells = near @ landmarks + 0.1 * random.normal(size=(SIZE * SIZE, WIDTH))
        self.texts = landmarks + 0.1 * random.normal(size=landmarks.shape)
        others = random.normal(size=landmarks.shape)
        self.read = self.texts if related else others

    def embed(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            words = text.split()
            rows.append(
                self.read[int(words[-1])] if words[0] == "go" else self.cells[cell(int(words[0]), int(words[1]))]
            )
        return torch.tensor(np.array(rows), dtype=torch.float32)


def cell(row: int, column: int) -> int:
    return row * SIZE + column


class Walker:
    """Q-learning, linear in the embedding of the instruction: Q(s, a | l) = sum_d W[d, s, a] e_d(l)."""

    def __init__(self, seed: int, embedder: GridEmbedder) -> None:
        self.random = np.random.default_rng((seed, 1))
        norms = np.linalg.norm(embedder.texts, axis=1, keepdims=True)
        self.texts = embedder.texts / norms
        self.weights = np.zeros((WIDTH, SIZE * SIZE, 4))

    def walk(self, landmark: int, stops: bool) -> list[Step]:
        """Cells, moves and next cells of an episode; epsilon-greedy, ties broken at random."""
        values = np.tensordot(self.texts[landmark], self.weights, 1)
        (row, column), path = START, []
        goal = cell(*LANDMARKS[landmark])
        chances, noise = self.random.random(STEPS), self.random.random((STEPS, 4))
        for step in range(STEPS):
            here = cell(row, column)
            scores = noise[step] if chances[step] < 0.1 else values[here] + 1e-6 * noise[step]
            move = int(scores.argmax())
            row = min(max(row + MOVES[move][0], 0), SIZE - 1)
            column = min(max(column + MOVES[move][1], 0), SIZE - 1)
            path.append((here, move, cell(row, column)))
            if stops and path[-1][2] == goal:
                break
        return path

    def improve(self, landmark: int, path: Sequence[Step], rewards: Sequence[float], ends: bool) -> None:
        """One update per step, in their order: a reward moves back by one cell in an episode."""
        text = self.texts[landmark]
        values = np.tensordot(text, self.weights, 1)
        for number, (here, move, there) in enumerate(path):
            last = ends and number == len(path) - 1
            target = rewards[number] + (0.0 if last else GAMMA * values[there].max())
            change = 0.3 * (target - values[here, move])
            self.weights[:, here, move] += change * text
            values[here, move] += change

    def pretrain(self, reward: AbstractReward, episodes: int) -> None:
        """Learn from a reward over all instructions; an episode is a round, and the cells are its responses."""
        rounds: list[list[Rollout]] = []
        for index in range(episodes):
            landmark = int(self.random.integers(len(LANDMARKS)))
            path = self.walk(landmark, stops=False)
            prompt = Prompt(landmark, (1,), f"go to landmark {landmark}")
            texts = [f"{there // SIZE} {there % SIZE}" for _, _, there in path]
            rounds.append([Rollout(prompt, Response((1,), text, "eos")) for text in texts])
            rewards = learn(reward, rounds, index).tolist()
            for _ in range(3):
                self.improve(landmark, path, rewards, ends=False)

    def finetune(self, episodes: int = 300) -> tuple[int, float]:
        """Learn to reach the goal from a reward of 1 there and 0 elsewhere.

        Returns:
            Episodes until 80 % of the last 20 succeeded, and the share of the first 20.
        """
        goal, successes = cell(*LANDMARKS[GOAL]), []
        # the first reward is thrown away: its values keep the order of the moves, as an actor would, and no more
        self.weights *= 0.01 / max(np.abs(self.weights).max(), 0.01)
        for _ in range(episodes):
            path = self.walk(GOAL, stops=True)
            successes.append(path[-1][2] == goal)
            self.improve(GOAL, path, [0.0] * (len(path) - 1) + [float(successes[-1])], ends=successes[-1])
        rates = np.convolve(successes, np.ones(20) / 20, "valid")
        good = np.flatnonzero(rates >= 0.8)
        return int(good[0]) + 20 if len(good) else episodes, float(np.mean(successes[:20]))


def pretraining(arm: str, seeds: int = 4, episodes: int = 400) -> dict[str, float]:
    """Mean episodes until success, and mean success in the first 20 episodes, after pretraining; standard errors.

    Args:
        arm: reward of pretraining: ``scratch`` has none; ``mixed`` alignment and novelty in equal parts; ``random`` the
            same with unrelated vectors of the instructions; ``alignment`` or ``novelty`` alone.
        seeds: number of seeds.
        episodes: episodes of pretraining.
    """
    found = []
    for seed in range(seeds):
        embedder = GridEmbedder(seed, related=arm != "random")
        parts: dict[str, AbstractReward] = {
            "alignment": LanguageAlignmentReward(embedder, baseline=f"{START[0]} {START[1]}"),
            "novelty": CountNoveltyReward(n=0),
        }
        walker = Walker(seed, embedder)
        if arm != "scratch":
            chosen = parts if arm in ("mixed", "random") else {arm: parts[arm]}
            reward = WeightedReward(chosen, dict.fromkeys(chosen, 1 / len(chosen)), standardize=True)
            walker.pretrain(reward, episodes)
        found.append(walker.finetune())
    means, errors = np.mean(found, 0), np.std(found, 0, ddof=1) / len(found) ** 0.5
    names = ("episodes", "first")
    return dict(zip(names, means.tolist(), strict=True)) | {
        f"{name}_stderr": error for name, error in zip(names, errors.tolist(), strict=True)
    }


def test_pretraining_on_language_and_novelty_shortens_the_learning_of_a_task() -> None:
    scratch, mixed, random = (pretraining(arm) for arm in ("scratch", "mixed", "random"))
    assert mixed["episodes"] <= 0.5 * scratch["episodes"]
    assert mixed["episodes"] < random["episodes"]
    assert mixed["first"] > scratch["first"] + 0.3


# -- texts -------------------------------------------------------------------------------------------------------------


def test_the_config_pretrains_and_its_policy_is_finetuned(tmp_path: Path, tiny_policy: Path) -> None:
    common = [
        *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        *("--trainer.enable_progress_bar=false", "--data.rounds.prompts_per_round=2", "--data.prompts_per_batch=2"),
        *("--data.responses_per_prompt=2", "--data.decoding.max_new_tokens=4", "--data.heldout=null"),
    ]
    embedders = [f"--data.reward.rewards.{name}.embedder.model={tiny_policy}" for name in ("alignment", "novelty")]
    first = tmp_path / "first"
    pretrain = ["fit", "--config=language_pretraining", f"--model.policy={tiny_policy}", *embedders]
    main([*pretrain, *common, f"--run_dir={first}"])
    written = next(first.rglob("metrics.csv")).read_text()
    for name in ("alignment/mean", "novelty/mean", "alignment/running_std", "novelty/running_std"):
        assert f"rollout/rewards/{name}" in written
    tune = ["fit", "--config=rlhf", f"--model.policy={first / 'model'}", "--data.reward=LengthReward"]
    main([*tune, "--data.reward.most_tokens=4", *common, f"--run_dir={tmp_path / 'second'}"])
    assert (tmp_path / "second" / "model").exists()

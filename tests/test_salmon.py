"""SALMON (arXiv 2310.05910): principles as data, labels by them, a reward model that reads them, interventions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_rlhf import PrincipleDataModule, RewardModule
from lightning_rlhf.cli import main
from lightning_rlhf.datamodules.options import PrincipleRoundOptions
from lightning_rlhf.estimators.principles import (
    dominant_score,
    geometric_count,
    order_consistent,
    principle_signs,
    variance_scaled,
    weighted_subset,
)
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.judging.principle import (
    HEADING,
    Principle,
    conditioned,
    load_principles,
    parse_principles,
    principle_sets,
    statement,
)
from lightning_rlhf.judging.prompts import JudgePrompt
from lightning_rlhf.labelers import AbstractLabeler, PrincipleLabeler, RecordedLabeler
from lightning_rlhf.losses import bradley_terry_loss
from lightning_rlhf.prompts import DatasetPrompts, PrincipledPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, PrincipleReward, RewardOutput
from lightning_rlhf.rewards.base import RoundSamples
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Comparison, Label, Prompt, Response, Rollout


KEY = Key((7,))


# -- scores and signs --------------------------------------------------------------------------------------------------


def test_orders_that_disagree_give_no_score() -> None:
    forward, reverse = torch.tensor([2.0, 2.0, -1.0, 3.0]), torch.tensor([1.0, -0.1, -3.0, 0.0])
    torch.testing.assert_close(order_consistent(forward, reverse), torch.tensor([1.5, 0.0, -2.0, 0.0]))


def test_scores_are_divided_by_their_variance() -> None:
    scores = torch.tensor([[1.0, 10.0, 5.0], [-1.0, -10.0, 5.0]])
    # variances 1, 100 and 0
    torch.testing.assert_close(variance_scaled(scores), torch.tensor([[1.0, 0.1, 0.0], [-1.0, -0.1, 0.0]]))


def test_the_largest_score_decides_and_negation_flips_it() -> None:
    scores = torch.tensor([1.0, -3.0, 2.0])
    assert dominant_score(scores, torch.tensor([1.0, 1.0, 1.0])) == -3.0
    assert dominant_score(scores, torch.tensor([1.0, -1.0, 1.0])) == 3.0
    assert dominant_score(scores, torch.tensor([1.0, 0.0, -1.0])) == -2.0
    assert dominant_score(scores, torch.zeros(3)) == 0.0


def test_the_number_of_principles_is_geometric() -> None:
    stop, most, n = 0.2, 8, 20_000
    counts = Counter(geometric_count((i + 0.5) / n, stop, most) for i in range(n))
    total = 1 - (1 - stop) ** most
    assert set(counts) == set(range(1, most + 1))
    for k, count in counts.items():
        # P(k) = q^(k-1) (1 - q) / (1 - q^most); the uniforms are a grid
        assert count / n == pytest.approx((1 - stop) ** (k - 1) * stop / total, abs=2 / n)
    assert geometric_count(0.0, stop, most) == 1
    assert geometric_count(math.nextafter(1.0, 0.0), stop, most) == most
    assert geometric_count(0.9, stop, 1) == 1


def test_principles_are_sampled_alike_and_negated_half_of_the_time() -> None:
    drawn = torch.stack(
        [principle_signs(KEY.fold(i).uniforms(13), 6, stop=0.2, most=3, negated=0.5) for i in range(2000)]
    )
    used = drawn != 0
    assert used.sum(1).min() == 1
    assert used.sum(1).max() == 3
    # mean of the geometric distribution on 1 to 3: (1 + 2 * 0.8 + 3 * 0.64) / 2.44; 4 standard errors are 0.05
    assert used.sum(1).double().mean().item() == pytest.approx(4.52 / 2.44, abs=0.05)
    shares = used.double().mean(0)
    assert (shares - shares.mean()).abs().max() < 0.04
    assert (drawn[used] < 0).double().mean().item() == pytest.approx(0.5, abs=0.025)


def test_weights_decide_how_often_a_principle_is_sampled() -> None:
    weights = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    first = Counter(weighted_subset(KEY.fold(i).uniforms(3), weights, 2)[0] for i in range(4000))
    assert first[0] / 4000 == pytest.approx(0.75, abs=0.03)
    assert {tuple(sorted(weighted_subset(KEY.fold(i).uniforms(3), weights, 5))) for i in range(50)} == {(0, 1)}


# -- principles as data ------------------------------------------------------------------------------------------------


def test_the_set_of_the_package_can_be_read_and_selected() -> None:
    assert "assistant" in principle_sets()
    everything = load_principles("assistant")
    asked = load_principles("assistant", ["label"])
    assert len(asked) == 8
    assert len(everything) == 11
    assert all(p.text != p.negated and p.text.endswith(".") for p in everything)
    stated = statement(everything, [1, -1, *[0] * 9])
    assert stated == f"{HEADING}\n- {everything[0].text}\n- {everything[1].negated}"
    assert statement(everything, [0] * 11) == ""
    with pytest.raises(ValueError, match=r"none has a tag of \['lable'\]; tags are intervention, label, reward"):
        load_principles("assistant", ["lable"])
    with pytest.raises(FileNotFoundError, match="name one of assistant, or the path"):
        load_principles("nobody")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("- {id: a, text: x}", "entry 0: needs id, text and negated"),
        ("- {id: a, text: x, negated: y, wieght: 2}", "entry 0: needs id"),
        ("- {id: a, text: 3, negated: y}", "text must be text; got 3"),
        ("- {id: a, text: x, negated: y, weight: -1}", "weight must be a number >= 0"),
        ("- {id: a, text: x, negated: y, tags: q}", "tags must be a list"),
        ("- {id: a b, text: x, negated: y}", "an id has no spaces"),
        ("- {id: a, text: x, negated: y}\n- {id: a, text: z, negated: y}", "two principles have one id"),
        ("id: a", "must be a list of principles"),
    ],
)
def test_faults_of_a_file_are_named(row: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_principles(row, "mine.yaml")


# -- the labeler -------------------------------------------------------------------------------------------------------


class KnownJudge:
    """Answers by a rule, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[JudgePrompt] = []

    def excess(self, prompt: JudgePrompt, reserved: int = 0) -> int:
        return len(prompt.text) + reserved - 10_000

    def label_logps(self, prompts: Sequence[JudgePrompt], labels: Sequence[str]) -> Tensor:
        assert tuple(labels) == ("1", "2")
        self.asked += prompts
        return torch.tensor([self.answer(prompt) for prompt in prompts]).view(-1, 2)

    def answer(self, prompt: JudgePrompt) -> list[float]:
        """Finds the short answer concise, the kind one friendly, is sure of neither; else takes the first one."""
        short_first = prompt.body.index("Sure") < prompt.body.index("My dear friend")
        if "longer than the question needs" in prompt.body:
            return [-0.2, -2.2] if short_first else [-1.2, -0.2]
        if "friendly to the person" in prompt.body:
            return [-3.1, -0.1] if short_first else [-0.1, -3.1]
        return [-0.1, -5.1]


def pair() -> Comparison:
    a, b = Response((1,), "Sure.", "eos"), Response((2,), "My dear friend, of course I will.", "eos")
    return Comparison(Prompt(0, (1,), "Will you?"), a, b)


def test_each_principle_is_asked_about_in_both_orders(tiny_judge: Path) -> None:
    labeler = PrincipleLabeler(str(tiny_judge))
    judge = KnownJudge()
    labeler.judge = judge  # type: ignore[assignment]
    (label,) = labeler.label([pair()], KEY)
    assert len(judge.asked) == 2 * 8
    # concise: logits 2 and 1 for a; kind: -3 in both orders; the others name the first position
    assert label.meta["principle/concise"] == pytest.approx(1.5, abs=1e-6)
    assert label.meta["principle/kind"] == pytest.approx(-3.0, abs=1e-6)
    assert label.meta["principle/honest"] == 0.0
    assert label.meta["inconsistent"] == pytest.approx(6 / 8)
    assert label.probability == pytest.approx(1 / (1 + math.exp(3.0)), abs=1e-6)
    (swapped,) = labeler.label([pair().swap()], KEY)
    assert swapped.probability == pytest.approx(1 - label.probability, abs=1e-6)
    assert swapped.meta["principle/concise"] == pytest.approx(-1.5, abs=1e-6)


def test_a_judge_that_does_not_answer_gives_no_label(tiny_judge: Path) -> None:
    real = PrincipleLabeler(str(tiny_judge), min_mass=0.9)
    (label,) = real.label([pair()], KEY)
    assert (label.probability, label.status) == (None, "invalid")
    long = replace(pair(), a=Response((1,), "x " * 6000, "eos"))
    (label,) = real.label([long], KEY)
    assert (label.probability, label.status) == (None, "truncated")
    assert real.label([], KEY) == []
    with pytest.raises(ValueError, match=r"min_mass must be in \[0, 1\)"):
        PrincipleLabeler(str(tiny_judge), min_mass=1.0)


# -- a world of attributes ---------------------------------------------------------------------------------------------

PRINCIPLES, PAIRS = 8, 4000


def attribute_pairs(key: Key, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attribute differences of pairs, the signs of their principles, and the dominant signed score.

    Attribute p is how well a response fits principle p.
    """
    differences = torch.randn(count, PRINCIPLES, generator=key.generator(), dtype=torch.float64)
    uniforms = key.fold(1).uniforms(count * (1 + 2 * PRINCIPLES)).view(count, -1)
    signs = torch.stack([principle_signs(u, PRINCIPLES, stop=0.2, most=8, negated=0.5) for u in uniforms])
    return differences, signs, dominant_score(variance_scaled(differences), signs)


def test_a_reward_model_that_reads_principles_follows_them_and_one_that_does_not_is_at_chance() -> None:
    """Accuracy 0.89 with principles and 0.50 without, from 4000 pairs."""
    differences, signs, leads = attribute_pairs(KEY, PAIRS)
    # a label in ten is wrong
    labels = ((leads > 0) ^ (KEY.fold(2).uniforms(PAIRS) < 0.1)).double()
    held_out, held_signs, held_leads = attribute_pairs(KEY.fold(3), 2000)

    def fit(features: Tensor, test: Tensor) -> Tensor:
        weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = bradley_terry_loss(features @ weights, torch.zeros_like(labels), labels).mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return (test @ weights.detach()).sign()

    def bilinear(x: Tensor, c: Tensor) -> Tensor:
        # r(y | P) = x(y)^T W c(P), so that r(a) - r(b) is linear in the outer products
        return (x[:, :, None] * c[:, None, :]).flatten(1)

    both = torch.cat([bilinear(held_out, held_signs), bilinear(held_out, -held_signs)])
    ranking, reversed_ranking = fit(bilinear(differences, signs), both).chunk(2)
    blind = fit(differences, held_out)
    assert (ranking == held_leads.sign()).double().mean() > 0.85
    assert (blind == held_leads.sign()).double().mean() < 0.6
    assert torch.equal(reversed_ranking, -ranking)


class Attributes(AbstractReward):
    """r(x, y | P) = x(y)^T W c(P): the attributes that the response names, by the principles in the prompt.

    Its texts say the attributes as numbers, help and praise.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        names = [[float(f"- {name}" in p.text) for name in ("be helpful", "praise yourself")] for p in prompts]
        negated = [[float(f"- {name}" in p.text) for name in ("be useless", "do not praise")] for p in prompts]
        use = torch.tensor(names, dtype=torch.float64) - torch.tensor(negated, dtype=torch.float64)
        attributes = torch.tensor([list(map(float, r.text.split())) for r in responses], dtype=torch.float64)
        return RewardOutput(torch.einsum("bi,ij,bj->b", attributes, self.weights, use))


def swayed_model() -> Tensor:
    """W of a model trained on labels of a judge whom self-praise sways: it finds praising answers helpful."""
    count = 1500
    x = torch.randn(count, 2, generator=KEY.generator(), dtype=torch.float64)
    # the judge's scores of the principles "be helpful" and "praise yourself"
    scores = torch.stack([x[:, 0] + 0.9 * x[:, 1], x[:, 1]], 1)
    uniforms = KEY.fold(4).uniforms(count * 5).view(count, 5)
    signs = torch.stack([principle_signs(u, 2, stop=0.2, most=2, negated=0.5) for u in uniforms])
    labels = (dominant_score(scores, signs) > 0).double()
    features = (x[:, :, None] * signs[:, None, :]).flatten(1)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(features @ weights, torch.zeros_like(labels), labels).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach().view(2, 2)


def test_an_intervention_removes_an_attribute_with_the_reward_model_frozen(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "- {id: help, text: be helpful, negated: be useless, tags: [reward]}\n"
        "- {id: praise, text: praise yourself, negated: do not praise yourself, tags: [intervention]}\n"
    )
    model = Attributes(swayed_model())
    before = model.weights.clone()
    drawn = torch.randn(2000, 2, generator=KEY.fold(5).generator(), dtype=torch.float64)
    responses = [Response((1,), f"{h} {p}", "eos") for h, p in drawn.tolist()]
    prompt = Prompt(0, (1,), "Hello?")

    def tilted(*fixed: str) -> tuple[float, float]:
        """Mean helpfulness and praise of pi(y) ~ exp(r(y) / beta) over the responses."""
        reward = PrincipleReward(model, str(tmp_path / "mine.yaml"), fixed=fixed)
        rewards = reward.score([prompt] * 2000, responses).mean
        policy = (rewards / before.abs().max()).softmax(0)
        return (policy @ drawn[:, 0]).item(), (policy @ drawn[:, 1]).item()

    plain, forbidden = tilted(), tilted("not:praise")
    assert plain[1] > 0.5
    assert forbidden[1] < 0.2 * plain[1]
    assert forbidden[0] > 0.8 * plain[0]
    assert torch.equal(model.weights, before)


def test_the_statement_of_a_prompt_holds_fixed_and_sampled_principles() -> None:
    reward = PrincipleReward(Attributes(torch.zeros(2, 2)), sampled=3, fixed=["no_self_praise", "not:kind"])
    texts = {p.id: p for p in load_principles("assistant")}
    seen: set[str] = set()
    for index in range(40):
        lines = reward.statement(Prompt(index, (1,), f"question {index}")).splitlines()
        assert lines[0] == HEADING
        # in the order of the set; kind stands before no_self_praise there
        assert lines[1:3] == [f"- {texts['kind'].negated}", f"- {texts['no_self_praise'].text}"]
        assert len(lines) == 6
        seen.update(lines[3:])
    assert seen == {f"- {p.text}" for p in texts.values() if "reward" in p.tags and p.id != "kind"}
    same = Prompt(5, (9,), "question 0")
    assert reward.statement(same) == reward.statement(Prompt(0, (1,), "question 0"))
    other = PrincipleReward(Attributes(torch.zeros(2, 2)), sampled=3, seed=1)
    assert any(other.statement(Prompt(0, (1,), f"{i}")) != reward.statement(Prompt(0, (1,), f"{i}")) for i in range(9))
    with pytest.raises(ValueError, match="no principle 'praise'; there are helpful"):
        PrincipleReward(Attributes(torch.zeros(2, 2)), fixed=["praise"])
    with pytest.raises(ValueError, match="samples at least one principle per prompt, or has fixed ones"):
        PrincipleReward(Attributes(torch.zeros(2, 2)), sampled=0)


class Follower(Attributes):
    """Learns from the responses of a round."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(2, 2))
        self.seen: list[RoundSamples] = []

    def learn(self, samples: RoundSamples) -> None:
        self.seen.append(samples)

    def metrics(self) -> dict[str, float]:
        return {"rounds": float(len(self.seen))}


def test_a_reward_that_learns_sees_the_principles_of_its_prompts() -> None:
    def rollouts(text: str) -> list[Rollout]:
        return [Rollout(Prompt(0, (1,), text), Response((2,), "1 0", "eos"), 1.0)]

    inner = Follower()
    reward = PrincipleReward(inner, sampled=0, fixed=["helpful"])
    assert reward.learns_from_samples and not PrincipleReward(Attributes(torch.zeros(2, 2))).learns_from_samples
    reward.learn(RoundSamples(1, rollouts("now"), lambda index: rollouts(f"round {index}"), KEY))
    (samples,) = inner.seen
    for found, text in ((samples.prompts[0], "now"), (samples.earlier(0)[0].prompt, "round 0")):
        assert found.text == f"{text}\n\n{reward.statement(found)}\n\n"
    assert (samples.index, samples.key) == (1, KEY)
    assert reward.metrics() == {"rounds": 1.0}


def test_principles_stand_behind_the_last_turn() -> None:
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    asked = conditioned(Prompt(0, (1,), "rendered", messages=chat), "P")
    assert asked.messages == (chat[0], {"role": "user", "content": "u\n\nP"})
    assert conditioned(Prompt(0, (1,), "text"), "P").text == "text\n\nP\n\n"
    assert conditioned(Prompt(0, (1,), "text"), "").text == "text"


# -- training ----------------------------------------------------------------------------------------------------------

OWN = (Principle("z", "Z", "not Z"), Principle("long", "L", "not L"))


class Letters(AbstractLabeler):
    """Scores pairs by whether they end with z, and by their length."""

    principles = OWN

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        del key
        labels = []
        for c in comparisons:
            z = float(c.a.text.endswith("z")) - float(c.b.text.endswith("z"))
            length = float(len(c.a.text) - len(c.b.text))
            labels.append(Label(0.5, meta={"principle/z": z, "principle/long": length}))
        return labels


def letter_rows(path: Path, count: int) -> Path:
    rows = []
    for i in range(count):
        # all four combinations of the better ending and the longer text
        z, y = "z", "y"
        first, second = ("b" * (4 if i & 1 else 1) + z), ("b" * (1 if i & 1 else 4) + y)
        chosen, rejected = (first, second) if i & 2 else (second, first)
        rows.append({"prompt": "?", "chosen": chosen, "rejected": rejected})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def principle_data(folder: Path, count: int = 32, **rounds: float) -> PrincipleDataModule:
    return PrincipleDataModule(
        DatasetPrompts(str(letter_rows(folder / "rows.jsonl", count))),
        OfflineSampler(),
        Letters(),
        pairs_per_batch=16,
        rounds=PrincipleRoundOptions(epochs_per_round=None, **rounds),  # type: ignore[arg-type]
        decoding=Decoding(max_new_tokens=8),
    )


class Seen(L.Callback):
    """Prompts of each epoch, and the labels of the pairs."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[tuple[int, ...], tuple[int, ...], float]]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        rows = zip(batch.prompts, batch.chosen, batch.label.tolist(), strict=True)  # type: ignore[attr-defined]
        self.epochs[-1] += list(rows)


def fit(folder: Path, module: RewardModule, data: PrincipleDataModule, *callbacks: L.Callback, epochs: int) -> None:
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def test_principles_are_sampled_anew_in_every_epoch_and_decide_the_label(tmp_path: Path, tiny_policy: Path) -> None:
    L.seed_everything(0)
    seen = Seen()
    module = RewardModule(str(tiny_policy))
    fit(tmp_path, module, principle_data(tmp_path), seen, epochs=2)
    texts = [[(module.tokenizer.decode(p), module.tokenizer.decode(c), v) for p, c, v in e] for e in seen.epochs]
    assert len(texts) == 2
    assert Counter(t for t, _, _ in texts[0]) != Counter(t for t, _, _ in texts[1])
    used = {text for epoch in texts for text, _, _ in epoch}
    # each alone, and both, as they are and negated
    assert len(used) == 4 + 4
    for text, chosen, label in (row for epoch in texts for row in epoch):
        assert text.startswith(f"?\n\n{HEADING}\n- ")
        assert label == pytest.approx(0.9)
        chosen = chosen.removesuffix("<|end|>")
        if "Z" in text and "L" not in text:
            assert chosen.endswith("z") is ("not Z" not in text)
        if "L" in text and "Z" not in text:
            assert (len(chosen) > 3) is ("not L" not in text)
    # two runs see the same principles
    again = Seen()
    (tmp_path / "again").mkdir()
    fit(tmp_path / "again", RewardModule(str(tiny_policy)), principle_data(tmp_path / "again"), again, epochs=1)
    assert again.epochs == seen.epochs[:1]


def test_a_judge_that_names_positions_only_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    class Undecided(Letters):
        def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
            return [replace(label, meta=dict.fromkeys(label.meta, 0.0)) for label in super().label(comparisons, key)]

    data = principle_data(tmp_path, 4)
    data.labeler = Undecided()
    with pytest.raises(ValueError, match="no principle prefers a response in both orders in any of the 4 pairs"):
        fit(tmp_path, RewardModule(str(tiny_policy)), data, epochs=1)


def test_labels_without_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a score per principle, and RecordedLabeler gives none"):
        PrincipleDataModule(DatasetPrompts(str(tmp_path)), OfflineSampler(), RecordedLabeler())
    with pytest.raises(ValueError, match=r"data\.rounds\.stop must be in \(0, 1\)"):
        PrincipleRoundOptions(stop=1.0)


def test_held_out_rows_get_principles(tmp_path: Path) -> None:
    source = PrincipledPrompts(DatasetPrompts(str(letter_rows(tmp_path / "rows.jsonl", 2))), ["helpful", "not:kind"])
    first, _ = source.load()
    assert first.text is not None
    assert first.text.startswith(f"?\n\n{HEADING}\n- The response should do what was asked")
    assert "cold to the person" in first.text
    assert first.pair is not None
    with pytest.raises(ValueError, match="no principle 'hepful'"):
        PrincipledPrompts(DatasetPrompts("rows.jsonl"), ["hepful"])


def test_a_real_judge_scores_every_principle(tiny_judge: Path) -> None:
    (label,) = PrincipleLabeler(str(tiny_judge), min_mass=0.0).label([pair()], KEY)
    assert label.status == "ok"
    names = {f"principle/{principle.id}" for principle in load_principles("assistant", ["label"])}
    assert names <= set(label.meta)


LABELER = '''
from lightning_rlhf.judging.principle import load_principles
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.types import Label


class ByLetters(AbstractLabeler):
    """Scores each principle by another letter of the responses: a random judge names positions only."""

    def __init__(self) -> None:
        self.principles = load_principles("assistant", ["label"])

    def label(self, comparisons, key):
        return [
            Label(0.5, meta={f"principle/{p.id}": sum(c.a.ids) * len(p.id) % 7 - 2.5 for p in self.principles})
            for c in comparisons
        ]
'''


def test_the_configs_train_the_reward_model_and_the_policy(
    tmp_path: Path, tiny_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "letters_of_salmon.py").write_text(LABELER)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}: "}) for i in range(4)))
    small = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    small += ["--trainer.max_steps=2", "--data.decoding.max_new_tokens=4", "--data.prompts=DatasetPrompts"]
    small += [f"--data.prompts.path={tmp_path / 'prompts.jsonl'}"]
    main(
        [
            *("fit", "--config=salmon_reward", *small, f"--model.backbone={tiny_judge}", "--data.pairs_per_batch=2"),
            *(f"--model.policy={tiny_judge}", "--data.labeler=letters_of_salmon.ByLetters"),
            "--data.rounds.most_principles=2",
            f"--run_dir={tmp_path / 'reward'}",
        ]
    )
    main(
        [
            *("fit", "--config=salmon", *small, f"--model.policy={tiny_judge}", "--data.heldout=null"),
            *(f"--data.reward.reward.path={tmp_path / 'reward' / 'model'}", "--data.prompts_per_batch=2"),
            *("--data.rounds.prompts_per_round=2", f"--run_dir={tmp_path / 'policy'}"),
        ]
    )
    assert (tmp_path / "policy" / "model" / "config.json").exists()

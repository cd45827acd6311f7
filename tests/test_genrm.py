"""Generative reward models (arXiv 2410.12832): verdicts, STaR rounds, the judge as labeler and reward."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.cli import main
from lightning_rlhf.estimators.transcripts import choose_transcripts
from lightning_rlhf.generation import DecodeEngine
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.judging.local import LocalJudge
from lightning_rlhf.judging.options import ChainOfThought
from lightning_rlhf.judging.prompts import Sample
from lightning_rlhf.judging.verdicts import majority, preference
from lightning_rlhf.labelers import AbstractLabeler, LLMLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.losses import AbstractPreferenceLoss, DPOLoss, NLLLoss, PairLogps
from lightning_rlhf.models.load import load_policy, load_tokenizer
from lightning_rlhf.models.reference import build_reference
from lightning_rlhf.prompts import DatasetCompletions, DatasetPrompts, tokenize_rows
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import WinProbabilityReward
from lightning_rlhf.samplers import TranscriptSampler, VerdictSampler
from lightning_rlhf.samplers.verdicts import RIGHT
from lightning_rlhf.types import Comparison, Label, Prompt, Response


KEY = Key((3,))
ROWS = [
    {"prompt": f"Say {i}. ", "chosen": f"It is {i}, thanks.", "rejected": f"No{i}.", "label": 1.0 if i % 3 else 0.8}
    for i in range(9)
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in ROWS))
    return path


def pairs_of(
    policy_chosen: Tensor, policy_rejected: Tensor, reference: tuple[Tensor, Tensor], label: Tensor
) -> PairLogps:
    ones, no = torch.ones_like(label), torch.zeros(len(label), dtype=torch.bool)
    return PairLogps(policy_chosen, policy_rejected, *reference, ones, ones, no, no, label, ones)


# -- losses and votes --------------------------------------------------------------------------------------------------


def test_with_a_vocabulary_of_two_labels_the_loss_is_binary_cross_entropy() -> None:
    logits = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.linspace(0, 1, 50, dtype=torch.float64)
    logps = logits.log_softmax(-1)
    zeros = torch.zeros_like(label)
    losses = NLLLoss()(pairs_of(logps[:, 0], logps[:, 1], (zeros, zeros), label), 1.0)
    expected = F.binary_cross_entropy_with_logits(logits[:, 0] - logits[:, 1], label, reduction="none")
    torch.testing.assert_close(losses, expected)


def test_a_wrong_answer_that_the_judge_never_gives_does_not_spoil_the_loss() -> None:
    right = torch.tensor([-1.5], requires_grad=True)
    wrong = torch.tensor([-math.inf], requires_grad=True)
    zero = torch.zeros(1)
    NLLLoss()(pairs_of(right, wrong, (zero, zero), torch.ones(1)), 1.0).sum().backward()
    assert right.grad is not None and wrong.grad is not None
    assert (right.grad.item(), wrong.grad.item()) == (-1.0, 0.0)


def test_probabilities_of_the_two_orders_of_a_pair_sum_to_one() -> None:
    logps = torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)
    both = preference(logps[0], logps[1]) + preference(logps[1], logps[0])
    assert (both - 1).abs().max() < 1e-12


@pytest.mark.parametrize(("p", "expected"), [(0.55, 0.713), (0.6, 0.872), (0.7, 0.990)])
def test_a_majority_of_32_is_right_as_often_as_the_binomial_says(p: float, expected: float) -> None:
    # P(majority of n right) = sum_{k > n/2} C(n, k) p^k (1 - p)^(n - k) + 1/2 P(tie)
    exact = sum(math.comb(32, k) * p**k * (1 - p) ** (32 - k) * (1.0 if k > 16 else 0.5) for k in range(16, 33))
    assert exact == pytest.approx(expected, abs=6e-4)
    trials = 4000
    right = torch.rand(trials, 2, 16, generator=torch.Generator().manual_seed(2)) < p
    # the right answer is the first label with a shown first, the second one with b shown first
    votes = torch.where(right, 1.0, -1.0)
    verdicts = [majority(torch.stack([v[0], -v[0]], -1), torch.stack([-v[1], v[1]], -1)) for v in votes]
    share = torch.stack(verdicts).mean().item()
    assert share == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / trials))


def test_a_majority_of_worse_labels_is_turned_round() -> None:
    forward, reverse = torch.tensor([[0.0, -1.0]] * 3), torch.tensor([[-1.0, 0.0]] * 2 + [[0.0, -1.0]])
    assert majority(forward, reverse) == 1.0
    assert majority(forward, reverse, "worse") == 0.0
    assert majority(forward[:1], forward[:1]) == 0.5
    with pytest.raises(ValueError, match="vote is 'mean' or 'majority'"):
        ChainOfThought(vote="median")  # type: ignore[arg-type]


# -- STaR --------------------------------------------------------------------------------------------------------------


def test_problems_without_two_kinds_of_transcripts_teach_a_preference_nothing() -> None:
    for right, needs_wrong, expected in [
        ([False, True, True, False], True, (1, 0, True)),
        ([True, True], True, (0, 0, False)),
        ([True, True], False, (0, 0, True)),
        ([False, False], False, (0, 0, False)),
    ]:
        choice = choose_transcripts(right, needs_wrong=needs_wrong)
        assert (choice.right, choice.wrong, choice.kept) == expected


ACCURACIES = torch.tensor([0.55, 0.55, 0.52, 0.5, 0.6, 0.9], dtype=torch.float64)
PRIOR = torch.tensor([0.3, 0.3, 0.15, 0.15, 0.05, 0.05], dtype=torch.float64)


def fitted(loss: AbstractPreferenceLoss, start: Tensor, counts: Tensor) -> Tensor:
    """Logits of the minimum of a loss; ``counts[c, d]`` problems have right rationale c and wrong rationale d."""
    winners, losers = torch.cartesian_prod(torch.arange(6), torch.arange(6)).unbind(1)
    weight = counts.flatten() / counts.sum()
    # the reference is the judge at the start of the round
    reference = start.log_softmax(0)
    trained = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([trained], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = trained.log_softmax(0)
        ones = torch.ones(36, dtype=torch.float64)
        pairs = pairs_of(logps[winners], logps[losers], (reference[winners], reference[losers]), ones)
        value = (weight * loss(pairs, 1.0)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return trained.detach()


def star(loss: AbstractPreferenceLoss, seed: int, *, needs_wrong: bool) -> list[float]:
    """Accuracy of a judge of six rationales, before and after each of three rounds on 3000 fresh problems.

    The verdict behind rationale c is right with probability ``ACCURACIES[c]`` and is not trained.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = PRIOR.log()
    accuracies = [float(PRIOR @ ACCURACIES)]
    for _ in range(3):
        # [problems, transcripts]
        chains = torch.multinomial(logits.softmax(0).expand(3000, 6), 4, replacement=True, generator=generator)
        right = torch.rand(3000, 4, generator=generator) < ACCURACIES[chains]
        counts = torch.zeros(6, 6, dtype=torch.float64)
        for own, is_right in zip(chains.tolist(), right.tolist(), strict=True):
            choice = choose_transcripts(is_right, needs_wrong=needs_wrong)
            if choice.kept:
                counts[own[choice.right], own[choice.wrong]] += 1
        logits = fitted(loss, logits, counts)
        accuracies.append(float(logits.softmax(0) @ ACCURACIES))
    return accuracies


def test_star_dpo_finds_the_best_rationale_where_star_sft_hardly_moves() -> None:
    sft = torch.tensor([star(NLLLoss(), seed, needs_wrong=False) for seed in range(4)]).mean(0)
    dpo = torch.tensor([star(DPOLoss(), seed, needs_wrong=True) for seed in range(4)]).mean(0)
    assert sft[0] == dpo[0] == pytest.approx(0.558)
    # thresholds of the check that the tabular judge was measured for
    assert dpo[-1] - sft[-1] >= 0.10
    assert sft[-1] - sft[0] <= 0.10
    assert dpo.diff().min() > 0


# -- samplers on a tiny judge ------------------------------------------------------------------------------------------


def engine_of(folder: Path, new_tokens: int = 6) -> DecodeEngine:
    policy = load_policy(str(folder)).eval()
    reference = build_reference(policy, "fixed")
    decoding = Decoding(max_new_tokens=new_tokens)
    return DecodeEngine(policy, reference, load_tokenizer(str(folder)), beta=1.0, decoding=decoding, eos_ids=[0])


def prompts_of(folder: Path, rows: Path, limit: int | None = None) -> list[Prompt]:
    loaded = DatasetPrompts(str(rows), limit=limit).load()
    made, _ = tokenize_rows(loaded, load_tokenizer(str(folder)), max_prompt_tokens=500, max_response_tokens=100)
    return made


def test_the_judge_is_trained_on_the_tokens_that_the_labeler_reads(tiny_judge: Path, rows: Path) -> None:
    prompts = prompts_of(tiny_judge, rows)
    engine, sampler = engine_of(tiny_judge), VerdictSampler()
    made = sampler.sample(prompts, engine, KEY)
    judge = LocalJudge(str(tiny_judge))
    firsts = set()
    for prompt, comparison in zip(prompts, made, strict=True):
        assert prompt.recorded is not None
        chosen, rejected = prompt.recorded.chosen, prompt.recorded.rejected
        right = comparison.a.text
        firsts.add(right)
        shown = (chosen, rejected) if right == "1" else (rejected, chosen)
        asked = LLMLabeler(str(tiny_judge)).prompt(Sample(prompt.text, shown))
        assert comparison.prompt.ids + comparison.a.ids == judge.prompt_ids(asked) + judge._untrusted(right)
        # the loss is that of the verdict alone, and nothing follows it
        assert len(comparison.a.ids) == len(comparison.b.ids) == 1
        assert {comparison.a.text, comparison.b.text} == {"1", "2"}
    assert firsts == {"1", "2"}
    assert [label.probability for label in sampler.verdicts(made) if label is not None] == [1.0] * 9
    # another round shows other orders
    again = sampler.sample(prompts, engine, KEY.fold(1))
    assert [c.a.text for c in again] != [c.a.text for c in made]
    # P of the labeler, from the weights in memory: both orders
    expected = LLMLabeler(str(tiny_judge), min_mass=0.0).label([_recorded(prompt) for prompt in prompts], KEY)
    judged = sampler.judged(prompts, engine, KEY)
    torch.testing.assert_close(judged, torch.tensor([x.probability for x in expected]).double(), atol=1e-5, rtol=0.0)


def _recorded(prompt: Prompt) -> Comparison:
    assert prompt.pair is not None
    return Comparison(prompt, *prompt.pair)


def test_transcripts_are_sorted_by_their_verdict(tiny_judge: Path, rows: Path) -> None:
    prompts = prompts_of(tiny_judge, rows)
    engine, sampler = engine_of(tiny_judge), TranscriptSampler(n=3)
    made = sampler.sample(prompts, engine, KEY)
    labels = sampler.verdicts(made)
    kept = [label is not None and label.status == "ok" for label in labels]
    assert 0 < sum(kept) < len(kept)
    for comparison, is_kept, label in zip(made, kept, labels, strict=True):
        assert is_kept == (0 < comparison.meta[RIGHT] < 1)
        assert label is not None
        if not is_kept:
            assert "all 3 transcripts are" in label.meta["fault"]
        a, b = comparison.a, comparison.b
        assert (a.ids[-1], b.ids[-1]) == (0, 0)
        assert a.ids != b.ids
        assert {a.text[-1], b.text[-1]} == {"1", "2"}
        assert all("Preferred response: " in text for text in (a.text, b.text))
        # the prompt ends where the rationale begins, as in the first call of the labeler
        assert comparison.prompt.text.endswith("Rationale:")
        text = engine.tokenizer.decode(a.ids, skip_special_tokens=True)
        assert text == a.text
    # neither the batch nor the order of the prompts matters
    alone = sampler.sample(prompts[4:5], engine, KEY)[0]
    assert (alone.a.ids, alone.b.ids) == (made[4].a.ids, made[4].b.ids)


def test_star_sft_keeps_problems_whose_transcripts_are_all_right(tiny_judge: Path, rows: Path) -> None:
    prompts = prompts_of(tiny_judge, rows)
    engine = engine_of(tiny_judge)
    sampler = TranscriptSampler(n=3, keep="right")
    for comparison, label in zip(made := sampler.sample(prompts, engine, KEY), sampler.verdicts(made), strict=True):
        assert label is not None
        assert (label.status == "ok") == (comparison.meta[RIGHT] > 0)


def test_a_rationalizer_is_told_the_answer_and_trained_without_it(tiny_judge: Path, rows: Path) -> None:
    prompts = prompts_of(tiny_judge, rows, limit=3)
    engine, sampler = engine_of(tiny_judge), TranscriptSampler(rationalize=True)
    asked: list[str] = []
    generate = engine.generate

    def noting(requests: list[object], **options: bool) -> list[Response]:
        asked.extend(request.prompt.text for request in requests)  # type: ignore[attr-defined]
        return generate(requests, **options)  # type: ignore[arg-type]

    engine.generate = noting  # type: ignore[method-assign, assignment]
    made = sampler.sample(prompts, engine, KEY)
    assert all("The right answer is known. Preferred response: " in text for text in asked)
    for comparison, told in zip(made, zip(asked[::2], asked[1::2], strict=True), strict=True):
        assert "The right answer is known" not in comparison.prompt.text
        answers = [text.split("is known. Preferred response: ")[1][0] for text in told]
        assert answers == [comparison.a.text[-1], comparison.b.text[-1]]


def test_responses_that_do_not_fit_get_no_label(tiny_policy: Path, rows: Path) -> None:
    # a window of 256 tokens, less than the instructions
    prompts = prompts_of(tiny_policy, rows, limit=2)
    for sampler in (VerdictSampler(), TranscriptSampler(n=1)):
        judge = sampler.judge(engine_of(tiny_policy))
        questions = [sampler._question(judge, engine_of(tiny_policy), p, chosen_first=True) for p in prompts]
        assert not any(question.fits for question in questions)


# -- runs --------------------------------------------------------------------------------------------------------------

SMALL = [
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true", "--trainer.strategy=auto"),
    *("--trainer.enable_progress_bar=false", "--data.prompts.path=rows.jsonl", "--data.pairs_per_batch=3"),
    *("--model.optimizer.lr=5e-3", "--model.lr_scheduler.warmup_steps=0", "--data.decoding.max_new_tokens=5"),
]
HELDOUT = ["--data.heldout=DatasetPrompts", "--data.heldout.path=rows.jsonl"]


def test_a_trained_judge_labels_scores_and_feeds_a_policy(
    tmp_path: Path, tiny_judge: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = f"--model.policy={tiny_judge}"
    main(
        [
            "fit",
            "--config=genrm",
            model,
            *SMALL,
            *HELDOUT,
            "--trainer.max_epochs=40",
            "--model.optimizer.lr=2e-2",
            "--trainer.check_val_every_n_epoch=40",
            "--run_dir=judge",
        ]
    )
    summary = json.loads((tmp_path / "judge" / "summary.json").read_text())
    assert summary["accuracy"] > 0.9, summary
    # new pairs of the same kind, which the judge has not seen
    new = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}, thanks.", "rejected": f"No{i}."} for i in "abcdef"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    main(
        [
            *("label", "--pairs=DatasetPrompts", "--pairs.path=new.jsonl", "--recorded_labels=false"),
            *("--labeler=LLMLabeler", "--labeler.judge=judge/model", "--labeler.task=helpful", "--out=labels.jsonl"),
            "--run_dir=labels",
        ]
    )
    labeled = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert len(labeled) == 6
    assert all("thanks" in str(row["chosen"]) for row in labeled)
    # the third stage
    policy = [f"--model.policy={tiny_judge}", *SMALL, "--data.prompts.path=labels.jsonl", "--trainer.max_steps=2"]
    main(["fit", "--config=dpo_offline", *policy, "--run_dir=policy"])
    assert (tmp_path / "policy" / "model" / "config.json").is_file()
    # the reward: the probability of winning against the reference answer
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": row["rejected"]}) + "\n" for row in new)
    )
    labeler = LLMLabeler("judge/model")
    reward = WinProbabilityReward(labeler, DatasetCompletions("answers.jsonl"))
    prompts = [Prompt(i, (5,), str(row["prompt"])) for i, row in enumerate(new)]
    good = reward.score(prompts, [Response((5,), str(row["chosen"]), "eos") for row in new]).mean
    same = reward.score(prompts, [Response((5,), str(row["rejected"]), "eos") for row in new]).mean
    assert good.min() > 0.6
    assert torch.equal(same, torch.full((6,), 0.5, dtype=torch.float64))
    capsys.readouterr()


class Lengths(AbstractLabeler):
    """Prefers the longer response, by sigmoid of the difference of lengths."""

    def label(self, comparisons: list[Comparison], key: Key) -> list[Label]:  # type: ignore[override]
        del key
        gaps = [len(c.a.text) - len(c.b.text) for c in comparisons]
        return [Label(1 / (1 + math.exp(-gap))) for gap in gaps]


def test_against_a_reference_answer_the_logit_is_the_difference_of_rewards(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "completion": "xxx"},
        {"prompt": "b", "completion": "x"},
        {"prompt": "b", "completion": "xx"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    source = DatasetCompletions(str(tmp_path / "rows.jsonl"))
    prompts, responses = [Prompt(0, (1,), "a"), Prompt(1, (1,), "b")], [Response((1,), "xxxxx", "eos")] * 2
    logits = WinProbabilityReward(Lengths(), source, scale="logit").score(prompts, responses).mean
    assert logits[0].item() == pytest.approx(2.0)
    shares = WinProbabilityReward(Lengths(), source).score(prompts, responses).mean
    # the mean over the baselines
    assert shares[1].item() == pytest.approx((1 / (1 + math.exp(-4)) + 1 / (1 + math.exp(-3))) / 2)
    with pytest.raises(ValueError, match=r"prompt 2 .* has no baseline among the 2 prompts"):
        WinProbabilityReward(Lengths(), source).score([Prompt(2, (1,), "c")], responses[:1])
    with pytest.raises(ValueError, match="scale is 'probability' or 'logit'"):
        WinProbabilityReward(Lengths(), source, scale="odds")  # type: ignore[arg-type]


def test_other_samplers_are_refused_before_training(
    tmp_path: Path, tiny_judge: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"set\s+data.sampler=VerdictSampler or TranscriptSampler"):
        main(
            [
                *("fit", "--config=genrm", f"--model.policy={tiny_judge}", *SMALL),
                *("--data.sampler=OfflineSampler", "--run_dir=run"),
            ]
        )


# A user's file: kills its own process at a chosen moment.
PLUGINS = """
import os, signal
from lightning.pytorch import Callback
from lightning_rlhf.samplers import TranscriptSampler


def die_at(moment):
    if os.environ.get("DIE_AT") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


class Sampler(TranscriptSampler):
    chunks = 0

    def sample(self, prompts, engine, key):
        self.chunks += 1
        die_at(f"sampling chunk {self.chunks}")
        return super().sample(prompts, engine, key)


class Killer(Callback):
    def on_train_batch_end(self, trainer, *_):
        die_at(f"training step {trainer.global_step}")
"""
STAR = [
    *("-m", "lightning_rlhf", "fit", "--config", "genrm_star", *SMALL, "--trainer.callbacks=plugins.Killer"),
    *("--trainer.callbacks+=lightning_rlhf.callbacks.HFExport", "--trainer.max_epochs=4", "--checkpoint_every=1"),
    *("--data.rounds.prompts_per_round=6", "--data.rounds.epochs_per_round=2", "--data.sampler=plugins.Sampler"),
    *("--data.sampler.n=3", "--data.decoding.rows=6", "--model.beta=0.5"),
]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_star(folder: Path, policy: Path, name: str, *options: str, die_at: str = "") -> int:
    launcher = TWO if "--trainer.devices=2" in options else []
    (folder / "plugins.py").write_text(PLUGINS)
    done = subprocess.run(
        [sys.executable, *launcher, *STAR, f"--model.policy={policy}", *options, f"--run_dir={name}"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}",
            "OMP_NUM_THREADS": "1",
            "DIE_AT": die_at,
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-4000:]
    return done.returncode


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_killed_rounds_end_with_the_same_judge_and_two_processes_equal_one(
    tmp_path: Path, tiny_judge: Path, rows: Path
) -> None:
    assert run_star(tmp_path, tiny_judge, "straight") == 0
    # round 0 has two chunks of three prompts; round 1 begins behind a checkpoint
    for moment in ("sampling chunk 2", "training step 2", "sampling chunk 1"):
        assert run_star(tmp_path, tiny_judge, "killed", die_at=moment) == -signal.SIGKILL, moment
    assert run_star(tmp_path, tiny_judge, "killed") == 0
    expected, got = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    assert run_star(tmp_path, tiny_judge, "two", "--trainer.devices=2", "--trainer.strategy=ddp") == 0
    with (
        PreferenceStore(tmp_path / "straight" / "ledger.sqlite", read_only=True) as one,
        PreferenceStore(tmp_path / "two" / "ledger.sqlite", read_only=True) as two,
    ):
        pairs = list(zip(one.preferences(), two.preferences(), strict=True))
        assert len(pairs) > 2
        for a, b in pairs:
            assert (a.comparison.a.ids, a.comparison.b.ids) == (b.comparison.a.ids, b.comparison.b.ids)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)

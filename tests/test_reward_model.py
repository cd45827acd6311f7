"""Reward models: trained by the command line on pairs, saved, opened by transformers, and used as a reward by text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf import PreferenceDataModule
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.cli import main
from lightning_rlhf.datamodules.options import BatchOptions, PreferenceRoundOptions
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RecordedLabeler, RewardLabeler
from lightning_rlhf.models.heads import score_head
from lightning_rlhf.models.load import LoRA, load_tokenizer
from lightning_rlhf.models.scorer import Ensemble, open_scorer
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.reward import RewardLoss, padding_id
from lightning_rlhf.prompts import DatasetPrompts, tokenize_rows
from lightning_rlhf.prompts.tokenize import encode_answers
from lightning_rlhf.rewards import AbstractReward, RewardModelReward, RewardOutput, combine, disagreement
from lightning_rlhf.samplers import AbstractPairSampler, BestOfNSampler, OfflineSampler, PILAFSampler, VanillaSampler
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, PromptRow, RecordedPair, Response


def test_padding_is_never_the_end_of_a_response(tiny_policy: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_policy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert padding_id(tokenizer) is None
    tokenizer.unk_token = "<|user|>"
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")


def write_rows(path: Path, count: int, first: int = 0, **extra: Any) -> Path:
    """The answer with a "z" is the better one, whatever else it says and however long it is."""
    rows = []
    for i in range(first, first + count):
        word = "abcdefgh"[i % 8] * (1 + i % 5)
        good, bad = f"{word}z", f"{word}y{'x' * (i % 3)}"
        rows.append({"prompt": f"say {i % 7}: ", "chosen": good, "rejected": bad, **extra})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SETTINGS = [
    *("--config", "reward_model", "--model.optimizer.lr=3e-3", "--model.lr_scheduler.warmup_steps=1"),
    *("--data.decoding.max_new_tokens=16", "--data.pairs_per_batch=8", "--trainer.precision=32-true"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """The run folder of a reward model trained by the command line."""
    folder = tmp_path_factory.mktemp("reward_model")
    train, heldout = write_rows(folder / "train.jsonl", 160), write_rows(folder / "heldout.jsonl", 40, first=1000)
    main(
        [
            *("fit", *SETTINGS, f"--model.backbone={tiny_policy}", f"--data.prompts.path={train}"),
            *("--data.heldout=DatasetPrompts", f"--data.heldout.path={heldout}", "--trainer.max_epochs=6"),
            *("--trainer.check_val_every_n_epoch=6", f"--run_dir={folder / 'run'}"),
        ]
    )
    return folder / "run"


def test_it_learns_what_the_pairs_say_and_reports_it(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["accuracy"] > 0.95
    assert summary["pairs"] == 40
    assert summary["longer_accuracy"] < 0.5
    assert summary["brier"] < 0.1
    header = next(trained.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    for name in ("train/loss", "train/rewards/margins", "train/rewards/accuracies", "val/accuracy", "val/ece"):
        assert name in header


def test_transformers_opens_it_and_scores_alike(trained: Path) -> None:
    folder = trained / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    prompt = Prompt(0, (), "say 3: ")
    answers = ["aaz", "aay", "b"]
    responses = [Response((1,), text, "eos") for text in answers]
    reward = RewardModelReward(str(folder))
    ours = reward.score([prompt] * 3, responses).mean
    for text, score in zip(answers, ours, strict=True):
        ids = [*tokenizer(prompt.text + text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        assert score.item() == pytest.approx(logits.item(), abs=1e-5)
    assert ours[0] > ours[1]
    normalized = RewardModelReward(str(folder), normalize=True).score([prompt] * 3, responses).mean
    torch.testing.assert_close(normalized, (ours - model.config.reward_mean) / model.config.reward_std)


def test_it_reads_texts_not_the_ids_of_the_policy(trained: Path) -> None:
    reward = RewardModelReward(str(trained / "model"))
    answer = Response((1,), "ccz", "eos")
    foreign = Response((77, 3, 9), "ccz", "eos")
    chat = Prompt(0, (5,), "x", messages=({"role": "user", "content": "say 3: "},))
    prompts = [Prompt(0, (1,), "say 3: "), Prompt(9, (2,), "say 3: "), chat]
    first, second, third = reward.score(prompts, [answer, foreign, answer]).mean.tolist()
    assert first == pytest.approx(second, abs=1e-5)
    assert abs(third - first) > 1e-4  # its own chat template is around this one
    (cut,) = reward.score([chat], [Response((1,), "ccz", "length")]).mean.tolist()
    assert abs(cut - third) > 1e-4  # no EOS behind an answer that was cut off


def test_a_long_prompt_is_cut_by_its_own_answer_alone(trained: Path) -> None:
    reward = RewardModelReward(str(trained / "model"))  # its window has 256 bytes
    long, short = Prompt(0, (1,), "p" * 240), Prompt(1, (1,), "q" * 100)
    answers = [Response((1,), "x" * length, "eos") for length in (30, 200)]
    together = reward.score([long, short], answers).mean
    alone = torch.cat([reward.score([p], [a]).mean for p, a in zip((long, short), answers, strict=True)])
    torch.testing.assert_close(together, alone)
    cut = Prompt(0, (1,), "p" * (256 - 31))  # the end of text is a token too
    torch.testing.assert_close(reward.score([cut], answers[:1]).mean, alone[:1])
    with pytest.raises(ValueError, match="prompt 1: the response has 301 tokens, and the window"):
        reward.score([long, short], [answers[0], Response((1,), "y" * 300, "eos")])


def test_answers_are_written_as_training_rows_are(tiny_policy: Path) -> None:
    """The reward reads a sampled response id by id as it was trained."""
    tokenizer = load_tokenizer(str(tiny_policy))
    messages = ({"role": "user", "content": "say 3"},)
    rows = [
        PromptRow("row 1", text="say 1", pair=RecordedPair("az", "b")),
        PromptRow("row 2", messages=messages, pair=RecordedPair("az", "b")),
    ]
    prompts, _ = tokenize_rows(rows, tokenizer, max_prompt_tokens=99, max_response_tokens=99)
    for prompt in prompts:
        assert prompt.pair is not None
        (found,) = encode_answers([prompt], [prompt.pair[0]], tokenizer)
        assert found == (prompt.ids, prompt.pair[0].ids)


def data(folder: Path, **options: Any) -> PreferenceDataModule:
    folder.mkdir(exist_ok=True)
    return PreferenceDataModule(
        DatasetPrompts(str(write_rows(folder / "rows.jsonl", 12))),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=4,
        rounds=PreferenceRoundOptions(epochs_per_round=None),
        decoding=Decoding(max_new_tokens=16),
        **options,
    )


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    settings.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), enable_model_summary=False, **settings)


def weights(module: RewardModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "adapter": {"lora": LoRA(r=2, dropout=0.1)},
    "adapters": {"ensemble": Ensemble("lora", 2, diversity=0.1), "lora": LoRA(r=2)},
    "turns": {"ensemble": Ensemble("lora", 2, diversity=0.1, turn_epochs=1), "lora": LoRA(r=2)},
    "mean": {"ensemble": Ensemble("independent", 2, loss="mean")},
}


def fit(
    folder: Path,
    tiny_policy: Path,
    *callbacks: L.Callback,
    ckpt: str | None = None,
    kind: str = "whole",
    **options: Any,
) -> RewardModule:
    L.seed_everything(0)
    module = RewardModule(
        str(tiny_policy),
        optimizer=partial(AdamW, lr=1e-2, weight_decay=0.0),
        loss=RewardLoss(margin=0.1, center_coefficient=0.01),
        **KINDS[kind],
    )
    trainer(folder, *callbacks).fit(module, datamodule=data(folder, **options), ckpt_path=ckpt)
    return module


@pytest.mark.filterwarnings("ignore:.*has not learned rewards")
@pytest.mark.parametrize("kind", ["whole", "adapters", "mean"])
def test_micro_batches_change_nothing(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    whole = fit(tmp_path / "whole", tiny_policy, batching=BatchOptions(None), kind=kind)
    parts = fit(tmp_path / "parts", tiny_policy, batching=BatchOptions(30), kind=kind)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*has not learned rewards")
@pytest.mark.parametrize("kind", ["whole", "adapter", "adapters", "turns"])
def test_a_run_continues_bitwise_from_every_checkpoint(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    folder = tmp_path / "run"
    every = ModelCheckpoint(folder / "ckpt", every_n_train_steps=1, save_top_k=-1)
    straight = weights(fit(folder, tiny_policy, every, kind=kind))
    checkpoints = sorted((folder / "ckpt").glob("*.ckpt"))
    assert len(checkpoints) == 6
    for number, checkpoint in enumerate(checkpoints if kind == "whole" else checkpoints[2:4]):
        copy = shutil.copytree(folder, tmp_path / f"again{number}")
        again = weights(fit(copy, tiny_policy, ckpt=str(checkpoint), kind=kind))
        torch.testing.assert_close(again, straight, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.*has not learned rewards")
def test_the_bonus_for_diversity_makes_adapters_read_more_directions(tmp_path: Path, tiny_policy: Path) -> None:
    ratios = []
    for diversity in (0.0, 1.0):
        L.seed_everything(0)
        ensemble = Ensemble("lora", 2, diversity=diversity)
        module = RewardModule(
            str(tiny_policy), ensemble, LoRA(r=2), optimizer=partial(AdamW, lr=1e-2, weight_decay=0.0)
        )
        trainer(tmp_path / str(diversity), max_epochs=5).fit(module, datamodule=data(tmp_path / str(diversity)))
        ratios.append(module._diversity().item())
    assert ratios[0] < ratios[1] <= 2.0  # 2 is the most that 2 x 2 directions allow


class Members(L.Callback):
    """Weights of each member, before training and after each epoch."""

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._note(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(pl_module)

    def _note(self, module: RewardModule) -> None:
        self.weights.append([member_weights(module, member) for member in range(2)])


def member_weights(module: RewardModule, member: int) -> torch.Tensor:
    # of two members, the adapters that are not the other one's
    own = [*module.scorer.adapters_but(1 - member), score_head(module.scorer.model, 2).weight[member]]
    return torch.cat([weight.detach().flatten() for weight in own])


@pytest.mark.filterwarnings("ignore:.*has not learned rewards")
def test_members_in_turn_are_trained_one_at_a_time(tmp_path: Path, tiny_policy: Path) -> None:
    noted = Members()
    L.seed_everything(0)
    # weight decay moves weights that have a gradient of 0
    optimizer = partial(AdamW, lr=1e-2, weight_decay=0.1)
    module = RewardModule(str(tiny_policy), optimizer=optimizer, **KINDS["turns"])
    run = trainer(tmp_path / "run", noted, max_epochs=4)
    run.fit(module, datamodule=data(tmp_path / "run"))
    for epoch in range(4):
        before, after = noted.weights[epoch], noted.weights[epoch + 1]
        moved = [not torch.equal(b, a) for b, a in zip(before, after, strict=True)]
        assert moved == [epoch % 2 == 0, epoch % 2 == 1]
    # the states of the optimizer are those of the last turn: three steps of the second member
    states = run.optimizers[0].state
    others = {id(weight) for weight in module.scorer.adapters_but(1)}
    assert {int(state["step"]) for state in states.values()} == {3}
    assert not any(id(weight) in others for weight in states)


@pytest.mark.filterwarnings("ignore:.*has not learned rewards")
def test_only_the_member_in_turn_gets_gradients(tmp_path: Path, tiny_policy: Path) -> None:
    module = RewardModule(str(tiny_policy), **KINDS["turns"])
    module.trainer = trainer(tmp_path)
    module.configure_model()
    a, b = Response((5, 9, 0), "a", "eos"), Response((40, 0), "b", "eos")
    batch = collate_preferences([Preference(Comparison(Prompt(0, (3, 4), "x"), a, b), Label(1.0))])
    losses = []
    for turn in range(2):
        module.turn = turn
        module.zero_grad()
        module._micro_batch(batch).loss.backward()
        module.on_before_optimizer_step(None)  # type: ignore[arg-type]
        for name, parameter in module.scorer.named_parameters():
            trained = f".member{turn}." in name or "score" in name
            assert (parameter.grad is not None) == trained, name
        head = score_head(module.scorer.model, 2).weight.grad
        assert head is not None
        assert head.any(1).tolist() == [turn == 0, turn == 1]
        losses.append(module.item_losses(batch).losses.item())
    # the loss is that of the member alone, not a mean
    module.turn = None
    assert module.item_losses(batch).losses.item() == pytest.approx(sum(losses) / 2, abs=1e-6)


def test_an_ensemble_in_two_phases_knows_how_sure_it_is(tmp_path: Path, tiny_policy: Path) -> None:
    train, heldout = write_rows(tmp_path / "train.jsonl", 96), write_rows(tmp_path / "heldout.jsonl", 24, first=1000)
    rows = [f"--data.prompts.path={train}", "--data.heldout=DatasetPrompts", f"--data.heldout.path={heldout}"]
    settings = ["--config", "reward_ensemble", *SETTINGS[2:], *rows, "--trainer.max_epochs=4"]
    settings += ["--trainer.check_val_every_n_epoch=4"]
    first, second = tmp_path / "first", tmp_path / "second"
    main(["fit", *settings, f"--model.backbone={tiny_policy}", f"--run_dir={first}"])
    adapters = ["--config", "reward_adapters", *settings[2:], "--model.lora.r=2", "--model.optimizer.lr=3e-3"]
    main(["fit", *adapters, f"--model.backbone={first / 'model'}", f"--run_dir={second}"])
    for folder, kind in ((first, "linear"), (second, "lora")):
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["accuracy"] > 0.9
        assert summary["members/accuracy"] > 0.9
        assert summary["members/std"] > 0
        manifest = json.loads((folder / "model" / "ensemble.json").read_text())
        assert (manifest["kind"], manifest["size"], len(manifest["means"])) == (kind, 3, 3)

        prompt, responses = Prompt(0, (), "say 3: "), [Response((1,), text, "eos") for text in ("aaz", "aay", "b")]
        path = str(folder / "model")
        plain = RewardModelReward(path).score([prompt] * 3, responses)
        assert plain.members is not None
        assert plain.std is not None
        assert plain.members.shape == (3, 3)
        torch.testing.assert_close(plain.mean, combine(plain.members))
        torch.testing.assert_close(plain.std, disagreement(plain.members))
        assert plain.mean[0] > plain.mean[1]
        # rules work on members with mean 0 and deviation 1, and put the result back on the average scale
        unit = RewardModelReward(path, normalize=True).score([prompt] * 3, responses)
        assert unit.members is not None
        scale, shift = sum(manifest["stds"]) / 3, sum(manifest["means"]) / 3
        for rule in ("mean", "lcb", "uwo", "wco"):
            found = RewardModelReward(path, combine=rule, coefficient=0.5).score([prompt] * 3, responses).mean  # type: ignore[arg-type]
            expected = scale * combine(unit.members, rule, 0.5) + shift  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected)


class HighEnding(AbstractReward):
    """Whether the last byte of a response is of the second half of the alphabet."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        del prompts
        return RewardOutput(torch.tensor([4.0 * (r.ids[-1] >= 130) for r in responses]))


class Accuracies(L.Callback):
    """Whether each pair that is no tie was ranked rightly when it was met, which was the first time for all of them."""

    def __init__(self) -> None:
        self.values: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        right = outputs["chosen_rewards"] > outputs["rejected_rewards"]
        self.values += right[outputs["label"] > 0.9].tolist()


@pytest.fixture
def moved_policy(tmp_path: Path, tiny_policy: Path) -> Path:
    """The tiny policy, moved away from where it began."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    folder = shutil.copytree(tiny_policy, tmp_path / "moved")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sampler", [PILAFSampler(), VanillaSampler(), BestOfNSampler(n=3)])
def test_it_learns_in_rounds_from_pairs_that_a_frozen_policy_samples(
    tmp_path: Path, tiny_policy: Path, moved_policy: Path, sampler: AbstractPairSampler
) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}: "}) for i in range(64)))
    sampled = PreferenceDataModule(
        DatasetPrompts(str(tmp_path / "prompts.jsonl")),
        sampler,
        RewardLabeler(HighEnding(), rule="soft"),
        pairs_per_batch=8,
        rounds=PreferenceRoundOptions(prompts_per_round=64),
        decoding=Decoding(max_new_tokens=3),
    )
    L.seed_everything(0)
    reference = None if isinstance(sampler, VanillaSampler) else str(tiny_policy)
    module = RewardModule(
        str(tiny_policy),
        policy=str(moved_policy),
        reference=reference,
        optimizer=partial(AdamW, lr=2e-2, weight_decay=0.0),
    )
    accuracies, keep = Accuracies(), ModelCheckpoint(tmp_path / "ckpt")
    trainer(tmp_path, accuracies, keep, max_epochs=12).fit(module, datamodule=sampled)
    assert sampled.round is not None
    assert sampled.round.index == 11  # a round per epoch, none of them recorded
    assert {c.a.source for c in sampled.round.comparisons} <= {"policy", "plus"}
    if isinstance(sampler, PILAFSampler):
        laws = {(c.branch, c.a.source, c.b.source) for c in sampled.round.comparisons}
        assert laws == {("tilt", "plus", "minus"), ("base", "policy", "policy")}
    late = accuracies.values[-150:]
    assert sum(late) / len(late) > 0.75
    # the policy stays what it was, and out of the checkpoints
    policy = module._sampled_from[0] if module._sampled_from else None
    before = AutoModelForCausalLM.from_pretrained(moved_policy)
    assert policy is not None
    for p, q in zip(policy.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=0)
    saved = torch.load(keep.best_model_path, weights_only=False)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"scorer"}


def test_sample_samples_from_the_policy_of_a_reward_model(tmp_path: Path, tiny_policy: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}: "}) for i in range(3)))
    main(
        [
            *("sample", *SETTINGS, f"--model.backbone={tiny_policy}", f"--model.policy={tiny_policy}"),
            *(f"--data.prompts.path={tmp_path / 'prompts.jsonl'}", "--data.sampler=VanillaSampler"),
            *(f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'pairs.jsonl'}"),
        ]
    )
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 3


def test_a_policy_of_another_family_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="has another chat template than the backbone"):
        RewardModule(str(tiny_policy), policy=str(other)).configure_model()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="has another vocabulary than the backbone"):
        RewardModule(str(tiny_policy), policy=str(other)).configure_model()
    with pytest.raises(ValueError, match=r"set model\.policy too"):
        RewardModule(str(tiny_policy), reference=str(tiny_policy))
    with pytest.raises(ValueError, match=r"model\.beta must be > 0; got 0"):
        RewardModule(str(tiny_policy), beta=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlay", "model"),
    [
        ("ddp", []),
        (
            "ddp",
            [
                *("--model.ensemble.kind=lora", "--model.ensemble.size=2", "--model.ensemble.diversity=0.1"),
                *("--model.lora.r=2", "--model.lora.target_modules=[q_proj]"),
            ],
        ),
        (
            "ddp",
            [
                *("--model.ensemble.kind=lora", "--model.ensemble.size=2", "--model.ensemble.turn_epochs=1"),
                *("--model.lora.r=2", "--model.lora.target_modules=[q_proj]", "--trainer.max_epochs=2"),
            ],
        ),
        ("fsdp", ["--model.ensemble.kind=linear", "--model.ensemble.size=2"]),
        ("fsdp", ["--model.lora.r=2", "--model.lora.target_modules=[q_proj]"]),
        ("ddp", ["--config=difference_model", "--data.decoding.max_new_tokens=16", "--model.optimizer.lr=3e-3"]),
    ],
    ids=["single", "adapters", "turns", "sharded", "sharded_lora", "differences"],
)
def test_two_processes_equal_one(tmp_path: Path, tiny_policy: Path, overlay: str, model: list[str]) -> None:
    # 22 rows: the last batch and the validation are uneven
    train, heldout = write_rows(tmp_path / "train.jsonl", 22), write_rows(tmp_path / "heldout.jsonl", 7, first=50)
    summaries, models = [], []
    for name, launcher, extra in (
        ("one", [], []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], [f"--config=trainer/{overlay}"]),
    ):
        devices = [] if name == "one" else ["--trainer.devices=2", "--trainer.accelerator=cpu"]
        done = subprocess.run(
            [
                *(sys.executable, *launcher, "-m", "lightning_rlhf", "fit", *SETTINGS, *extra, *devices, *model),
                *("--trainer.precision=32-true", f"--model.backbone={tiny_policy}", f"--data.prompts.path={train}"),
                *("--data.heldout=DatasetPrompts", f"--data.heldout.path={heldout}", f"--run_dir={tmp_path / name}"),
            ],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
        models.append(open_scorer(str(tmp_path / name / "model")))
    for key, value in summaries[0].items():
        assert summaries[1][key] == (value and pytest.approx(value, abs=1e-4)), key
    assert summaries[0]["pairs"] == 7
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    if models[0].stds is not None:
        assert models[0].stds == pytest.approx(models[1].stds, rel=1e-4)
    means = [getattr(model.config, "mean_coefficients", None) for model in models]
    assert means[0] == (means[1] and pytest.approx(means[1], rel=1e-4))


def test_bad_use_is_named(tmp_path: Path, tiny_policy: Path) -> None:
    module = RewardModule(str(tiny_policy))
    sampled = data(tmp_path)
    sampled.sampler = VanillaSampler()
    with pytest.raises(ValueError, match=r"VanillaSampler samples responses.*set data\.sampler=OfflineSampler"):
        trainer(tmp_path).fit(module, datamodule=sampled)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say 1"}')
    unpaired = data(tmp_path, heldout=DatasetPrompts(str(tmp_path / "prompts.jsonl")))
    with pytest.raises(ValueError, match=r"held-out prompt 0 \('say 1'\) has no recorded pair"):
        trainer(tmp_path).validate(RewardModule(str(tiny_policy)), datamodule=unpaired)
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        RewardModule(str(tiny_policy), loss=RewardLoss(margin=-1.0))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RewardModelReward("/nowhere/at/all")
    with pytest.raises(ValueError, match=r"train with data\.heldout"):
        RewardModelReward(str(tiny_policy), normalize=True).score([], [])
    with pytest.raises(ValueError, match="combine=wco needs an ensemble"):
        RewardModelReward(str(tiny_policy), combine="wco").score([], [])
    with pytest.raises(ValueError, match="combine must be one of"):
        RewardModelReward(str(tiny_policy), combine="max")  # type: ignore[arg-type]

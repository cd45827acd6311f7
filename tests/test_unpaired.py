"""Single responses with labels of their own: rows, ledger, labelers, KTO and BCO, and two processes."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from lightning_rlhf import BCOModule, Decoding, DPOModule, KTOModule, PreferenceDataModule
from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.commands.export import export_ledger
from lightning_rlhf.datamodules.options import BatchOptions, PreferenceRoundOptions, PromptOptions
from lightning_rlhf.labelers import RecordedLabeler, RewardLabeler, ThumbsLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.losses import unpaired_bco_loss
from lightning_rlhf.modules.kto import RunningMean, mismatched
from lightning_rlhf.prompts import BuiltinPrompts, DatasetCompletions, DatasetUnpaired, LedgerPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import FunctionReward, LexiconReward
from lightning_rlhf.samplers import OfflineSampler, SelfPlaySampler, SingleSampler, VanillaSampler
from lightning_rlhf.types import NO_RESPONSE, Comparison, Label, Preference, Prompt, Response


BETA = 0.5
ROWS: list[dict[str, Any]] = [
    {"prompt": "one: ", "completion": "az", "label": True},
    {"prompt": "two: ", "completion": "byy", "label": False},
    {"prompt": "three: ", "completion": "c", "label": 0.75, "weight": 2.0},
    {"prompt": "four: ", "completion": "dzyz", "label": False},
    {"prompt": "five: ", "completion": "ezz", "label": True, "source": "mine"},
]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_hold_labels_weights_and_sources(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,true\nc,d,false\n")
    rows = DatasetUnpaired(str(tmp_path / "rows.csv")).load()
    assert [(row.text, row.completion, row.pair and row.pair.probability) for row in rows] == [
        ("a", "b", 1.0),
        ("c", "d", 0.0),
    ]
    rows = DatasetUnpaired([*ROWS, {"prompt": "six", "completion": " ", "label": True}]).load()
    assert [(row.pair.probability, row.pair.weight, row.subset) for row in rows if row.pair] == [
        *((1, 1, ""), (0, 1, ""), (0.75, 2, ""), (0, 1, ""), (1, 1, "mine"))
    ]
    assert all(row.is_single for row in rows)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (talk,) = DatasetUnpaired([{"messages": turns, "good": False}], label_column="good").load()
    assert (talk.messages, talk.completion) == ((turns[0],), "Ho")


@pytest.mark.parametrize("label", [None, "yes", 1.5, -1, float("nan")])
def test_other_labels_are_refused(label: object) -> None:
    with pytest.raises(ValueError, match=r"row 1.*'label' must be true, false, or P\(desirable\)"):
        DatasetUnpaired([{"prompt": "a", "completion": "b", "label": label}]).load()


def test_bad_completions_are_not_imitated() -> None:
    with pytest.raises(ValueError, match="read such rows with DatasetUnpaired"):
        DatasetCompletions([ROWS[1]]).load()


# -- comparisons -------------------------------------------------------------------------------------------------------


def single(prompt: tuple[int, ...], response: tuple[int, ...], probability: float, **logps: Any) -> Preference:
    a = Response(response, "x", "eos", **logps)
    return Preference(Comparison(Prompt(0, prompt, "p"), a, NO_RESPONSE), Label(probability))


def test_an_empty_response_is_no_tie_with_no_response() -> None:
    comparison = Comparison(Prompt(0, (1,), "p"), Response((2,), "", "eos"), NO_RESPONSE)
    assert comparison.is_single
    assert not comparison.has_equal_responses


def test_batches_keep_the_response_first_and_have_columns_for_pairs() -> None:
    pair = Comparison(Prompt(1, (1,), "p"), Response((5,), "x", "eos"), Response((6, 7), "y", "eos"))
    batch = collate_preferences([single((1, 2), (3, 4), 0.25), Preference(pair, Label(0.0))])
    assert (batch.chosen, batch.rejected, batch.label.tolist()) == ([(3, 4), (6, 7)], [(), (5,)], [0.25, 1.0])
    assert batch.groups() == [((1, 2), ((3, 4),)), ((1,), ((6, 7), (5,)))]
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    columns = batch.by_pair(values)
    assert columns.tolist() == [[1, 0], [2, 3]]
    (columns * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 100, 1000]


def test_prompts_meet_the_responses_of_others() -> None:
    items = [((9,), (), (1,)), ((7,), (8,), (2,)), ((8,), (), (3,))]
    assert mismatched(items) == [((2,), ((8,),)), ((3,), ((9,),)), ((1,), ((7,), (8,)))]
    assert mismatched(items[:1]) == []


# -- labelers ----------------------------------------------------------------------------------------------------------


def length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def comparisons(count: int) -> list[Comparison]:
    return [Comparison(Prompt(i, (1,), "p"), Response((2, i), "x" * i, "eos"), NO_RESPONSE) for i in range(count)]


def test_thumbs_follow_the_reward_above_a_threshold() -> None:
    asked, key = comparisons(5), Key((0,))

    def labels(rule: Any) -> list[float | None]:
        made = ThumbsLabeler(FunctionReward(length), threshold=2.0, rule=rule).label(asked, key)
        assert [label.meta["reward_a"] for label in made] == [0, 1, 2, 3, 4]
        return [label.probability for label in made]

    assert labels("argmax") == [0, 0, 0.5, 1, 1]
    assert labels("soft") == pytest.approx([1 / (1 + math.exp(2 - i)) for i in range(5)])
    many = ThumbsLabeler(FunctionReward(lambda prompts, completions, **_: [1.0] * len(prompts))).label(
        comparisons(2000), key
    )
    share = sum(label.probability or 0 for label in many) / 2000
    # three standard errors
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    assert {label.probability for label in many} == {0.0, 1.0}


def test_thumbs_refuse_pairs() -> None:
    pair = Comparison(Prompt(0, (1,), "p"), Response((2,), "x", "eos"), Response((3,), "y", "eos"), branch="base")
    with pytest.raises(ValueError, match="ThumbsLabeler judges single responses, and prompt 0 came with a pair"):
        ThumbsLabeler(LexiconReward()).label([pair], Key((0,)))


# -- BCO in closed form ------------------------------------------------------------------------------------------------


def test_the_loss_of_bco_in_closed_form() -> None:
    ratio = torch.tensor([-3.0, 0.2, 4.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    shift = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = unpaired_bco_loss(ratio, desirable, shift, 0.3, 1.5, 0.5)
    s = torch.sigmoid(0.3 * ratio.detach() - 0.7)
    torch.testing.assert_close(loss, -desirable * 1.5 * s.log() - (1 - desirable) * 0.5 * (1 - s).log())
    (gradient,) = torch.autograd.grad(loss.sum(), ratio, retain_graph=True)
    torch.testing.assert_close(gradient, 0.3 * (-1.5 * desirable * (1 - s) + 0.5 * (1 - desirable) * s))
    assert torch.autograd.grad(loss.sum(), shift, allow_unused=True) == (None,)


def test_the_running_mean_is_that_of_all_values() -> None:
    running, values = RunningMean(), torch.randn(37, dtype=torch.float64)
    for part in values.split(5):
        running.update(float(part.sum()), len(part))
    running.update(0.0, 0)
    assert (running.mean, running.count) == (pytest.approx(float(values.mean())), 37)


# -- runs --------------------------------------------------------------------------------------------------------------


def recorded(rows: list[dict[str, Any]], items: int = 3, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(
        DatasetUnpaired(rows),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=items,
        decoding=Decoding(max_new_tokens=8, rows=8),
        rounds=PreferenceRoundOptions(epochs_per_round=None),
        # a response is a micro-batch: the reference point must be that of the whole step
        batching=BatchOptions(max_tokens_per_micro_batch=1),
        prompt_options=PromptOptions(max_prompt_tokens=200),
        **options,
    )


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )


def log_ratio(module: DPOModule, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """Log-ratio of a response by plain forward passes."""
    assert module.reference is not None

    def logp(model: Any) -> float:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[range(len(response)), list(response)].sum())

    with torch.no_grad():
        policy = logp(module.policy)
        with module.reference.active() as reference:
            return policy - logp(reference)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Follow(L.Callback):
    """Computes the loss of every step by plain forward passes, before the step, and compares."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: PreferenceBatch, *_: Any) -> None:
        items = sorted(zip(batch.chosen, batch.prompts, batch.label.tolist(), batch.weight.tolist(), strict=True))
        ratios = [log_ratio(pl_module, prompt, response) for response, prompt, _, _ in items]
        if isinstance(pl_module, KTOModule):
            others = [*items[1:], items[0]]
            kl = [log_ratio(pl_module, items[i][1], others[i][0]) for i in range(len(items))]
            self.points.append(BETA * max(sum(kl) / len(kl), 0.0) if len(items) > 1 else 0.0)
        else:
            self.seen += [BETA * ratio for ratio in ratios]
            self.points.append(sum(self.seen) / len(self.seen))
        losses = []
        for (_, _, p, weight), ratio in zip(items, ratios, strict=True):
            s = sigmoid(BETA * ratio - self.points[-1])
            good, bad = (1 - s, s) if isinstance(pl_module, KTOModule) else (-math.log(s), -math.log(1 - s))
            losses.append(weight * (p * 1.5 * good + (1 - p) * bad))
        self.expected = sum(losses) / len(losses)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        assert float(pl_module._point) == pytest.approx(self.points[-1], abs=1e-4)
        assert float(pl_module.step_metrics["loss"]) == pytest.approx(self.expected, rel=1e-4)
        point: Tensor = pl_module.step_metrics["rejected_rewards"]
        assert point.tolist() == pytest.approx([self.points[-1]] * len(point), abs=1e-4)


@pytest.mark.parametrize("kind", [KTOModule, BCOModule])
def test_steps_follow_the_formula_through_ledger_export_and_validation(
    tmp_path: Path, tiny_policy: Path, kind: type[KTOModule] | type[BCOModule]
) -> None:
    torch.manual_seed(0)
    module = kind(str(tiny_policy), beta=BETA, desirable_weight=1.5, optimizer=partial(SGD, lr=0.3))
    datamodule, follow = recorded(ROWS, heldout=DatasetUnpaired(ROWS[:3])), Follow()
    run = trainer(tmp_path, follow)
    run.fit(module, datamodule=datamodule)
    # steps of three and of two responses
    assert len(follow.points) == 4
    assert max(map(abs, follow.points)) > 1e-3
    check_validation(run, module, datamodule)
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        found = {p.comparison.prompt.text: p for p in store.preferences()}
    assert [found[row["prompt"]].probability for row in ROWS] == [1, 0, 0.75, 0, 1]
    assert found["three: "].weight == 2
    assert all(p.comparison.b == NO_RESPONSE and p.label.cost == 0 for p in found.values())
    check_rows_go_round(tmp_path)


def check_validation(run: L.Trainer, module: Any, datamodule: PreferenceDataModule) -> None:
    """The loss and accuracy of held-out responses, against plain forward passes."""
    module.eval()
    losses, right, point = [], [], float(module._point)
    for prompt in datamodule._heldout:
        assert prompt.recorded is not None and prompt.pair is not None
        p, weight = prompt.recorded.probability, prompt.recorded.weight
        reward = BETA * log_ratio(module, prompt.ids, prompt.pair[0].ids)
        s = sigmoid(reward - point)
        good, bad = (1 - s, s) if isinstance(module, KTOModule) else (-math.log(s), -math.log(1 - s))
        losses.append(weight * (p * 1.5 * good + (1 - p) * bad))
        right.append((reward > point) == (p > 0.5))
    assert run.callback_metrics["val/loss"].item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert run.callback_metrics["val/accuracy"].item() == pytest.approx(sum(right) / 3)


def check_rows_go_round(folder: Path) -> None:
    """Exported rows, and those of the ledger, are the rows that were read."""
    export_ledger(str(folder / "ledger.sqlite"), str(folder / "rows.jsonl"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    found = {row["prompt"]: (row["completion"], row["label"]) for row in rows}
    assert found == {row["prompt"]: (row["completion"], row["label"] >= 0.5) for row in ROWS}
    assert len(DatasetUnpaired(str(folder / "rows.jsonl")).load()) == 5
    again = LedgerPrompts(str(folder / "ledger.sqlite")).load()
    assert {(row.text, row.completion, row.pair and row.pair.probability) for row in again} == {
        (row["prompt"], row["completion"], float(row["label"])) for row in ROWS
    }
    assert all(row.is_single for row in again)


def test_the_running_mean_continues_from_a_checkpoint(tmp_path: Path, tiny_policy: Path) -> None:
    def module() -> BCOModule:
        return BCOModule(str(tiny_policy), beta=BETA, optimizer=partial(SGD, lr=0.3))

    whole, part, rest = module(), module(), module()
    trainer(tmp_path / "whole").fit(whole, datamodule=recorded(ROWS))
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer(tmp_path / "part", saved, max_epochs=1, enable_checkpointing=True).fit(part, datamodule=recorded(ROWS))
    assert part.running.count == 5
    trainer(tmp_path / "part").fit(rest, datamodule=recorded(ROWS), ckpt_path=saved.last_model_path)
    assert rest.running == whole.running
    assert whole.running.count == 10
    for p, q in zip(rest.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(p, q)


def online(sampler: Any, labeler: Any) -> PreferenceDataModule:
    return PreferenceDataModule(
        BuiltinPrompts("train", limit=4),
        sampler,
        labeler,
        pairs_per_batch=2,
        decoding=Decoding(max_new_tokens=4, rows=4),
        rounds=PreferenceRoundOptions(prompts_per_round=2),
        prompt_options=PromptOptions(max_prompt_tokens=240),
    )


def test_samples_of_the_policy_get_thumbs(tmp_path: Path, tiny_policy: Path) -> None:
    module = KTOModule(str(tiny_policy), optimizer=partial(SGD, lr=0.3))
    datamodule = online(SingleSampler(), ThumbsLabeler(LexiconReward(scale=4.0)))
    trainer(tmp_path).fit(module, datamodule=datamodule)
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        found = list(store.preferences())
        assert (store.num_labels, store.mean_passes()) == (4, 1.0)
    assert [p.round for p in found] == [0, 0, 1, 1]
    for preference in found:
        assert preference.comparison.is_single and preference.comparison.a.reference_logps is not None
        assert preference.probability in (0.0, 1.0)


def test_what_does_not_fit_is_refused_before_anything_is_sampled(tmp_path: Path, tiny_policy: Path) -> None:
    kto = KTOModule(str(tiny_policy))
    thumbs = ThumbsLabeler(LexiconReward())
    for module, datamodule, message in (
        (DPOModule(str(tiny_policy)), recorded(ROWS), "DPOModule learns from pairs, and the responses of this run"),
        (
            DPOModule(str(tiny_policy)),
            PreferenceDataModule(
                BuiltinPrompts("train", limit=2),
                VanillaSampler(),
                RewardLabeler(LexiconReward()),
                heldout=DatasetUnpaired(ROWS),
            ),
            "DPOModule learns from pairs, and the held-out rows of this run",
        ),
        (kto, online(SingleSampler(), RewardLabeler(LexiconReward())), "RewardLabeler judges pairs"),
        (
            kto,
            online(VanillaSampler(), thumbs),
            "ThumbsLabeler judges single responses, and VanillaSampler gives pairs",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).fit(module, datamodule=datamodule)
    prompt = Prompt(0, (1,), "p", pair=(Response((2,), "x", "eos"), NO_RESPONSE))
    with pytest.raises(ValueError, match="no recorded completion"):
        SelfPlaySampler().sample([prompt], None, Key((0,)))  # type: ignore[arg-type]


# -- processes ---------------------------------------------------------------------------------------------------------


def reference_points(folder: Path, name: str) -> list[float]:
    """The logged reference point of every step."""
    with next(folder.rglob("metrics.csv")).open(newline="") as file:
        column = "train/kto_kl" if name == "KTOModule" else "train/bco_delta"
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.slow
@pytest.mark.parametrize(("overlay", "name"), [("ddp", "KTOModule"), ("fsdp", "KTOModule"), ("ddp", "BCOModule")])
def test_two_processes_equal_one_though_a_rank_holds_padding_alone(
    tmp_path: Path, tiny_policy: Path, overlay: str, name: str
) -> None:
    """Steps of two responses, one a rank, and of one, so that a rank has none: it takes part in the reference point."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def fit(folder: str, *options: str, launcher: tuple[str, ...] = ()) -> Any:
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    *launcher,
                    "-m",
                    "lightning_rlhf",
                    "fit",
                    "--config=kto",
                    *options,
                    f"--model={name}",
                ),
                *(f"--model.policy={tiny_policy}", "--model.optimizer.lr=1e-3", f"--model.beta={BETA}"),
                *("--model.lr_scheduler.warmup_steps=0", "--data.prompts.path=rows.jsonl", "--data.pairs_per_batch=2"),
                *("--trainer.max_epochs=2", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
                *("--trainer.accelerator=cpu", "--data.decoding.max_new_tokens=8", f"--run_dir={folder}"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder / "model")

    one = fit("one", "--config=trainer/cpu")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = fit("two", f"--config=trainer/{overlay}", "--trainer.devices=2", launcher=launcher)
    points = [reference_points(tmp_path / folder, name) for folder in ("one", "two")]
    assert points[1] == pytest.approx(points[0], abs=1e-5)
    assert max(map(abs, points[0])) > 1e-3
    start = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert max((p - q).abs().max().item() for p, q in zip(one.parameters(), start.parameters(), strict=True)) > 1e-3
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)

"""Held-out pairs: their metrics in closed form, against plain forward passes, and on two processes."""

from __future__ import annotations

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
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import SGD

from lightning_rlhf import Decoding, DPOModule, KTOModule, PreferenceDataModule
from lightning_rlhf.callbacks import FinalValidation, Summary
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.evaluation.held_out_pairs import HeldOutPair, HeldOutPairs, pair_means
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.models.load import LoRA
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.policy import ReferenceUpdate
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Prompt


BETA = 0.5

ROWS = [
    {"prompt": "one: ", "chosen": "az", "rejected": "by", "source": "a"},
    {"prompt": "two: ", "chosen": "czz", "rejected": "d", "probability": 0.8, "source": "b"},
    {"prompt": "three: ", "chosen": "e", "rejected": "fyyy", "weight": 3.0, "source": "a"},
    # the other response is the likelier winner
    {"prompt": "four: ", "chosen": "gy", "rejected": "hz", "probability": 0.25, "weight": 0.5},
    {"prompt": "five: ", "chosen": "iz", "rejected": "jy", "probability": 0.5, "source": "b"},
]


def test_means_in_closed_form() -> None:
    rows = [
        HeldOutPair(2.0, 1.0, 1.0, 0.3, 1.0, 2, 2),
        HeldOutPair(3.0, 1.0, 0.2, 0.9, 2.0, 2, 2),  # b is the likelier winner, and has the lower reward
        HeldOutPair(1.0, 1.0, 1.0, 0.6, 0.0, 2, 2),  # a tie of rewards, whose loss does not count
    ]
    assert pair_means(rows) == pytest.approx(
        {
            "loss": (0.3 + 2 * 0.9 + 0) / 3,
            "rewards/chosen": (2 + 1 + 1) / 3,
            "rewards/rejected": (1 + 3 + 1) / 3,
            "rewards/margins": (1 - 2 + 0) / 3,
            "accuracy": (1 + 0 + 0.5) / 3,
            "pairs": 3.0,
        }
    )


TWO_RANKS = """
import json, sys
import torch
import torch.distributed as dist
from lightning_rlhf.evaluation.held_out_pairs import HeldOutPairs

rank, file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
table = torch.load(f"{out}/table.pt")
pairs = HeldOutPairs()
mine = table[rank::2]
names = ["even" if i % 2 == 0 else "" for i in range(len(table))][rank::2]
pairs.update(mine[:, :2], mine[:, 2], mine[:, 3], mine[:, 4], mine[:, 5:], names)
json.dump(pairs.compute(), open(f"{out}/{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    # 5 pairs: ranks hold 3 and 2, and one of them no pair of the source
    table = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    torch.save(table, tmp_path / "table.pt")
    one = HeldOutPairs()
    names = ["even" if i % 2 == 0 else "" for i in range(5)]
    one.update(table[:, :2], table[:, 2], table[:, 3], table[:, 4], table[:, 5:], names)
    command = [sys.executable, "-c", TWO_RANKS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "file"), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    expected = one.compute()
    assert expected["source/even/pairs"] == 3
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, nan_ok=True)


# -- the modules -------------------------------------------------------------------------------------------------------


def data(folder: Path, rows: list[dict[str, Any]] = ROWS, **rounds: Any) -> PreferenceDataModule:
    path = folder / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    train = folder / "train.jsonl"
    train.write_text("\n".join(map(json.dumps, ROWS)))
    return PreferenceDataModule(
        DatasetPrompts(str(train)),
        OfflineSampler(),
        RecordedLabeler(),
        heldout=DatasetPrompts(str(path)),
        pairs_per_batch=5,
        decoding=Decoding(max_new_tokens=8, rows=4),
        rounds=PreferenceRoundOptions(epochs_per_round=None, **rounds),
    )


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    return L.Trainer(default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **quiet)


def log_ratio(module: DPOModule, prompt: Prompt, place: int) -> float:
    """Log-ratio of a recorded response by plain forward passes."""
    assert module.reference is not None and prompt.pair is not None
    ids, start = prompt.pair[place].ids, len(prompt.ids)

    def logp(model: Any) -> float:
        logits = model(input_ids=torch.tensor([[*prompt.ids, *ids]])).logits[0, start - 1 : -1]
        return float(logits.log_softmax(-1)[range(len(ids)), list(ids)].sum())

    with torch.no_grad():
        policy = logp(module.policy)
        with module.reference.active() as reference:
            return policy - logp(reference)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def expected_of(module: DPOModule, prompts: list[Prompt]) -> dict[str, float]:
    """Loss, accuracy and margin of DPO on recorded pairs, pair by pair."""
    losses, right, margins = [], [], []
    for prompt in prompts:
        assert prompt.recorded is not None
        p, weight = prompt.recorded.probability, prompt.recorded.weight
        margin = BETA * (log_ratio(module, prompt, 0) - log_ratio(module, prompt, 1))
        losses.append(-weight * (p * log_sigmoid(margin) + (1 - p) * log_sigmoid(-margin)))
        right.append(0.5 if p == 0.5 else float((margin > 0) == (p > 0.5)))
        margins.append(margin if p >= 0.5 else -margin)
    n = len(prompts)
    return {"loss": sum(losses) / n, "accuracy": sum(right) / n, "rewards/margins": sum(margins) / n}


class DecodesNothing(L.Callback):
    """Fails where a validation has generated answers."""

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        assert outputs is None


@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_dpo_without_decoding(tmp_path: Path, tiny_policy: Path, lora: LoRA | None) -> None:
    torch.manual_seed(0)
    module, datamodule = (
        DPOModule(str(tiny_policy), beta=BETA, lora=lora, optimizer=partial(SGD, lr=0.3)),
        data(tmp_path),
    )
    run = trainer(tmp_path, DecodesNothing(), Summary(), max_epochs=3, check_val_every_n_epoch=3)
    (before,) = run.validate(module, datamodule=datamodule, verbose=False)
    # policy = reference, bit by bit: l = ln 2, times the mean weight
    assert before["val/loss"] == pytest.approx(math.log(2) * (1 + 1 + 3 + 0.5 + 1) / 5, rel=1e-6)
    assert before["val/accuracy"] == 0.5
    assert before["val/rewards/chosen"] == before["val/rewards/rejected"] == 0
    run.fit(module, datamodule=datamodule)
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    module.eval()
    expected = expected_of(module, datamodule._heldout)
    assert expected["loss"] != pytest.approx(before["val/loss"], rel=1e-3)
    for name, value in expected.items():
        assert found[f"val/{name}"] == pytest.approx(value, abs=1e-5), name
    for name, rows in (("a", [0, 2]), ("b", [1, 4])):
        values = expected_of(module, [datamodule._heldout[i] for i in rows])
        assert found[f"val/source/{name}/pairs"] == 2
        assert found[f"val/source/{name}/loss"] == pytest.approx(values["loss"], abs=1e-5)
        assert found[f"val/source/{name}/accuracy"] == values["accuracy"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pairs"] == 5
    assert summary["loss_before"] == pytest.approx(before["val/loss"])
    assert summary["loss_after"] == pytest.approx(expected["loss"], abs=1e-5)
    assert summary["reward_after"] is None


def test_a_reference_that_moved_is_asked_again(tmp_path: Path, tiny_policy: Path) -> None:
    module = DPOModule(
        str(tiny_policy), beta=BETA, optimizer=partial(SGD, lr=0.3), reference=ReferenceUpdate("previous")
    )
    datamodule = data(tmp_path)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=datamodule)
    moved = run.callback_metrics["val/rewards/margins"].item()
    assert moved != 0
    module.start_round(1)
    (after,) = run.validate(module, datamodule=datamodule, verbose=False)
    assert after["val/rewards/margins"] == 0


def test_kto_with_the_reference_point_of_a_validation_batch(tmp_path: Path, tiny_policy: Path) -> None:
    module = KTOModule(str(tiny_policy), beta=BETA, optimizer=partial(SGD, lr=0.3))
    datamodule = data(tmp_path, ROWS[:3])
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, datamodule=datamodule)
    module.eval()
    losses = []
    for prompt in datamodule._heldout:
        assert prompt.recorded is not None
        p, weight, kl = prompt.recorded.probability, prompt.recorded.weight, float(module._point) / BETA
        s = [1 / (1 + math.exp(-BETA * (log_ratio(module, prompt, place) - kl))) for place in (0, 1)]
        halves = [q * (1 - x) + (1 - q) * x for q, x in zip((p, 1 - p), s, strict=True)]
        losses.append(weight * sum(halves) / 2)
    assert run.callback_metrics["val/loss"].item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert 0 <= run.callback_metrics["val/accuracy"].item() <= 1


def test_reward_models_report_loss_and_sources(tmp_path: Path, tiny_policy: Path) -> None:
    module, datamodule = RewardModule(str(tiny_policy)), data(tmp_path)
    (found,) = trainer(tmp_path).validate(module, datamodule=datamodule, verbose=False)
    losses, margins = [], []
    for prompt in datamodule._heldout:
        assert prompt.pair is not None and prompt.recorded is not None
        with torch.no_grad():
            a, b = module._scores([(prompt.ids, tuple(r.ids for r in prompt.pair))]).flatten().tolist()
        p = prompt.recorded.probability
        losses.append(-prompt.recorded.weight * (p * log_sigmoid(a - b) + (1 - p) * log_sigmoid(b - a)))
        margins.append(a - b if p >= 0.5 else b - a)
    assert found["val/loss"] == pytest.approx(sum(losses) / 5, abs=1e-5)
    assert found["val/rewards/margins"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert found["val/source/b/loss"] == pytest.approx((losses[1] + losses[4]) / 2, abs=1e-5)


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path, tiny_policy: Path) -> None:
    module = DPOModule(str(tiny_policy), optimizer=partial(SGD, lr=1e-30))
    best = ModelCheckpoint(tmp_path / "best", monitor="val/accuracy", mode="max", filename="{step}")
    stop = EarlyStopping("val/loss", patience=2, check_on_train_epoch_end=False)
    run = trainer(tmp_path, FinalValidation(), stop, best, max_epochs=20, enable_checkpointing=True)
    run.fit(module, datamodule=data(tmp_path))
    # nothing is learned: the first validation is the best, and two more are waited for
    assert run.global_step == 3
    assert best.best_model_score == 0.5
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step=1.ckpt"]


def test_answers_are_a_choice(tmp_path: Path, tiny_policy: Path) -> None:
    prompts = [{"prompt": "say: "}]
    datamodule = data(tmp_path, prompts, heldout_generate=False)
    with pytest.raises(ValueError, match=r"have no recorded pairs, and with data\.rounds\.heldout_generate=false"):
        trainer(tmp_path).validate(DPOModule(str(tiny_policy)), datamodule=datamodule)
    for rows, generate, answers in ((prompts, None, True), (ROWS, None, False), (ROWS, True, True)):
        asked = data(tmp_path, rows, heldout_generate=generate)
        asked.trainer = trainer(tmp_path)
        (found,) = asked.trainer.validate(DPOModule(str(tiny_policy)), datamodule=asked, verbose=False) or [{}]
        assert asked.answers_heldout == answers
        assert ("val/loss" in found) == (rows is ROWS)

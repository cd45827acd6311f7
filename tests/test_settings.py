"""Settings of a run that change what is computed without a word: made to work, or refused with what to set."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_rlhf import (
    Decoding,
    DPOModule,
    PolicyGradientModule,
    PreferenceDataModule,
    RewardModule,
    RolloutDataModule,
)
from lightning_rlhf.advantages import GAE
from lightning_rlhf.callbacks import NonFiniteGuard
from lightning_rlhf.commands.fit import RLHFTrainer
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, RoundOptions
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.models.load import LoRA, load_tokenizer
from lightning_rlhf.models.master_weights import MASTER
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.modules import ConstantWithWarmup
from lightning_rlhf.modules.base import AbstractStepModule
from lightning_rlhf.modules.policy_gradient import PolicyLoss
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.rewards import AbstractReward, LexiconReward, RewardOutput
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Prompt, PromptRow, RecordedPair, Response


class Pairs(AbstractPromptSource):
    """Recorded pairs."""

    def load(self) -> list[PromptRow]:
        return [PromptRow(f"row {i}", f"Say {i}. ", pair=RecordedPair(f"It is {i}.", "No.")) for i in range(8)]


class Seen(L.Callback):
    """Keeps what training steps returned, and whether a model was loaded."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)


def pairs() -> PreferenceDataModule:
    decoding = Decoding(max_new_tokens=16)
    return PreferenceDataModule(
        Pairs(),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=4,
        decoding=decoding,
        rounds=PreferenceRoundOptions(epochs_per_round=None),
    )


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """A folder with a tiny GPT-2 whose dropout is 0.1, as GPT-2 has it."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer(str(tiny_policy))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=256, eos_token_id=0, bos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_the_first_loss_of_dpo_is_ln_2_unless_dropout_is_kept(tmp_path: Path, gpt2: Path) -> None:
    first = []
    for kept in (False, True):
        seen = Seen()
        policy = DPOModule(
            str(gpt2),
            options=ModelOptions(disable_dropout=not kept),
            optimizer=partial(AdamW, lr=1e-3, weight_decay=0.0),
        )
        trainer(tmp_path / str(kept), seen).fit(policy, datamodule=pairs())
        first.append(seen.outputs[0]["loss"].item())
    assert first[0] == pytest.approx(math.log(2), abs=1e-5)
    # ten times what rounding may leave: a tiny model with dropout 0.1 is off by a few 1e-4
    assert abs(first[1] - math.log(2)) > 1e-4


def test_no_ratio_is_clipped_before_the_policy_moves(tmp_path: Path, gpt2: Path) -> None:
    seen = Seen()
    policy = PolicyGradientModule(
        str(gpt2), GAE(), loss=PolicyLoss(clip=1e-3), optimizer=partial(AdamW, lr=1e-12, weight_decay=0.0)
    )
    data = RolloutDataModule(
        BuiltinPrompts("train", limit=4),
        LexiconReward(),
        rounds=RoundOptions(prompts_per_round=4),
        prompts_per_batch=2,
        decoding=Decoding(max_new_tokens=5, rows=4),
    )
    trainer(tmp_path, seen).fit(policy, datamodule=data)
    assert [o["ratio/clipped"].sum().item() for o in seen.outputs] == [0.0, 0.0]


def test_what_is_random_in_train_mode_for_another_reason_is_refused(tmp_path: Path, gpt2: Path) -> None:
    class Noisy(DPOModule):
        def configure_model(self) -> None:
            super().configure_model()

            def noise(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                return output + torch.randn_like(output) if module.training else output

            self.policy.transformer.ln_f.register_forward_hook(noise)

    with pytest.raises(ValueError, match=r"other log-probabilities in training than in decoding.*disable_dropout=fal"):
        trainer(tmp_path).fit(Noisy(str(gpt2)), datamodule=pairs())
    trainer(tmp_path / "kept").fit(Noisy(str(gpt2), options=ModelOptions(disable_dropout=False)), datamodule=pairs())


class Parity(AbstractReward):
    """1 where the first token id is odd: rewards of gibberish that differ, so that values have something to learn."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(response.ids[0] % 2) for response in responses]))


@pytest.mark.parametrize("kind", ["dpo", "reward_model", "value_model"])
def test_training_in_bfloat16_moves_as_float32_does(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    def fitted(dtype: str) -> tuple[AbstractStepModule, L.Trainer, list[float]]:
        L.seed_everything(0, verbose=False)
        seen, run = Seen(), tmp_path / dtype
        module: AbstractStepModule
        data: L.LightningDataModule = pairs()
        options: dict[str, Any] = {
            "optimizer": partial(AdamW, lr=5e-7, weight_decay=0.0),
            "options": ModelOptions(dtype=dtype),
        }
        if kind == "dpo":
            module = DPOModule(str(tiny_policy), **options)
        elif kind == "reward_model":
            module = RewardModule(str(tiny_policy), **options)
        else:
            module = PolicyGradientModule(str(tiny_policy), GAE(), lora=LoRA(r=2), **options)
            data = RolloutDataModule(
                BuiltinPrompts("train", limit=4),
                Parity(),
                rounds=RoundOptions(prompts_per_round=4),
                prompts_per_batch=2,
                decoding=Decoding(max_new_tokens=5, rows=4),
            )
        trainer_ = trainer(run, seen, max_epochs=4, gradient_clip_val=1.0)
        trainer_.fit(module, datamodule=data)
        return module, trainer_, [float(o["loss"]) for o in seen.outputs]

    half, run, losses = fitted("bfloat16")
    (optimizer,) = run.optimizers
    masters = {
        name: optimizer.state[p][MASTER]
        for name, p in half.named_parameters()
        if p.requires_grad and p.dtype == torch.bfloat16
    }
    assert masters and all(torch.equal(m.bfloat16(), dict(half.named_parameters())[n]) for n, m in masters.items())
    moved = sum(int((m.bfloat16().float() != m).sum()) for m in masters.values())
    assert moved > 0.4 * sum(m.numel() for m in masters.values())
    if kind != "value_model":  # samples in bfloat16 may differ
        single, _, expected = fitted("float32")
        assert losses == pytest.approx(expected, abs=0.03)
        steps = 8 * 5e-7
        weights = dict(single.named_parameters())
        for name, master in masters.items():
            assert (master - weights[name]).abs().max() < 2 * steps + 2**-8 * weights[name].abs().max()


def test_weights_in_float16_are_refused_before_the_model_is_loaded(tmp_path: Path, tiny_policy: Path) -> None:
    for module in (
        DPOModule(str(tiny_policy), options=ModelOptions(dtype="float16")),
        DPOModule(str(tiny_policy), options=ModelOptions(dtype="float16"), lora=LoRA(r=2)),
        RewardModule(str(tiny_policy), options=ModelOptions(dtype="float16"), lora=LoRA(r=2)),
    ):
        with pytest.raises(
            ValueError, match=r"model\.options\.dtype=float16 cannot be .*Set model\.options\.dtype=bfloat16"
        ):
            trainer(tmp_path).fit(module, datamodule=pairs())
        assert getattr(module, "policy", None) is None and getattr(module, "scorer", None) is None


def test_an_optimizer_of_ones_own_on_bfloat16_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    class Plain(DPOModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"configure_optimizers of Plain gives a SGD.*MasterWeights"):
        trainer(tmp_path).fit(Plain(str(tiny_policy), options=ModelOptions(dtype="bfloat16")), datamodule=pairs())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_cast_the_model_are_refused(tmp_path: Path, tiny_policy: Path, precision: Any) -> None:
    for module in (DPOModule(str(tiny_policy)), RewardModule(str(tiny_policy))):
        with pytest.raises(ValueError, match=rf"trainer\.precision={precision} is not supported: .*set "):
            trainer(tmp_path, precision=precision).fit(module, datamodule=pairs())
        assert getattr(module, "policy", None) is None and getattr(module, "scorer", None) is None
    with pytest.raises(ValueError, match=rf"trainer\.precision={precision} is not supported"):
        RLHFTrainer(accelerator="cpu", precision=precision)


def test_the_command_line_refuses_transformer_engine_by_name() -> None:
    with pytest.raises(ValueError, match=r"transformer-engine is not supported: set trainer\.precision=bf16-mixed"):
        RLHFTrainer(accelerator="cpu", precision="transformer-engine")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": partial(AdamW, lr=float("nan"))}, r"model\.optimizer: Invalid learning rate: nan"),
        ({"optimizer": partial(AdamW, lr=0.0)}, r"model\.optimizer\.lr must be > 0; got 0.0"),
        ({"optimizer": partial(AdamW, weight_decay=-0.1)}, r"model\.optimizer: Invalid weight_decay value: -0.1"),
        ({"lr_scheduler": partial(ConstantWithWarmup, warmup_steps=-1)}, r"lr_scheduler\.warmup_steps must be >= 0"),
    ],
)
def test_optimizer_settings_out_of_range_are_named_before_the_model_is_loaded(
    tmp_path: Path, tiny_policy: Path, options: dict[str, Any], said: str
) -> None:
    module = DPOModule(str(tiny_policy), **options)
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(module, datamodule=pairs())
    assert module.policy is None


def test_an_overflow_of_the_scaled_loss_is_the_scalers_business(tmp_path: Path, tiny_policy: Path) -> None:
    """float16 on the CPU: the first scale is far too large, as it often is at the start of a run."""
    guard, scaler = NonFiniteGuard(), torch.amp.GradScaler("cpu", init_scale=2.0**22)
    policy = DPOModule(str(tiny_policy), optimizer=partial(AdamW, lr=1e-3, weight_decay=0.0))
    run = trainer(tmp_path, guard, max_epochs=8, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    run.fit(policy, datamodule=pairs())
    assert 1 <= guard.skipped < 10
    assert scaler.get_scale() == 2.0 ** (22 - guard.skipped)
    assert run.optimizers[0].state_dict()["state"][0]["step"] == 16 - guard.skipped


DRAWS = """
import sys, json, torch, lightning as L
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lightning_rlhf import DPOModule
from lightning_rlhf.models.load import LoRA
from settings_of_test import pairs, trainer

class Note(L.Callback):
    drawn = []
    def on_before_backward(self, trainer, pl_module, loss):
        self.drawn.append((trainer.global_step, torch.initial_seed()))

note = Note()
policy = DPOModule(sys.argv[2], lora=LoRA(r=2, dropout=0.5))
run = trainer(Path(sys.argv[3]), note, devices=2, strategy="ddp")
run.fit(policy, datamodule=pairs())
Path(sys.argv[3], f"rank{run.global_rank}.json").write_text(json.dumps(note.drawn))
"""


@pytest.mark.slow
def test_every_step_and_rank_has_dropout_of_its_own(tmp_path: Path, tiny_policy: Path) -> None:
    (tmp_path / "draws.py").write_text(DRAWS)
    (tmp_path / "settings_of_test.py").write_text(Path(__file__).read_text())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "draws.py"),
            *(str(tmp_path), str(tiny_policy), str(tmp_path)),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert [step for step, _ in zero] == [step for step, _ in one] == [0, 1]
    assert len({seed for _, seed in [*zero, *one]}) == 4

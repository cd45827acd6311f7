"""Adapters of PEFT beyond plain LoRA: their reference, training, saving, resuming and continuing; quantized bases."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from torch.optim import SGD
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_rlhf import Decoding, DPOModule, PreferenceDataModule
from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.models import LoRA, build_reference, load_policy, load_tokenizer, merged_state_dict, save_policy
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.models.reference import AdapterOffReference, AdapterSnapshotReference, off_is_start
from lightning_rlhf.models.scorer import build_scorer
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.rewards import LexiconReward
from lightning_rlhf.samplers import VanillaSampler


IDS = torch.tensor([[3, 9, 4, 1], [5, 6, 7, 8]])

METHODS: dict[str, LoRA | PeftConfig] = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
    "rslora": LoRA(r=4, alpha=4, peft={"use_rslora": True}),
    "pissa": LoRA(r=2, alpha=2, peft={"init_lora_weights": "pissa"}),
    "olora": LoRA(r=2, target_modules=["q_proj", "up_proj"], peft={"init_lora_weights": "olora"}),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
}


def logits(model: Any) -> Tensor:
    training = model.training
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    model.train(training)
    return found


def reference_logits(module: DPOModule) -> Tensor:
    assert module.reference is not None
    with module.reference.active() as model:
        return model(input_ids=IDS).logits.detach()


def logp(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """Log-probability of a response by a plain forward pass."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return float(found.log_softmax(-1)[range(len(response)), list(response)].sum())


class Watch(L.Callback):
    """Compares the reference log-probabilities of each batch with those of a model."""

    def __init__(self, expected: Any) -> None:
        self.expected = expected.eval()
        self.steps = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: PreferenceBatch, *_: Any) -> None:
        del trainer, pl_module
        self.steps += 1
        for prompt, chosen, known in zip(
            batch.prompts, batch.chosen, batch.reference_chosen_logps.tolist(), strict=True
        ):
            assert known == pytest.approx(logp(self.expected, prompt, chosen), abs=2e-3)


def fit(folder: Path, module: DPOModule, *callbacks: L.Callback) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **quiet)
    data = PreferenceDataModule(
        BuiltinPrompts("train", limit=4),
        VanillaSampler(),
        RewardLabeler(LexiconReward(scale=4.0)),
        pairs_per_batch=2,
        decoding=Decoding(max_new_tokens=4, rows=8),
        rounds=PreferenceRoundOptions(prompts_per_round=4),
        prompt_options=PromptOptions(max_prompt_tokens=240),
    )
    trainer.fit(module, datamodule=data)
    return trainer


def dpo(policy: Path, lora: Any) -> DPOModule:
    return DPOModule(str(policy), beta=0.5, lora=lora, optimizer=partial(SGD, lr=0.5))


def test_the_learning_rate_of_a_whole_model_is_noted(tiny_policy: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    for lora, rate in ((LoRA(r=2), 1e-4), (None, 5e-7), (LoRA(r=2), 5e-7)):
        assert "adapters hardly learn" not in caplog.text
        module = DPOModule(str(tiny_policy), lora=lora, optimizer=partial(SGD, lr=rate))
        module.configure_model()
        module.configure_optimizers()
    assert "at model.optimizer.lr=5e-07, a rate for whole models, adapters hardly learn" in caplog.text


@pytest.mark.parametrize("name", list(METHODS))
def test_two_steps_leave_the_reference_at_the_base_model_and_the_exports_at_the_policy(
    name: str, tmp_path: Path, tiny_policy: Path
) -> None:
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_policy)
    module, watch = dpo(tiny_policy, METHODS[name]), Watch(base)
    trainer = fit(tmp_path / "run", module, watch)
    assert watch.steps == 2
    # PiSSA takes its start out of the base, so that the model under the adapter is no reference
    own = isinstance(module.reference, AdapterSnapshotReference)
    assert own == (name in ("pissa", "olora"))
    torch.testing.assert_close(reference_logits(module), logits(base), rtol=0, atol=1e-4 if own else 1e-6)
    assert (logits(module.policy) - logits(base)).abs().max() > 1e-3, "it trains"

    module.save_pretrained(tmp_path / "model")
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(whole), logits(module.policy), rtol=0, atol=1e-4)
    adapter: Any = PeftModel.from_pretrained(base, str(tmp_path / "model" / "adapter"))
    torch.testing.assert_close(logits(adapter), logits(module.policy), rtol=0, atol=1e-4)

    # resumed: policy and reference as they were, whatever a decomposition gives another time
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    assert any(key.endswith("base_layer.weight") for key in saved) == own
    again = DPOModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(logits(again.policy), logits(module.policy))
    assert torch.equal(reference_logits(again), reference_logits(module))


def test_a_given_adapter_is_trained_further_and_its_start_is_the_reference(tmp_path: Path, tiny_policy: Path) -> None:
    first: Any = load_policy(str(tiny_policy), lora=LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    start = logits(first)
    save_policy(first, load_tokenizer(str(tiny_policy)), tmp_path / "sft")

    module, watch = dpo(tiny_policy, LoRA(adapter=str(tmp_path / "sft"))), Watch(first)
    trainer = fit(tmp_path / "run", module, watch)
    assert watch.steps == 2
    torch.testing.assert_close(reference_logits(module), start, rtol=0, atol=1e-5)
    assert (logits(module.policy) - start).abs().max() > 1e-3
    trained = {key.rpartition(".lora_")[0] for key, p in module.policy.named_parameters() if p.requires_grad}
    assert {key.rpartition(".")[2] for key in trained} == {"q_proj", "v_proj"}
    module.save_pretrained(tmp_path / "model")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_policy)
    adapter: Any = PeftModel.from_pretrained(base, str(tmp_path / "model" / "adapter"))
    torch.testing.assert_close(logits(adapter), logits(module.policy), rtol=0, atol=1e-5)

    # the reference is in the checkpoint: the folder may change or go away
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    weights = tmp_path / "sft" / "adapter" / "adapter_model.safetensors"
    save_policy(module.policy, load_tokenizer(str(tiny_policy)), tmp_path / "sft")
    assert weights.exists()
    again = DPOModule.load_from_checkpoint(tmp_path / "end.ckpt")
    torch.testing.assert_close(reference_logits(again), start, rtol=0, atol=1e-5)


def test_an_object_of_peft_and_its_settings_are_the_same() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], use_dora=True, modules_to_save=["lm_head"]
    )
    lora = LoRA.of(config)
    assert lora == LoRA(
        peft={
            "peft_type": "LORA",
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head"],
            "use_dora": True,
        }
    )
    module: Any = DPOModule("nowhere", lora=config)
    assert module.lora == lora == module._arguments["lora"]


def test_trained_biases_of_the_base_make_the_start_a_reference_of_its_own() -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(shape)
    start = logits(model)
    targets = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    policy: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="all", **targets))  # type: ignore[arg-type]
    assert not off_is_start(policy)
    reference = build_reference(policy, "fixed")
    assert isinstance(reference, AdapterSnapshotReference)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    with reference.active() as frozen:
        torch.testing.assert_close(frozen(input_ids=IDS).logits, start, rtol=0, atol=1e-6)
    merged = merged_state_dict(policy)
    expected = logits(policy)
    plain = GPT2LMHeadModel(shape)
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4)


def test_rows_of_policy_and_reference_share_a_batch_only_under_plain_adapters(tiny_policy: Path) -> None:
    for settings, gates in (({"use_rslora": True}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)):
        policy: Any = load_policy(str(tiny_policy), lora=LoRA(r=2, peft=settings))  # type: ignore[arg-type]
        reference = build_reference(policy, "fixed")
        assert isinstance(reference, AdapterOffReference)
        assert reference.gates_rows == gates, settings


REFUSED: dict[str, tuple[Any, str]] = {
    "misspelt": ({"peft": {"use_dor": True}}, "LoraConfig .* no 'use_dor'; did you mean use_dora"),
    "own name": ({"peft": {"lora_alpha": 8}}, "write model.lora.peft.lora_alpha as model.lora.alpha"),
    "no effect": ({"r": 4, "peft": {"peft_type": "IA3"}}, "model.lora.r would have no effect"),
    "no method": ({"peft": {"peft_type": "LORAX"}}, "peft_type must be one of .*IA3.*; got 'LORAX'"),
    "no layer": ({"peft": {"peft_type": "IA3", "target_modules": ["c_attn"]}}, "match no layer"),
    "from data": ({"peft": {"init_lora_weights": "eva"}}, "is computed from data"),
    "tokens": ({"peft": {"alora_invocation_tokens": [1, 2]}}, "alora_invocation_tokens is not supported"),
    "virtual": (PromptTuningConfig(num_virtual_tokens=2), "virtual tokens before the prompt"),
    "steps": (AdaLoraConfig(total_step=10, target_modules=["q_proj"]), "told of every step"),
    "two": ({"adapter": "somewhere", "r": 4}, "model.lora.adapter brings all settings"),
    "folder": ({"adapter": "nowhere"}, "holds no adapter_config.json"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(REFUSED))
def test_adapters_that_cannot_be_trained_here_are_refused_by_name(name: str, tiny_policy: Path) -> None:
    settings, message = REFUSED[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_policy(str(tiny_policy), lora=LoRA(**settings) if isinstance(settings, dict) else settings)


def test_what_only_plain_adapters_can_do_is_said_before_weights_are_read(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only plain LoRA runs sharded"):
        load_policy(str(tiny_policy), lora=LoRA(peft={"use_dora": True}), meta=True)
    with pytest.raises(ValueError, match="reward models take plain LoRA"):
        build_scorer(str(tiny_policy), lora=LoRA(peft={"use_dora": True}))
    pissa: Any = load_policy(str(tiny_policy), lora=LoRA(r=2, peft={"init_lora_weights": "pissa"}))
    pissa.save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="took its start out of the weights of its base"):
        load_policy(str(tiny_policy), lora=LoRA(adapter=str(tmp_path / "pissa")))


def test_a_tied_head_in_modules_to_save_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(tiny_policy)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        load_policy(str(tmp_path), lora=LoRA(r=2, target_modules=["q_proj"], peft={"modules_to_save": ["lm_head"]}))


# -- quantization ------------------------------------------------------------------------------------------------------


def test_settings_of_quantization_are_checked(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four = {"load_in_4bit": True}
    with pytest.raises(ValueError, match=r"set model\.lora"):
        DPOModule(str(tiny_policy), options=ModelOptions(quantization=four))
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_policy(str(tiny_policy), lora=LoRA(r=2), quantization=four)
    with pytest.raises(ValueError, match="has no 'load_in_4bits'; did you mean load_in_4bit"):
        load_policy(str(tiny_policy), lora=LoRA(r=2), quantization={"load_in_4bits": True})
    for settings in ({"bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}):
        with pytest.raises(ValueError, match="needs load_in_4bit"):
            load_policy(str(tiny_policy), lora=LoRA(r=2), quantization=settings)  # type: ignore[arg-type]


def test_a_quantized_base_trains_and_is_exported_as_it_computes(tmp_path: Path, tiny_policy: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # on a CPU bitsandbytes wants widths of whole blocks
    config = LlamaForCausalLM.from_pretrained(tiny_policy).config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    load_tokenizer(str(tiny_policy)).save_pretrained(tmp_path / "wide")
    options = ModelOptions(quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    module = DPOModule(str(tmp_path / "wide"), lora=LoRA(r=2), options=options, optimizer=partial(SGD, lr=0.5))
    module.configure_model()
    start = logits(module.policy)
    fit(tmp_path / "run", module)
    torch.testing.assert_close(reference_logits(module), start, rtol=0, atol=1e-5)
    module.save_pretrained(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (logits(whole) - start).abs().max() > 1e-3
    torch.testing.assert_close(logits(whole), logits(module.policy), rtol=0, atol=1e-2)

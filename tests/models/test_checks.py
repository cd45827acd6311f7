"""Checkpoints that are broken, or of another kind than asked for: each is refused by folder, weight and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lightning_rlhf.models import end_of_sequence_ids, load_policy, load_tokenizer
from lightning_rlhf.models.load import load_scorer, resolve_checkpoint
from lightning_rlhf.models.scorer import Ensemble, build_scorer, open_scorer
from lightning_rlhf.rewards import RewardModelReward
from lightning_rlhf.types import Prompt, Response


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IDS = torch.tensor([[30, 41, 52, 63, 74]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def policy(tiny_policy: Path, tmp_path: Path) -> Path:
    """A causal LM that the test may break."""
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


@pytest.fixture
def reward(tiny_policy: Path, tmp_path: Path) -> Path:
    """A reward model that the test may break."""
    torch.manual_seed(3)
    folder = tmp_path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], name: str = "model.safetensors") -> None:
    """Change the weights in a file."""
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name, metadata={"format": "pt"})


def configure(folder: Path, name: str = "config.json", **values: Any) -> None:
    file = folder / name
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def score(path: Path, prompt: str = "Name a river.", answer: str = " The Elbe.", **options: Any) -> float:
    reward = RewardModelReward(str(path), device="cpu", **options)
    return float(reward.score([Prompt(0, (1,), prompt)], [Response((1,), answer, "eos")]).mean.item())


# --- files ---


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("use", [load_policy, load_tokenizer, resolve_checkpoint, RewardModelReward])
def test_git_lfs_pointers_are_named(policy: Path, name: str, use: Callable[[str], object]) -> None:
    (policy / name).write_bytes(LFS)
    with pytest.raises(ValueError, match=rf"policy/{name} is a git-lfs pointer .*git lfs pull"):
        use(str(policy))


def test_files_that_are_cut_off_or_missing_are_named(policy: Path, tmp_path: Path) -> None:
    whole = (policy / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 10):
        (policy / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"policy/model\.safetensors .*cut off.*download it again"):
            load_policy(str(policy))
    (policy / "model.safetensors").write_bytes(whole)
    (policy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"policy/config\.json is no JSON"):
        load_policy(str(policy))


def test_shards_must_all_be_there(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(tiny_policy).save_pretrained(folder, max_shard_size="10KB")
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    load_policy(str(folder))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    kept = shards[0].read_bytes()
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name} is missing"):
        load_policy(str(folder))
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(ValueError, match=f"{shards[0].name} lacks '.*', which model.safetensors.index.json"):
        load_policy(str(folder))
    shards[0].write_bytes(kept[:-1])
    with pytest.raises(ValueError, match=f"{shards[0].name} is cut off"):
        load_policy(str(folder))


def test_quantized_weights_are_refused(policy: Path) -> None:
    configure(policy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"policy' is quantized .*gptq.*dequantize"):
        load_policy(str(policy))
    configure(policy, quantization_config=None)

    def to_int8(state: dict[str, Tensor]) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        state[key] = (state[key] * 100).to(torch.int8)

    edit(policy, to_int8)
    with pytest.raises(ValueError, match=r"model\.safetensors holds 'model\.layers\.0\.mlp\.up_proj\.weight' as I8"):
        load_policy(str(policy))


# --- policies ---


def test_policies_with_weights_missing_left_over_or_of_another_shape_are_refused(policy: Path) -> None:
    whole = (policy / "model.safetensors").read_bytes()
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (lambda s: s.pop("model.norm.weight"), r"lacks 1 weights of a causal LM, e\.g\. 'model\.norm\.weight'"),
        (lambda s: s.update({"v_head.summary.weight": torch.ones(1, 16)}), r"holds 1 .*'v_head\.summary\.weight'"),
        (lambda s: s.update({"model.layers.0.mlp.gate.weight": torch.ones(4)}), r"'model\.layers\.0\.mlp\.gate"),
        (lambda s: s.update({"model.norm.weight": torch.ones(8)}), r"'model\.norm\.weight' \[8\] in place of \[16\]"),
        (lambda s: s.update({f"module.{k}": s.pop(k) for k in list(s)}), r"lacks .*; it holds 'module\."),
        (
            lambda s: s.update({f"base_model.model.{k}": s.pop(k) for k in list(s)}),
            r"lacks .*; it holds 'base_model\.model\.",
        ),
    ]
    for change, message in cases:
        (policy / "model.safetensors").write_bytes(whole)
        edit(policy, change)
        with pytest.raises(ValueError, match=r"policy' .*" + message):
            load_policy(str(policy))


def test_a_reward_model_is_no_policy_even_with_a_tied_head(tiny_policy: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"tied' holds 1 weights .*'score\.weight'.*LlamaForSequenceClassification"):
        load_policy(str(tmp_path / "tied"))


def test_a_checkpoint_of_another_class_is_refused(policy: Path) -> None:
    configure(policy, architectures=["LlamaForWhatever"])
    with pytest.raises(ValueError, match=r"policy' is a LlamaForWhatever .*which transformers does not have.*convert"):
        load_policy(str(policy))
    configure(policy, auto_map={"AutoModelForCausalLM": "modeling_whatever.LlamaForWhatever"})
    with pytest.raises(ValueError, match="trust_remote_code=true"):
        load_policy(str(policy))
    configure(policy, auto_map=None, architectures=["LlamaForTokenClassification"])
    with pytest.raises(ValueError, match=r"LlamaForTokenClassification .*computes other numbers"):
        load_policy(str(policy))
    # a family whose computation is the same
    configure(policy, architectures=["MistralForCausalLM"])
    assert load_policy(str(policy))(IDS).logits.isfinite().all()


def test_the_embedding_of_eos_learns_where_padding_is_eos(tiny_policy: Path) -> None:
    policy: Any = load_policy(str(tiny_policy))
    assert policy.config.pad_token_id == policy.config.eos_token_id == 0
    policy(torch.tensor([[5, 0, 7, 0]])).logits.square().sum().backward()
    assert policy.get_input_embeddings().weight.grad[0].abs().sum() > 0
    scorer: Any = build_scorer(str(tiny_policy))
    scorer.scores([((5, 0), [(7, 0)])]).sum().backward()
    assert scorer.model.get_input_embeddings().weight.grad[0].abs().sum() > 0


# --- tokenizers ---


def test_tokens_beyond_the_embedding_are_refused_before_the_model_is_loaded(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens(["<cite>", "</cite>"])
    tokenizer.save_pretrained(policy)
    (policy / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"policy' has 262 tokens, and the embedding of the model 260 rows: '<cite>' has id 260.*\(262\)",
    ):
        load_tokenizer(str(policy))


def test_a_placeholder_of_images_needs_no_row_in_a_text_model(policy: Path) -> None:
    AutoTokenizer.from_pretrained(policy, extra_special_tokens={"image_token": "<image_soft_token>"}).save_pretrained(
        policy
    )
    assert len(load_tokenizer(str(policy))) == 261


@pytest.mark.parametrize("spare_rows", [0, 12])
def test_an_eos_token_that_does_not_exist_is_refused(policy: Path, spare_rows: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.resize_token_embeddings(260 + spare_rows)
    model.save_pretrained(policy)
    load_tokenizer(str(policy))
    configure(policy, "tokenizer_config.json", eos_token="<|eot_id|>")
    with pytest.raises(ValueError, match=r"eos_token '<\|eot_id\|>', which is not in its vocabulary"):
        load_tokenizer(str(policy))


def test_a_tokenizer_of_another_family_is_refused(policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.resize_token_embeddings(400)
    model.config.eos_token_id = 399
    model.save_pretrained(policy)
    with pytest.raises(ValueError, match=r"eos_token_id 399, and its tokenizer only 260 tokens: .*different vocabular"):
        load_tokenizer(str(policy))


def test_end_of_sequence_ids_beyond_the_embedding_are_refused(policy: Path) -> None:
    configure(policy, "generation_config.json", eos_token_id=[0, 128009])
    with pytest.raises(ValueError, match=r"id 128009 lies outside of the 260 rows .*generation_config\.json"):
        end_of_sequence_ids(load_policy(str(policy)), load_tokenizer(str(policy)))


# --- adapters ---


def adapter(base: Path, folder: Path, labels: int | None = None, tokens: int = 0, **options: Any) -> PeftModel:
    """Save an adapter whose weights all matter, as training would leave it; return it as peft computes it."""
    torch.manual_seed(5)
    model: Any
    if labels is None:
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokens:
        tokenizer.add_tokens([f"<new{i}>" for i in range(tokens)])
        model.resize_token_embeddings(len(tokenizer))
    kind = TaskType.CAUSAL_LM if labels is None else TaskType.SEQ_CLS
    adapted = get_peft_model(model, LoraConfig(task_type=options.pop("task_type", kind), r=2, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("task_type", [TaskType.SEQ_CLS, None])
def test_a_peft_reward_model_opens_with_its_head(tiny_policy: Path, tmp_path: Path, task_type: TaskType | None) -> None:
    options: dict[str, Any] = {} if task_type else {"modules_to_save": ["score"]}
    expected = adapter(tiny_policy, tmp_path / "rm", 1, task_type=task_type, target_modules=["q_proj"], **options)
    with torch.no_grad():
        logits = expected(IDS).logits.item()
    scorer = open_scorer(str(tmp_path / "rm"))
    for _ in range(2):
        assert scorer.scores([((30, 41), [(52, 63, 74)])]).item() == pytest.approx(logits, abs=1e-5)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        load_policy(str(tmp_path / "rm"))
    state = torch.get_rng_state()
    assert score(tmp_path / "rm") == score(tmp_path / "rm")
    assert torch.equal(torch.get_rng_state(), state), "opening uses no random numbers"


def test_adapters_without_a_usable_head_are_no_reward_models(tiny_policy: Path, tmp_path: Path) -> None:
    adapter(tiny_policy, tmp_path / "lm", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"lm' lacks 1 weights of a reward model, e\.g\. 'score\.weight'"):
        RewardModelReward(str(tmp_path / "lm"))
    adapter(tiny_policy, tmp_path / "lost", 1, target_modules=["q_proj"])
    edit(tmp_path / "lost", lambda s: s.pop("base_model.model.score.weight"), "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights of a reward model, e\.g\. 'score\.weight'"):
        RewardModelReward(str(tmp_path / "lost"))
    adapter(tiny_policy, tmp_path / "two", 2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"two' has 2 labels"):
        RewardModelReward(str(tmp_path / "two"))


def test_an_adapter_with_more_tokens_than_its_base_opens_as_peft_opens_it(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    expected = adapter(tiny_policy, folder, tokens=3, target_modules=["q_proj"])
    ids = torch.tensor([[30, 260, 262, 5]])
    assert load_tokenizer(str(folder))("<new2>").input_ids == [262]
    with torch.no_grad():
        torch.testing.assert_close(load_policy(str(folder)).eval()(ids).logits, expected(ids).logits)
    trained = adapter(
        tiny_policy, tmp_path / "full", tokens=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    with torch.no_grad():
        torch.testing.assert_close(load_policy(str(tmp_path / "full")).eval()(ids).logits, trained(ids).logits)


def test_adapters_that_do_not_fit_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "adapter", "adapter_model.safetensors"
    adapter(tiny_policy, folder, target_modules=["q_proj"])
    whole = (folder / file).read_bytes()
    key = next(iter(load_file(folder / file)))
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (lambda s: s.pop(key), "lacks 1 weights"),
        (
            lambda s: s.update({"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(2, 2)}),
            "no place in the b",
        ),
        (lambda s: s.update({key: torch.ones(3, 3)}), "peft cannot open the adapter"),
    ]
    for change, message in cases:
        (folder / file).write_bytes(whole)
        edit(folder, change, file)
        with pytest.raises(ValueError, match=rf"adapter' .*{message}|{message}.*adapter'"):
            load_policy(str(folder))
    (folder / file).write_bytes(LFS)
    with pytest.raises(ValueError, match=rf"{file} is a git-lfs pointer"):
        load_policy(str(folder))
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"needs {file}"):
        load_policy(str(folder))


# --- reward models ---


def test_what_holds_no_trained_head_is_no_reward_model(tiny_policy: Path, reward: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny_policy.* lacks 1 weights of a reward model, e\.g\. 'score\.weight'"):
        RewardModelReward(str(tiny_policy))
    whole = (reward / "model.safetensors").read_bytes()
    mlp = {"score.0.weight": torch.ones(16, 16), "score.2.weight": torch.ones(1, 16)}
    value_head = {"value_head.weight": torch.ones(1, 16)}
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (lambda s: s.pop("score.weight"), r"lacks .*'score\.weight'"),
        (lambda s: (s.pop("score.weight"), s.update(mlp)), r"lacks .*'score\.weight'.*it holds 'score\.0\.weight'"),
        (lambda s: (s.pop("score.weight"), s.update(value_head)), r"it holds 'value_head\.weight'"),
        (lambda s: s.update(value_head), r"no place for, e\.g\. 'value_head\.weight'"),
        (lambda s: s.update({"score.weight": torch.ones(2, 16)}), r"has 2 labels"),
        (lambda s: s.pop("model.norm.weight"), r"lacks .*'model\.norm\.weight'"),
    ]
    for change, message in cases:
        (reward / "model.safetensors").write_bytes(whole)
        edit(reward, change)
        for use in (RewardModelReward, open_scorer, build_scorer):
            with pytest.raises(ValueError, match=r"reward' .*" + message):
                use(str(reward))


def test_two_labels_are_refused_whatever_the_config_says(reward: Path) -> None:
    configure(reward, architectures=None)
    edit(reward, lambda s: s.update({"score.weight": torch.ones(2, 16)}))
    with pytest.raises(ValueError, match="reward' has 2 labels"):
        build_scorer(str(reward))


def test_the_tokenizer_of_a_reward_model_is_checked_at_once(reward: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward)
    tokenizer.add_tokens(["<cite>"])
    tokenizer.save_pretrained(reward)
    with pytest.raises(ValueError, match="'<cite>' has id 260"):
        RewardModelReward(str(reward))


def test_a_causal_lm_with_a_value_head_gets_no_new_head_without_a_word(policy: Path) -> None:
    load_scorer(str(policy))
    for key in ("v_head.summary.weight", "value_head.weight", "score.0.weight", "classifier.weight", "rm_head.weight"):
        whole = (policy / "model.safetensors").read_bytes()
        edit(policy, lambda s, key=key: s.update({key: torch.ones(1, 16)}))  # type: ignore[misc]
        with pytest.raises(ValueError, match=rf"policy' .*'{key}'"):
            load_scorer(str(policy))
        (policy / "model.safetensors").write_bytes(whole)


def test_scores_by_another_class_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    tokens = LlamaForTokenClassification.from_pretrained(tiny_policy, num_labels=1)
    tokens.save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"tokens' .*'score\.bias'"):
        RewardModelReward(str(tmp_path / "tokens"))
    edit(tmp_path / "tokens", lambda s: s.pop("score.bias"))
    with pytest.raises(ValueError, match=r"tokens' is a LlamaForTokenClassification .*(computes other|does not open)"):
        open_scorer(str(tmp_path / "tokens"))


def test_an_ensemble_whose_heads_are_not_those_of_its_manifest_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    build_scorer(str(tiny_policy), Ensemble("linear", 3)).save(tmp_path / "three", load_tokenizer(str(tiny_policy)))
    open_scorer(str(tmp_path / "three"))
    configure(tmp_path / "three", "ensemble.json", size=2)
    with pytest.raises(ValueError, match=r"three' has 3 labels"):
        open_scorer(str(tmp_path / "three"))
    (tmp_path / "three" / "ensemble.json").write_text('{"kind": "linear"}')
    with pytest.raises(ValueError, match=r"three/ensemble\.json does not say which members"):
        open_scorer(str(tmp_path / "three"))


def encoder(family: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    torch.manual_seed(2)
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": 1,
        "initializer_range": 0.3,
        "max_position_embeddings": 80,
        "pad_token_id": 1 if family == "roberta" else tokenizer.pad_token_id,
    }
    model: Any
    if family == "bert":
        model = BertForSequenceClassification(BertConfig(**size))
    elif family == "roberta":
        model = RobertaForSequenceClassification(RobertaConfig(**size))
    else:
        relative: dict[str, Any] = {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "pooler_hidden_size": 16,
        }
        model = DebertaV2ForSequenceClassification(DebertaV2Config(**size, **relative))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("special", [True, False], ids=["cls", "plain"])
def test_encoders_give_the_rewards_of_transformers_and_are_not_trained(
    family: str, special: bool, tiny_policy: Path, tmp_path: Path
) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    if special:
        tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
        tokenizer.chat_template = None
        tokenizer.eos_token = None
        ends = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    model = encoder(family, tmp_path / family, tokenizer)
    reward = RewardModelReward(str(tmp_path / family), device="cpu", scoring_batch_tokens=64)
    prompts = [
        Prompt(i, (1,), text) for i, text in enumerate(["Name a river.", "Who?", "Name a lake.", "Why so long?"])
    ]
    answers = [" The Elbe.", " Nobody.", " The Oder", " Since it is."]
    found = reward.score(prompts, [Response((1,), text, "eos") for text in answers]).mean
    for prompt, answer, value in zip(prompts, answers, found.tolist(), strict=True):
        if special:
            inputs = tokenizer(prompt.text, answer, return_tensors="pt")
            if family != "bert":
                inputs.pop("token_type_ids", None)
        else:
            inputs = {"input_ids": tokenizer(f"{prompt.text}{answer}<|end|>", return_tensors="pt").input_ids}
        with torch.no_grad():
            assert value == pytest.approx(model(**inputs).logits.item(), abs=1e-5)
    assert len({round(value, 4) for value in found.tolist()}) == 4
    with pytest.raises(ValueError, match=rf"{family}' is a .*cannot be trained; use a decoder|no linear head"):
        build_scorer(str(tmp_path / family))
    # longer than the window: the beginning of the prompt goes
    assert reward.score([Prompt(0, (1,), "x" * 300)], [Response((1,), " yes", "eos")]).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"lower max_new_tokens"):
        reward.score([Prompt(0, (1,), "x")], [Response((1,), " yes" * 60, "eos")])

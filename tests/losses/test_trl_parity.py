"""Our losses, fed with log-probabilities of a plain forward pass, against TRL's DPOTrainer on the same batch.

TRL's conventions, as of version 1: ``ipo`` divides each log-ratio by the length of its response (our default);
``robust`` reads ``label_smoothing``, ``sigmoid`` does not, and the smoothed loss (cDPO) survives only inside ``aot``,
which equals it on a batch of one pair; ``hinge`` is normalized by the reference. ``bco_pair`` has no reward shift, and
``sft`` is the mean over the tokens of all chosen responses, which is ours where they are equally long. TRL appends EOS
to completions and counts it. Its CPO and ORPO trainers are experimental; ORPO's likelihood counts the prompt, of which
a single token has no likelihood. KTO's reference point is the mean log-ratio of mismatched rows of the batch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_rlhf.losses import (
    AbstractPreferenceLoss,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    BCOLoss,
    CDPOLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    LNDPOLoss,
    NCALoss,
    NLLTermLoss,
    ORPOLoss,
    PairLogps,
    RobustLoss,
    SimPOLoss,
    SPPOLoss,
    clipped_loss,
    implicit_rewards,
    kl_loss,
    kto_loss,
    response_weights,
    reward_accuracy,
)
from lightning_rlhf.modules.kto import mismatched as mismatched_items


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

BETA = 0.3
ROWS = [
    {"prompt": "a b", "chosen": " c d e f", "rejected": " g"},
    {"prompt": "h", "chosen": " a", "rejected": " b c d"},
    {"prompt": "c c c", "chosen": " d h", "rejected": " e f"},
]


def tokenizer() -> Any:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.7,  # far from uniform, so that policy and reference differ by nats
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def trainer_and_batch(folder: Path, rows: list[dict[str, str]], **options: Any) -> tuple[Any, dict[str, Tensor]]:
    args = trl.DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        per_device_train_batch_size=len(rows),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
        **options,
    )
    trainer = trl.DPOTrainer(
        model=model(0),
        ref_model=model(1),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


def summed_logps(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of completions by a plain forward pass, chosen rows first; shape [2 * pairs]."""
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def our_pairs(trainer: Any, batch: dict[str, Tensor]) -> PairLogps:
    policy_chosen, policy_rejected = summed_logps(trainer.model, batch).chunk(2)
    with torch.no_grad():
        reference_chosen, reference_rejected = summed_logps(trainer.ref_model, batch).chunk(2)
    chosen_length, rejected_length = batch["completion_mask"].sum(1).chunk(2)
    no = torch.zeros_like(chosen_length, dtype=torch.bool)
    one = torch.ones_like(policy_chosen)
    return PairLogps(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        chosen_from_reference=no,
        rejected_from_reference=no,
        label=one.detach(),
        weight=one.detach(),
    )


def gradients_of(network: Any, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters()}


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "loss"),
    [
        ("sigmoid", 0.0, DPOLoss()),
        ("robust", 0.2, RobustLoss(0.2)),
        ("ipo", 0.0, IPOLoss()),
        ("hinge", 0.0, HingeLoss()),
    ],
)
def test_loss_and_gradients_equal_those_of_trl(
    loss_type: str, smoothing: float, loss: AbstractPreferenceLoss, tmp_path: Path
) -> None:
    trainer, batch = trainer_and_batch(tmp_path, ROWS, loss_type=[loss_type], label_smoothing=smoothing)
    theirs = trainer.compute_loss(trainer.model, batch)
    pairs = our_pairs(trainer, batch)
    ours = loss(pairs, BETA).mean()
    assert sorted((pairs.chosen_length - pairs.rejected_length).tolist()) == [-2, 0, 3]  # lengths matter in this batch
    assert pairs.margin().abs().min() > 0.1
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-6)

    expected, got = gradients_of(trainer.model, theirs), gradients_of(trainer.model, ours)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"loss_type": ["sigmoid_norm"]}, LNDPOLoss()),
        ({"loss_type": ["exo_pair"], "label_smoothing": 0.01}, EXOLoss(0.01)),
        ({"loss_type": ["nca_pair"]}, NCALoss()),
        ({"loss_type": ["bco_pair"]}, BCOLoss()),
        ({"loss_type": ["sppo_hard"]}, SPPOLoss()),
        ({"loss_type": ["aot"], "label_smoothing": 0.1}, AOTLoss(label_smoothing=0.1)),
        ({"loss_type": ["aot_unpaired"]}, AOTLoss(paired=False)),
        ({"loss_type": ["apo_zero"]}, APOZeroLoss()),
        ({"loss_type": ["apo_down"]}, APODownLoss()),
        ({"loss_type": ["discopop"], "discopop_tau": 0.7}, DiscoPOPLoss(0.7)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AbstractPreferenceLoss) else "",
)
def test_losses_of_log_ratios_equal_those_of_trl_in_float64(
    options: dict[str, Any], loss: AbstractPreferenceLoss, tmp_path: Path
) -> None:
    trainer, batch = trainer_and_batch(tmp_path, ROWS, **options)
    assert_equal_in_float64(trainer, batch, loss)


def test_the_nll_term_equals_that_of_trl_in_float64(tmp_path: Path) -> None:
    # equally long chosen responses: TRL weighs tokens, and we weigh pairs
    rows = [{**row, "chosen": chosen} for row, chosen in zip(ROWS, (" c d", " a e", " d h"), strict=True)]
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}
    trainer, batch = trainer_and_batch(tmp_path, rows, **options)
    assert_equal_in_float64(trainer, batch, NLLTermLoss(0.4))


def assert_equal_in_float64(trainer: Any, batch: dict[str, Tensor], loss: AbstractPreferenceLoss) -> None:
    for network in (trainer.model, trainer.ref_model):
        network.double().register_forward_hook(with_float64_head, with_kwargs=True)
    theirs = trainer.compute_loss(trainer.model, batch)
    ours = loss(our_pairs(trainer, batch), BETA).mean()
    # TRL rounds the label smoothing of EXO to float32
    tolerance = 1e-7 if isinstance(loss, EXOLoss) else 1e-11
    assert_same_loss_and_gradients(trainer.model, ours, theirs, tolerance)


def with_float64_head(network: Any, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any) -> Any:
    """TRL's fused head is float32; with the log-probabilities of a plain head its losses are float64."""
    if "fused_lm_head" in inputs:
        hidden = network.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        labels = inputs["labels"][:, 1:]
        logps = network.lm_head(hidden)[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        logps = logps.masked_fill(labels == -100, 0.0)
        # the same numbers as those of the head of TRL
        torch.testing.assert_close(outputs.log_probs[:, -logps.shape[1] :].double(), logps, rtol=1e-5, atol=1e-5)
        outputs.log_probs = logps
    return outputs


def assert_same_loss_and_gradients(network: Any, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    expected, got = gradients_of(network, theirs), gradients_of(network, ours)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=100 * tolerance, atol=100 * tolerance)


def pairs_without_reference(network: Any, batch: dict[str, Tensor]) -> PairLogps:
    """Pairs of a batch of TRL's CPO and ORPO trainers; their reference is NaN."""
    logps, lengths = [], []
    for side in ("chosen", "rejected"):
        ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"]
        full = {"input_ids": ids, "attention_mask": batch[f"{side}_attention_mask"], "completion_mask": labels != -100}
        logps.append(summed_logps(network, full))
        lengths.append((labels != -100).sum(1))
    nan, no = torch.full_like(logps[0], float("nan")).detach(), torch.zeros_like(lengths[0], dtype=torch.bool)
    one = torch.ones_like(nan)
    return PairLogps(logps[0], logps[1], nan, nan, lengths[0], lengths[1], no, no, one, one)


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("CPO", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, CPOLoss(0.0)),
        ("CPO", {"loss_type": "sigmoid", "cpo_alpha": 0.7}, CPOLoss(0.7)),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4}, SimPOLoss(0.4)),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.7, "simpo_gamma": 0.4}, NLLTermLoss(0.7, SimPOLoss(0.4))),
        ("ORPO", {}, ORPOLoss()),
    ],
)
def test_losses_without_reference_equal_those_of_trl_in_float64(
    name: str, options: dict[str, Any], loss: AbstractPreferenceLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    experimental = importlib.import_module(f"trl.experimental.{name.lower()}")
    # prompts of one token and equally long chosen responses: there the likelihoods of TRL are ours
    rows = [
        {"prompt": "h", "chosen": " c d", "rejected": " b c d"},
        {"prompt": "g", "chosen": " d h", "rejected": " e"},
    ]
    args = getattr(experimental, f"{name}Config")(
        output_dir=str(tmp_path),
        beta=BETA,
        per_device_train_batch_size=len(rows),
        max_length=16,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **options,
    )
    trainer = getattr(experimental, f"{name}Trainer")(
        model=model(0),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    network = trainer.model.double()
    theirs, _ = trainer.get_batch_loss_metrics(network, batch)
    pairs = pairs_without_reference(network, batch)
    assert sorted(pairs.rejected_length.tolist()) == [2, 4]
    ours = loss(pairs, BETA).mean()
    # TRL rounds the log-probabilities of ORPO to float32
    assert_same_loss_and_gradients(network, ours, theirs, tolerance=1e-7 if name == "ORPO" else 1e-11)


def halves(batch: dict[str, Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of prompt and completion of each row."""
    found = []
    for ids, attended, completed in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        found.append((tuple(ids[attended & ~completed].tolist()), tuple(ids[attended & completed].tolist())))
    return found


def test_kto_equals_that_of_trl(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a b", "completion": " c d e f", "label": True},
        {"prompt": "h", "completion": " a", "label": False},
        {"prompt": "c c c", "completion": " d h", "label": True},
    ]
    args = trl.KTOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        per_device_train_batch_size=len(rows),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
    )
    trainer = trl.KTOTrainer(
        model=model(3),
        ref_model=model(0),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    mismatched = {name: batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")}

    def ratio(part: dict[str, Tensor]) -> Tensor:
        return summed_logps(trainer.model, part) - summed_logps(trainer.ref_model, part).detach()

    # the step pairs prompts and responses as TRL pairs those of a batch
    items = [(response, (), prompt) for prompt, response in halves(batch)]
    assert dict(mismatched_items(items)) == {prompt: (response,) for prompt, response in halves(mismatched)}
    kl = ratio(mismatched).mean().clamp(min=0)
    assert kl > 0.1
    ours = kto_loss(ratio(batch), batch["label"].float(), kl, BETA, 1.5, 0.8).mean()
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-6)
    expected, got = gradients_of(trainer.model, theirs), gradients_of(trainer.model, ours)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5)


def test_smoothed_labels_equal_trl_on_single_pairs(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        trainer, batch = trainer_and_batch(tmp_path / str(i), [row], loss_type=["aot"], label_smoothing=0.2)
        theirs = trainer.compute_loss(trainer.model, batch)
        ours = CDPOLoss(0.2)(our_pairs(trainer, batch), BETA).mean()
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-6)


def test_rewards_and_accuracy_equal_those_trl_logs(tmp_path: Path) -> None:
    trainer, batch = trainer_and_batch(tmp_path, ROWS, loss_type=["sigmoid"])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    pairs = our_pairs(trainer, batch)
    chosen = implicit_rewards(pairs.policy_chosen, pairs.reference_chosen, BETA)
    rejected = implicit_rewards(pairs.policy_rejected, pairs.reference_rejected, BETA)
    assert chosen.mean().item() == pytest.approx(logged["rewards/chosen"], rel=1e-5)
    assert rejected.mean().item() == pytest.approx(logged["rewards/rejected"], rel=1e-5)
    assert (BETA * pairs.margin()).mean().item() == pytest.approx(logged["rewards/margins"], rel=1e-5)
    assert reward_accuracy(pairs.margin(), pairs.label).mean().item() == pytest.approx(logged["rewards/accuracies"])


@pytest.mark.parametrize("corrected", [True, False])
def test_the_kl_of_grpo_equals_that_of_trl(corrected: bool, tmp_path: Path) -> None:
    """TRL multiplies k3 by the importance ratio unless told otherwise; tokens here are those of another policy."""
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        epsilon=0.2,
        loss_type="grpo",
        num_generations=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **({} if corrected else {"use_bias_correction_kl": False}),
    )
    model(0).save_pretrained(tmp_path)  # where TRL takes its reference from
    trainer = trl.GRPOTrainer(
        model=transformers.LlamaForCausalLM.from_pretrained(tmp_path),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b"}]),
        processing_class=tokenizer(),
    )
    prompt, completion = torch.tensor([[3, 4], [3, 4]]), torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    advantages = torch.tensor([0.7, -0.7])

    def logps(network: Any) -> Tensor:
        logits = network(input_ids=torch.cat([prompt, completion], 1)).logits[:, 1:-1]
        return torch.as_tensor(logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0])

    with torch.no_grad():
        sampling, reference = logps(model(2)), logps(model(1))
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": sampling,
        "ref_per_token_logps": reference,
    }
    trainer.current_gradient_accumulation_steps = 1
    network = trainer.model.train()
    theirs = trainer._compute_loss(network, inputs)
    theirs_gradients = gradients_of(network, theirs)
    ours_logps = logps(network)
    tokens = clipped_loss(ours_logps, sampling, advantages[:, None], 0.2)
    tokens = tokens + BETA * kl_loss(ours_logps, reference, "loss_k3_ratio" if corrected else "loss_k3", sampling)
    weights = response_weights(mask.sum(1), "sequence_mean", 3.5, 4)
    ours = (weights * (tokens * mask).sum(1)).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients_of(network, ours), theirs_gradients, atol=1e-5, rtol=1e-4)

"""Counts of the calculator, beside models that are built and figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.cli import main
from lightning_rlhf.commands.plan import SHAPES, TILE_BYTES, Device, Load, Shape, estimate, plan_run, shape_of
from lightning_rlhf.models.load import LoRA, load_policy


DEVICE = Device(80, 100, 1000)
LOAD = Load(pairs=8, prompt=100, response=50, rows=4, tokens_per_pass=1000)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_a_model(tied: bool) -> None:
    shape = Shape(3, 64, 96, 4, 2, 16, 200, tied)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_named_sizes_are_what_they_are_called() -> None:
    billions = {name: shape.parameters / 1e9 for name, shape in SHAPES.items()}
    assert billions == pytest.approx({"1B": 1.24, "8B": 8.03, "70B": 70.55}, abs=0.01)


def test_a_folder_is_read(tiny_policy: object) -> None:
    assert shape_of(str(tiny_policy)) == Shape(2, 16, 32, 2, 1, 8, 260)


def test_memory_by_hand() -> None:
    shape = Shape(2, 8, 16, 2, 1, 4, 10)
    size = shape.parameters * 2
    one = estimate(shape, LOAD, DEVICE, 1)
    assert one.training == {
        "weights": size,
        # moments and copies of the weights are float32
        "AdamW": 4 * size,
        "float32 copies": 2 * size,
        "reference": size,
        "gradients": size,
        "activations": 1000 * 2 * (6 * 8 + 3 * 8 + 4 * 4 + 4 * 16) * 2,
        "float32 gradients": 0,
        "gathered layers and logits": TILE_BYTES,
    }
    # ddp holds buckets of gradients beside the gradients
    assert estimate(shape, LOAD, DEVICE, 4).training["gradients"] == 2 * size
    sharded = estimate(shape, LOAD, DEVICE, 4, "fsdp")
    assert sharded.training["weights"] == size / 4
    assert sharded.training["reference"] == size / 4
    parts = ("weights", "reference", "gathered policy and reference")
    assert sum(sharded.decoding[part] for part in parts) == 2 * size
    adapters = estimate(shape, LOAD, DEVICE, 1, lora=2)
    heads = 2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16)
    trained = 2 * 2 * heads
    assert adapters.training["weights"] == size + 4 * trained
    assert adapters.training["AdamW"] == 2 * 4 * trained
    assert adapters.training["gradients"] == 4 * trained
    assert adapters.training["reference"] == adapters.training["float32 copies"] == 0
    single = estimate(shape, LOAD, DEVICE, 1, weight_bytes=4)
    assert single.training["weights"] == single.training["gradients"] == single.training["AdamW"] / 2 == 2 * size
    assert single.training["float32 copies"] == 0
    short = Load(pairs=8, prompt=1, response=1, rows=4, tokens_per_pass=1)
    stepping = estimate(SHAPES["1B"], short, DEVICE, 1).training
    assert stepping["float32 gradients"] == 2 * SHAPES["1B"].parameters - stepping["activations"] > 0


def test_adapters_count_what_peft_makes_of_them(tiny_policy: object) -> None:
    policy = load_policy(str(tiny_policy), lora=LoRA(r=2), dtype="bfloat16")
    adapters = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    assert sum(p.numel() for p in adapters) == shape_of(str(tiny_policy)).adapters(2)


def test_time_falls_with_devices_and_rises_with_work() -> None:
    shape = SHAPES["1B"]
    one, four = (estimate(shape, LOAD, DEVICE, gpus).seconds for gpus in (1, 4))
    assert four["training"] == pytest.approx(one["training"] / 4)
    assert four["decoding"] < one["decoding"]
    assert one["training"] == pytest.approx(3 * one["reference"])
    assert estimate(shape, LOAD, DEVICE, 1, checkpointing=True).seconds["training"] == pytest.approx(
        4 * one["reference"]
    )


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model=70B", "--gpus=16", "--memory=80"])
    lines = capsys.readouterr().out.splitlines()
    assert "70.55 billion parameters, 16 x 80 GiB" in lines[0]
    # policy and reference, gathered for decoding, are 263 GiB
    assert [line.split("|")[4].strip() for line in lines[3:7]] == ["no"] * 4
    assert len(plan_run("1B", gpus=1).splitlines()) == 3 + 4
    with pytest.raises(ValueError, match="must be >= 1"):
        plan_run("1B", gpus=0)

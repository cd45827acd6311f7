"""Decoding by vLLM or SGLang: a real HTTP server with a real tiny model on loopback; and each way in which it may fail.

tests/samplers/test_vllm_server_real.py has ``vllm serve``.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_rlhf.cli import main
from lightning_rlhf.generation import DecodeEngine, Decoding, Request, ServerEngine
from lightning_rlhf.generation.server_client import GenerationServerError
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models import LoRA, build_reference, load_policy, load_tokenizer
from lightning_rlhf.models.options import GenerationServer, ModelOptions
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt


PROMPTS = [Prompt(0, (40, 41, 42), ""), Prompt(1, (50,), "")]
REQUESTS = [Request(prompt, Key((1, k))) for k, prompt in enumerate([*PROMPTS, PROMPTS[0]])]
GREEDY = [Request(prompt, Key((2,)), temperature=1e-6) for prompt in PROMPTS]


@pytest.fixture
def serve(servers: ModuleType, tiny_policy: Path) -> Iterator[Any]:
    """Start servers, which end with the test."""
    running = []

    def start(folder: Path = tiny_policy, **settings: Any) -> Any:
        running.append(servers.CompletionServer(folder, **settings).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__(None, None, None)


def engines(
    policy: Path, server: Any, folder: Path, lora: LoRA | None = None, **settings: Any
) -> tuple[ServerEngine, DecodeEngine]:
    """The engine of a server, and the built-in one over the same policy."""
    model: Any = load_policy(str(policy), lora=lora)
    tokenizer = load_tokenizer(str(policy))
    reference = build_reference(model, "fixed")
    options: dict[str, Any] = {"beta": 0.1, "decoding": Decoding(max_new_tokens=6), "eos_ids": [0]}
    kind = getattr(server, "engine", "vllm")
    address = GenerationServer(
        **{
            "base_url": server.base_url,
            "model": "base",
            "folder": str(folder),
            "engine": kind,
            "retries": 0,
            **settings,
        }
    )
    return ServerEngine(model, reference, tokenizer, server=address, **options), DecodeEngine(
        model, reference, tokenizer, **options
    )


def train(policy: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_ids_go_and_come_and_log_probabilities_are_of_the_local_policy(
    serve: Any, tiny_policy: Path, tmp_path: Path, engine: str
) -> None:
    server = serve(engine=engine)
    served, ours = engines(tiny_policy, server, tmp_path)
    counted: list[int] = []
    served.on_tokens = counted.append
    responses = served.generate(REQUESTS, reference_logps=True)
    # the server samples with Key((seed,)): the same engine gives the same responses in order; SGLang gets 31 bits
    bits = 2**63 - 1 if engine == "vllm" else 2**31 - 1
    seeded = [Request(r.prompt, Key((r.key.seed() & bits,))) for r in REQUESTS]
    expected = ours.generate(seeded, reference_logps=True)
    assert [r.ids for r in responses] == [r.ids for r in expected]
    assert [(r.text, r.finish_reason, r.source) for r in responses] == [
        (r.text, r.finish_reason, r.source) for r in expected
    ]
    for left, right in zip(responses, expected, strict=True):
        assert left.policy_logps == pytest.approx(right.policy_logps, abs=1e-5)
        assert left.reference_logps == pytest.approx(right.reference_logps, abs=1e-5)
    assert counted == [sum(len(r.ids) for r in responses)]
    if engine == "vllm":
        probe, *sent = server.bodies("/v1/completions")
        assert (probe["logprobs"], probe["temperature"]) == (1, 1.0)
        seeds = {body["seed"] for body in sent}
    else:
        probe, *sent = [body["sampling_params"] for body in server.bodies("/generate")]
        assert (probe["top_p"], probe["temperature"]) == (1.0, 1.0)
        seeds = {body["sampling_seed"] for body in sent}
    # in any order, since they are sent side by side
    assert seeds == {request.key.seed() & bits for request in REQUESTS}
    # defaults of the server must not change the distribution
    assert all((body["top_k"], body["repetition_penalty"], body["stop_token_ids"]) == (-1, 1.0, [0]) for body in sent)
    assert {body["ignore_eos"] for body in sent} == {engine == "vllm"}
    assert served.generate([]) == []


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("lora", [None, LoRA(r=2), LoRA(r=2, peft={"rank_pattern": {"q_proj": 1}})])
def test_the_server_follows_the_policy(
    serve: Any, tiny_policy: Path, tmp_path: Path, lora: LoRA | None, kind: str
) -> None:
    server = serve(engine=kind)
    engine, ours = engines(tiny_policy, server, tmp_path, lora)
    # another process of the run: it finds the weights that the first one brought
    other, _ = engines(tiny_policy, server, tmp_path, lora)
    other.policy.load_state_dict(engine.policy.state_dict())

    def pushed() -> int:
        routes = ("/collective_rpc", "/v1/load_lora_adapter", "/update_weights_from_disk", "/load_lora_adapter")
        return sum(len(server.bodies(route)) for route in routes)

    before = [r.ids for r in engine.generate(GREEDY)]
    assert [r.ids for r in other.generate(GREEDY)] == before
    assert pushed() == 1
    for policy in (engine.policy, other.policy):
        train(policy)
    after = [r.ids for r in engine.generate(GREEDY)]
    assert after == [r.ids for r in ours.generate(GREEDY)] == [r.ids for r in other.generate(GREEDY)]
    assert after != before
    assert pushed() == 2
    if engine.adapted is not None:
        # the old adapter is gone, and the base model without one is the reference
        assert len(server.models) == 2 and len(list(tmp_path.glob("policy-*"))) == 1
        of_reference = [Request(r.prompt, r.key, mix=-1.0, temperature=1e-6) for r in GREEDY]
        responses = engine.generate(of_reference)
        assert [r.ids for r in responses] == before
        assert all(r.reference_logps is not None for r in responses)
    else:
        assert not list(tmp_path.glob("policy-*"))
        with pytest.raises(ValueError, match="mixes policy and reference"):
            engine.generate([Request(PROMPTS[0], Key((0,)), mix=-1.0)])
    # a server that was started again has its first weights, and gets the policy's
    if lora is None:
        server.version = "default"
        engine.generate(GREEDY)
        assert pushed() == 3


def test_a_failure_that_passes_is_tried_again(serve: Any, tiny_policy: Path, tmp_path: Path) -> None:
    server = serve(fault=lambda route, before: 503 if route == "/v1/completions" and before == 1 else None)
    engine, _ = engines(tiny_policy, server, tmp_path, retries=1)
    assert len(engine.generate(REQUESTS)) == 3
    assert len(server.bodies("/v1/completions")) == 5


def test_the_key_goes_in_the_header(
    serve: Any, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    with pytest.raises(GenerationServerError, match=r"api_key_env names is not set"):
        engines(tiny_policy, server, tmp_path, api_key_env="SERVER_KEY")
    monkeypatch.setenv("SERVER_KEY", "secret")
    engines(tiny_policy, server, tmp_path, api_key_env="SERVER_KEY")
    assert server.headers[-1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("settings", "lora", "message"),
    [
        ({"dev_mode": False}, None, "HTTP 404.*VLLM_SERVER_DEV_MODE=1"),
        ({"adapters": False}, LoRA(r=2), "HTTP 404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"token_ids": False}, None, "no token ids.*use vLLM, or SGLang with"),
        ({"name": "other"}, None, "model.options.server.model is 'base', and .* has 'other'"),
        ({"engine": "sglang", "dev_mode": False}, None, "/model_info has no weight_version"),
        ({"engine": "sglang", "adapters": False}, LoRA(r=2), "HTTP 400.*LoRA is not enabled.*--enable-lora"),
        ({"engine": "sglang", "token_ids": False}, None, "without output_token_logprobs"),
        # every token of the tiny vocabulary but the policy's own EOS
        ({"engine": "sglang", "own_eos": tuple(range(1, 260))}, None, "ended a response at .*eos_token_id"),
    ],
    ids=["dev_mode", "adapters", "token_ids", "name", "sgl_version", "sgl_adapters", "sgl_token_ids", "sgl_eos"],
)
def test_servers_that_cannot_serve_a_policy_are_refused(
    serve: Any, tiny_policy: Path, tmp_path: Path, settings: Any, lora: LoRA | None, message: str
) -> None:
    with pytest.raises(GenerationServerError, match=message):
        engines(tiny_policy, serve(**settings), tmp_path, lora)[0].generate(REQUESTS)


def test_a_server_that_is_down_is_named(tiny_policy: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(GenerationServerError, match=r"start the server, or correct model.options.server.base_url"):
        engines(tiny_policy, SimpleNamespace(base_url=address), tmp_path)


def test_another_model_behind_the_name_is_noticed(serve: Any, tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    model: Any = load_policy(str(tiny_policy))
    train(model)
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_policy)).save_pretrained(folder)
    # adapters of one base over another one
    engine, _ = engines(tiny_policy, serve(folder), tmp_path / "shared", LoRA(r=2))
    with pytest.raises(GenerationServerError, match=r"is not the policy: log-probabilities differ by .*model.policy"):
        engine.generate(REQUESTS)


def test_a_second_run_on_the_server_is_noticed(serve: Any, tiny_policy: Path, tmp_path: Path) -> None:
    server = serve()
    engine, _ = engines(tiny_policy, server, tmp_path)
    engine.generate(REQUESTS)
    asked = len(server.bodies("/v1/completions"))

    def other_run(route: str, before: int) -> None:
        if route == "/v1/completions" and before > asked:
            server.version = "another"

    server.fault = other_run
    with pytest.raises(GenerationServerError, match="another run uses the server"):
        engine.generate(REQUESTS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vllm", "HTTP 400: This model's maximum context length is 256 tokens"),
        ("sglang", "SGLang cut a response after [12] of 6 tokens .*--context-length"),
    ],
)
def test_prompts_that_are_too_long_are_named(
    serve: Any, tiny_policy: Path, tmp_path: Path, kind: str, message: str
) -> None:
    engine, _ = engines(tiny_policy, serve(engine=kind), tmp_path)
    with pytest.raises(GenerationServerError, match=message):
        engine.generate([Request(Prompt(0, (5,) * 254, ""), Key((1,)))])


def test_a_request_that_sglang_aborts_is_named(serve: Any, tiny_policy: Path, tmp_path: Path) -> None:
    server = serve(engine="sglang")
    finish = {"type": "abort", "message": "The request queue is full."}
    server._generate_sglang = lambda body: (200, {"text": "", "meta_info": {"finish_reason": finish}})
    with pytest.raises(GenerationServerError, match="SGLang aborted a request: The request queue is full"):
        engines(tiny_policy, server, tmp_path)[0].generate(REQUESTS)


def test_an_adapter_whose_reply_was_lost_is_not_loaded_twice(serve: Any, tiny_policy: Path, tmp_path: Path) -> None:
    server = serve()
    load = server._load_adapter

    def lost(body: Any) -> None:
        load(body)
        # the server has it; the client gets an error
        raise RuntimeError

    server._load_adapter = lost
    engine, ours = engines(tiny_policy, server, tmp_path, LoRA(r=2))
    assert [r.ids for r in engine.generate(GREEDY)] == [r.ids for r in ours.generate(GREEDY)]


def test_options() -> None:
    server = GenerationServer("http://127.0.0.1:8000/v1", "base", "weights")
    assert ModelOptions(use_vllm=True).generation == "vllm"
    assert ModelOptions(generation="server", server=server).server == server
    for wrong, message in [
        ({"generation": "sglang"}, "one of local, vllm, server"),
        ({"generation": "server"}, "without a server"),
        ({"server": server}, "generation=local with a server"),
        ({"generation": "server", "server": server, "use_vllm": True}, "earlier name"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelOptions(**wrong)  # type: ignore[arg-type]
    for changed, message in [
        ({"base_url": "http://user:secret@host/v1"}, "base_url must be like"),
        ({"folder": ""}, "folder must not be empty"),
        ({"timeout": float("nan")}, "timeout > 0"),
        ({"engine": "tgi"}, "server.engine must be one of vllm, sglang; got 'tgi'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GenerationServer(**{"base_url": server.base_url, "model": "base", "folder": "weights", **changed})  # type: ignore[arg-type, dict-item]


@pytest.mark.slow
def test_a_run_of_sir_pilaf_decodes_on_the_server(serve: Any, tiny_policy: Path, tmp_path: Path) -> None:
    server, run = serve(), tmp_path / "run"
    main(
        [
            *(
                "fit",
                "--config",
                "dpo_online",
                "--config",
                "debug",
                f"--run_dir={run}",
                f"--model.policy={tiny_policy}",
            ),
            *("--data.sampler=SIRPILAFSampler", "--data.sampler.n=4", "--trainer.enable_progress_bar=false"),
            *("--model.options.generation=server", f"--model.options.server.base_url={server.base_url}"),
            *("--model.options.server.model=base", f"--model.options.server.folder={tmp_path / 'weights'}"),
        ]
    )
    with PreferenceStore(run / "ledger.sqlite", read_only=True) as store:
        preferences = list(store.preferences())
    assert {p.comparison.branch for p in preferences} == {"sir"}
    # weights of the first round and of each later one
    assert len(server.bodies("/collective_rpc")) >= len({p.round for p in preferences}) > 1
    seeds = {body["seed"] for body in server.bodies("/v1/completions")}
    assert len(seeds) >= 4 * len(preferences)

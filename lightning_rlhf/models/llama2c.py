"""Models of llama2.c (https://github.com/karpathy/llama2.c) as folders that transformers opens.

A ``model.bin`` of its first format is seven integers and the float32 weights in a fixed order; a ``tokenizer.bin`` is a
list of pieces with scores. Both are read whole: these are small models.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROPE_THETA = 10_000.0
FIRST_BYTE = 3
"""Id of the piece for byte 0; before it come ``<unk>``, ``<s>`` and ``</s>``, behind the bytes what merges make."""

SPECIALS = ("<unk>", "<s>", "</s>")


def convert_llama2c(model: bytes, tokenizer: bytes, folder: Path) -> None:
    """Write a model and its tokenizer as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    A story is taught to begin with ``<s>`` and to be followed by the ``<s>`` of the next one; so that token is both
    the first of every text and the one that ends it, as in llama2.c.

    Args:
        model: content of ``model.bin``.
        tokenizer: content of ``tokenizer.bin``.
        folder: where to; exists.

    Raises:
        ValueError: if either is no such file, or they do not belong together.
    """
    config, weights = read_model(model)
    built = LlamaForCausalLM(config)
    missing, unexpected = built.load_state_dict(weights, strict=False)
    # a head that shares the embedding is not among the weights
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    built.save_pretrained(folder)
    pieces = read_pieces(tokenizer)
    if len(pieces) != config.vocab_size:
        raise ValueError(f"the tokenizer has {len(pieces)} pieces, the model {config.vocab_size}; they don't belong")
    make: Any = PreTrainedTokenizerFast
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
    """Read a ``model.bin``: its config, and its weights by the names and in the layout of `LlamaForCausalLM`.

    Raises:
        ValueError: if the header makes no sense, the size does not fit it, or the rotary table is another one.
    """
    if len(data) < 28:
        raise ValueError(f"a model.bin has a header of 28 bytes; got {len(data)} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) < 1 or dim % (2 * heads) or heads % kv_heads:
        raise ValueError(f"this is no model.bin of llama2.c's first format: {struct.unpack_from('<7i', data)}")
    size, tied = dim // heads, vocab > 0
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
    flat = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).astype(np.float32))
    arrays = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    read = {name: part.view(shapes[name]) for name, part in zip(shapes, arrays, strict=True)}
    angles = torch.arange(length)[:, None] * ROPE_THETA ** (-torch.arange(0, size, 2) / size)
    if not (
        torch.allclose(read["cos"], angles.cos(), atol=1e-3) and torch.allclose(read["sin"], angles.sin(), atol=1e-3)
    ):
        raise ValueError(f"the rotary table of model.bin is not that of base {ROPE_THETA:g}")

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
    """Reorder the outputs of a query or key projection for transformers' rotary embedding.

    llama2.c turns neighbours, (0, 1), (2, 3), ...; transformers turns entry i with entry i + size / 2.

    Args:
        weight: shape [heads * size, inputs].
        heads: number of heads.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_pieces(data: bytes) -> list[tuple[str, float]]:
    """Read a ``tokenizer.bin``: pieces and scores by id, those of bytes as ``<0x0A>``.

    Raises:
        ValueError: if it ends too early, or two pieces are equal.
    """
    pieces: list[tuple[str, float]] = []
    place = 4  # behind the length of the longest piece
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
            # written with line breaks around them
            pieces.append((SPECIALS[number], score))
        elif number < FIRST_BYTE + 256:
            # written as characters, or, by later versions, as here
            pieces.append((f"<0x{number - FIRST_BYTE:02X}>", score))
        else:
            pieces.append((piece.decode(), score))
    if len({piece for piece, _ in pieces}) < len(pieces) or len(pieces) < FIRST_BYTE + 256:
        raise ValueError(f"tokenizer.bin holds {len(pieces)} pieces, of which some are equal or the bytes are missing")
    return pieces


def piece_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """A tokenizer that merges as llama2.c does: of all neighbours that make a piece, those of the highest score first.

    A text gets a space in front, as in SentencePiece, and characters without a piece of their own become bytes.

    Args:
        pieces: pieces and scores by id, as of `read_pieces`.
    """
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    own = {piece for piece, _ in pieces[FIRST_BYTE + 256 :]}
    merges = []
    for piece, _ in sorted(pieces[FIRST_BYTE + 256 :], key=lambda entry: -entry[1]):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in splits if left in own and right in own]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer

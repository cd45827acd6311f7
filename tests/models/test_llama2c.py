"""Files of llama2.c: the converted model computes what llama2.c computes, and the tokenizer merges as it does."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_rlhf.models.builtin.llama2c import convert_llama2c, piece_tokenizer, read_model, read_pieces
from lightning_rlhf.models.load import end_of_sequence_ids, load_tokenizer


MERGED = ("  ", " t", "he", " the", "in", " a", "an", "nd", " and", "th", "ing", "aa", "aaa", " cat", "at", "ca")
CHARACTERS = " abcdeghint"


def model_file(tied: bool, kv_heads: int = 2, vocab: int = 300) -> tuple[bytes, dict[str, Tensor]]:
    """A model.bin with random weights, and these weights in llama2.c's layout."""
    generator = torch.Generator().manual_seed(0)
    dim, hidden, layers, heads, length = 16, 24, 2, 4, 12
    size = dim // heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    weights = {
        "embedding": draw(vocab, dim),
        "rms_att": 1 + draw(layers, dim),
        "wq": draw(layers, dim, dim),
        "wk": draw(layers, kv_heads * size, dim),
        "wv": draw(layers, kv_heads * size, dim),
        "wo": draw(layers, dim, dim),
        "rms_ffn": 1 + draw(layers, dim),
        "w1": draw(layers, hidden, dim),
        "w2": draw(layers, dim, hidden),
        "w3": draw(layers, hidden, dim),
        "rms_final": 1 + draw(dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    if not tied:
        weights["wcls"] = draw(vocab, dim)
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab if tied else -vocab, length)
    return header + b"".join(w.contiguous().numpy().astype("<f4").tobytes() for w in weights.values()), weights


def forward(w: dict[str, Tensor], ids: Tensor, heads: int, kv_heads: int) -> Tensor:
    """What run.c computes, for a whole sequence: neighbors are turned, groups of heads share keys and values."""
    size = w["cos"].shape[1] * 2

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(x: Tensor) -> Tensor:
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], w["cos"][: len(ids), None], w["sin"][: len(ids), None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    x = w["embedding"][ids]
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    for layer in range(len(w["wq"])):
        y = norm(x, w["rms_att"][layer])
        q, k, v = (
            (y @ w[name][layer].T).view(len(ids), n, size)
            for name, n in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
        )
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (turned(k), v))
        scores = torch.einsum("ihd,jhd->hij", turned(q), k) / size**0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ w["wo"][layer].T
        y = norm(x, w["rms_ffn"][layer])
        x = x + (F.silu(y @ w["w1"][layer].T) * (y @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["rms_final"]) @ w.get("wcls", w["embedding"]).T


def tokenizer_file(named_bytes: bool = False) -> bytes:
    """A tokenizer.bin with 300 pieces: specials, bytes, merges by falling score, characters, and rare ones."""
    pieces: list[tuple[bytes, float]] = [(name, 0.0) for name in (b"<unk>", b"\n<s>\n", b"\n</s>\n")]
    pieces += [(b"<0x%02X>" % i if named_bytes else chr(i).encode(), 0.0) for i in range(256)]
    pieces += [(piece.encode(), -1e9 if piece == "  " else -float(i)) for i, piece in enumerate(MERGED)]
    pieces += [(piece.encode(), -float(len(MERGED) + i)) for i, piece in enumerate(CHARACTERS + "é")]
    pieces += [(chr(0x4E00 + i).encode(), -1000.0 - i) for i in range(300 - len(pieces))]
    longest = max(len(piece) for piece, _ in pieces)
    return struct.pack("<i", longest) + b"".join(struct.pack("<fi", s, len(p)) + p for p, s in pieces)


def greedy_ids(pieces: list[tuple[str, float]], text: str) -> list[int]:
    """Ids as ``bpe_encode`` of llama2.c makes them, without the first ``<s>``: the best pair merges until none does."""
    ids_of = {piece: number for number, (piece, _) in enumerate(pieces)}
    ids = []
    for character in f" {text}":
        known = ids_of.get(character)
        ids += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        best = None
        for i, pair in enumerate(pairwise(ids)):
            merged = ids_of.get(pieces[pair[0]][0] + pieces[pair[1]][0])
            if merged is not None and (best is None or pieces[merged][1] > best[0]):
                best = (pieces[merged][1], i, merged)
        if best is None:
            return ids
        ids[best[1] : best[1] + 2] = [best[2]]


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 4), (True, 2), (False, 1)])
def test_converted_model_computes_what_llama2c_computes(tied: bool, kv_heads: int, tmp_path: Path) -> None:
    data, weights = model_file(tied, kv_heads)
    convert_llama2c(data, tokenizer_file(), tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor([1, 5, 270, 9, 270, 299, 3, 0])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(logits, forward(weights, ids, 4, kv_heads), atol=1e-4, rtol=1e-4)
    tokenizer = load_tokenizer(str(tmp_path))
    # a story is followed by the <s> of the next
    assert end_of_sequence_ids(model, tokenizer) == (1,)
    assert tokenizer("a cat").input_ids[0] == 1


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    data, _ = model_file(True)
    for wrong, match in (
        (data[:-4], "should have"),
        (data[:20], "28 bytes"),
        (b"\0" * len(data), "first format"),
        (data[:-400] + b"\0" * 400, "rotary"),
    ):
        with pytest.raises(ValueError, match=match):
            read_model(wrong)
    with pytest.raises(ValueError, match="ends within piece 299"):
        read_pieces(tokenizer_file()[:-1])
    with pytest.raises(ValueError, match="bytes are missing"):
        read_pieces(tokenizer_file()[: 4 + 3 * 8 + 5 + 5 + 6])
    with pytest.raises(ValueError, match="use the model's tokenizer"):
        convert_llama2c(model_file(True, vocab=301)[0], tokenizer_file(), tmp_path)


def test_both_spellings_of_bytes_are_read() -> None:
    assert read_pieces(tokenizer_file()) == read_pieces(tokenizer_file(named_bytes=True))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=[*CHARACTERS, *CHARACTERS, "é", "\n", "ß", "🙂", "▁"], max_size=30))
def test_merges_are_those_of_llama2c_and_texts_come_back(text: str) -> None:
    pieces = read_pieces(tokenizer_file())
    tokenizer = piece_tokenizer(pieces)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == (greedy_ids(pieces, text) if text else ids)
    assert tokenizer.decode(ids) == text

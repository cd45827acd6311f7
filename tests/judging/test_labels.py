"""How labels are spelled in three kinds of vocabulary, and how their probabilities are read off a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf.judging.labels import label_logps, spell
from lightning_rlhf.logprobs.prefix_tree import next_token_logps


SCORES = [str(score) for score in range(1, 11)]
MERGES = {
    "digits alone": [],  # SmolLM2, Qwen, Llama-2
    "ten is a token": [("1", "0")],  # Llama-3, Falcon
    "space and number": [("1", "0"), *[("Ġ", d) for d in "123456789"], ("Ġ", "10")],  # GPT-2, NeoX
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *[left + right for left, right in MERGES[kind]]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES[kind]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("digits alone", [["1"], ["2"], ["1", "0"]]),
        ("ten is a token", [["1"], ["2"], ["10"]]),
        ("space and number", [["Ġ1"], ["Ġ2"], ["Ġ10"]]),  # the space belongs to the label
    ],
)
def test_the_vocabulary_says_what_belongs_to_a_label(kind: str, written: list[list[str]]) -> None:
    reader = tokenizer(kind)
    found = spell(reader, "Score: ", SCORES)
    tokens = [reader.convert_ids_to_tokens(list(ids)) for ids in found.written]
    assert [tokens[0], tokens[1], tokens[9]] == written
    assert found.ended == (True, *[False] * 9)  # "1" begins "10"
    assert set(reader.convert_ids_to_tokens(list(found.digits))) >= set("0123456789")
    assert not any(token.startswith("Ġ") for token in reader.convert_ids_to_tokens(list(found.digits)))
    ways = [reader.convert_ids_to_tokens(list(ids)) for ids in found.spellings[9]]
    assert (
        ways
        == {
            "digits alone": [["1", "0"]],
            "ten is a token": [["10"], ["1", "0"]],
            "space and number": [["Ġ10"], ["Ġ1", "0"]],
        }[kind]
    )


def plain(model: LlamaForCausalLM, text: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(text)])).logits[0, -1].double().softmax(-1)


@pytest.mark.parametrize("kind", MERGES)
def test_probabilities_of_labels_by_the_definition(kind: str) -> None:
    reader = tokenizer(kind)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(reader),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            initializer_range=0.5,
        )
    ).eval()
    ending = "Score:" if kind == "space and number" else "Score: "  # where the prefix ends in each vocabulary
    prefixes = [tuple(reader(text + ending)["input_ids"]) for text in ("a text. ", "another, longer text. ")]
    space = "Ġ" if kind == "space and number" else ""

    def id_of(token: str) -> int:
        return int(reader.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    expected = torch.zeros(2, 10, dtype=torch.float64)
    for row, prefix in enumerate(prefixes):
        first = plain(model, prefix)
        behind_one = plain(model, (*prefix, id_of(f"{space}1")))
        for score in range(1, 10):
            expected[row, score - 1] = first[id_of(f"{space}{score}")]
        digits = [id_ for token, id_ in reader.get_vocab().items() if token[0] in "0123456789"]
        ten = first[id_of(f"{space}1")] * behind_one[id_of("0")]
        if kind != "digits alone":
            ten = ten + first[id_of(f"{space}10")]
        expected[row, 9] = ten
        expected[row, 0] *= 1 - behind_one[digits].sum()

    def read(texts: Sequence[tuple[int, ...]], targets: Sequence[int]) -> Tensor:
        return next_token_logps(model, texts, targets)

    found = label_logps(read, prefixes, spell(reader, "Score: ", SCORES))
    torch.testing.assert_close(found.exp().double(), expected, rtol=1e-4, atol=1e-9)
    assert (found.exp().sum(1) < 1).all()  # nothing counts twice


def test_a_label_that_is_all_of_another_ones_beginning() -> None:
    reader = tokenizer("digits alone")
    found = spell(reader, "Answer: ", ["1", "12"])
    assert [reader.convert_ids_to_tokens(list(ids)) for ids in found.written] == [["1"], ["1", "2"]]


def test_labels_that_look_alike_are_an_error() -> None:
    with pytest.raises(ValueError, match="alike"):
        spell(tokenizer("digits alone"), "Answer: ", ["1", "1"])

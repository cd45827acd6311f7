"""How a chat template writes the assistant's turn: the tokens before the answer, at its end, and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.types import Message


@dataclass(frozen=True)
class TurnFormat:
    """Token ids around an answer; all empty if there is no template, or it fits no simple conversation.

    Args:
        opening: the generation prompt (``add_generation_prompt``), e.g.
            ``<|im_start|>assistant\\n``; empty where an answer follows the user's turn at once.
        end: the token that ends the assistant's turn, e.g. ``<|im_end|>``; None where no special token does.
        closing: tokens behind it, e.g. a newline.
        writes_bos: whether the template writes BOS.
    """

    opening: tuple[int, ...] = ()
    end: int | None = None
    closing: tuple[int, ...] = ()
    writes_bos: bool = False

    def asks(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends with the generation prompt."""
        length = len(self.opening)
        return length > 0 and tuple(ids[-length:]) == self.opening

    def closed(self, prompt: Sequence[int], answer: tuple[int, ...]) -> tuple[int, ...]:
        """An answer with the tokens behind it, if it ends with the turn and the prompt is a chat."""
        ended = self.end is not None and answer[-1:] == (self.end,)
        return answer + self.closing if ended and self.asks(prompt) else answer

    def joined(
        self, prompt: Sequence[int], first: tuple[int, ...], second: tuple[int, ...], eos: int
    ) -> tuple[int, ...]:
        """Two answers to one prompt as one text: the second follows as another turn of the assistant.

        Args:
            prompt: token ids of the prompt.
            first: token ids of the first answer.
            second: token ids of the second answer.
            eos: id that ends the first answer where nothing else does, as when it was cut.
        """
        first = self.closed(prompt, first)
        turn = (self.end, *self.closing)
        ended = first[-1:] == (eos,) or (self.end is not None and first[-len(turn) :] == turn)
        opening = self.opening if self.asks(prompt) else ()
        return first + (() if ended else (eos,)) + opening + self.closed(prompt, second)


PROBE = "Elbe"
"""Answer that is rendered to find its end; a word that no template contains."""


def turn_format(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> TurnFormat:
    """Find out how a chat template writes the assistant's turn, by rendering one.

    Args:
        tokenizer: the tokenizer.
        chat_template: Jinja chat template to use instead of the tokenizer's own.
    """
    if not (chat_template or tokenizer.chat_template):
        return TurnFormat()
    question: list[Message] = [{"role": "user", "content": "a"}]

    def written(messages: list[Message], add_generation_prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text

    try:
        bare, asked = written(question), written(question, add_generation_prompt=True)
        answered = written([*question, {"role": "assistant", "content": PROBE}])
    except Exception:  # a template is a program: one that expects other conversations may raise anything
        return TurnFormat()
    # the generation prompt is the difference of the two
    bare_ids, asked_ids = _encode(tokenizer, bare), _encode(tokenizer, asked)
    bos = tokenizer.bos_token_id
    opening = asked_ids[shared_length(bare_ids, asked_ids) :]
    writes_bos = bos is not None and asked_ids[:1] == (bos,)
    behind = answered[answered.rfind(PROBE) + len(PROBE) :] if PROBE in answered else ""
    end = _first_token(tokenizer, behind.lstrip())
    answered_ids = _encode(tokenizer, answered)
    if end is None or end not in answered_ids:
        return TurnFormat(opening, writes_bos=writes_bos)
    # the last one, since the user's turn may end with the same token
    last = len(answered_ids) - 1 - answered_ids[::-1].index(end)
    return TurnFormat(opening, end, answered_ids[last + 1 :], writes_bos)


def shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common prefix of two sequences of ids or characters."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The special or added token that a text begins with; the longest, if there are several."""
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    found = max((token for token in known if token and text.startswith(token)), key=len, default=None)
    if found is None:
        return None
    return cast(int, tokenizer.convert_tokens_to_ids(found))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # the template writes BOS and other special tokens itself
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

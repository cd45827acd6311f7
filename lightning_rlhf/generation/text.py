"""The text of a sampled response."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.types import Prompt


CONTEXT = 8


def sampled_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int], ended: bool) -> str:
    """Text of sampled token ids, without special tokens and without the token that ended them.

    Behind a plain prompt it begins with the space that it has there: tokenizers of the SentencePiece kind lose it when
    they decode a response alone, and prompt and response would no longer be the text that was sampled.

    Args:
        tokenizer: the tokenizer.
        prompt: the prompt of the response.
        ids: token ids of the response.
        ended: whether the last of them ended it.
    """
    body = list(ids[:-1] if ended else ids)
    alone = str(tokenizer.decode(body, skip_special_tokens=True))
    if prompt.messages is not None or not body:
        return alone
    before = list(prompt.ids[-CONTEXT:])
    known = str(tokenizer.decode(before, skip_special_tokens=True))
    both = str(tokenizer.decode(before + body, skip_special_tokens=True))
    # a character of several byte tokens may begin in the prompt and end in the response: the decoded prompt
    # is then no prefix of both
    return both[len(known) :] if known and both.startswith(known) else alone

"""How a tokenizer spells the labels behind an ending, and how their probabilities are read off a model.

A label may be one token or several, with or without the space before it, and one label may begin another ("1" and
"10"). Ending and label are tokenized together, as the model has seen them in its training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.logprobs.prefix_tree import common_length


Ids = tuple[int, ...]
Reader = Callable[[Sequence[Ids], Sequence[int]], Tensor]
"""Log-probabilities of targets behind texts, nats; as `lightning_rlhf.logprobs.prefix_tree.next_token_logps` gives."""


@dataclass(frozen=True)
class LabelSpelling:
    """Labels as token ids.

    Args:
        written: ids that follow the prefix when a label is written, by label.
        spellings: all the ways of writing each label that are counted.
        ended: labels that begin another label, and so count only where no digit follows.
        digits: tokens that begin with a digit and would go on with a number.
    """

    written: tuple[Ids, ...]
    spellings: tuple[tuple[Ids, ...], ...]
    ended: tuple[bool, ...]
    digits: Ids


def spell(tokenizer: PreTrainedTokenizerBase, ending: str, labels: Sequence[str]) -> LabelSpelling:
    """Find out how labels are written behind an ending.

    The ids of ``ending + label`` without the prefix that all labels share have to be predicted. So the vocabulary
    decides whether the space before a digit belongs to the ending or to the label. A number that is one token ("10") is
    counted in two tokens as well, where the first is another label ("1", then "0").

    Args:
        tokenizer: the judge's tokenizer.
        ending: end of the prompt.
        labels: the possible answers.

    Raises:
        ValueError: if two labels are written alike.
    """
    whole = [tuple(tokenizer(ending + label, add_special_tokens=False)["input_ids"]) for label in labels]
    cut = common_length(min(whole), max(whole))
    written = tuple(ids[cut:] for ids in whole)
    # "1" before "10": the common prefix has swallowed the shorter label
    if not all(written):
        # one label is the beginning of another: the last common token is predicted too
        written = tuple(ids[cut - 1 :] for ids in whole)
    # the judge could not say which of the two it means
    if len(set(written)) < len(labels):
        raise ValueError(f"the tokenizer writes two of the labels {list(labels)} alike behind {ending!r}")
    digits = {token: id_ for token, id_ in tokenizer.get_vocab().items() if token[:1] in set("0123456789")}
    spellings, ended = [], []
    for label, ids in zip(labels, written, strict=True):
        found = [ids]
        for shorter, start in zip(labels, written, strict=True):
            rest = label[len(shorter) :]
            if rest and label.startswith(shorter) and rest in digits:
                found.append((*start, digits[rest]))
        spellings.append(tuple(dict.fromkeys(found)))
        ended.append(any(other != label and other.startswith(label) for other in labels))
    return LabelSpelling(written, tuple(spellings), tuple(ended), tuple(sorted(digits.values())) if any(ended) else ())


def label_logps(read: Reader, prefixes: Sequence[Ids], spelling: LabelSpelling) -> Tensor:
    """Compute log P(label | prefix), nats; [prefixes, labels], float32.

    The probability of a label is that of its tokens, summed over its spellings. Of a label that begins another one,
    "1" beside "10", it is P("1") (1 - sum_d P(d | "1")) over the tokens d that begin with a digit, so that no
    probability counts twice. Labels need not sum to one: the rest belongs to other answers of the judge.

    Args:
        read: gives log-probabilities of the next token.
        prefixes: token ids of the prompts, up to where the labels begin.
        spelling: the labels.
    """
    # every token of every spelling is read behind the tokens before it
    stems, tokens = set[Ids](), set(spelling.digits)
    for ids in itertools.chain.from_iterable(spelling.spellings):
        stems.update(ids[:place] for place in range(len(ids)))
        tokens.update(ids)
    stems.update(itertools.compress(spelling.written, spelling.ended))
    targets, ordered = sorted(tokens), sorted(stems)
    texts = [prefix + stem for prefix, stem in itertools.product(prefixes, ordered)]
    logps = read(texts, targets).double()
    logps = logps.view(len(prefixes), len(ordered), len(targets))
    # columns of the forward passes, by text and by token
    stem_at = {stem: i for i, stem in enumerate(ordered)}
    target_at = {target: i for i, target in enumerate(targets)}

    # log P(t_1 ... t_n | prefix) = sum_i log P(t_i | prefix, t_1 ... t_{i-1})
    def of_tokens(ids: Ids) -> Tensor:
        return torch.stack([logps[:, stem_at[ids[:i]], target_at[id_]] for i, id_ in enumerate(ids)]).sum(0)

    columns = []
    for ids, ways, ended in zip(spelling.written, spelling.spellings, spelling.ended, strict=True):
        # P(label) is the sum over its spellings
        column = torch.stack([of_tokens(way) for way in ways]).logsumexp(0)
        if ended:
            # P("1") (1 - sum_d P(d | "1")): a "1" that goes on as "10" is not the label "1"
            goes_on = logps[:, stem_at[ids], [target_at[id_] for id_ in spelling.digits]].exp().sum(-1)
            column = column + torch.log1p(-goes_on.clamp_max(1 - 1e-12))
        columns.append(column)
    return torch.stack(columns, 1).float()

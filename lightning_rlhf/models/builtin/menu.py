"""The policy of the world "menu": a tiny transformer, trained on a corpus that is generated here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf.models.cache import cached
from lightning_rlhf.randomness import Key


GUESTS = ("ann", "ben", "cleo", "dan", "eva", "finn", "gus", "hana")


DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


WEATHERS = ("sun", "rain", "snow")


DISHES = (
    *("apple", "bread", "cake", "dumpling", "egg", "fish", "grapes", "honey"),
    *("icecream", "jam", "kale", "lemon", "melon", "noodles", "olives", "pasta"),
    *("quinoa", "rice", "soup", "toast", "udon", "veal", "waffle", "yoghurt"),
)


SPECIALS = ("<end>", "<start>")


MOST_DISHES = 6
"""Longest menu of the corpus."""


VERSION = 1
"""Version of corpus and model; raise it when either changes."""


def menu_policy() -> Path:
    """The folder of the policy after supervised training, made on the first call (about half a minute on one core)."""
    return cached("world-menu", hashlib.sha256(f"menu {VERSION}".encode()).hexdigest(), build_policy)


def build_policy(folder: Path, steps: int = 600) -> None:
    """Train the policy on the corpus and save it.

    Args:
        folder: an empty folder.
        steps: optimizer steps of 96 menus.
    """
    words = (*SPECIALS, *GUESTS, *DAYS, *WEATHERS, *DISHES)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    make = cast(Callable[..., PreTrainedTokenizerFast], PreTrainedTokenizerFast)
    tokenizer = make(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", bos_token="<start>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    # the random numbers of a run must not depend on whether the policy was in the cache
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key((VERSION, _WEIGHTS)).seed())
        model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    offset = len(words) - len(DISHES)
    generator = Key((VERSION, _CORPUS)).generator()
    # <start>, guest, day, weather, numbered as in `words`; shape [168, 4]
    prompts = torch.tensor(
        [[1, 2 + g, 10 + d, 17 + w] for g, d, w in product(range(8), range(7), range(3))], dtype=torch.int64
    )
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (96,), generator=generator)
        menus, length = corpus_menus(prompts[chosen], generator)
        # dish -> dish + offset, and -1 behind the end -> <end>; ids: [96, 4 + 7]
        ids = torch.cat([prompts[chosen], torch.where(menus >= 0, menus + offset, 0)], 1)
        # position t predicts token t + 1: logits of the 7 tokens behind the prompt, [96, 7, vocabulary]
        logits = model(input_ids=ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        # the loss counts the dishes and the end behind them, and no padding
        counts = torch.arange(logits.shape[1])[None] <= length[:, None]
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, prompts.shape[1] :], reduction="none")[counts].mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)


def corpus_menus(prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample menus of the corpus: dishes 0, 1, ..., with -1 behind the end; and the number of dishes of each.

    The first dish depends on the day, each later one on the dish before it, and menus have 3 to 6 dishes. They do not
    depend on the guest: his taste is left to preferences.

    Args:
        prompts: token ids of prompts; shape [rows, 4].
        generator: random stream of the dishes.
    """
    # the transition probabilities are random once, the same for all menus
    chain = Key((VERSION, _CHAIN)).generator()
    # p(first | day) and p(dish | dish before) = softmax(1.2 z) with z ~ N(0, I); [7, 24] and [24, 24]
    first = (1.2 * torch.randn(len(DAYS), len(DISHES), generator=chain)).softmax(-1)
    follows = (1.2 * torch.randn(len(DISHES), len(DISHES), generator=chain)).softmax(-1)
    dishes = torch.multinomial(first[prompts[:, 2] - 10], 1, generator=generator)
    menu = [dishes]
    for _ in range(MOST_DISHES - 1):
        dishes = torch.multinomial(follows[dishes.squeeze(-1)], 1, generator=generator)
        menu.append(dishes)
    length = torch.randint(3, MOST_DISHES + 1, (len(prompts),), generator=generator)
    # one more column, so that also the longest menu has an end; menus: [rows, 7]
    menus = torch.cat([*menu, torch.full_like(dishes, -1)], 1)
    return menus.masked_fill(torch.arange(MOST_DISHES + 1)[None] >= length[:, None], -1), length


_PLACE = {dish: place for place, dish in enumerate(DISHES)}


_TASTES = 4


# second part of key paths below the version
_TASTE, _CORPUS, _CHAIN, _WEIGHTS = 0, 1, 2, 3

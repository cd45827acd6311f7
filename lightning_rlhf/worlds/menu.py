"""The world "menu": a tiny transformer that orders dishes for a guest, and an oracle whose taste is a formula.

A prompt names a guest, a day and the weather; the response is a short list of dishes. A generated corpus teaches the
model which dishes follow each other; the oracle likes what the guest likes, and dislikes repetition. Policy, prompts
and reward are functions of fixed seeds, so that everybody has the same world:

    lightning-rlhf fit --config worlds/menu
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

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
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response
from lightning_rlhf.worlds.prompts import AbstractWorldPrompts


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


class MenuReward(AbstractReward):
    """What the guest thinks of a menu: liking of each dish, added up, minus a price for repetition.

    ``r*(x, y) = scale * (sum over dishes of taste(guest, dish) + weather(weather, dish) - repeats)``, where tastes are
    fixed numbers of mean 0 and standard deviation 1/2, those of the weather 1/4, and ``repeats`` counts dishes that
    were on the menu before. Words that are no dishes count as a repeat.

    Args:
        scale: what a unit of liking is worth, > 0: with Bradley-Terry labels it sets how decided the oracle is. At 1
            the menus of the reference have rewards of standard deviation 1.3 or so.
        tastes: 0 for the world's own tastes; any other number draws tastes of the same law that have nothing to do with
            them, for judges that are wrong.
    """

    def __init__(self, scale: float = 1.0, tastes: int = 0) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"MenuReward needs a finite scale > 0; got {scale}")
        self.scale = scale
        generator = Key((VERSION, _TASTE, tastes) if tastes else (VERSION, _TASTE)).generator()
        # low rank: guests resemble each other, so that labels about one teach about others
        guests = torch.randn(len(GUESTS), _TASTES, generator=generator, dtype=torch.float64)
        dishes = torch.randn(_TASTES, len(DISHES), generator=generator, dtype=torch.float64)
        weather = torch.randn(len(WEATHERS), len(DISHES), generator=generator, dtype=torch.float64)
        taste = guests @ dishes
        self._taste = (0.5 * (taste - taste.mean()) / taste.std()).tolist()
        self._weather = (0.25 * weather).tolist()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each menu; the prompt must be one of `MenuPrompts`."""
        values = [self._liking(p.text, r.text) for p, r in zip(prompts, responses, strict=True)]
        return RewardOutput(self.scale * torch.tensor(values, dtype=torch.float64))

    def _liking(self, prompt: str, menu: str) -> float:
        words = prompt.split()
        try:
            taste = self._taste[GUESTS.index(words[-3])]
            weather = self._weather[WEATHERS.index(words[-1])]
        except (ValueError, IndexError) as error:
            raise ValueError(f"MenuReward knows prompts like 'ann monday sun'; got {prompt!r}") from error
        seen: set[str] = set()
        total = 0.0
        for dish in menu.split():
            if dish in seen or dish not in _PLACE:
                total -= 1.0
                continue
            seen.add(dish)
            total += taste[_PLACE[dish]] + weather[_PLACE[dish]]
        return total


class MenuPrompts(AbstractWorldPrompts):
    """Guests, days and weathers: 168 prompts, of which every fourth is held out.

    Args:
        split: ``train`` or ``heldout``.
        repeats: times that each prompt is listed, >= 1: held-out answers are then averaged over as many draws.
    """

    NAME = "menu prompt"

    def texts(self) -> Iterator[tuple[str, bool]]:
        """Give each prompt, and whether it is held out."""
        for i, words in enumerate(product(GUESTS, DAYS, WEATHERS)):
            # 4 and 21 prompts per guest have no common divisor: every guest and weather is held out equally often
            yield " ".join(words), i % 4 == 3


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
    make: Any = PreTrainedTokenizerFast
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key((VERSION, _WEIGHTS)).seed())
        model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    offset = len(words) - len(DISHES)
    generator = Key((VERSION, _CORPUS)).generator()
    prompts = torch.tensor(
        [[1, 2 + g, 10 + d, 17 + w] for g, d, w in product(range(8), range(7), range(3))], dtype=torch.int64
    )
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (96,), generator=generator)
        menus, length = corpus_menus(prompts[chosen], generator)
        ids = torch.cat([prompts[chosen], torch.where(menus >= 0, menus + offset, 0)], 1)
        logits = model(input_ids=ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        # dishes and the end behind them are learnt, what fills the row is not
        counts = torch.arange(logits.shape[1])[None] <= length[:, None]
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, prompts.shape[1] :], reduction="none")[counts].mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)


def corpus_menus(prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the corpus' menus for prompts: dishes 0, 1, ..., and -1 behind the end; and how many dishes each has.

    The first dish depends on the day, each later one on the dish before it, and menus have 3 to 6 dishes. Guests do not
    matter: what they like is for preferences to teach.

    Args:
        prompts: token ids of prompts; shape [rows, 4].
        generator: draws the dishes.
    """
    laws = Key((VERSION, _CHAIN)).generator()
    first = (1.2 * torch.randn(len(DAYS), len(DISHES), generator=laws)).softmax(-1)
    follows = (1.2 * torch.randn(len(DISHES), len(DISHES), generator=laws)).softmax(-1)
    dishes = torch.multinomial(first[prompts[:, 2] - 10], 1, generator=generator)
    menu = [dishes]
    for _ in range(MOST_DISHES - 1):
        dishes = torch.multinomial(follows[dishes.squeeze(-1)], 1, generator=generator)
        menu.append(dishes)
    length = torch.randint(3, MOST_DISHES + 1, (len(prompts),), generator=generator)
    menus = torch.cat([*menu, torch.full_like(dishes, -1)], 1)
    return menus.masked_fill(torch.arange(MOST_DISHES + 1)[None] >= length[:, None], -1), length


_PLACE = {dish: place for place, dish in enumerate(DISHES)}
_TASTES = 4

# second part of key paths below the version
_TASTE, _CORPUS, _CHAIN, _WEIGHTS = 0, 1, 2, 3

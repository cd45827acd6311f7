"""The world "menu": a policy that speaks the corpus' language, an oracle that is the formula, and a start for runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.models.builtin.menu import DISHES, build_policy, corpus_menus
from lightning_rlhf.models.builtin.policies import world_policy
from lightning_rlhf.models.load import load_tokenizer, resolve_checkpoint
from lightning_rlhf.prompts.tokenize import tokenize_rows
from lightning_rlhf.types import Prompt, Response
from lightning_rlhf.worlds import MenuPrompts, MenuReward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy after a tenth of its training, so that the test is short."""
    folder = tmp_path_factory.mktemp("menu")
    build_policy(folder, steps=80)
    return folder


def prompt(text: str) -> Prompt:
    return Prompt(0, (1,), text)


def menu(text: str) -> Response:
    return Response((2,), text, "eos")


def test_policy_is_small_and_has_learned_that_menus_end_after_three_to_six_dishes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    tokenizer = load_tokenizer(str(folder))
    prompts, _ = tokenize_rows(MenuPrompts().load(), tokenizer, max_prompt_tokens=8, max_response_tokens=8)
    assert prompts[0].ids[0] == tokenizer.bos_token_id
    ids = torch.tensor([p.ids for p in prompts[:32]])
    ends = []
    for _ in range(8):
        with torch.no_grad():
            law = model(input_ids=ids).logits[:, -1].softmax(-1)
        ends.append(float(law[:, tokenizer.eos_token_id].mean()))
        # the likeliest dish goes on
        ids = torch.cat([ids, law[:, -len(DISHES) :].argmax(-1, keepdim=True) + law.shape[1] - len(DISHES)], 1)
    # a menu of three to six is as likely to be each of them; the seventh dish is never in the corpus
    assert max(ends[:3]) < 0.12
    assert 0.12 < ends[3] < 0.45
    assert ends[6] > 2 * max(ends[:3])


def test_building_twice_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build_policy(tmp_path / name, steps=2)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(first[name].equal(second[name]) for name in first)


def test_corpus_menus_start_by_the_day_and_have_three_to_six_dishes() -> None:
    rows = torch.tensor([[1, 2, 10, 17]]).expand(4000, -1)
    menus, length = corpus_menus(rows, torch.Generator().manual_seed(0))
    assert sorted(set(length.tolist())) == [3, 4, 5, 6]
    assert bool(((menus >= 0).sum(1) == length).all())
    other, _ = corpus_menus(torch.tensor([[1, 2, 13, 17]]).expand(4000, -1), torch.Generator().manual_seed(0))
    counts = [torch.bincount(found[:, 0], minlength=len(DISHES)) / 4000 for found in (menus, other)]
    assert float((counts[0] - counts[1]).abs().sum()) > 0.3


def test_reward_is_the_sum_over_dishes_minus_repeats() -> None:
    reward = MenuReward()
    ann = prompt("ann monday sun")

    def score(text: str, of: Prompt = ann) -> float:
        return float(reward.score([of], [menu(text)]).mean)

    assert score("") == 0
    assert score("soup rice") == pytest.approx(score("soup") + score("rice"))
    assert score("rice soup") == pytest.approx(score("soup rice"))
    assert score("soup soup") == pytest.approx(score("soup") - 1)
    assert score("soup monday") == pytest.approx(score("soup") - 1)
    # the day is for the policy alone, guest and weather count
    assert score("soup", prompt("ann friday sun")) == score("soup")
    assert score("soup", prompt("ben monday sun")) != score("soup")
    assert score("soup", prompt("ann monday rain")) != score("soup")
    tastes = torch.tensor([score(dish, prompt(f"{g} monday sun")) for g in ("ann", "ben", "eva") for dish in DISHES])
    assert 0.3 < float(tastes.std()) < 1.0
    assert float(MenuReward(scale=2.0).score([ann], [menu("soup")]).mean) == pytest.approx(2 * score("soup"))
    with pytest.raises(ValueError, match="ann monday sun"):
        score("soup", prompt("write a poem please"))


def test_prompts_of_both_splits_are_disjoint_and_cover_guests_and_weathers() -> None:
    train, heldout = (MenuPrompts(split).load() for split in ("train", "heldout"))
    texts = [{row.text for row in rows} for rows in (train, heldout)]
    assert (len(texts[0]), len(texts[1])) == (126, 42)
    assert not texts[0] & texts[1]
    for rows in texts:
        words = {word for text in rows for word in str(text).split()}
        assert len(words) == 8 + 7 + 3
    assert [row.text for row in MenuPrompts("heldout", repeats=3).load()] == [row.text for row in heldout] * 3
    with pytest.raises(ValueError, match="repeats"):
        MenuPrompts(repeats=0)


def test_worlds_that_do_not_exist_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="menu"):
        world_policy("mars")
    with pytest.raises(FileNotFoundError, match="world:mars"):
        resolve_checkpoint("world:mars")

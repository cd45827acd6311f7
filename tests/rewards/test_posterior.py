"""PosteriorReward: fitted to the labels of a ledger, with a lower confidence bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.preference_models import KernelPreferenceModel
from lightning_rlhf.rewards import PosteriorReward
from lightning_rlhf.types import Comparison, Label, Prompt, Response


PROMPT = Prompt(0, (40, 41), "x")


def response(*ids: int) -> Response:
    return Response(ids, str(ids), "length")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose labels prefer token 50 to the others."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(24):
        liked, other = (torch.randint(60, 70, (4,), generator=generator).tolist() for _ in range(2))
        pairs.append(Comparison(Prompt(i, (40, 41), "x"), response(50, *liked[1:]), response(*other)))
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        ids = store.add_comparisons(0, pairs, list(range(24)))
        store.add_labels(ids, [Label(1.0)] * 24)
        store.close_round(0, {})
    return tmp_path


def test_rewards_follow_the_labels_and_the_bound(run: Path, tiny_policy: Path) -> None:
    answers = [response(50, 61, 62, 63), response(64, 61, 62, 63), response(90, 91, 92, 93)]
    plain = PosteriorReward(KernelPreferenceModel(), str(run), str(tiny_policy)).score([PROMPT] * 3, answers)
    assert plain.std is not None
    assert float(plain.mean[0]) > float(plain.mean[1])
    # labels say nothing of the tokens of the third response
    assert float(plain.std[2]) > float(plain.std[1])
    bound = PosteriorReward(KernelPreferenceModel(), str(run), str(tiny_policy), lcb=2.0)
    assert bound.score([PROMPT] * 3, answers).mean == pytest.approx(plain.mean - 2 * plain.std)


def test_a_ledger_that_is_missing_or_empty_is_named(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=r"PosteriorReward.ledger names .*none"):
        PosteriorReward(KernelPreferenceModel(), str(tmp_path / "none"), str(tiny_policy))
    with PreferenceStore(tmp_path / "ledger.sqlite"):
        pass
    with pytest.raises(ValueError, match="has no labels"):
        PosteriorReward(KernelPreferenceModel(), str(tmp_path), str(tiny_policy)).score([PROMPT], [response(50)])

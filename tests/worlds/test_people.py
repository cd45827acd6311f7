"""Simulated people: right as often as they should be, their votes in the ledger, and weights from earlier rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.commands.config_files import find_config
from lightning_rlhf.evaluation.feedback import feedback_summary
from lightning_rlhf.labelers.votes import VoteOptions
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Prompt, Response
from lightning_rlhf.worlds import PeopleLabeler


class Good(AbstractReward):
    """1 for the text "good", 0 for others."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(response.text == "good") for response in responses]))


def prompts(start: int, count: int) -> list[Prompt]:
    def response(text: str) -> Response:
        return Response(tuple(text.encode()), text, "eos", reference_logps=(-1.0,) * len(text))

    return [Prompt(n, (1,), f"q{n}", pair=(response("good"), response("bad"))) for n in range(start, start + count)]


def collect(path: Path, labeler: PeopleLabeler, rounds: int = 2, size: int = 600) -> list[list[float]]:
    """P(the good response) of each pair, round by round."""
    with PreferenceStore(path) as store:
        collector = RoundCollector(store, OfflineSampler(), labeler, Key((0,)))
        found = []
        for index in range(rounds):
            round_ = collector.collect(index, prompts(size * index, size), None, 64)
            found.append(
                [p.probability if p.comparison.a.text == "good" else 1 - p.probability for p in round_.preferences]
            )
        return found


def test_people_are_right_as_often_as_their_accuracy_says(tmp_path: Path) -> None:
    labeler = PeopleLabeler([0.6, 0.9, 0.75], votes_per_pair=2, reward=Good())
    first, second = collect(tmp_path / "ledger.sqlite", labeler)
    # the mean accuracy of three people who are all asked equally often; standard error 0.01
    assert sum(first + second) / 1200 == pytest.approx(0.75, abs=0.04)
    assert set(first) == {0.0, 0.5, 1.0}
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        votes = store.votes()
        assert len(votes) == 2400 and len({vote.uid for _, _, vote in votes}) == 2400
        people = feedback_summary(store)["people"]
        assert store.total_cost == 2400
    for name, accuracy in (("person-1", 0.6), ("person-2", 0.9), ("person-3", 0.75)):
        assert people["people"][name]["votes"] == pytest.approx(800, abs=80)
        assert people["people"][name]["first_share"] == pytest.approx(0.5, abs=0.08)
        found = people["people"][name]["accuracy"]
        assert found is not None and found == pytest.approx(accuracy, abs=0.08)
    assert collect(tmp_path / "again.sqlite", labeler) == [first, second]


def test_weights_come_from_closed_rounds(tmp_path: Path) -> None:
    labeler = PeopleLabeler([0.55, 0.95, 0.55], 3, Good(), VoteOptions("weighted"))
    first, second = collect(tmp_path / "weighted.sqlite", labeler, size=300)
    # in the first round all weigh the same: p is sigma of an odd number of logit 0.8
    assert {round(p, 6) for p in first} == {round(p, 6) for p in (0.8, 0.2, 64 / 65, 1 / 65)}
    right = sum(p > 0.5 for p in second) / 300
    # the majority of 0.55, 0.95, 0.55 is right on 77 %, the best of them on 95 %
    assert sum(p > 0.5 for p in first) / 300 < 0.85 < right


def test_the_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = yaml.safe_load(find_config("compare/menu_people").read_text())
    experiment = study["experiment"]["init_args"]
    budgets = []
    for name, arm in experiment["arms"].items():
        labels = arm["labels"] if isinstance(arm, dict) else experiment["labels"]
        budgets.append(labels * int(name[0]))
    assert set(budgets) == {960}, "equal votes in every arm"
    arms = {name: experiment["arms"][name] for name in ("1 vote, mean", "3 votes, weighted")}
    arms["3 votes, weighted"]["labels"] = 16
    experiment |= {"arms": arms, "labels": 48, "seeds": 1}
    experiment["args"] += ["--data.heldout.repeats=1"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    main(["compare", "study.yaml", "--run_dir=out"])
    costs = []
    for ledger in sorted((tmp_path / "out").rglob("ledger.sqlite")):
        with PreferenceStore(ledger, read_only=True) as store:
            costs.append((store.num_labels, store.total_cost))
    assert sorted(costs) == [(16, 48.0), (48, 48.0)]
    assert list((tmp_path / "out").glob("report.md"))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"accuracies must lie in \[0, 1\]"):
        PeopleLabeler([1.2])
    with pytest.raises(ValueError, match="votes_per_pair must be 1 to the 2 people; got 3"):
        PeopleLabeler([0.6, 0.7], 3)

"""Ensembles: parameter counts, what is trained, members one by one, and folders that open again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.losses import bradley_terry_loss
from lightning_rlhf.models.load import LoRA, load_tokenizer
from lightning_rlhf.models.scorer import Ensemble, Kind, Scorer, build_scorer, open_scorer
from lightning_rlhf.rewards import disagreement, standardised


GROUPS: list[Group] = [((5, 6, 7), [(8, 9), (10,)]), ((11, 12), [(13, 14, 15), (16, 17)])]
ADAPTERS = LoRA(r=3, alpha=6, target_modules=["q_proj", "down_proj"])


def count(parameters: list[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def jolt(scorer: Scorer) -> Scorer:
    """Change all that is trained, adapters too, which begin with no effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return scorer


@pytest.fixture
def linear_folder(tmp_path: Path, tiny_policy: Path) -> Path:
    """A linear ensemble of three that was saved."""
    torch.manual_seed(0)
    scorer = jolt(build_scorer(str(tiny_policy), Ensemble("linear", 3)))
    scorer.means, scorer.stds = [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]
    scorer.save(tmp_path / "linear", load_tokenizer(str(tiny_policy)))
    return tmp_path / "linear"


def made(kind: Kind, tiny_policy: Path, linear_folder: Path) -> Scorer:
    torch.manual_seed(1)
    if kind == "lora":
        return build_scorer(str(linear_folder), Ensemble(kind, 3), ADAPTERS)
    return build_scorer(str(tiny_policy), Ensemble(kind, 3))


def test_parameter_counts_are_those_of_the_paper(tiny_policy: Path, linear_folder: Path) -> None:
    trunk = AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1).base_model
    m, head = count(list(trunk.parameters())), 16
    # two layers: q_proj 16 -> 16 and down_proj 32 -> 16, at rank 3
    adapter = 2 * 3 * ((16 + 16) + (32 + 16))
    expected = {"linear": m + 3 * head, "lora": m + 3 * head + 3 * adapter, "independent": 3 * (m + head)}
    trained = {"linear": expected["linear"], "lora": 3 * head + 3 * adapter, "independent": expected["independent"]}
    kinds: tuple[Kind, ...] = ("linear", "lora", "independent")
    for kind in kinds:
        scorer = made(kind, tiny_policy, linear_folder)
        assert scorer.size == 3
        assert count(list(scorer.parameters())) == expected[kind]
        assert count([p for p in scorer.parameters() if p.requires_grad]) == trained[kind]


def test_the_second_phase_keeps_what_the_first_learned_and_moves_no_backbone(
    tiny_policy: Path, linear_folder: Path
) -> None:
    first = open_scorer(str(linear_folder))
    second = made("lora", tiny_policy, linear_folder)
    # adapters begin with no effect: the members are those of the first phase
    torch.testing.assert_close(second.scores(GROUPS), first.scores(GROUPS))
    second.scores(GROUPS).square().sum().backward()
    for name, parameter in second.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name or "score" in name), name


def test_gradients_reach_the_members_they_are_about(tiny_policy: Path, linear_folder: Path) -> None:
    scorer = jolt(made("lora", tiny_policy, linear_folder))
    scorer.scores(GROUPS)[:, 1].sum().backward()
    for name, parameter in scorer.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == (".member1." in name), name
    score = scorer.model.get_submodule("score").weight.grad
    assert score is not None
    assert (score.abs().sum(1) > 0).tolist() == [False, True, False]


def test_each_member_has_the_loss_and_the_gradient_it_would_have_alone(tiny_policy: Path, linear_folder: Path) -> None:
    """The mean over members of Bradley-Terry losses is k losses of their own: independent members do not meet."""
    scorer = made("independent", tiny_policy, linear_folder)
    alone = copy.deepcopy(scorer)
    label = torch.tensor([1.0, 0.7])
    chosen, rejected = scorer.scores(GROUPS).view(2, 2, 3).unbind(1)
    bradley_terry_loss(chosen, rejected, label[:, None]).mean(1).sum().backward()
    for member in range(3):
        single = Scorer([alone.models[member]])  # type: ignore[list-item]
        chosen, rejected = single.scores(GROUPS).view(2, 2, 1).unbind(1)
        (bradley_terry_loss(chosen, rejected, label[:, None]).sum() / 3).backward()
    for p, q in zip(scorer.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind", ["linear", "lora", "independent"])
def test_saved_and_opened_again_it_scores_the_same(
    kind: Kind, tmp_path: Path, tiny_policy: Path, linear_folder: Path
) -> None:
    scorer = jolt(made(kind, tiny_policy, linear_folder))
    scorer.means, scorer.stds = [1.0, 2.0, 3.0], [0.5, 0.6, 0.7]
    expected = scorer.scores(GROUPS).detach()
    assert (expected - expected.mean(1, keepdim=True)).abs().min() > 1e-5  # members differ
    for _ in range(2):  # the second time over the first
        scorer.save(tmp_path / "saved", load_tokenizer(str(tiny_policy)))
    opened = open_scorer(str(tmp_path / "saved"))
    assert (opened.kind, opened.size, opened.means, opened.stds) == (kind, 3, scorer.means, scorer.stds)
    torch.testing.assert_close(opened.scores(GROUPS), expected, atol=0, rtol=0)
    # and trained further
    again = build_scorer(str(tmp_path / "saved"), Ensemble(kind, 3))
    torch.testing.assert_close(again.scores(GROUPS), expected, atol=0, rtol=0)
    trained = [name for name, p in scorer.named_parameters() if p.requires_grad]
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained


def test_transformers_opens_several_heads_and_refuses_half_an_ensemble(
    tmp_path: Path, tiny_policy: Path, linear_folder: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(linear_folder)
    model.config.pad_token_id = 0
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits
    torch.testing.assert_close(logits[0], open_scorer(str(linear_folder)).scores(GROUPS)[0], atol=1e-5, rtol=1e-4)
    for kind in ("lora", "independent"):
        made(kind, tiny_policy, linear_folder).save(tmp_path / kind, load_tokenizer(str(tiny_policy)))
        with pytest.raises(OSError, match="no file named"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / kind)


def test_a_single_model_with_an_adapter_is_saved_merged(tmp_path: Path, tiny_policy: Path) -> None:
    torch.manual_seed(0)
    scorer = jolt(build_scorer(str(tiny_policy), lora=ADAPTERS))
    frozen = [name for name, p in scorer.named_parameters() if not p.requires_grad]
    assert all(".lora_" not in name and "score" not in name for name in frozen)
    expected = scorer.scores(GROUPS)[:, 0]
    scorer.save(tmp_path / "saved", load_tokenizer(str(tiny_policy)))
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert not any("lora" in name for name, _ in model.named_parameters())
    logits = torch.stack([model(input_ids=torch.tensor([[*p, *r]])).logits[0, 0] for p, rs in GROUPS for r in rs])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "saved" / "adapter" / "adapter_config.json").exists()
    torch.testing.assert_close(scorer.scores(GROUPS)[:, 0], expected, atol=0, rtol=0)  # as it was


def test_bad_use_is_named(tmp_path: Path, tiny_policy: Path, linear_folder: Path) -> None:
    with pytest.raises(ValueError, match="is a linear ensemble of 3 members, from which no single reward model"):
        build_scorer(str(linear_folder))
    with pytest.raises(ValueError, match="from which no linear ensemble of 4 can be trained"):
        build_scorer(str(linear_folder), Ensemble("linear", 4))
    with pytest.raises(ValueError, match="leave gradient_checkpointing out"):
        build_scorer(str(linear_folder), Ensemble("lora", 3), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="independent members are trained whole"):
        build_scorer(str(tiny_policy), Ensemble("independent", 3), ADAPTERS)
    with pytest.warns(UserWarning, match="has not learned rewards.*kind=linear first"):
        build_scorer(str(tiny_policy), Ensemble("lora", 2), ADAPTERS)
    with pytest.raises(ValueError, match="size must be at least 2; got 1"):
        Ensemble("linear", 1)
    with pytest.raises(ValueError, match=r"diversity must be >= 0.*kind 'lora'; got 0\.1 with kind 'linear'"):
        Ensemble("linear", 2, diversity=0.1)
    for wrong in ({"kind": "linear"}, {"turn_epochs": 0}, {"loss": "mean"}):
        with pytest.raises(ValueError, match="turn_epochs must be >= 1, and trains members of kind 'lora'"):
            Ensemble(**{"kind": "lora", "turn_epochs": 1, **wrong})  # type: ignore[arg-type]


def test_adapters_disagree_and_heads_on_one_backbone_hardly_do(tmp_path: Path, tiny_policy: Path) -> None:
    """Why LoRA members are worth their price (related.md 2.5, check 3); a quarter of the labels is wrong."""
    spreads: list[list[Tensor]] = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        worth = torch.randn(40, generator=generator)

        def pairs(count: int, generator: torch.Generator = generator, worth: Tensor = worth) -> tuple[Tensor, Tensor]:
            ids = torch.randint(5, 40, (count, 2, 6), generator=generator)
            gold = worth[ids].mean(-1)
            wrong = torch.rand(count, generator=generator) < 0.25
            return ids, ((gold[:, 0] > gold[:, 1]) ^ wrong).float()

        torch.manual_seed(seed)
        linear = fitted(build_scorer(str(tiny_policy), Ensemble("linear", 3)), *pairs(250))
        linear.save(tmp_path / f"linear{seed}", load_tokenizer(str(tiny_policy)))
        lora = fitted(build_scorer(str(tmp_path / f"linear{seed}"), Ensemble("lora", 3), LoRA(r=4)), *pairs(250))
        ids, _ = pairs(100)
        spreads.append([])
        for scorer in (linear, lora):
            with torch.no_grad():
                members = scorer.scores(grouped(ids))
            aligned = standardised(members, members.mean(0).tolist(), members.std(0).tolist())
            spreads[-1].append(disagreement(aligned).mean())
    linear_spread, lora_spread = torch.tensor(spreads).mean(0).tolist()
    assert linear_spread < 0.25 * lora_spread


def grouped(ids: Tensor) -> list[Group]:
    return [((1, 2), (tuple(a), tuple(b))) for a, b in ids.tolist()]


def fitted(scorer: Scorer, ids: Tensor, label: Tensor) -> Scorer:
    """Train for a while, with everything as RewardModule has it but the Trainer."""
    optimizer = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randperm(len(ids), generator=generator)[:50]
        chosen, rejected = scorer.scores(grouped(ids[rows])).view(50, 2, -1).unbind(1)
        bradley_terry_loss(chosen, rejected, label[rows, None]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return scorer

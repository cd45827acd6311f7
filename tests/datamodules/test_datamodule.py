"""Rounds, replay, budgets, moving references and exact resume, on a tiny policy with a real Trainer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf import DPOModule, PreferenceDataModule
from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.callbacks import KLMonitor, LabelBudget, RewardMonitor, Throughput
from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.datamodules.options import BatchOptions, PreferenceRoundOptions, PromptOptions
from lightning_rlhf.generation.base import AbstractEngine, Decoding
from lightning_rlhf.labelers import AbstractLabeler, RecordedLabeler, RewardLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.logprobs.compute import Layout, summed_logps
from lightning_rlhf.models.load import LoRA
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.models.reference import ReferenceRule
from lightning_rlhf.modules import ReferenceUpdate
from lightning_rlhf.prompts import AbstractPromptSource, BuiltinPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.runtime.metric_sums import logs_now
from lightning_rlhf.runtime.preemption import Stopped
from lightning_rlhf.samplers import (
    AbstractPairSampler,
    AbstractSelectiveSampler,
    OfflineSampler,
    PILAFSampler,
    TPILAFSampler,
    VanillaSampler,
)
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, PromptRow, RecordedPair, Response


class Bytes(AbstractReward):
    """Likes some tokens more than others: a reward with a signal even on random text."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        del prompts
        return RewardOutput(torch.tensor([float(sum(token % 7 for token in r.ids)) for r in responses]))


class Counting(VanillaSampler):
    """Notes which prompts each call was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = []

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        self.calls.append([prompt.index for prompt in prompts])
        return super().sample(prompts, engine, key)


class Moody(AbstractLabeler):
    """Refuses prompts of odd index the first ``moods`` times that it sees them."""

    def __init__(self, moods: int) -> None:
        self.moods = moods
        self.asked: Counter[int] = Counter()

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        del key
        labels = []
        for comparison in comparisons:
            index = comparison.prompt.index
            self.asked[index] += 1
            refuses = index % 2 == 1 and self.asked[index] <= self.moods
            labels.append(Label(None, "refused") if refuses else Label(1.0))
        return labels


class Pairs(AbstractPromptSource):
    """Recorded pairs."""

    def load(self) -> list[PromptRow]:
        return [
            PromptRow(
                f"row {i}", text=f"Say {i}. ", pair=RecordedPair(f"It is {i}.", "No.", probability=0.9, weight=2.0)
            )
            for i in range(6)
        ]


class Buffers(Callback):
    """Notes the pairs that each epoch trains on."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[int, int]]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        loader: Any = trainer.train_dataloader
        self.epochs.append([(p.round, p.comparison.prompt.index) for pairs, _ in loader.dataset for p in pairs])


class Said(Callback):
    """Notes how many labels a run says it bought, as the closing summary does."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.labels = datamodule.num_labels


def module(policy: Path, layout: Layout = "padded", dtype: str = "float32", **options: Any) -> DPOModule:
    return DPOModule(
        str(policy),
        optimizer=partial(AdamW, lr=1e-2, weight_decay=0.0),
        options=ModelOptions(layout=layout, dtype=dtype),
        **options,
    )


def data(sampler: AbstractPairSampler, labeler: AbstractLabeler | None = None, **options: Any) -> PreferenceDataModule:
    """Six prompts, four in a round; fields of the options of rounds and micro-batches are given by their own names."""
    rounds = {"prompts_per_round": 4, **taken(options, PreferenceRoundOptions)}
    batching = taken(options, BatchOptions)
    settings = {"pairs_per_batch": 2, "decoding": Decoding(max_new_tokens=4, rows=4), **options}
    return settings.pop("kind", PreferenceDataModule)(
        settings.pop("prompts", BuiltinPrompts("train", limit=6)),
        sampler,
        labeler or RewardLabeler(Bytes()),
        rounds=PreferenceRoundOptions(**rounds),
        batching=BatchOptions(**batching),
        prompt_options=PromptOptions(max_prompt_tokens=240),
        **settings,
    )


def taken(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Take the fields of a group of options out of keyword arguments."""
    return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}


def trainer(folder: Path, epochs: int, *callbacks: Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **options},
    )


def test_each_epoch_draws_one_round_and_prompts_come_in_shuffled_passes(tmp_path: Path, tiny_policy: Path) -> None:
    sampler = Counting()
    trainer(tmp_path, 3).fit(module(tiny_policy), datamodule=data(sampler))
    # rows=4 makes chunks of two prompts; three rounds of four are two passes over six prompts
    assert [len(call) for call in sampler.calls] == [2] * 6
    drawn = [index for call in sampler.calls for index in call]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))
    assert drawn[:6] != drawn[6:]


@pytest.mark.parametrize(
    ("options", "sizes", "draws"),
    [
        ({"epochs_per_round": 2}, [4, 4, 4, 4], 2),
        ({"epochs_per_round": None}, [4, 4, 4, 4], 1),
        ({"replay": "all"}, [4, 8, 12, 16], 4),
        ({"replay": 2}, [4, 8, 8, 8], 4),
        ({"prompts_per_round": None}, [6, 6, 6, 6], 4),
    ],
)
def test_rounds_and_replay(
    tmp_path: Path, tiny_policy: Path, options: dict[str, Any], sizes: list[int], draws: int
) -> None:
    seen = Buffers()
    loaded = data(VanillaSampler(), **options)
    trainer(tmp_path, 4, seen).fit(module(tiny_policy), datamodule=loaded)
    assert [len(epoch) for epoch in seen.epochs] == sizes
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        assert {p.round for p in store.preferences()} == set(range(draws))


class InMemory(PreferenceDataModule):
    """Replays rounds from memory, as it must where the ledger does not know the length of a pair."""

    def length(self, item: Preference) -> int:
        return super().length(item)


@pytest.mark.parametrize("replay", [2, "all"])
def test_replayed_rounds_are_read_from_the_ledger_and_train_to_the_same_bit(
    tmp_path: Path, tiny_policy: Path, replay: Any
) -> None:
    found = []
    for kind in (PreferenceDataModule, InMemory):
        seen, policy = Buffers(), module(tiny_policy)
        loaded = data(VanillaSampler(), kind=kind, replay=replay, length_window=2)
        trainer(tmp_path / kind.__name__, 4, seen).fit(policy, datamodule=loaded)
        items: Any = loaded.trainer.train_dataloader.dataset.items  # type: ignore[union-attr]
        in_memory = [isinstance(pairs, list) for pairs in items.rounds]
        earlier = 3 if replay == "all" else 1
        # only the newest round is in memory
        assert in_memory == [kind is InMemory] * earlier + [True]
        found.append((seen.epochs, torch.cat([p.detach().flatten() for p in policy.parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_pairs_move_the_policy_towards_the_labels(tmp_path: Path, tiny_policy: Path) -> None:
    policy = module(tiny_policy)
    loaded = data(VanillaSampler(), RewardLabeler(Bytes(), rule="argmax"), epochs_per_round=None)
    trainer(tmp_path, 40).fit(policy, datamodule=loaded)
    assert loaded.round is not None
    decided = [p for p in loaded.round.preferences if p.probability != 0.5]
    assert decided
    groups = [(p.comparison.prompt.ids, (p.comparison.a.ids, p.comparison.b.ids)) for p in decided]
    with torch.no_grad():
        logps = summed_logps(policy.policy.eval(), groups).view(-1, 2)
    for preference, (a, b) in zip(decided, logps.tolist(), strict=True):
        pair = preference.comparison
        assert pair.a.reference_logps is not None
        assert pair.b.reference_logps is not None
        margin = (a - sum(pair.a.reference_logps)) - (b - sum(pair.b.reference_logps))
        assert (margin > 0) == (preference.probability > 0.5)


def test_offline_pairs_keep_their_soft_labels_and_weights(tmp_path: Path, tiny_policy: Path) -> None:
    loaded = data(
        OfflineSampler(),
        RecordedLabeler(),
        prompts=Pairs(),
        prompts_per_round=None,
        epochs_per_round=None,
        decoding=Decoding(max_new_tokens=16),
    )
    trainer(tmp_path, 2).fit(module(tiny_policy), datamodule=loaded)
    assert loaded.round is not None
    assert len(loaded.round.preferences) == 6
    for preference in loaded.round.preferences:
        first = preference.comparison.a.text.startswith("It is")
        assert preference.probability == pytest.approx(0.9 if first else 0.1)
        assert preference.comparison.weight == 2.0


def test_failed_labels_are_retried_then_dropped_and_counted(tmp_path: Path, tiny_policy: Path) -> None:
    retried = data(VanillaSampler(), Moody(1), prompts_per_round=6, label_attempts=2)
    trainer(tmp_path / "retried", 1).fit(module(tiny_policy), datamodule=retried)
    assert retried.round is not None
    assert (len(retried.round.preferences), retried.round.failed) == (6, {})
    dropped = data(VanillaSampler(), Moody(9), prompts_per_round=6, label_attempts=2)
    trainer(tmp_path / "dropped", 1).fit(module(tiny_policy), datamodule=dropped)
    assert dropped.round is not None
    assert (len(dropped.round.preferences), dropped.round.failed) == (3, {"refused": 3})


def test_attempts_are_counted_across_restarts(tmp_path: Path) -> None:
    prompts = [Prompt(i, (1,), "") for i in range(4)]

    class Killed(Moody):
        """Stops the process after the first attempt of the first chunk."""

        def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
            if sum(self.asked.values()) >= 2:
                raise KeyboardInterrupt
            return super().label(comparisons, key)

    labelers = [Killed(9), Moody(9)]
    for labeler in labelers:
        with PreferenceStore(tmp_path / "ledger.sqlite") as store:
            collector = RoundCollector(store, Ready(), labeler, Key((0,)), label_attempts=2)
            if labeler is labelers[0]:
                with pytest.raises(KeyboardInterrupt):
                    collector.collect(0, prompts, None, chunk=2)
            else:
                result = collector.collect(0, prompts, None, chunk=2)
    assert labelers[0].asked + labelers[1].asked == {0: 1, 1: 2, 2: 1, 3: 2}
    assert len(result.preferences) == 2
    assert result.failed == {"refused": 2}
    assert [c.prompt.index for c in result.comparisons] == [0, 1, 2, 3]


def test_only_pairs_worth_a_label_are_labeled_and_the_budget_is_met(tmp_path: Path, tiny_policy: Path) -> None:
    class Odd(VanillaSampler, AbstractSelectiveSampler):
        """Wants every other pair labeled."""

        label_fraction = 0.5

        def select_for_labeling(self, comparisons: Sequence[Comparison]) -> list[int]:
            return list(range(0, len(comparisons), 2))

    loaded = data(Odd(), prompts_per_round=6)
    trainer(tmp_path, 10, LabelBudget(5)).fit(module(tiny_policy), datamodule=loaded)
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        rounds = [store.comparisons(index) for index in (0, 1)]
        # three labels of six pairs, then two of four
        bought = [[label is not None for _, _, label in rows] for rows in rounds]
        assert bought == [[True, False] * 3, [True, False] * 2]
        assert store.failed(0) == {}


class Ready(AbstractPairSampler):
    """Has its answers ready."""

    needs_engine = False

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        del engine, key
        answers = [Response((2,), "yes", "eos"), Response((3,), "no", "eos")]
        return [Comparison(prompt, *answers) for prompt in prompts]


def test_a_budget_that_shrank_cuts_a_round_that_was_sampled_before(tmp_path: Path) -> None:
    prompts = [Prompt(index, (0, 1), f"row {index}") for index in range(8)]
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        collector = RoundCollector(store, Ready(), Moody(0), Key((0,)))
        collector.sample(0, prompts, None, chunk=4)
        result = collector.collect(0, prompts[:3], None, chunk=4)
        assert store.num_labels == len(result.preferences) == len(result.comparisons) == 3


def test_samplers_that_want_more_labels_than_they_said_are_refused(tmp_path: Path) -> None:
    class Greedy(Ready, AbstractSelectiveSampler):
        label_fraction = 0.5

        def select_for_labeling(self, comparisons: Sequence[Comparison]) -> list[int]:
            return list(range(len(comparisons)))

    class Lost(Ready, AbstractSelectiveSampler):
        def select_for_labeling(self, comparisons: Sequence[Comparison]) -> list[int]:
            return [-1, 0]

    prompts = [Prompt(index, (0, 1), f"row {index}") for index in range(3)]
    for sampler, message in ((Greedy(), "wants 3 labels for 3 comparisons, more than the 2"), (Lost(), "returned -1")):
        with PreferenceStore(tmp_path / f"{type(sampler).__name__}.sqlite") as store:
            with pytest.raises(ValueError, match=message):
                RoundCollector(store, sampler, Moody(0), Key((0,))).collect(0, prompts, None, chunk=4)
            assert store.num_labels == 0


def test_a_prompt_that_comes_twice_in_a_round_gets_other_responses(tmp_path: Path, tiny_policy: Path) -> None:
    loaded = data(VanillaSampler(), prompts_per_round=12, decoding=Decoding(max_new_tokens=8, rows=6))
    trainer(tmp_path, 1).fit(module(tiny_policy), datamodule=loaded)
    assert loaded.round is not None
    pairs = [(p.comparison.prompt.index, p.comparison.a.ids) for p in loaded.round.preferences]
    assert Counter(index for index, _ in pairs) == dict.fromkeys(range(6), 2)
    assert len(set(pairs)) == 12


def test_the_first_loss_is_log_two_in_mixed_precision(tmp_path: Path, tiny_policy: Path) -> None:
    class FirstLoss(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
            del pl_module
            if trainer.global_step == 1:
                assert outputs["loss"].item() == pytest.approx(math.log(2), abs=2e-3)

    trainer(tmp_path, 1, FirstLoss(), precision="bf16-mixed").fit(module(tiny_policy), datamodule=data(PILAFSampler()))


def test_a_round_without_labels_is_an_error(tmp_path: Path, tiny_policy: Path) -> None:
    class Mute(Moody):
        def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
            del key
            return [Label(None, "timeout") for _ in comparisons]

    with pytest.raises(
        RuntimeError, match=r"round 0 has no labeled pair.*'timeout': 4.*larger data.rounds.label_attempts"
    ):
        trainer(tmp_path, 1).fit(module(tiny_policy), datamodule=data(VanillaSampler(), Mute(0)))
    again = data(VanillaSampler(), label_attempts=2)
    trainer(tmp_path, 1).fit(module(tiny_policy), datamodule=again)
    with PreferenceStore(again.ledger, read_only=True) as store:
        assert store.num_labels == 4


def test_the_label_budget_cuts_the_last_round_and_stops(tmp_path: Path, tiny_policy: Path) -> None:
    seen = Buffers()
    trainer(tmp_path, 9, seen, LabelBudget(10)).fit(module(tiny_policy), datamodule=data(VanillaSampler()))
    assert [len(epoch) for epoch in seen.epochs] == [4, 4, 2]
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        assert store.num_labels == 10


@pytest.mark.parametrize(
    ("epochs", "steps", "budget", "labels"), [(3, -1, [], 12), (9, 6, [], 12), (9, 5, [], 12), (9, -1, [10], 10)]
)
def test_a_run_that_is_over_buys_nothing_when_it_is_started_again(
    tmp_path: Path, tiny_policy: Path, epochs: int, steps: int, budget: list[int], labels: int
) -> None:
    spent = []
    for _ in range(2):
        checkpoint = tmp_path / "checkpoints" / "last.ckpt"
        keep = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_on_train_epoch_end=True)
        policy = module(tiny_policy)
        loaded = data(VanillaSampler())
        said = Said()
        trainer(tmp_path, epochs, keep, said, *(LabelBudget(n) for n in budget), max_steps=steps).fit(
            policy, datamodule=loaded, ckpt_path=checkpoint if checkpoint.exists() else None
        )
        assert said.labels == labels
        weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
        with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
            spent.append((store.num_labels, weights))
    assert [bought for bought, _ in spent] == [labels, labels]
    assert torch.equal(spent[0][1], spent[1][1])


def test_a_larger_budget_samples_nothing_more_for_old_rounds(tmp_path: Path, tiny_policy: Path) -> None:
    for budget, rounds in ((10, {0: 4, 1: 4, 2: 2}), (15, {0: 4, 1: 4, 2: 2, 3: 4, 4: 1})):
        keep = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_on_train_epoch_end=True)
        checkpoint = tmp_path / "checkpoints" / "last.ckpt"
        trainer(tmp_path, 9, keep, LabelBudget(budget)).fit(
            module(tiny_policy),
            datamodule=data(VanillaSampler(), replay="all"),
            ckpt_path=checkpoint if checkpoint.exists() else None,
        )
        with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
            assert Counter(p.round for p in store.preferences()) == rounds


def test_a_sampler_or_labeler_that_returns_too_few_is_named(tmp_path: Path, tiny_policy: Path) -> None:
    class Lazy(VanillaSampler):
        def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
            return super().sample(prompts, engine, key)[1:]

    with pytest.raises(ValueError, match=r"Lazy.sample returned 1 comparisons for 2 prompts"):
        trainer(tmp_path, 1).fit(module(tiny_policy), datamodule=data(Lazy()))


@pytest.mark.parametrize("rule", ["previous", "ema"])
@pytest.mark.parametrize("lora", [None, LoRA(r=2, alpha=4)], ids=["full", "lora"])
def test_a_moving_reference_refreshes_old_log_probabilities(
    tmp_path: Path, tiny_policy: Path, rule: ReferenceRule, lora: LoRA | None
) -> None:
    class Check(Callback):
        """At the start of an epoch policy and reference agree under ``previous``; and no pair is stale."""

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, DPOModule)
            assert pl_module.reference is not None
            loader: Any = trainer.train_dataloader
            pairs = [p.comparison for pairs, _ in loader.dataset for p in pairs]
            with torch.no_grad(), pl_module.reference.active() as model:
                fresh = summed_logps(model, [(c.prompt.ids, (c.a.ids, c.b.ids)) for c in pairs]).tolist()
            kept = [sum(r.reference_logps or ()) for c in pairs for r in (c.a, c.b)]
            assert kept == pytest.approx(fresh, abs=1e-4)
            assert pl_module.reference.version == trainer.current_epoch

    policy = module(tiny_policy, reference=ReferenceUpdate(rule, ema_decay=0.5), lora=lora)
    trainer(tmp_path, 3, Check()).fit(policy, datamodule=data(PILAFSampler(), replay="all"))


class EveryStep(ModelCheckpoint):
    """Keeps a checkpoint of every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)


class Leave(EveryStep):
    """Ends the run after a step, with its checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder)
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.step:
            raise Stopped


class EveryEpoch(ModelCheckpoint):
    """Keeps a checkpoint of every epoch's end, as the command line does."""

    def __init__(self, folder: Path) -> None:
        name = "end-of-{epoch}"
        super().__init__(folder, filename=name, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (TPILAFSampler, {"replay": 2}),
        (PILAFSampler, {"epochs_per_round": 2, "reference": ReferenceUpdate("previous"), "replay": "all"}),
        (VanillaSampler, {"lora": LoRA(r=2, alpha=4, dropout=0.3), "epochs_per_round": None}),
        (PILAFSampler, {"replay": "all", "max_steps": 1000}),
        (PILAFSampler, {"replay": "all", "max_steps": 8}),
        (
            VanillaSampler,
            {"lora": LoRA(r=2, alpha=4, dropout=0.3), "max_tokens_per_micro_batch": 1, "length_window": 2},
        ),
        (VanillaSampler, {"dtype": "bfloat16", "epochs_per_round": None}),
    ],
    ids=["t_pilaf", "previous", "lora_dropout", "max_steps", "max_steps_within_an_epoch", "micro_batches", "bfloat16"],
)
def test_a_run_continues_bitwise_from_every_checkpoint(
    tmp_path: Path, tiny_policy: Path, sampler: type[AbstractPairSampler], options: dict[str, Any]
) -> None:
    model_options = {k: v for k, v in options.items() if k in ("reference", "lora", "dtype")}
    max_steps = options.get("max_steps", -1)
    data_options = {k: v for k, v in options.items() if k not in ("reference", "lora", "dtype", "max_steps")}

    def fit(checkpoint: Path | None, *callbacks: Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # adapters are random
        policy = module(tiny_policy, **model_options)
        loaded = data(sampler(), **data_options)
        run = trainer(tmp_path, 3, *callbacks, max_steps=max_steps)
        run.fit(policy, datamodule=loaded, ckpt_path=checkpoint)
        assert run.global_step == min(max_steps if max_steps > 0 else 1000, sum(lengths))
        return {name: p.detach().clone() for name, p in policy.named_parameters()}

    replay, per_round = data_options.get("replay", "last"), data_options.get("epochs_per_round", 1)
    rounds = [0 if per_round is None else epoch // per_round for epoch in range(3)]
    lengths = [2 * min({"last": 1, "all": 9}.get(replay, replay), index + 1) for index in rounds]
    straight = fit(None, EveryStep(tmp_path / "checkpoints"), EveryEpoch(tmp_path / "checkpoints"))
    checkpoints = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert len(checkpoints) >= 8
    for checkpoint in checkpoints:
        continued = fit(checkpoint)
        assert all(torch.equal(straight[name], continued[name]) for name in straight), checkpoint.name
    # stopped again and again: after every step; and at the end of a first epoch, then within the third
    last = min(max_steps if max_steps > 0 else 1000, sum(lengths))
    for number, stops in enumerate((range(1, last), (lengths[0], min(sum(lengths[:2]) + 1, last - 1)))):
        left = None
        for step in stops:
            leave = Leave(tmp_path / f"chain{number}", step)
            with pytest.raises(Stopped):
                fit(left, leave)
            left = Path(leave.best_model_path)
            assert left.name.endswith(f"-step={step}.ckpt")
        continued = fit(left)
        assert all(torch.equal(straight[name], continued[name]) for name in straight), stops


def test_a_sampler_goes_on_with_what_it_had_learned_where_the_ledger_lacks_the_later_rounds(
    tmp_path: Path, tiny_policy: Path
) -> None:
    drawn = []
    for name, parts in (("straight", [3]), ("stopped", [2, 3])):
        left: Path | None = None
        for epochs in parts:
            keep = EveryEpoch(tmp_path / name / "checkpoints")
            loaded = data(TPILAFSampler(), prompts_per_round=6)
            policy = module(tiny_policy)
            trainer(tmp_path / name, epochs, keep).fit(policy, datamodule=loaded, ckpt_path=left)
            left = Path(keep.best_model_path)
        assert loaded.round is not None
        assert loaded.round.index == 2
        drawn.append([(c.a.ids, c.b.ids, c.weight, c.meta["tilt_probability"]) for c in loaded.round.comparisons])
    assert drawn[0] == drawn[1]
    assert {probability for *_, probability in drawn[0]} != {0.5}  # it had learned something


def test_a_checkpoint_of_another_ledger_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    trainer(tmp_path / "a", 1, EveryStep(tmp_path / "a" / "checkpoints")).fit(
        module(tiny_policy), datamodule=data(VanillaSampler())
    )
    checkpoint = next((tmp_path / "a" / "checkpoints").glob("*.ckpt"))
    with pytest.raises(ValueError, match="checkpoint belongs to ledger"):
        trainer(tmp_path / "b", 2).fit(module(tiny_policy), datamodule=data(VanillaSampler()), ckpt_path=checkpoint)


def test_fast_dev_run_and_overfit_batches_draw_once(tmp_path: Path, tiny_policy: Path) -> None:
    sampler = Counting()
    trainer(tmp_path / "fast", 1, fast_dev_run=True).fit(module(tiny_policy), datamodule=data(sampler))
    # what one batch needs, and nothing is left behind
    assert [len(call) for call in sampler.calls] == [2]
    assert not (tmp_path / "fast" / "ledger.sqlite").exists()


class Steps(Callback):
    """Notes of each step its micro-batches, its gradient before it is applied, and what was logged."""

    def __init__(self) -> None:
        self.micro_batches: list[int] = []
        self.gradients: list[torch.Tensor] = []
        self.metrics: list[list[float]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        assert batch.micro_batches is not None
        assert all(p.grad is None for p in pl_module.parameters())
        self.micro_batches.append(len(batch.micro_batches))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients).clone())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        logged = trainer.callback_metrics
        assert outputs["loss"].item() == pytest.approx(logged["train/loss"].item())
        names = ("train/loss", "train/rewards/margins", "train/rewards/accuracies", "train/logps/chosen")
        self.metrics.append([logged[name].item() for name in names])


class Plain(DPOModule):
    """Plain gradient steps: what Adam would make of rounding errors does not matter here."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03)


def test_micro_batches_and_accumulation_change_nothing(tmp_path: Path, tiny_policy: Path) -> None:
    """Seven pairs in steps of four and three, for two epochs; the whole step in one micro-batch must come out."""

    def fit(pairs: int, accumulate: int, tokens: int | None) -> tuple[Steps, torch.Tensor]:
        steps, policy = Steps(), Plain(str(tiny_policy), options=ModelOptions(layout="padded"))
        loaded = data(
            VanillaSampler(),
            pairs_per_batch=pairs,
            max_tokens_per_micro_batch=tokens,
            prompts_per_round=7,
            epochs_per_round=None,
        )
        # other settings are another run
        folder = tmp_path / f"{pairs}-{accumulate}-{tokens}"
        run = trainer(folder, 2, RewardMonitor(), steps, accumulate_grad_batches=accumulate, log_every_n_steps=1)
        run.fit(policy, datamodule=loaded)
        assert run.global_step == 4
        assert run.accumulate_grad_batches == accumulate
        return steps, torch.cat([p.detach().flatten() for p in policy.parameters()])

    whole, weights = fit(4, 1, None)
    assert whole.micro_batches == [1] * 4
    for pairs, accumulate, tokens, sizes in (
        (4, 1, 1, [4, 3, 4, 3]),
        (4, 1, 300, None),
        (2, 2, None, [2] * 4),
        (2, 2, 1, [4, 3, 4, 3]),
        (1, 4, 4096, [4, 3, 4, 3]),
    ):
        parts, got = fit(pairs, accumulate, tokens)
        if sizes is None:
            assert 4 < sum(parts.micro_batches) < 14
        else:
            assert parts.micro_batches == sizes
        for expected, gradient in zip(whole.gradients, parts.gradients, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
        torch.testing.assert_close(got, weights, atol=1e-6, rtol=1e-5)
        for expected_metrics, metrics in zip(whole.metrics, parts.metrics, strict=True):
            assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)


def test_metrics_are_means_over_the_steps_since_the_last_log(tmp_path: Path, tiny_policy: Path) -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.logged: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
            self.losses.append(outputs["loss"].item())
            if logs_now(trainer):
                self.logged.append(trainer.callback_metrics["train/loss"].item())

    seen = Logged()
    trainer(tmp_path, 3, seen, log_every_n_steps=3).fit(module(tiny_policy), datamodule=data(VanillaSampler()))
    assert len(seen.losses) == 6
    # a log covers steps of the epoch before
    assert seen.logged == pytest.approx([sum(seen.losses[:3]) / 3, sum(seen.losses[3:]) / 3])


class Fetched(TorchDispatchMode):
    """Counts the numbers that are fetched from tensors; on a GPU each would wait for the queue."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_fetches_single_numbers(tmp_path: Path, tiny_policy: Path) -> None:
    modes: list[Fetched] = []

    class First(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            modes.append(Fetched())
            modes[-1].__enter__()

    class Last(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            modes[-1].__exit__(None, None, None)

    callbacks = [First(), KLMonitor(), RewardMonitor(), Throughput(), Last()]
    run = trainer(tmp_path, 3, *callbacks, log_every_n_steps=3, gradient_clip_val=1.0)
    # in the padded layout transformers itself asks its position ids whether rows are packed
    run.fit(module(tiny_policy, layout="auto"), datamodule=data(VanillaSampler(), max_tokens_per_micro_batch=1))
    # the one of `NonFiniteGuard`, which looks at loss and gradient once per optimizer step
    assert [mode.count for mode in modes] == [1] * 6
    with Fetched() as control:
        torch.ones(1).item()
    assert control.count == 1


def test_fsdp1_is_refused_before_a_model_is_loaded(tiny_policy: Path, tmp_path: Path) -> None:
    policy, run = module(tiny_policy), trainer(tmp_path, 1)
    policy.trainer = run
    # Lightning itself refuses it where there is no GPU
    run._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match="use --config trainer/fsdp"):
        policy.setup("fit")
    assert policy.policy is None


def test_a_schedule_of_accumulation_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=r"set data\.pairs_per_batch"):
        trainer(tmp_path, 1, GradientAccumulationScheduler({0: 2})).fit(
            module(tiny_policy), datamodule=data(VanillaSampler())
        )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fused_adamw_takes_the_steps_of_the_plain_one(tmp_path: Path, tiny_policy: Path, precision: str) -> None:
    class Unfused(DPOModule):
        def configure_optimizers(self) -> Any:
            configured: Any = super().configure_optimizers()
            assert all(group["fused"] for group in configured["optimizer"].param_groups)
            for group in configured["optimizer"].param_groups:
                group["fused"] = False
            return configured

    fitted = []
    for kind in (DPOModule, Unfused):
        policy = kind(
            str(tiny_policy),
            optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1),
            options=ModelOptions(layout="padded"),
        )
        loaded = data(VanillaSampler(), epochs_per_round=None)
        # Lightning would refuse to clip for a fused optimizer in mixed precision
        run = trainer(tmp_path / kind.__name__, 3, gradient_clip_val=1.0, precision=precision)
        run.fit(policy, datamodule=loaded)
        fitted.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*fitted, atol=1e-5, rtol=1e-4)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.rounds\.replay must be at least 1; got 0"):
        data(VanillaSampler(), replay=0)

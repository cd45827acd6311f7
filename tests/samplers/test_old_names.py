"""Samplers of version 0.1 still work: ``worth_labels`` and ``label_share`` are the old names of the selection."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_rlhf.renamed import renamed_arguments, renamed_config
from lightning_rlhf.samplers import AbstractSelectiveSampler, PolicyWeightedSampler, VanillaSampler
from lightning_rlhf.types import Comparison


def test_a_sampler_with_worth_labels_is_selective_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"Old\.worth_labels is select_for_labeling"):

        class Old(VanillaSampler):
            label_share = 0.5

            def worth_labels(self, comparisons: Sequence[Comparison]) -> list[int]:
                return list(range(0, len(comparisons), 2))

    sampler = Old()
    assert isinstance(sampler, AbstractSelectiveSampler)
    assert (sampler.label_fraction, sampler.most_labels(5)) == (0.5, 3)
    assert not isinstance(VanillaSampler(), AbstractSelectiveSampler)


def test_the_old_argument_works_in_python() -> None:
    with pytest.warns(DeprecationWarning, match="is label_fraction since version 0.2"):
        assert PolicyWeightedSampler(n=4, dim=4, label_share=0.25).label_fraction == 0.25  # type: ignore[call-arg]


@pytest.mark.parametrize("path", ["--data.sampler.", "--data.sampler.init_args.", "--data.init_args.sampler."])
def test_the_old_argument_works_on_the_command_line(path: str) -> None:
    notes: list[str] = []
    classes = {"data.sampler": "PolicyWeightedSampler"}
    assert renamed_arguments([f"{path}label_share=0.5"], notes.append, classes) == [f"{path}label_fraction=0.5"]
    assert notes == [f"{path}label_share is {path}label_fraction since version 0.2"]


def test_the_old_argument_works_in_configs() -> None:
    old = {"class_path": "PolicyWeightedSampler", "init_args": {"n": 4, "label_share": 0.5}}
    new = {"class_path": "PolicyWeightedSampler", "init_args": {"n": 4, "label_fraction": 0.5}}
    for data in ({"init_args": {"sampler": old}}, {"sampler": old}):
        assert str(renamed_config({"data": data})) == str({"data": data}).replace("label_share", "label_fraction")
    mixture = renamed_config({"data": {"sampler": {"class_path": "MixtureSampler", "init_args": {"samplers": [old]}}}})
    assert mixture["data"]["sampler"]["init_args"]["samplers"] == [new]
    assert renamed_config({"data": {"sampler": "PILAFSampler"}}) == {"data": {"sampler": "PILAFSampler"}}

"""Null on the command line, at any depth."""

from __future__ import annotations

import pytest

from lightning_rlhf.commands.config_files import nested_nulls
from lightning_rlhf.commands.fit import RLHFCLI


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--data.rounds.epochs_per_round=null", '--config={"data": {"rounds": {"epochs_per_round": null}}}'),
        ("--data.init_args.rounds.ledger=~", '--config={"data": {"rounds": {"ledger": null}}}'),
        ("--data.heldout=null", "--data.heldout=null"),
        ("--trainer.logger.x=null", "--trainer.logger.x=null"),
        ("--model.options.dtype=float32", "--model.options.dtype=float32"),
    ],
)
def test_only_nested_nulls_become_configs(argument: str, expected: str) -> None:
    assert nested_nulls([argument]) == [expected]


def test_null_replaces_what_a_config_sets(capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse alone would read the text "None", or refuse it for a number."""
    arguments = [
        *("fit", "--config=quickstart", "--data.rounds.epochs_per_round=null", "--data.system_prompt=null"),
        *("--data.batching.max_tokens_per_micro_batch=null", "--print_config"),
    ]
    with pytest.raises(SystemExit):
        RLHFCLI(arguments)
    printed = capsys.readouterr().out
    for line in ("epochs_per_round: null", "system_prompt: null", "max_tokens_per_micro_batch: null"):
        assert line in printed
    # the other settings of the group stay
    assert "prompts_per_round: 24" in printed

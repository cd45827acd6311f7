"""The command ``export``: rows of a ledger, or the model of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning_rlhf.commands.export import Content, Format, Rows, export_ledger
from lightning_rlhf.models.hub import HubRepo, check_login, push_folder


def export(
    out: str,
    ledger: str | None = None,
    checkpoint: str | None = None,
    format: Format = "auto",
    rows: Rows = "auto",
    best: bool = False,
    content: Content = "rows",
    unlabeled: bool = False,
    push_to_hub: HubRepo | None = None,
) -> str:
    """Write the labels of a ledger as rows for other trainers, or the model of a checkpoint as a folder.

    Rows: every labeled comparison is ``prompt``, ``chosen``, ``rejected`` and more columns, every rollout ``prompt``,
    ``completion``, ``reward``. Models: any checkpoint of a run, also one of your own ``ModelCheckpoint``, becomes a
    folder that transformers opens, with the adapter alone in ``adapter/``. Returns a line that says what was written.

    Args:
        out: of rows the file, ``.jsonl`` or ``.parquet``; of a checkpoint a folder that is not there yet.
        ledger: path of the ledger of a run.
        checkpoint: a checkpoint, or a run folder for its newest one.
        format: format of the rows; ``auto`` goes by the suffix.
        rows: ``plain`` writes texts, prompts as rendered with the chat template; ``conversational`` writes lists of
            messages; ``auto`` writes messages if every prompt has them.
        best: of rollouts, only the most rewarded one of each prompt and round.
        content: ``rows``, or ``votes`` of people for the command ``import``, or labeled pairs in the form of
            ``helpsteer``, or all pairs for people to judge in ``argilla`` (name the file ``.json``) or ``potato``.
        unlabeled: of the pairs for Argilla and potato, only those without a label.
        push_to_hub: repository to which the folder of a model is uploaded as well.

    Raises:
        ValueError: if not exactly one of ``ledger`` and ``checkpoint`` is given, among others.
    """
    if push_to_hub is not None:
        if checkpoint is None:
            raise ValueError("push_to_hub uploads the folder of a model: give --checkpoint")
        check_login(push_to_hub)
    if ledger is not None and checkpoint is None:
        return f"wrote {export_ledger(ledger, out, format, rows, best, content, unlabeled)} rows"
    if checkpoint is None or ledger is not None:
        raise ValueError("name what to export: either --ledger=RUN/ledger.sqlite or --checkpoint=RUN")
    # imported here: rows need no modules
    from lightning_rlhf.commands.checkpoint_export import export_checkpoint

    step = export_checkpoint(checkpoint, out)
    written = f"wrote the model of step {step} to {out}"
    return written if push_to_hub is None else f"{written}, uploaded to {push_folder(Path(out), push_to_hub)}"

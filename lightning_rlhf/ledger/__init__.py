"""The ledger: every comparison, label, rollout, score and cost of a run, in SQLite."""

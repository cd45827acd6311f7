"""One round of pairs or rollouts: sample, store, label or score, store."""

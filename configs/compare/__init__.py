"""Comparisons by name: ``lightning-rlhf compare compare/tabular``."""

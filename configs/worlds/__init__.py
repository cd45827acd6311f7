"""Runs in worlds where the truth is known: ``--config worlds/menu``."""

"""Sets of principles as data, read by `lightning_rlhf.judging.principle.load_principles`."""

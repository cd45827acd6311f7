"""Overlays that exchange the pair sampler: ``--config dpo_online --config sampler/pilaf``."""

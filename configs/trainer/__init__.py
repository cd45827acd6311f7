"""Overlays that exchange the hardware: ``--config dpo_online --config trainer/ddp``."""

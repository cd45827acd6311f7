"""Overlays that exchange the labeler: ``--config dpo_online --config labeler/server``."""

"""Preference models: rewards with their uncertainty, learnt from all labels so far."""

from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, Posterior, win_probability


__all__ = ["AbstractPreferenceModel", "ModelStart", "Posterior", "win_probability"]

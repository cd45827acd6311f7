"""The interface of preference losses, under its earlier path; it is defined beside the DPO loss."""

from __future__ import annotations

from lightning_rlhf.losses.preference import AbstractPreferenceLoss, PairLogps, checked_losses


__all__ = ["AbstractPreferenceLoss", "PairLogps", "checked_losses"]

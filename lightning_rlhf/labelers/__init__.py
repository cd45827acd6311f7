"""Labelers: comparison -> label, P(first response preferred). A plug-in folder: subclass `AbstractLabeler`."""

from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.labelers.difference import DifferenceLabeler
from lightning_rlhf.labelers.human import HumanLabeler
from lightning_rlhf.labelers.llm import LLMLabeler
from lightning_rlhf.labelers.mixed import MixedLabeler
from lightning_rlhf.labelers.principle import PrincipleLabeler
from lightning_rlhf.labelers.recorded import RecordedLabeler
from lightning_rlhf.labelers.reward import RewardLabeler
from lightning_rlhf.labelers.server import ServerLabeler
from lightning_rlhf.labelers.thumbs import ThumbsLabeler


__all__ = [
    "AbstractLabeler",
    "DifferenceLabeler",
    "HumanLabeler",
    "LLMLabeler",
    "MixedLabeler",
    "PrincipleLabeler",
    "RecordedLabeler",
    "RewardLabeler",
    "ServerLabeler",
    "ThumbsLabeler",
]

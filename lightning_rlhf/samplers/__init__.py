"""Pair samplers: prompts in, pairs of responses (comparisons) out. Subclass `AbstractPairSampler` to write your own."""

from lightning_rlhf.samplers.base import AbstractPairSampler, AbstractSelectiveSampler
from lightning_rlhf.samplers.best_of_n import BestOfNSampler
from lightning_rlhf.samplers.best_worst import BestWorstSampler
from lightning_rlhf.samplers.cost_table import cost_table
from lightning_rlhf.samplers.hybrid import HybridSampler
from lightning_rlhf.samplers.infomax import InfomaxSampler
from lightning_rlhf.samplers.low_curvature import LowCurvatureSampler
from lightning_rlhf.samplers.mixture import MixtureSampler
from lightning_rlhf.samplers.model_based import AbstractModelSampler
from lightning_rlhf.samplers.nash_md import NashMDSampler
from lightning_rlhf.samplers.offline import OfflineSampler
from lightning_rlhf.samplers.pilaf import PILAFSampler
from lightning_rlhf.samplers.policy_weighted import PolicyWeightedSampler
from lightning_rlhf.samplers.rso import RSOSampler
from lightning_rlhf.samplers.self_play import SelfPlaySampler
from lightning_rlhf.samplers.single import SingleSampler
from lightning_rlhf.samplers.sir_pilaf import SIRPILAFSampler
from lightning_rlhf.samplers.t_pilaf import TPILAFSampler
from lightning_rlhf.samplers.thompson import ThompsonSampler
from lightning_rlhf.samplers.vanilla import VanillaSampler
from lightning_rlhf.samplers.verdicts import TranscriptSampler, VerdictSampler
from lightning_rlhf.samplers.weighted_vanilla import WeightedVanillaSampler


__all__ = [
    "AbstractModelSampler",
    "AbstractPairSampler",
    "AbstractSelectiveSampler",
    "BestOfNSampler",
    "BestWorstSampler",
    "HybridSampler",
    "InfomaxSampler",
    "LowCurvatureSampler",
    "MixtureSampler",
    "NashMDSampler",
    "OfflineSampler",
    "PILAFSampler",
    "PolicyWeightedSampler",
    "RSOSampler",
    "SIRPILAFSampler",
    "SelfPlaySampler",
    "SingleSampler",
    "TPILAFSampler",
    "ThompsonSampler",
    "TranscriptSampler",
    "VanillaSampler",
    "VerdictSampler",
    "WeightedVanillaSampler",
    "cost_table",
]

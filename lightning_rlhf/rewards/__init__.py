"""Rewards: (prompt, response) -> how good the response is. A plug-in folder: subclass `AbstractReward`."""

from lightning_rlhf.rewards.adversarial import AdversarialReward, DiscriminatorSteps
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, checked_output, checked_score
from lightning_rlhf.rewards.combine import combine, disagreement, standardised
from lightning_rlhf.rewards.discriminators import AbstractDiscriminator, ModelDiscriminator, NGramDiscriminator
from lightning_rlhf.rewards.embedders import AbstractEmbedder, HashEmbedder, ModelEmbedder
from lightning_rlhf.rewards.function import FunctionReward
from lightning_rlhf.rewards.implicit import ImplicitReward
from lightning_rlhf.rewards.language import LanguageAlignmentReward
from lightning_rlhf.rewards.lexicon import LexiconReward
from lightning_rlhf.rewards.llm import LLMScoreReward
from lightning_rlhf.rewards.model import RewardModelReward
from lightning_rlhf.rewards.novelty import AbstractNoveltyReward, CountNoveltyReward, RNDNoveltyReward
from lightning_rlhf.rewards.posterior import PosteriorReward
from lightning_rlhf.rewards.principle import PrincipleReward
from lightning_rlhf.rewards.server import ServerScoreReward
from lightning_rlhf.rewards.uncertainty import UncertaintyPenalty
from lightning_rlhf.rewards.verifiable import ExactAnswerReward, JSONSchemaReward, LengthReward, PatternReward
from lightning_rlhf.rewards.weighted import WeightedReward
from lightning_rlhf.rewards.win import WinProbabilityReward
from lightning_rlhf.rewards.wrapped import AbstractWrappedReward


__all__ = [
    "AbstractDiscriminator",
    "AbstractEmbedder",
    "AbstractNoveltyReward",
    "AbstractReward",
    "AbstractWrappedReward",
    "AdversarialReward",
    "CountNoveltyReward",
    "DiscriminatorSteps",
    "ExactAnswerReward",
    "FunctionReward",
    "HashEmbedder",
    "ImplicitReward",
    "JSONSchemaReward",
    "LLMScoreReward",
    "LanguageAlignmentReward",
    "LengthReward",
    "LexiconReward",
    "ModelDiscriminator",
    "ModelEmbedder",
    "NGramDiscriminator",
    "PatternReward",
    "PosteriorReward",
    "PrincipleReward",
    "RNDNoveltyReward",
    "RewardModelReward",
    "RewardOutput",
    "ServerScoreReward",
    "UncertaintyPenalty",
    "WeightedReward",
    "WinProbabilityReward",
    "checked_output",
    "checked_score",
    "combine",
    "disagreement",
    "standardised",
]

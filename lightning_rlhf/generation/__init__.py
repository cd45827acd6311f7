"""Generation: requests in, responses with log-probabilities under policy and reference out.

`base.Request` holds the mixing coefficient of a response. `engine.pilaf_logits` mixes the next-token logits of policy
and reference (PILAF, arXiv 2502.04270, section 5), and `engine.sample_tokens` samples from them. `lanes` and `slots`
run the models on a KV cache.
"""

from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.generation.external import AbstractExternalEngine
from lightning_rlhf.generation.server import ServerEngine
from lightning_rlhf.generation.vllm import VLLMEngine


__all__ = [
    "AbstractEngine",
    "AbstractExternalEngine",
    "DecodeEngine",
    "Decoding",
    "PolicyEngine",
    "Request",
    "ServerEngine",
    "VLLMEngine",
]

PolicyEngine = DecodeEngine | AbstractExternalEngine
"""Engines that sample from a policy and score under its reference."""

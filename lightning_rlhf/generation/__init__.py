"""The decode engine: requests in, responses with log-probabilities under policy and reference out."""

from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine


__all__ = ["AbstractEngine", "DecodeEngine", "Decoding", "Request"]

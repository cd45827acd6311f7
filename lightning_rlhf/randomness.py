"""Random numbers that do not depend on batching, ranks or history: one key per sample.

A `Key` is a path of integers, ``(seed, round, prompt index, sample, ...)``, folded one step at a time, as in JAX. The
same path gives the same numbers on every rank and after every restart.

torch's CPU generator uses the lower 32 bits of a seed, so that two keys share their numbers with probability 2^-32.
Among n keys, n^2 / 2^33 such pairs are expected: 1.2 among 100 000 samples. Their samples are not independent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """Purpose of random numbers: the first step of a key path below the run seed.

    The numbers are part of every run's results and never change; new purposes get new numbers.
    """

    SAMPLING = 1
    LABELING = 2
    PROMPTS = 3
    ORDER = 4
    WINDOWS = 5
    SILVER = 6
    PRINCIPLES = 7
    LEARNING = 12
    DROPOUT = 100
    HELDOUT = 101
    ANSWERS = 201


@dataclass(frozen=True)
class Key:
    """A name for a stream of random numbers.

    Args:
        path: integers that identify the stream, from coarse (run seed) to fine (sample number).
    """

    path: tuple[int, ...]

    def fold(self, *parts: int) -> Key:
        """Derive the key of a sub-stream."""
        return Key(self.path + parts)

    def seed(self) -> int:
        """A 63-bit seed, equal on every machine; a CPU generator uses its lower 32 bits, a CUDA one all."""
        digest = hashlib.blake2b(",".join(map(str, self.path)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self) -> torch.Generator:
        """A fresh CPU generator at the start of this stream."""
        return torch.Generator().manual_seed(self.seed())

    def uniforms(self, count: int) -> Tensor:
        """The first ``count`` numbers of the stream, uniform on [0, 1), float64 on the CPU; shape [count]."""
        return torch.rand(count, generator=self.generator(), dtype=torch.float64)

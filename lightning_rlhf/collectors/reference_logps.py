"""Reference log-probabilities of the responses of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_rlhf.collectors.recorded import RecordedPairs
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.models.reference_cache import ReferenceCache
from lightning_rlhf.types import Comparison, Preference, pair_rows


def with_reference_logps(
    comparisons: Sequence[Comparison], engine: PolicyEngine, cache: ReferenceCache | None = None
) -> list[Comparison]:
    """Add reference log-probabilities to the responses that have none, from the cache or by a forward pass.

    A training step then runs no reference. The version of the reference is kept in ``meta``, so that log-probabilities
    under an earlier reference are recognized.
    """
    if engine.reference is None:
        return list(comparisons)
    prompts, responses = pair_rows(comparisons)
    if cache is not None:
        scored = cache.complete(engine.reference, prompts, responses, engine.with_reference_logps)
    else:
        scored = engine.with_reference_logps(prompts, responses)
    version = {"reference_version": engine.reference.version}
    return [
        replace(c, a=a, b=b, meta={**c.meta, **version})
        for c, a, b in zip(comparisons, scored[::2], scored[1::2], strict=True)
    ]


def reference_version(engine: PolicyEngine) -> int:
    """Version of the reference of an engine; 0 without one."""
    return engine.reference.version if engine.reference is not None else 0


def refreshed(preferences: Sequence[Preference], engine: PolicyEngine | None) -> Sequence[Preference]:
    """Recompute reference log-probabilities of an older reference; without an engine, keep all."""
    # rows of the data hold no log-probabilities
    if engine is None or isinstance(preferences, RecordedPairs):
        return preferences
    version = reference_version(engine)
    # a pair without a version was scored by no reference of this run: it stays as it is
    stale = [p for p in preferences if p.comparison.meta.get("reference_version", version) != version]
    if not stale:
        return preferences
    # without the old values, since only responses without reference log-probabilities are scored
    bare: list[Comparison] = []
    for c in [p.comparison for p in stale]:
        b = c.b if c.is_single else replace(c.b, reference_logps=None)
        bare.append(replace(c, a=replace(c.a, reference_logps=None), b=b))
    # by id: a preference holds dictionaries and has no hash
    fresh = {id(p): replace(p, comparison=c) for p, c in zip(stale, with_reference_logps(bare, engine), strict=True)}
    return [fresh.get(id(p), p) for p in preferences]

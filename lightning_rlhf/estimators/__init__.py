"""Pure functions that estimate: KL from samples, the laws and weights of PILAF, exact laws for tests."""

from __future__ import annotations

from lightning_rlhf.estimators.kl import categorical_kl, k1, k2, k3, kl_per_sequence, kl_per_token, pad_ragged
from lightning_rlhf.estimators.pilaf import (
    RunningZZ,
    cosh_delta,
    mix_logits,
    pair_weight,
    tilt_probability,
    vanilla_pair_weight,
    zz_from_deltas,
)
from lightning_rlhf.estimators.tabular import (
    TiltedLaws,
    differences,
    expected_dpo_loss,
    objective_j,
    product_pair_law,
    tilted_laws,
    tilted_pair_law,
    tpilaf_pair_law,
)


__all__ = [
    "RunningZZ",
    "TiltedLaws",
    "categorical_kl",
    "cosh_delta",
    "differences",
    "expected_dpo_loss",
    "k1",
    "k2",
    "k3",
    "kl_per_sequence",
    "kl_per_token",
    "mix_logits",
    "objective_j",
    "pad_ragged",
    "pair_weight",
    "product_pair_law",
    "tilt_probability",
    "tilted_laws",
    "tilted_pair_law",
    "tpilaf_pair_law",
    "vanilla_pair_weight",
    "zz_from_deltas",
]

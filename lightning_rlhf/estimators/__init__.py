"""Pure functions: KL estimators, returns and advantages, PILAF's mixes and weights, exact distributions for tests."""

from __future__ import annotations

from lightning_rlhf.estimators.choice import choice_variance, gaussian_samples
from lightning_rlhf.estimators.difference import (
    antisymmetric_difference,
    difference_weight,
    effective_sample_size,
)
from lightning_rlhf.estimators.kl import categorical_kl, k1, k2, k3, kl_per_sequence, kl_per_token, pad_ragged
from lightning_rlhf.estimators.pilaf import (
    RunningZZ,
    cosh_delta,
    log_secant_slope,
    mix_logits,
    pair_weight,
    tilt_probability,
    vanilla_pair_weight,
    zz_from_deltas,
)
from lightning_rlhf.estimators.principles import (
    dominant_score,
    geometric_count,
    order_consistent,
    principle_signs,
    variance_scaled,
    weighted_subset,
)
from lightning_rlhf.estimators.ranking import mean_win_probability
from lightning_rlhf.estimators.returns import (
    gae,
    group_relative,
    kl_price,
    leave_one_out,
    objective_weights,
    returns_to_go,
    token_rewards,
    whiten,
)
from lightning_rlhf.estimators.tabular import (
    TiltedDistributions,
    differences,
    expected_dpo_loss,
    objective_j,
    product_pair_distribution,
    tilted_distributions,
    tilted_pair_distribution,
    tpilaf_pair_distribution,
)
from lightning_rlhf.estimators.temperature import fit_temperature, gap_factor, tempered


__all__ = [
    "RunningZZ",
    "TiltedDistributions",
    "antisymmetric_difference",
    "categorical_kl",
    "choice_variance",
    "cosh_delta",
    "difference_weight",
    "differences",
    "dominant_score",
    "effective_sample_size",
    "expected_dpo_loss",
    "fit_temperature",
    "gae",
    "gap_factor",
    "gaussian_samples",
    "geometric_count",
    "group_relative",
    "k1",
    "k2",
    "k3",
    "kl_per_sequence",
    "kl_per_token",
    "kl_price",
    "leave_one_out",
    "log_secant_slope",
    "mean_win_probability",
    "mix_logits",
    "objective_j",
    "objective_weights",
    "order_consistent",
    "pad_ragged",
    "pair_weight",
    "principle_signs",
    "product_pair_distribution",
    "returns_to_go",
    "tempered",
    "tilt_probability",
    "tilted_distributions",
    "tilted_pair_distribution",
    "token_rewards",
    "tpilaf_pair_distribution",
    "vanilla_pair_weight",
    "variance_scaled",
    "weighted_subset",
    "whiten",
    "zz_from_deltas",
]

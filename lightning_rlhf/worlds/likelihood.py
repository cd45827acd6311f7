"""Maximum likelihood of Bradley-Terry labels in many tabular worlds at once."""

from __future__ import annotations

import torch
from torch import Tensor


def maximum_likelihood(gaps: Tensor, labels: Tensor, weights: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Fit all labels by Newton steps; shape [worlds, dimensions].

    Args:
        gaps: feature gaps of the pairs; shape [worlds, pairs, dimensions].
        labels: 1 where the first response won; shape [worlds, pairs].
        weights: weight of each pair; shape [worlds, pairs].
        start: where to begin.
        ridge: precision of the prior, > 0.
    """
    parameters = start
    eye = torch.eye(gaps.shape[-1], dtype=gaps.dtype)
    for _ in range(40):
        # gradient = sum weight (label - sigma(delta)) dphi - ridge w
        # Hessian = -(sum weight sigma'(delta) dphi dphi^T + ridge 1), here with the opposite sign
        delta = torch.einsum("wpd,wd->wp", gaps, parameters)
        gradient = torch.einsum("wp,wp,wpd->wd", weights, labels - delta.sigmoid(), gaps) - ridge * parameters
        curvature = weights * delta.sigmoid() * (-delta).sigmoid()
        hessian = torch.einsum("wpd,wpe->wde", gaps * curvature[..., None], gaps) + ridge * eye
        # the ridge keeps the Hessian invertible with fewer pairs than dimensions
        step = torch.linalg.solve(hessian, gradient)
        # far from the optimum the curvature is nearly zero, and a full step would overshoot
        length = step.norm(dim=-1, keepdim=True)
        parameters = parameters + step * (2.0 / length.clamp_min(2.0))
        if float(length.max()) < 1e-9:
            break
    return parameters

"""The posterior of a preference model as a reward, for reinforcement learning on the labels of a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_rlhf.ledger.recorded import check_holds_pairs
from lightning_rlhf.ledger.silver import UNLABELED, SilverTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, Response, pair_rows


class PosteriorReward(AbstractReward):
    """Posterior mean of a reward, or a lower confidence bound, by a preference model fitted to a ledger.

    Policy gradients and best-of-N then learn from the labels that an earlier run, ``label`` or people gave. The model
    is fitted once, at the first score. A bound of ``lcb`` standard deviations below the mean keeps a policy from
    responses that no label says anything about.

    Args:
        model: the preference model.
        ledger: ledger with the labels: the file, or the run folder with ``ledger.sqlite``.
        policy: checkpoint of the policy before training, whose features the model reads.
        lcb: standard deviations that are subtracted from the mean, >= 0.
        options: how the checkpoint is loaded.

    Raises:
        ValueError: if ``lcb`` is out of range, or the ledger has no labels.
    """

    def __init__(
        self,
        model: AbstractPreferenceModel,
        ledger: str,
        policy: str,
        lcb: float = 0.0,
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> None:
        check_plugin("PosteriorReward.model", model, AbstractPreferenceModel)
        if not 0 <= lcb < float("inf"):
            raise ValueError(f"PosteriorReward.lcb must be finite and >= 0; got {lcb}")
        path = Path(ledger)
        self.ledger = path / "ledger.sqlite" if path.is_dir() else path
        if not self.ledger.exists():
            raise ValueError(f"PosteriorReward.ledger names {self.ledger}, which does not exist; give a run folder")
        self.model, self.policy, self.lcb, self.options = model, policy, lcb, options
        self._is_fitted = False

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Posterior mean less ``lcb`` standard deviations, with the standard deviation; nats."""
        self._fit()
        posterior = self.model.posterior(prompts, responses)
        std = posterior.covariance.diagonal().clamp_min(0.0).sqrt()
        return RewardOutput(posterior.mean - self.lcb * std, std)

    def _fit(self) -> None:
        if self._is_fitted:
            return
        with PreferenceStore(self.ledger, read_only=True) as store:
            check_holds_pairs(store)
            preferences = [p for p in store.preferences() if not p.label.is_free_tie]
            pairs = [pair for pair, _ in SilverTable(store).pairs(UNLABELED)]
        if not preferences:
            raise ValueError(f"{self.ledger} has no labels to fit a preference model to; run fit or label first")
        # without stored samples of the reference, the labeled responses serve for statistics
        pairs = pairs or [preference.comparison for preference in preferences]
        samples = list(zip(*pair_rows(pairs), strict=True))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.setup(ModelStart(self.policy, self.options, device, samples, Key((0,))))
        self.model.fit(preferences)
        self._is_fitted = True

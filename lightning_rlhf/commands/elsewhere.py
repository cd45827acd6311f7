"""Settings, classes and commands of TRL, transformers, LLaMA-Factory and Axolotl by our names, for errors.

A table per kind; `docs/coming-from-trl.md` has the differences, and a test compares both. Imports no torch.
"""

from __future__ import annotations

import difflib


_ROWS = "--data.prompts.path"
_HELD_OUT = "--data.heldout.path"
_STEP = "--data.pairs_per_batch (--data.rows_per_batch in SFT, --data.prompts_per_batch in reinforcement learning)"
_SCHEDULE = "--model.lr_scheduler (CosineWithWarmup, LinearWithWarmup, ...)"
_VALIDATION = "--trainer.val_check_interval, --trainer.check_val_every_n_epoch"
_CHECKPOINTS = "--checkpoint_every, --checkpoint_every_steps, --checkpoint_every_minutes"
_BEST = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val/loss"
_REFERENCE_UPDATE = "--model.reference.rule=ema, --model.reference.ema_decay"
_LIMITS = "--data.prompt_options.max_prompt_tokens, --data.decoding.max_new_tokens (SFT: --data.max_completion_tokens)"
_LOGGER = "--trainer.logger=WandbLogger, --trainer.logger.name"
_PEFT = "--model.lora.peft, which takes the settings of peft.LoraConfig"
_QUANTIZATION = "--model.options.quantization='{load_in_4bit: true}'"
_LOADING = "--model.options.dtype, --model.options.attn_implementation"
_STRATEGY = "--config trainer/ddp or trainer/fsdp (--trainer.strategy)"
_CONTINUES = ": the same command with the same --run_dir continues a run"
_PACKED = ": nothing is padded here, and rows are always packed (--model.options.layout)"
_EXPORT = ": the callback HFExport writes and uploads the model (--trainer.callbacks)"
_VLLM = "--model.options.use_vllm"
_COMPILE = ": a model is not compiled here; --data.decoding.compile compiles decoding"
_TURNS = "--data.prompts.turns=all, with --config sft"
_MERGED = ": the saved model/ is merged, the adapter alone is in model/adapter/"
_NONE = ": it has no counterpart here"
_TEMPLATE = "--model.options.chat_template"
_WORKERS = ": rows are tokenized in batches, before any model is loaded"

SETTINGS: dict[str, str] = {
    # transformers' TrainingArguments, which TRL's configs extend
    "model_name_or_path": "--model.policy (a reward model: --model.backbone)",
    "model": "--model.policy (a reward model: --model.backbone)",
    "output_dir": "--run_dir",
    "learning_rate": "--model.optimizer.lr",
    "optim": "--model.optimizer, a class such as AdamW",
    "optim_args": "--model.optimizer, a class with its arguments",
    "weight_decay": "--model.optimizer.weight_decay",
    "adam_beta1": "--model.optimizer.betas",
    "adam_beta2": "--model.optimizer.betas",
    "adam_epsilon": "--model.optimizer.eps",
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler_kwargs": _SCHEDULE,
    "warmup_steps": "--model.lr_scheduler.warmup_steps",
    "warmup_ratio": "--model.lr_scheduler.warmup_steps, a number of steps",
    "per_device_train_batch_size": _STEP,
    "train_batch_size": _STEP,
    "batch_size": _STEP,
    "gradient_accumulation_steps": "--data.batching.max_tokens_per_micro_batch, --trainer.accumulate_grad_batches",
    "num_train_epochs": "--trainer.max_epochs",
    "max_steps": "--trainer.max_steps",
    "max_grad_norm": "--trainer.gradient_clip_val",
    "bf16": "--trainer.precision=bf16-mixed",
    "fp16": "--trainer.precision=16-mixed",
    "dtype": "--model.options.dtype",
    "torch_dtype": "--model.options.dtype",
    "gradient_checkpointing": "--model.options.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "--model.options.gradient_checkpointing",
    "attn_implementation": "--model.options.attn_implementation",
    "trust_remote_code": "--model.options.trust_remote_code",
    "seed": "--seed_everything",
    "data_seed": "--data.seed",
    "logging_steps": "--trainer.log_every_n_steps",
    "report_to": _LOGGER,
    "run_name": _LOGGER,
    "eval_strategy": _VALIDATION,
    "evaluation_strategy": _VALIDATION,
    "eval_steps": _VALIDATION,
    "per_device_eval_batch_size": "--model.options.scoring_batch_tokens",
    "eval_batch_size": "--model.options.scoring_batch_tokens",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.mode=max",
    "early_stopping_patience": "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss",
    "save_strategy": _CHECKPOINTS,
    "save_steps": _CHECKPOINTS,
    "save_total_limit": "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.save_top_k",
    "resume_from_checkpoint": _CONTINUES,
    "overwrite_output_dir": _CONTINUES,
    "use_cpu": "--trainer.accelerator=cpu",
    "device": "--trainer.accelerator",
    "ddp_timeout": "--trainer.strategy",
    "deepspeed": f"{_STRATEGY}; DeepSpeed was never run here",
    "fsdp": _STRATEGY,
    "fsdp_config": _STRATEGY,
    "num_processes": "--trainer.devices",
    "disable_tqdm": "--trainer.enable_progress_bar=false",
    "group_by_length": "--data.batching.length_window",
    "train_sampling_strategy": "--data.batching.length_window",
    "dataloader_num_workers": _WORKERS,
    "remove_unused_columns": ": rewards read the columns that they name",
    "use_liger_kernel": ": the output head is never computed for prompts, docs/speed.md",
    "torch_compile": _COMPILE,
    "neftune_noise_alpha": _NONE,
    "push_to_hub": _EXPORT,
    "hub_model_id": _EXPORT,
    # TRL's ScriptArguments and ModelConfig
    "dataset_name": _ROWS,
    "dataset_config": "--data.prompts.path.name",
    "dataset_train_split": "--data.prompts.split",
    "dataset_test_split": "--data.heldout.split",
    "dataset_streaming": "--data.prompts.path.streaming",
    "train_dataset": _ROWS,
    "eval_dataset": _HELD_OUT,
    "model_revision": ": --model.policy takes a folder or a Hub id, without revision",
    "use_peft": "--model.lora.r=16",
    "peft_config": "--model.lora",
    "lora_r": "--model.lora.r",
    "lora_alpha": "--model.lora.alpha",
    "lora_dropout": "--model.lora.dropout",
    "lora_target_modules": "--model.lora.target_modules",
    "lora_modules_to_save": _PEFT,
    "lora_target_parameters": _PEFT,
    "use_rslora": _PEFT,
    "use_dora": _PEFT,
    "load_in_4bit": _QUANTIZATION,
    "load_in_8bit": f"{_QUANTIZATION}; 8 bits are refused",
    "bnb_4bit_quant_type": _QUANTIZATION,
    "use_bnb_nested_quant": _QUANTIZATION,
    # TRL's DPOConfig, KTOConfig, RewardConfig, SFTConfig
    "beta": "--model.beta",
    "loss_type": "--model.loss in preference learning, --model.aggregation in SFT, --model.loss.aggregation in GRPO",
    "label_smoothing": "--model.loss=CDPOLoss --model.loss.label_smoothing",
    "discopop_tau": "--model.loss=DiscoPOPLoss --model.loss.tau",
    "loss_weights": "--model.loss=NLLTermLoss --model.loss.weight",
    "f_divergence_type": ": the divergence is the reverse KL; --model.loss=ChiPOLoss has another regularizer",
    "f_alpha_divergence_coef": ": the divergence is the reverse KL; --model.loss=ChiPOLoss has another regularizer",
    "ld_alpha": ": LD-DPO is not here; --model.loss=LNDPOLoss and SimPOLoss normalize by length",
    "use_weighting": ": WPO is not here",
    "precompute_ref_log_probs": ": the reference is always computed ahead (--data.rounds.reference_logps)",
    "precompute_ref_batch_size": "--model.options.scoring_batch_tokens",
    "ref_model": ": the reference is --model.policy as loaded; other weights to start from are --model.start",
    "sync_ref_model": _REFERENCE_UPDATE,
    "ref_model_mixup_alpha": _REFERENCE_UPDATE,
    "ref_model_sync_steps": _REFERENCE_UPDATE,
    "max_length": _LIMITS,
    "max_prompt_length": "--data.prompt_options.max_prompt_tokens",
    "truncation_mode": "--data.prompt_options.on_long_prompt",
    "disable_dropout": "--model.options.disable_dropout",
    "model_init_kwargs": _LOADING,
    "padding_free": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "pad_token": _PACKED,
    "eos_token": f": it is that of the tokenizer, or the end of turn of {_TEMPLATE}",
    "dataset_num_proc": _WORKERS,
    "dataset_kwargs": _WORKERS,
    "activation_offloading": _NONE,
    "router_aux_loss_coef": _NONE,
    "desirable_weight": "--model.desirable_weight, with --config kto",
    "undesirable_weight": "--model.undesirable_weight, with --config kto",
    "center_rewards_coefficient": "--model.loss.center_coefficient, with --config reward_model",
    "chat_template_path": _TEMPLATE,
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "eval_packing": _PACKED,
    "completion_only_loss": ": prompts never carry loss",
    "assistant_only_loss": _TURNS,
    "dataset_text_field": ": rows with a text alone are not read: give 'prompt' and 'completion', or 'messages'",
    "shuffle_dataset": ": rows are always shuffled, by --data.seed",
    # TRL's GRPOConfig, RLOOConfig and OnlineDPOConfig
    "num_generations": "--data.responses_per_prompt",
    "num_generations_eval": ": one answer per held-out prompt",
    "max_completion_length": "--data.decoding.max_new_tokens",
    "max_new_tokens": "--data.decoding.max_new_tokens",
    "temperature": "--data.decoding.temperature",
    "top_p": "--data.decoding.top_p, not in reinforcement learning",
    "top_k": _NONE,
    "min_p": _NONE,
    "repetition_penalty": _NONE,
    "generation_kwargs": "--data.decoding",
    "cache_implementation": _NONE,
    "generation_batch_size": "--data.rounds.prompts_per_round, --data.prompts_per_batch",
    "steps_per_generation": "--data.rounds.prompts_per_round, --data.prompts_per_batch",
    "num_iterations": "--data.rounds.epochs_per_round",
    "use_bias_correction_kl": "--model.kl.placement",
    "epsilon": "--model.loss.clip",
    "epsilon_high": f"{_NONE}; --model.loss.clip is one number",
    "delta": _NONE,
    "importance_sampling_level": ": ratios are those of tokens",
    "scale_rewards": "--model.advantage=GRPO --model.advantage.divide_by_std",
    "normalize_advantages": "--model.loss.whiten_advantages",
    "reward_funcs": "--data.reward=FunctionReward --data.reward.function=my_file.my_function",
    "reward_weights": "--data.reward=WeightedReward, --data.reward.weights",
    "multi_objective_aggregation": "--data.reward=WeightedReward, --data.reward.standardize",
    "reward_clip_range": ": --data.shaping.normalize_rewards scales rewards",
    "reward_model_path": "--data.reward=RewardModelReward --data.reward.path; in online DPO behind --data.labeler",
    "mask_truncated_completions": "--data.shaping.missing_eos_penalty",
    "missing_eos_penalty": "--data.shaping.missing_eos_penalty, in reinforcement learning",
    "off_policy_mask_threshold": _NONE,
    "max_tool_calling_iterations": _NONE,
    "use_vllm": _VLLM,
    "use_transformers_paged": "--data.decoding.rows",
    "use_transformers_continuous_batching": "--data.decoding.rows",
    "transformers_continuous_batching_config": "--data.decoding.rows",
    "chat_template_kwargs": ": a column of the rows with this name reaches the chat template",
    "ds3_gather_for_generation": ": weights are gathered once per round under --config trainer/fsdp",
    "cast_lm_head_to_fp32": ": the log-softmax is in float32 in any case",
    "log_completions": "--trainer.callbacks+=CompletionsTable or RolloutMonitor",
    "num_completions_to_print": "--trainer.callbacks+=CompletionsTable or RolloutMonitor",
    # TRL's PPOConfig
    "kl_coef": "--model.beta",
    "cliprange": "--model.loss.clip",
    "cliprange_value": "--model.value.clip",
    "vf_coef": "--model.value.coefficient",
    "num_ppo_epochs": "--data.rounds.epochs_per_round",
    # LLaMA-Factory
    "stage": "--config dpo_offline, kto, reward_model, sft or rlhf",
    "finetuning_type": "--model.lora.r=16 for LoRA",
    "template": _TEMPLATE,
    "dataset": _ROWS,
    "dataset_dir": _ROWS,
    "eval_dataset_path": _HELD_OUT,
    "cutoff_len": _LIMITS,
    "max_samples": "--data.prompts.limit",
    "val_size": "--data.prompts.part=train --data.heldout.part=heldout",
    "pref_beta": "--model.beta",
    "pref_loss": "--model.loss",
    "pref_ftx": "--model.loss=NLLTermLoss --model.loss.weight",
    "dpo_label_smoothing": "--model.loss=CDPOLoss --model.loss.label_smoothing",
    "simpo_gamma": "--model.loss=SimPOLoss --model.loss.gamma",
    "kto_chosen_weight": "--model.desirable_weight, with --config kto",
    "kto_rejected_weight": "--model.undesirable_weight, with --config kto",
    "ppo_epochs": "--data.rounds.epochs_per_round",
    "lora_rank": "--model.lora.r",
    "rank": "--model.lora.r",
    "lora_target": "--model.lora.target_modules",
    "additional_target": _PEFT,
    "adapter_name_or_path": "--model.lora.adapter",
    "reward_model": "--data.reward=RewardModelReward --data.reward.path",
    "quantization_bit": _QUANTIZATION,
    "flash_attn": "--model.options.attn_implementation",
    "mask_history": _TURNS,
    "interleave_probs": "--data.prompts=MixedPrompts --data.prompts.weights",
    "export_dir": ": lightning-rlhf export --checkpoint=RUN --out=FOLDER",
    "preprocessing_num_workers": _WORKERS,
    "plot_loss": ": metrics are in metrics/ and tensorboard/ of the run folder",
    # Axolotl
    "base_model": "--model.policy (a reward model: --model.backbone)",
    "datasets": f"{_ROWS}, or several with --data.prompts=MixedPrompts",
    "test_datasets": _HELD_OUT,
    "val_set_size": "--data.prompts.part=train --data.heldout.part=heldout",
    "sequence_len": _LIMITS,
    "sample_packing": _PACKED,
    "micro_batch_size": _STEP,
    "num_epochs": "--trainer.max_epochs",
    "epochs": "--trainer.max_epochs",
    "optimizer": "--model.optimizer",
    "lr": "--model.optimizer.lr",
    "lr_scheduler": _SCHEDULE,
    "adapter": "--model.lora.r=16 for LoRA",
    "lora_model_dir": "--model.lora.adapter",
    "lora_target_linear": "--model.lora.target_modules=all-linear",
    "peft_use_dora": _PEFT,
    "peft_use_rslora": _PEFT,
    "merge_lora": _MERGED,
    "rl": "--config dpo_offline, kto or gsm8k_grpo",
    "rl_beta": "--model.beta",
    "dpo_beta": "--model.beta",
    "flash_attention": "--model.options.attn_implementation",
    "wandb_project": "--trainer.logger=WandbLogger --trainer.logger.project",
    "wandb_name": _LOGGER,
    "evals_per_epoch": _VALIDATION,
    "saves_per_epoch": _CHECKPOINTS,
    "auto_resume_from_checkpoints": _CONTINUES,
    "train_on_inputs": ": prompts never carry loss",
    # ours, without their section
    "policy": "--model.policy",
    "loss": "--model.loss",
    "lora": "--model.lora.r=16",
    "prompts": "--data.prompts",
    "heldout": "--data.heldout",
    "sampler": "--data.sampler",
    "labeler": "--data.labeler",
    "reward": "--data.reward",
    "precision": "--trainer.precision",
    "max_epochs": "--trainer.max_epochs",
    "devices": "--trainer.devices",
}
"""A setting of another library -> our settings, or, after a colon, the reason why there is none."""

_NO_COUNTERPART = ("entropy_", "top_entropy", "sapo_", "vespo_", "use_adaptive_entropy", "log_", "hub_")

CLASSES = {
    "sigmoid": "DPOLoss",
    "dpo": "DPOLoss",
    "sigmoid_norm": "LNDPOLoss",
    "exo_pair": "EXOLoss",
    "nca_pair": "NCALoss",
    "bco_pair": "BCOLoss",
    "sppo_hard": "SPPOLoss",
    "apo_zero": "APOZeroLoss",
    "apo_down": "APODownLoss",
    "sft": "NLLLoss",
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_hf": "AdamW",
    "constant": "ConstantWithWarmup",
    "cosine": "CosineWithWarmup",
    "linear": "LinearWithWarmup",
    "warmup_stable_decay": "WarmupStableDecay",
    "wandb": "WandbLogger",
    "best_of_n": "BestOfNSampler",
    "ppo": "GAE",
    "reinforce": "LearnedBaseline",
    "llm": "LLMLabeler",
    "model": "RewardModelReward",
}
"""A value of another library -> our class."""

COMMANDS = {
    "train": "fit",
    "dpo": "fit --config dpo_offline",
    "kto": "fit --config kto",
    "sft": "fit --config sft",
    "reward": "fit --config reward_model",
    "rm": "fit --config reward_model",
    "grpo": "fit --config gsm8k_grpo",
    "rloo": "fit --config rlhf --model.advantage=RLOO",
    "ppo": "fit --config rlhf --model.advantage=GAE",
    "eval": "evaluate",
    "test": "validate",
    "generate": "sample",
    "predict": "sample",
    "merge": "export",
    "merge-lora": "export",
}
"""A command of another library -> ours."""


def our_setting(name: str, misspelt: bool = False) -> str | None:
    """The end of a message about a setting that does not exist: our name for it; None if it is not known elsewhere.

    Args:
        name: the setting as it was given, with or without dashes and section.
        misspelt: also find a name of another library that is nearly this one.
    """
    leaf = name.lstrip("-").rpartition(".")[2].replace("-", "_")
    if leaf not in SETTINGS and leaf.startswith("vllm_"):
        return f": the only setting of vLLM is {_VLLM}"
    if leaf not in SETTINGS and leaf.startswith(_NO_COUNTERPART):
        return _NONE
    near = difflib.get_close_matches(leaf, SETTINGS, n=1, cutoff=0.88) if misspelt else [leaf]
    found = SETTINGS.get(near[0]) if near else None
    if found is None:
        return None
    return found if found.startswith(":") else f"; here it is {found}"

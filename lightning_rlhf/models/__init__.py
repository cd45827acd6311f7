"""The policy and its frozen reference: loading, saving, merging."""

from lightning_rlhf.models.load import (
    AdapterSettings,
    LoRA,
    context_window,
    end_of_sequence_ids,
    load_policy,
    load_tokenizer,
    resolve_checkpoint,
    save_policy,
)
from lightning_rlhf.models.reference import (
    AbstractReference,
    AdapterOffReference,
    AdapterSnapshotReference,
    FrozenCopyReference,
    build_reference,
)
from lightning_rlhf.models.save import merged_state_dict


__all__ = [
    "AbstractReference",
    "AdapterOffReference",
    "AdapterSettings",
    "AdapterSnapshotReference",
    "FrozenCopyReference",
    "LoRA",
    "build_reference",
    "context_window",
    "end_of_sequence_ids",
    "load_policy",
    "load_tokenizer",
    "merged_state_dict",
    "resolve_checkpoint",
    "save_policy",
]

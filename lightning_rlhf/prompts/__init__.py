"""Sources of prompts, and of recorded pairs of completions.

A source parses its data into `PromptRow`, plain or conversational, with or without completions; `tokenize_rows` turns
rows into `Prompt`, which samplers and labelers use. `DatasetPrompts` reads TRL's row formats from files, folders and
the Hub, `DatasetCompletions` those of supervised fine-tuning, `DatasetUnpaired` single responses with labels,
`HHPrompts` Human/Assistant transcripts, `LedgerPrompts` the pairs of another run, `MixedPrompts` several of these in
shares, `MixedPairs` recorded pairs of several labelers, `TemplatePrompts` fills in templates, and `BuiltinPrompts`
needs no data at all.
`text_prompts` makes prompts of rows where no policy is involved. To plug in your own, subclass `AbstractPromptSource`.
Rows that are left out on purpose are counted by reason; malformed rows raise an error that names them.
"""

from __future__ import annotations

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.builtin import BuiltinPrompts
from lightning_rlhf.prompts.completions import DatasetCompletions
from lightning_rlhf.prompts.dataset import DatasetPrompts
from lightning_rlhf.prompts.files import DatasetFiles
from lightning_rlhf.prompts.hh import HHPrompts
from lightning_rlhf.prompts.judged import ArgillaPrompts, HelpSteerPrompts, LabelStudioPrompts, RewardBenchPrompts
from lightning_rlhf.prompts.ledger import LedgerPrompts
from lightning_rlhf.prompts.mixed_pairs import MixedPairs
from lightning_rlhf.prompts.mixture import MixedPrompts
from lightning_rlhf.prompts.principles import PrincipledPrompts
from lightning_rlhf.prompts.templates import TemplatePrompts
from lightning_rlhf.prompts.text import text_prompts
from lightning_rlhf.prompts.tokenize import CHAT_TEMPLATES, tokenize_rows
from lightning_rlhf.prompts.unpaired import DatasetUnpaired


__all__ = [
    "CHAT_TEMPLATES",
    "AbstractPromptSource",
    "ArgillaPrompts",
    "BuiltinPrompts",
    "DatasetCompletions",
    "DatasetFiles",
    "DatasetPrompts",
    "DatasetUnpaired",
    "HHPrompts",
    "HelpSteerPrompts",
    "LabelStudioPrompts",
    "LedgerPrompts",
    "MixedPairs",
    "MixedPrompts",
    "PrincipledPrompts",
    "RewardBenchPrompts",
    "TemplatePrompts",
    "text_prompts",
    "tokenize_rows",
]

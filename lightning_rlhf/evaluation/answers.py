"""Responses of a policy to prompts: sampled once and kept, or recorded elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from transformers import PreTrainedModel

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.models.cache import file_digest
from lightning_rlhf.models.load import (
    context_window,
    end_of_sequence_ids,
    load_policy,
    load_tokenizer,
    resolve_checkpoint,
)
from lightning_rlhf.models.pretrained import required_config
from lightning_rlhf.models.reference import FrozenCopyReference
from lightning_rlhf.prompts.files import SUFFIXES, read_rows
from lightning_rlhf.prompts.messages import parse_completion, parse_prompt, turn_text
from lightning_rlhf.prompts.text import text_response
from lightning_rlhf.prompts.tokenize import CHAT_TEMPLATES, tokenize_rows
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import FinishReason, Message, PromptRow, Response


RECORDED = ("chosen", "rejected")
"""Names of the answers that come with preference rows."""

ANSWER_COLUMNS = ("response", "completion", "answer")
"""Names of the answer's column in a file of answers; the first that is there counts."""


Row = dict[str, Any]
"""A row of a JSONL file."""


class ProgressBar(Protocol):
    """A progress bar, as of tqdm."""

    def update(self, n: float = 1) -> object:
        """Move it by a number of items."""


class RowLog:
    """A JSONL file of rows with an ``index``, appended to chunk by chunk; a row that a kill cuts off is removed.

    Args:
        path: the file; created with its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, Row]:
        """The whole rows, by index; an unfinished last line is removed from the file."""
        # nothing is answered yet
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        # a kill has cut the last line; the next append must begin a new one
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["index"]: row for row in rows}

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows; they are on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            # rows cost money or time: they survive a power loss
            os.fsync(file.fileno())


def to_row(index: int, row: PromptRow, response: Response) -> Row:
    """The row of an answer in a log; a file of such rows is one of recorded answers.

    ``log_ratio`` is log pi - log pi_ref of the answer in nats, where there is a reference.
    """
    ratio = {} if response.reference_logps is None else {"log_ratio": response.log_ratio()}
    return ratio | {
        "index": index,
        "prompt": row.text if row.messages is None else list(row.messages),
        "response": response.text,
        "finish_reason": response.finish_reason,
        "tokens": len(response.ids),
    }


def from_row(row: Row, source: str) -> Response:
    """The answer in a row; its ids are its bytes, as judges and rewards read texts."""
    finish: FinishReason = row["finish_reason"]
    return replace(text_response(row["response"], source), finish_reason=finish)


@dataclass(frozen=True)
class PolicyOptions:
    """How the policies of an evaluation are loaded and prompted.

    Args:
        dtype: data type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where the policies run: ``cpu``, ``cuda``; default: a GPU if there is one.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; default: the tokenizer's own.
        on_long_prompt: ``error`` stops, ``truncate`` keeps the end of the prompt.
        trust_remote_code: run code that comes with a checkpoint.
    """

    dtype: str = "float32"
    device: str | None = None
    chat_template: str | None = None
    on_long_prompt: Literal["error", "truncate"] = "error"
    trust_remote_code: bool = False


DEFAULT_POLICY_OPTIONS = PolicyOptions()


class ResponseGenerator:
    """Generates the responses of policies with the engine of this library.

    Args:
        decoding: length limit, temperature and top-p.
        key: key of the policy's random numbers; the index of the prompt is folded in.
        options: how the policies are loaded and prompted.
        reference: policy whose log-probabilities of the responses are noted too; it must have the same vocabulary.
    """

    def __init__(
        self,
        decoding: Decoding,
        key: Key,
        options: PolicyOptions = DEFAULT_POLICY_OPTIONS,
        reference: str | None = None,
    ) -> None:
        self.decoding, self.key, self.options, self.reference = decoding, key, options, reference
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.chat_template = CHAT_TEMPLATES.get(options.chat_template or "", options.chat_template)

    def complete(
        self,
        checkpoint: str,
        rows: Sequence[PromptRow],
        log: RowLog,
        progress: Callable[[str, int], AbstractContextManager[ProgressBar]],
    ) -> None:
        """Generate the answers that a log does not hold yet; the model is loaded if there are any.

        Args:
            checkpoint: the policy, as `lightning_rlhf.models.load.resolve_checkpoint` takes it.
            rows: the prompts.
            log: where answers go, chunk by chunk.
            progress: makes a progress bar of a description and a total.

        Raises:
            ValueError: if a prompt does not fit into the policy's window, or needs a chat template that it has not.
        """
        held = log.read()
        missing = [index for index in range(len(rows)) if index not in held]
        # the model is not loaded for nothing
        if not missing:
            return
        tokenizer = load_tokenizer(checkpoint, self.chat_template, self.options.trust_remote_code)
        # rows are checked before the model is loaded
        source = resolve_checkpoint(checkpoint, trust_remote_code=self.options.trust_remote_code)
        window = context_window(required_config(source, checkpoint, self.options.trust_remote_code))
        prompts, _ = tokenize_rows(
            # recorded answers need no tokens: the policy answers anew
            [replace(row, pair=None, answers=(), finish_reasons=()) for row in rows],
            tokenizer,
            # prompt + response <= window
            max_prompt_tokens=1_000_000 if window is None else window - self.decoding.max_new_tokens,
            max_response_tokens=self.decoding.max_new_tokens,
            on_long_prompt=self.options.on_long_prompt,
        )
        model = self._load(checkpoint)
        engine = DecodeEngine(
            model,
            None if self.reference is None else FrozenCopyReference(self._load(self.reference)),
            tokenizer,
            # only samplers read beta, and requests without a mix sample the policy itself
            beta=1.0,
            decoding=self.decoding,
            eos_ids=end_of_sequence_ids(model, tokenizer),
        )
        with progress(f"{checkpoint}: answering", len(missing)) as bar, torch.inference_mode():
            # several batches per chunk: finished rows make room for more; a stop loses one chunk at most
            for part in in_chunks(missing, 4 * self.decoding.rows):
                # a key per prompt, so that chunks do not change the samples
                requests = [Request(prompts[i], self.key.fold(i)) for i in part]
                responses = engine.generate(requests, reference_logps=self.reference is not None)
                log.append([to_row(i, rows[i], response) for i, response in zip(part, responses, strict=True)])
                bar.update(len(part))

    def _load(self, checkpoint: str) -> PreTrainedModel:
        loaded = load_policy(checkpoint, dtype=self.options.dtype, trust_remote_code=self.options.trust_remote_code)
        # the engine puts it into eval mode
        model = cast(PreTrainedModel, loaded).requires_grad_(False)
        model.to(torch.device(self.device))  # type: ignore[arg-type]
        return model


def in_chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Pieces of a list, in order, of ``size`` at most."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def is_file_of_answers(name: str) -> bool:
    """Whether the name of a policy is that of a file with recorded answers."""
    return name.lower().endswith(SUFFIXES)


def recorded_answers(name: str, rows: Sequence[PromptRow], source: str) -> list[Response]:
    """Answers that somebody has given before: those in the rows themselves, or those of a file, by prompt.

    Args:
        name: ``chosen`` or ``rejected``, for those of the rows; or a file whose rows have ``prompt`` and one of
            ``response``, ``completion`` and ``answer``.
        rows: the prompts.
        source: value of `Response.source`.

    Raises:
        ValueError: if a prompt has no answer.
    """
    if name in RECORDED:
        for row in rows:
            if row.pair is None or row.is_single:
                raise ValueError(f"{row.source}: has no {name!r} response to compare with; give preference rows")
        return [text_response(getattr(row.pair, name), source) for row in rows]
    answers: dict[str, str] = {}
    for where, given in read_rows(name):
        column = next((c for c in ANSWER_COLUMNS if c in given), None)
        # the row would be read as an empty answer
        if column is None or "prompt" not in given:
            columns = f"expected 'prompt' and one of {', '.join(ANSWER_COLUMNS)}; got {sorted(given)}"
            raise ValueError(f"{where}: {columns}: rename the columns")
        asked = parse_prompt(given["prompt"], where, "prompt")
        # the first of several answers to one prompt counts
        answers.setdefault(_named(asked), parse_completion(given[column], asked, where, column))
    found = []
    for row in rows:
        prompt = row.messages if row.messages is not None else row.text or ""
        # a text and a conversation of one turn are the same question
        names = [_named(prompt)]
        if not isinstance(prompt, str) and len(prompt) == 1:
            names.append(_named(turn_text(prompt[0])))
        text = next((answers[name] for name in names if name in answers), None)
        # comparing fewer prompts than asked for would bias the rates
        if text is None:
            raise ValueError(f"{name}: has no answer to the prompt of {row.source}; give a row for every prompt")
        found.append(text_response(text, source))
    return found


def _named(prompt: str | Sequence[Message]) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def identity(name: str) -> str:
    """Identity of a policy: its name, and the content of its files, so that it changes with further training."""
    if name in RECORDED:
        return name
    source = Path(name) if is_file_of_answers(name) else resolve_checkpoint(name)
    # of a Hub id the name is the identity
    if not isinstance(source, Path):
        return name
    files = [source] if source.is_file() else sorted([*source.glob("*.safetensors"), *source.glob("config.json")])
    # a folder without weights would have the digest of nothing
    if not files:
        raise FileNotFoundError(f"{name}: no such file, or a folder without safetensors")
    digest = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
    return f"{name} {digest[:16]}"


def identified(settings: object) -> object:
    """Settings in which folders of models are named with their content, for judges and rewards are models too."""
    if isinstance(settings, dict):
        return {name: identified(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [identified(value) for value in settings]
    return identity(settings) if isinstance(settings, str) and _is_folder_of_weights(settings) else settings


def _is_folder_of_weights(setting: str) -> bool:
    """Whether a setting is the path of a local model; most strings, such as templates and preambles, are no path."""
    try:
        # an empty string would be the working folder
        return bool(setting) and any(Path(setting).expanduser().glob("*.safetensors"))
    # too long for a path, a null byte, or the home folder of nobody
    except (OSError, RuntimeError, ValueError):
        return False

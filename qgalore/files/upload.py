"""An exported folder sent to the Hugging Face Hub, for a user who is logged in there."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError


@dataclass(frozen=True)
class Destination:
    """A repository for a model: its full id, and who sees it. ``exists`` is False for one that is still to be made,
    which will be private."""

    repo: str
    exists: bool
    private: bool

    def __str__(self) -> str:
        if not self.exists:
            return f"{self.repo}, which will be made, private"
        return f"{self.repo}, which is there and is {'private' if self.private else 'public: everybody will see it'}"


def destination(name: str, asked: str) -> Destination:
    """Where ``name``, USER/NAME or a NAME of one's own, can be uploaded to. ``asked`` is how a message calls the wish.

    Raises :class:`ConfigError` if nobody is logged in, the name is none, the hub cannot be reached, or its token may
    only read.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"{asked}: {name!r} is no name of a repository. Give a name, or USER/NAME, of letters, digits and . - _"
        ) from error
    if get_token() is None:
        raise ConfigError(
            f"{asked} uploads to the Hugging Face Hub, and nobody is logged in here. Run hf auth login, set HF_TOKEN, "
            "or leave the option out"
        )
    api = HfApi()
    try:
        known = api.whoami()
        repo = name if "/" in name else f"{known['name']}/{name}"
        role = known.get("auth", {}).get("accessToken", {}).get("role")
        found = _found(api, repo)
    except Exception as error:  # the hub, its client and the network raise dozens of types, all of one meaning here
        raise ConfigError(
            f"{asked}: the hub does not answer as it must: {_said(error)}. Log in anew with hf auth login, look at the "
            "network and at HF_HUB_OFFLINE, or leave the option out"
        ) from error
    if role == "read":
        raise ConfigError(f"{asked}: the token may only read. Log in with one that may write: hf auth login")
    return found


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _found(api: HfApi, repo: str) -> Destination:
    try:
        return Destination(repo, exists=True, private=bool(api.model_info(repo).private))
    except RepositoryNotFoundError:
        return Destination(repo, exists=False, private=True)


def upload(folder: Path, to: Destination) -> str:
    """Send all of ``folder`` as one commit; returns the repository's address. Raises :class:`ConfigError`."""
    api = HfApi()
    try:
        if not to.exists:
            api.create_repo(to.repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=to.repo, folder_path=folder, commit_message="Upload an export of qgalore")
    except Exception as error:  # as above
        raise ConfigError(
            f"the upload to {to.repo} failed: {_said(error)}. The export in {folder} is whole; send it later with hf "
            f"upload {to.repo} {folder}"
        ) from error
    return f"{api.endpoint}/{to.repo}"

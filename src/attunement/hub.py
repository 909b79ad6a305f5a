"""Adapters on the Hugging Face hub: `push` puts one there with a card, `snapshot` brings the files of one here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from attunement.card import WRITTEN, card
from attunement.errors import AttunementError
from attunement.storage import DESCRIPTION, TENSORS, save

if TYPE_CHECKING:
    from attunement.adapter import Adapter

FILES = (TENSORS, DESCRIPTION, "adapter_config.json", "adapter_model.safetensors")


def push(
    adapter: Adapter,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an adapter and its card to the hub, the repository and the branch made where there are none.

    See `Adapter.push`.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    _check(repository, revision, "push")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        save(adapter, folder)
        if not (folder / DESCRIPTION).exists():
            return repository  # of several processes that hold shards, one writes
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        api = huggingface_hub.HfApi(token=token)
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            if private and api.model_info(repository).private is False:
                raise AttunementError("there is one already, and it is public")
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            try:
                there = api.hf_hub_download(
                    repository, "README.md", revision=revision, local_dir=Path(temporary) / "card"
                )
                own = WRITTEN not in Path(there).read_text(encoding="utf-8")
            except EntryNotFoundError:
                own = False
            if not own:
                text = card(described, address.repo_id, license)
                (folder / "README.md").write_text(text, encoding="utf-8")
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Adapter {adapter.name}",
            )
        except Exception as error:
            raise AttunementError(f"push: {repository!r} could not be written: {_cause(error)}") from error
    return str(address)


def snapshot(repository: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder, in the hub's cache, with the files of an adapter at one commit.

    Raises:
        AttunementError: no such repository or revision, no right to read it, or no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    _check(repository, revision, "load")
    try:
        folder = Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=list(FILES)))
    except Exception as error:
        raise AttunementError(
            f"load: {repository!r} is no folder here and could not be had from the hub: {_cause(error)}"
        ) from error
    if not any((folder / file).exists() for file in FILES):
        raise AttunementError(f"load: {repository!r} on the hub holds no adapter: expected {TENSORS} at its top")
    return folder


def _check(repository: str, revision: str | None, where: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise AttunementError(f"{where}: {repository!r} is no address on the hub: {_cause(error)}") from None
    parts = ("main" if revision is None else revision).split("/")
    if "" in parts or ".." in parts or any(part.startswith("-") for part in parts):  # it names files in the cache
        raise AttunementError(f"{where}: {revision!r} is no branch, tag or commit")


def _cause(error: Exception) -> str:
    from huggingface_hub import errors

    kinds = {
        errors.GatedRepoError: "it is gated, and the token that was given has no access",
        errors.RepositoryNotFoundError: "there is none of that name, or it is private and no token that may read it was given",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.LocalEntryNotFoundError: "there is no network, and the cache has no copy",
    }
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled"):
        return "there is no network, or HF_HUB_OFFLINE is set"
    known = next((text for kind, text in kinds.items() if isinstance(error, kind)), None)
    return known or (str(error).strip().splitlines() or [type(error).__name__])[0]

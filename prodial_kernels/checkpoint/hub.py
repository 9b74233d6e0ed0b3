"""Adapters on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from prodial_kernels.checkpoint.adapter import save_adapter
from prodial_kernels.checkpoint.card import CARD_FILE
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE
from prodial_kernels.upstream import require_extra

_FILES = (CONFIG_FILE, TENSOR_FILE, CARD_FILE)


def push_adapter(
    model: nn.Module,
    repo_id: str,
    *,
    adapter: str | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> str:
    """Upload an adapter with its card; the repository is made if it is not there.

    Args:
        model: As for :func:`save_adapter`, like ``adapter`` and ``base_model``.
        repo_id: ``NAME`` or ``OWNER/NAME``.
        adapter: See ``model``.
        base_model: See ``model``.
        private: Of a repository that is made; default: the owner's default.
        token: Of the hub; default: the one that is logged in.
        revision: Branch to commit to.
        commit_message: Of the commit.
        create_pr: Whether to open a pull request instead of committing.

    Returns:
        The commit's address.

    Raises:
        AdapterError: As for :func:`save_adapter`, before anything is sent.
        MissingExtraError: huggingface_hub is not installed.
    """
    api = _hub(token)
    with TemporaryDirectory() as folder:
        save_adapter(model, folder, adapter=adapter, base_model=base_model)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(_FILES),
                revision=revision, commit_message=commit_message, create_pr=create_pr,
            )
        )  # fmt: skip


def fetch_adapter(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Download an adapter of the hub; return its directory, for :func:`load_adapter`.

    Args:
        repo_id: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        token: As in :func:`push_adapter`.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
    """
    return Path(
        _hub(token).snapshot_download(repo_id, revision=revision, allow_patterns=list(_FILES))
    )


def _hub(token: str | bool | None) -> Any:
    require_extra("adapters on the hub", ("huggingface_hub",))
    import huggingface_hub

    return huggingface_hub.HfApi(token=token)

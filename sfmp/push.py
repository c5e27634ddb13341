"""A checkpoint folder on the Hugging Face Hub, complete with the card that says what it is.

``model.push_to_hub`` of transformers works too, but it replaces the card by a template that names no base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfmp.checks import SfmpError

_EARLIER = ("model*.safetensors", "model.safetensors.index.json")  # else a loader may prefer those of an older upload


def push_checkpoint(folder, repository: str, *, results: Sequence[Mapping] = (), private: bool | None = None,
                    revision: str | None = None, message: str = "Upload a model quantized by sfmp",
                    token: str | None = None, endpoint: str | None = None) -> str:
    """Upload a checkpoint in one commit; nothing is uploaded unless this is called.

    Weight files (``model*.safetensors`` and their index) of an earlier upload that this one does not replace are
    removed in the same commit. Hidden files and ``*.tmp`` stay here.

    Parameters
    ----------
    folder : path of a checkpoint that `sfmp.hf.save_checkpoint` wrote
        Its card is written anew, with the results if any are given.
    repository : str
        ``owner/name``; made if it does not exist.
    results : sequence of mappings, optional
        See `sfmp.card.checked_results`. Without any, a card that is there stays as it is.
    private : bool, optional
        Of a new repository; the account's default if None.
    revision : str, optional
        Branch, made if it does not exist; main by default.
    message : str
        Of the commit.
    token, endpoint : str, optional
        What the Hugging Face client finds by itself (login, HF_TOKEN, HF_ENDPOINT) by default.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    SfmpError
        The folder is no checkpoint, the name is malformed, or the Hub refuses (with its reason).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    from sfmp.card import save_model_card
    from sfmp.inspection import read_checkpoint

    folder = Path(folder)
    read_checkpoint(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SfmpError(f"repository {repository!r}: expected OWNER/NAME, as on the Hub; correct it")
    if results or not (folder / "README.md").is_file():
        save_model_card(None, folder, results)
    api = HfApi(endpoint=endpoint, token=token, library_name="sfmp")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, revision=revision,
                                   ignore_patterns=[".*", "*/.*", "*.tmp"], delete_patterns=list(_EARLIER))
    except (HTTPError, ConnectionError, LocalTokenNotFoundError, ValueError) as error:  # ValueError: an invalid card
        reason = " ".join(str(error).split())
        raise SfmpError(f"{repository}: expected the Hub to take the upload, found: {reason}; log in with `hf auth "
                        "login`, and check the name, your rights, the card and the network") from error
    return commit.commit_url

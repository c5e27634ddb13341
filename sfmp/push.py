"""A checkpoint folder on the Hugging Face Hub, complete with the card that says what it is.

``model.push_to_hub`` of transformers works too, but it replaces the card by a template that names no base model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically

COMPANIONS = (  # what goes with weights, by file name
    "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.spm", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*")
_WEIGHTS = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_CARD = ("README.md", "*.png", "*.svg", "*.jpg")  # with the pictures it may show
_EARLIER = ("model*.safetensors", "model.safetensors.index.json")  # else a loader may prefer those of an older upload


def push_checkpoint(folder, repository: str, *, results: Sequence[Mapping] = (), private: bool | None = None,
                    revision: str | None = None, message: str = "Upload a model quantized by sfmp",
                    token: str | None = None, endpoint: str | None = None) -> str:
    """Upload a checkpoint in one commit; nothing is uploaded unless this is called.

    Uploaded are weights, configuration, tokenizer, licence, card and pictures, by name; a warning names the files that
    stay here, and folders do. Weight files (``model*.safetensors`` and their index) of an earlier upload that this one
    does not replace are removed in the same commit.

    Parameters
    ----------
    folder : path of a checkpoint that `sfmp.hf.save_checkpoint` wrote
        Its card is written anew: with the name of the repository, and the results if any are given. If nothing could
        be uploaded it is as it was.
    repository : str
        ``owner/name``; made if it does not exist.
    results : sequence of mappings, optional
        See `sfmp.card.checked_results`. Without any, a card that somebody wrote or that has results stays as it is.
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
    from sfmp.card import folder_card, save_model_card
    from sfmp.inspection import read_checkpoint

    folder = Path(folder)
    read_checkpoint(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SfmpError(f"repository {repository!r}: expected OWNER/NAME, as on the Hub; correct it")
    card = folder / "README.md"
    earlier = card.read_bytes() if card.is_file() else None
    if results or earlier is None or _but_place(card.read_text("utf-8")) == _but_place(folder_card(folder)):
        save_model_card(None, folder, results, repository)
    try:
        return _uploaded(folder, repository, private, revision, message, token, endpoint)
    except BaseException:  # the card would name a repository that does not hold this
        if earlier is None:
            card.unlink()
        else:
            write_atomically(card, lambda temporary: temporary.write_bytes(earlier))
        raise


def _uploaded(folder, repository, private, revision, message, token, endpoint):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    taken = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
             and any(fnmatch(path.name, pattern) for pattern in (*_WEIGHTS, *COMPANIONS, *_CARD))]
    if left := sorted(path.name for path in folder.iterdir() if path.name not in taken):
        warnings.warn(f"{folder}: not uploaded, because no part of a checkpoint: {', '.join(left)}", stacklevel=3)
    api = HfApi(endpoint=endpoint, token=token, library_name="sfmp")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, revision=revision,
                                   allow_patterns=[escape(name) for name in taken], delete_patterns=list(_EARLIER))
    except (HTTPError, ConnectionError, LocalTokenNotFoundError, ValueError) as error:  # ValueError: an invalid card
        reason = " ".join(str(error).split())
        raise SfmpError(f"{repository}: expected the Hub to take the upload, found: {reason}; log in with `hf auth "
                        "login`, and check the name, your rights, the card and the network") from error
    return commit.commit_url


def _but_place(card):
    """A card without what it loads the model from: this folder, or a repository that it was pushed to."""
    return re.sub(r'from_pretrained\("[^"]*"\)', "", card)

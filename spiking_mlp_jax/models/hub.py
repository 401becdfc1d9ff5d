"""Networks of the Hugging Face Hub: from the local cache, and from the network only when asked."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import SUMS, verify

# All that is downloaded: data and text, nothing that could be executed.
FILES = ("model.safetensors", "config.json", "README.md", SUMS)
INSTALL = "pip install 'spiking-mlp-jax[hub]'"


def is_repo(where: str) -> bool:
    """Whether a name could be a repository of the Hub, OWNER/NAME.

    Examples:
        >>> is_repo("me/garments"), is_repo("garments"), is_repo("runs/demo/weights")
        (True, False, False)
    """
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", where, re.ASCII) is not None


def snapshot(repo: str, revision: str | None = None, download: bool = False) -> Path | None:
    """The cached weights folder of a repository on the Hub; None if it is not cached.

    The cache is that of huggingface_hub (`HF_HOME`), the server `HF_ENDPOINT`.

    Args:
        repo: OWNER/NAME.
        revision: branch, tag or commit; None: the main branch.
        download: fetch what is missing or outdated. Without it nothing is sent over the network, and the cached
            commit is taken.

    Raises:
        InputError: with `download`: huggingface_hub is not installed, the repository cannot be fetched, lacks weights,
            or its files do not match its SHA256SUMS.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        if not download:
            return None
        raise InputError(f"downloading {repo} needs huggingface_hub: {INSTALL}") from error

    def fetch(local: bool, again: bool = False) -> Path:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(FILES), local_files_only=local, force_download=again
            )
        )

    if not download:
        try:
            return fetch(local=True)
        except (LocalEntryNotFoundError, ValueError):
            return None
    try:
        folder = fetch(local=False)
        try:
            verify(folder, FILES[:2])
        except InputError:
            # The cached copy may be damaged; a second failure is the repository's.
            folder = fetch(local=False, again=True)
            verify(folder, FILES[:2])
    except InputError:
        raise
    except LocalEntryNotFoundError as error:
        server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise InputError(
            f"{repo} cannot be downloaded: {server} cannot be reached; check the connection, HF_ENDPOINT and "
            "HF_HUB_OFFLINE"
        ) from error
    # Server, authentication, disk: huggingface_hub and its HTTP client have no common base class.
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{repo} cannot be downloaded ({type(error).__name__}: {said})") from error
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{repo} on the Hub has no {missing[0]}: it is not a network of this package")
    return folder

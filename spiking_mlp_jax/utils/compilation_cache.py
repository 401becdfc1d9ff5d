"""Programs that stay compiled from one start to the next."""

from __future__ import annotations

import os

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import user_path


def use_compilation_cache(where: str) -> None:
    """Enable JAX's persistent compilation cache.

    Args:
        where: a folder; "auto": in the user's cache folder; "off": nothing is changed.

    Raises:
        InputError: the given folder cannot be made.
    """
    if where == "off":
        return
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = epath.Path(user_path(f"{cache}/spiking_mlp_jax/jax" if where == "auto" else where))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if where == "auto":
            return  # a home that cannot be written to only costs time
        raise InputError(
            f'compilation_cache "{folder}" cannot be made ({error.strerror}): name another folder'
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX settles at the first compilation whether there is a cache, and that may have been already.
    compilation_cache.reset_cache()

"""Programs that stay compiled from one start to the next."""

from __future__ import annotations

import os

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import user_path

_OPTION = "jax_compilation_cache_dir"
_ours: str | None = None  # the folder set here, as opposed to the user's


def use_compilation_cache(where: str) -> None:
    """Enable JAX's persistent compilation cache.

    Args:
        where: a folder; "auto": JAX's own setting (JAX_COMPILATION_CACHE_DIR) or else a folder in the user's cache;
            "off": nothing is changed.

    Raises:
        InputError: the given folder cannot be made.
    """
    global _ours
    if where == "off" or (where == "auto" and getattr(jax.config, _OPTION) not in (None, _ours)):
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
    _ours = str(folder)
    jax.config.update(_OPTION, _ours)
    # JAX settles at the first compilation whether there is a cache, and that may have been already.
    compilation_cache.reset_cache()

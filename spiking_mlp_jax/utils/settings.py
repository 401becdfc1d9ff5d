"""JAX's default settings, where the user has chosen stricter ones for their own code."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def usual_settings() -> Iterator[None]:
    """Within the block, or the function it decorates, JAX promotes types and ranks and copies arrays as by default.

    For other people's code (Optax) and for analyses; neurons, layers and networks run under the strict settings.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.transfer_guard("allow"):
        yield

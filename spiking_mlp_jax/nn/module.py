"""The base class of all layers."""

from __future__ import annotations

import inspect

from flax import nnx


class Module(nnx.Module):
    """An `nnx.Module` whose subclasses show the signature of their `__init__`.

    The metaclass of NNX hides it: `inspect.signature` and editors would show `(*args, **kwargs)`.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__)
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])

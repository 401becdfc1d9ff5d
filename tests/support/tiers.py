"""Two tiers of tests: a coffee break for `make test`, the rest for `make test-slow`."""

import pytest


def rest_slow(values, fast=1):
    """Values for `pytest.mark.parametrize`; all but the first `fast` of them are in the slow tier."""
    values = list(values)
    slow = [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow) for x in values[fast:]]
    return values[:fast] + slow

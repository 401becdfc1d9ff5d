"""Settings of the C library, in a process of their own."""

import platform
import subprocess
import sys

import pytest

from spiking_mlp_jax.utils import memory

CODE = """
import resource
import numpy as np
from spiking_mlp_jax.utils import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), memory.keep_freed_memory(), faults(), faults(), memory.return_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept_and_returned():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    default, keeps, _, kept, returns, returned = done.stdout.split()
    assert keeps == returns == "True"
    assert int(kept) < int(default) / 10 and int(returned) > int(default) / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_function", lambda name: None)
    assert memory.keep_freed_memory() is False and memory.return_freed_memory() is False

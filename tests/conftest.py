"""Eight virtual CPU devices, set before JAX starts; float64 where a test asks for it."""

import gc
import os

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Tests compile hundreds of tiny programs and run each a few times: compile fast, not fast code.
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"

# JAX keeps what it traces and compiles, a heap that grows with the tests: look through it less often.
gc.set_threshold(20_000, 20, 20)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Fixed examples, so that a failure is there again on the next run; no deadline, because machines differ.
hypothesis.settings.register_profile("full", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("full"), max_examples=6)
hypothesis.settings.load_profile("few")  # `make test-slow` takes the other one


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield

"""JAX's compilation cache: the user's setting wins over the default folder."""

import jax
import pytest

from spiking_mlp_jax.utils import compilation_cache


@pytest.fixture(autouse=True)
def restored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compilation_cache, "_ours", None)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.compilation_cache.reset_cache()


def test_a_folder_that_the_user_set_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compilation_cache.use_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    compilation_cache.use_compilation_cache(str(tmp_path / "named"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")


def test_without_one_it_is_in_the_users_cache(tmp_path):
    for where in (str(tmp_path / "named"), "auto"):
        compilation_cache.use_compilation_cache(where)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "home" / "spiking_mlp_jax" / "jax")

"""The network built from SpikingJelly's layers, which benchmarks compare with, is the same network."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.interop import official

torch = pytest.importorskip("torch", reason="PyTorch is only needed for benchmarks")
pytest.importorskip("spikingjelly", reason="SpikingJelly is only needed for benchmarks")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("encoding", ["spe", "plain"])
@pytest.mark.parametrize("norm_features", ["token", "channel"])
def test_twin_has_the_same_logits(encoding, norm_features, x64):
    from benchmarks.spikingjelly_twin import Twin

    config = ModelConfig(
        image_size=16,
        patch_size=2,
        dim=6,
        depths=(1, 2),
        num_classes=5,
        time_steps=3,
        encoding=encoding,
        norm_features=norm_features,
    )
    model = SpikingMLP(config, rngs=nnx.Rngs(0))
    twin = Twin(config).double()
    twin.load_official(official.state_dict(model))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    for training in (True, False):
        model.train() if training else model.eval()
        twin.train(training)
        theirs = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()
        np.testing.assert_allclose(model(jnp.asarray(images)), theirs, rtol=1e-8, atol=1e-10)

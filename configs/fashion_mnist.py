"""Fashion-MNIST, 28 x 28 grey images padded to 32.

    spiking-mlp train --config fashion_mnist --config.data_dir=DIR --workdir runs/fashion_mnist

DIR holds the original IDX files or a TFDS copy; without it, the 20,000 training images in the package are used. The
test set is always complete. Hardware: 2 CPU cores, shared with other work.
Result: test accuracy 90.24 % after 8 epochs of the full set (log: docs/runs/fashion_mnist).

    spiking-mlp train --config fashion_mnist:demo --workdir runs/demo

A smaller network, six epochs of the 20,000 images. Hardware: 2 CPU cores.
Result: test accuracy 86.68 %; `make demo` took 2.9 minutes including set-up.

    spiking-mlp train --config fashion_mnist:sparse --config.data_dir=DIR --workdir runs/sparse

The first network with a penalty on firing, for fewer synaptic operations. Hardware: 2 CPU cores.
Result: test accuracy 89.57 % with 41 % of the first network's synaptic operations (log:
docs/runs/fashion_mnist_sparse).
"""

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.train.config import default_config


def get_config(arg="full"):
    """The experiment; `arg` is "full", "demo" or "sparse"."""
    known = ("full", "demo", "sparse")
    if arg not in known:
        raise InputError(f'unknown argument "{arg}" of configs/fashion_mnist.py: {nearest(arg, known)}')
    config = default_config()

    # Data
    config.dataset = "fashion_mnist"
    config.image_size = 32
    config.in_channels = 1
    config.num_classes = 10
    config.mean = (0.2860,)
    config.std = (0.3530,)

    # Network
    config.patch_size = 4
    config.dim = 24 if arg == "demo" else 48
    config.depths = (1, 2)
    config.time_steps = 4

    # Optimisation
    config.batch_size = 128
    config.learning_rate = 0.1
    config.schedule = "cosine"
    if arg == "demo":
        config.epochs = 6
        return config
    config.epochs = 8
    config.warmup_epochs = 0.5
    config.flip = True
    if arg == "sparse":
        config.activity_measure = "rates"
        config.activity_weight = 1.0
    return config

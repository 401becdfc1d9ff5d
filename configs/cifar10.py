"""CIFAR-10, from TFDS (prepare it once with `tfds build cifar10`).

    python train.py --config configs/cifar10.py --workdir runs/cifar10

or from DIR/train/<class>/*.png and DIR/test/<class>/*.png:

    python train.py --config configs/cifar10.py --config.dataset=folder --config.data_dir=DIR --workdir runs/cifar10

32 px images and patches of 2. Hardware: one GPU.
Result: not measured here.

    python train.py --config configs/cifar10.py:224 --workdir runs/cifar10_224

MLP-SPE-T on images enlarged to 224 px, as in the paper. Hardware: 8 GPUs.
Result: not measured here.
"""

from spiking_mlp_jax.config import VARIANTS
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.train.config import default_config


def get_config(arg="32"):
    """The experiment; `arg` is the image size, "32" or "224"."""
    if arg not in ("32", "224"):
        raise InputError(f'configs/cifar10.py knows no "{arg}": {nearest(arg, ("32", "224"))}')
    config = default_config()

    # Data
    config.dataset = "tfds:cifar10"
    config.num_classes = 10
    config.image_size = int(arg)
    config.resize_mode = "resize"
    config.flip = True
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2023, 0.1994, 0.2010)
    config.workers = 8

    # Network
    config.time_steps = 4
    if arg == "224":
        config.update(VARIANTS["mlp_spe_t"])
        config.random_resized_crop = True
        config.remat = "block"
    else:
        config.patch_size = 2
        config.dim = 96
        config.depths = (2, 4, 2)
        config.crop_padding = 4

    # Optimisation
    config.batch_size = 512 if arg == "224" else 128
    config.epochs = 100
    config.learning_rate = 0.1
    config.schedule = "cosine"
    return config

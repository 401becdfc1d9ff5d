"""CIFAR-10, from TFDS (prepare it once with `tfds build cifar10`).

    python train.py --config configs/cifar10.py --workdir runs/cifar10

or from DIR/train/<class>/*.png and DIR/test/<class>/*.png:

    python train.py --config configs/cifar10.py --config.dataset=folder --config.data_dir=DIR --workdir runs/cifar10

32 px images and patches of 2. Hardware: one GPU.
Result: not measured here.

    python train.py --config configs/cifar10.py:folder --config.data_dir=DIR --workdir runs/cifar10_augmented

The same folder with the whole augmentation of the ImageNet recipe (crop, flip, RandAugment, colour jitter, random
erasing, mixup, cutmix, label smoothing). Hardware: 2 CPU cores.
Result: not measured here.

    python train.py --config configs/cifar10.py:224 --workdir runs/cifar10_224

MLP-SPE-T on images enlarged to 224 px, as in the paper. Hardware: 8 GPUs.
Result: not measured here.
"""

from spiking_mlp_jax.config import VARIANTS
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.train.config import default_config


def get_config(arg="32"):
    """The experiment; `arg` is "32" or "224", the image size, or "folder", 32 px with the whole augmentation."""
    known = ("32", "224", "folder")
    if arg not in known:
        raise InputError(f'configs/cifar10.py knows no "{arg}": {nearest(arg, known)}')
    config = default_config()

    # Data
    config.dataset = "folder" if arg == "folder" else "tfds:cifar10"
    config.num_classes = 10
    config.image_size = 224 if arg == "224" else 32
    config.resize_mode = "resize"
    config.flip = True
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2023, 0.1994, 0.2010)
    config.workers = 0 if arg == "folder" else 8
    if arg == "folder":
        config.rand_augment = "rand-m9-mstd0.5-inc1"
        config.color_jitter = 0.4
        config.random_erasing = 0.25
        config.mixup = 0.8
        config.cutmix = 1.0
        config.label_smoothing = 0.1

    # Network
    config.time_steps = 4
    if arg == "224":
        config.update(VARIANTS["mlp_spe_t"])
        config.random_resized_crop = True
        config.remat = "block"
    else:
        config.patch_size = 2
        config.dim = 48 if arg == "folder" else 96
        config.depths = (1, 2, 1) if arg == "folder" else (2, 4, 2)
        config.crop_padding = 4

    # Optimisation
    config.batch_size = 512 if arg == "224" else 128
    config.epochs = 100
    config.learning_rate = 0.1
    config.schedule = "cosine"
    return config

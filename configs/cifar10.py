"""CIFAR-10, from TFDS (prepare it once with `tfds build cifar10`).

    spiking-mlp train --config cifar10 --workdir runs/cifar10

or from DIR/train/<class>/*.png and DIR/test/<class>/*.png:

    spiking-mlp train --config cifar10 --config.dataset=folder --config.data_dir=DIR --workdir runs/cifar10

32 px, patch 2. Hardware: one GPU. Result: not measured here.

    spiking-mlp train --config cifar10:one_step --config.data_dir=DIR --workdir runs/cifar10_one_step
    spiking-mlp train --config cifar10:small --config.data_dir=DIR \\
        --config.init_weights=runs/cifar10_one_step --workdir runs/cifar10_small

A small network on the same folder with every augmentation (crop, flip, RandAugment, colour jitter, random erasing,
mixup, cutmix, label smoothing), for two CPU cores and three hours. A step at T=1 takes less than a quarter of the time
at T=4, so it trains at T=1 first. Augmentation is milder than ImageNet's, as so small a network underfits.
Hardware: 2 CPU cores.
Result: test accuracy 73.65 % at T=1, then 75.86 % at T=4, on images re-compressed as JPEGs of about quality 75
(docs/results.md; logs: docs/runs/cifar10_one_step, docs/runs/cifar10).

    spiking-mlp train --config cifar10:224 --workdir runs/cifar10_224

MLP-SPE-T on images enlarged to 224 px, as in the paper. Hardware: 8 GPUs. Result: not measured here.
"""

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import VARIANTS
from spiking_mlp_jax.train.config import default_config


def get_config(arg="32"):
    """The experiment; `arg` is an image size, "32" or "224", or a stage of the small one, "one_step" or "small"."""
    known = ("32", "224", "one_step", "small")
    if arg not in known:
        raise InputError(f'unknown argument "{arg}" of configs/cifar10.py: {nearest(arg, known)}')
    config = default_config()
    small = arg in ("one_step", "small")

    # Data
    config.dataset = "folder" if small else "tfds:cifar10"
    config.num_classes = 10
    config.image_size = 224 if arg == "224" else 32
    config.resize_mode = "resize"
    config.flip = True
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2023, 0.1994, 0.2010)
    config.workers = 0 if small else 8
    if small:
        config.rand_augment = "rand-m5-mstd0.5-inc1"
        config.color_jitter = 0.2
        config.random_erasing = 0.1
        config.mixup = 0.2
        config.cutmix = 1.0
        config.mix_probability = 0.4
        config.label_smoothing = 0.05

    # Network
    config.time_steps = 1 if arg == "one_step" else 4
    if arg == "224":
        config.update(VARIANTS["mlp_spe_t"])
        config.random_resized_crop = True
        config.remat = "block"
    else:
        config.patch_size = 2
        config.dim = 48 if small else 96
        config.depths = (1, 2, 1) if small else (2, 4, 2)
        config.crop_padding = 4

    # Optimisation
    config.batch_size = 512 if arg == "224" else 128
    config.epochs = {"one_step": 38, "small": 4}.get(arg, 100)
    if small:
        config.optimizer = "adamw"
        config.learning_rate = 0.003 if arg == "one_step" else 0.001
        config.weight_decay = 0.05
        config.warmup_epochs = 1.0
        config.ema_decay = 0.999
    else:
        config.learning_rate = 0.1
    config.schedule = "cosine"
    return config

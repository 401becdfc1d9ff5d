"""ImageNet-1k at 224 px with the official recipe, an argument for each network of the paper.

    spiking-mlp train --config imagenet:mlp_spe_t --config.data_dir=DIR --workdir runs/mlp_spe_t

DIR holds train/<class>/*.jpg and val/<class>/*.jpg. With a TFDS copy (`spiking-mlp prepare imagenet`) in DIR:

    spiking-mlp train --config imagenet:mlp_spe_t --config.dataset=tfds:imagenet2012 --config.data_dir=DIR \\
        --workdir runs/mlp_spe_t

The other networks are mlp_t, mlp_s, mlp_spe_s and mlp_spe_b.
Hardware: 8 GPUs. Result: not measured here.
The paper's top-1 accuracy: mlp_s 63.25 %, mlp_spe_t 66.39 %, mlp_spe_s 68.84 % (4 time steps), mlp_spe_b
71.64 % (6 time steps).
"""

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import VARIANTS
from spiking_mlp_jax.train.config import default_config


def get_config(arg="mlp_spe_t"):
    """The experiment; `arg` names the network."""
    if arg not in VARIANTS:
        raise InputError(f'unknown argument "{arg}" of configs/imagenet.py: {nearest(arg, VARIANTS)}')
    config = default_config()

    # Network
    config.update(VARIANTS[arg])
    config.image_size = 224
    config.num_classes = 1000
    config.patch_size = 4
    config.time_steps = 6 if arg == "mlp_spe_b" else 4
    config.remat = "block"
    config.dtype = "bfloat16"  # the official run used mixed precision

    # Data; docs/data.md explains the fields. The official command line also has colour jitter 0.4, which timm skips
    # beside RandAugment; config.color_jitter would add it.
    config.dataset = "folder"
    config.random_resized_crop = True
    config.flip = True
    config.rand_augment = "rand-m9-mstd0.5-inc1"
    config.random_erasing = 0.25
    config.mixup = 0.8
    config.cutmix = 1.0
    config.repeats = 3
    config.resize_mode = "resize_crop"
    config.eval_resize = 256
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)
    config.workers = 16

    # Optimisation. Batch norms see 64 images, as in the official run on 8 GPUs, where devices * accumulate is 8; else
    # one device's part of a micro-batch.
    config.batch_size = 512
    config.norm_statistics = "device"
    config.eval_batch_size = 512
    config.epochs = 100
    config.optimizer = "sgd"
    config.momentum = 0.9
    config.learning_rate = 0.1
    config.weight_decay = 0.0
    config.schedule = "cosine"
    config.warmup_epochs = 0.0
    config.label_smoothing = 0.1
    config.checkpoint_every = 1000
    return config

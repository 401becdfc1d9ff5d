"""Your own images, with sizes chosen from their number and size; docs/own_images.md explains the choices.

    spiking-mlp train --config folder --config.data_dir=DIR --workdir runs/mine

DIR holds train/<class>/*.jpg|jpeg|png and test/ (or val/) with the same classes; `folder:DIR` is the same. Other
datasets work, too: --config.dataset=npz:FILE, idx or tfds:NAME.

    spiking-mlp train --config folder:finetune=cifar10 --config.data_dir=DIR --workdir runs/mine

starts from a shipped network, a workdir or a weights folder, and takes over its architecture, image size, mean and
standard deviation.

Hardware: two CPU cores for small sets. Result: depends on the images; none measured here.
"""

import numpy as np

from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train.config import MODEL_FIELDS, default_config


def get_config(arg="", *, data_dir=None, dataset="folder"):
    """The experiment; `arg` is the folder or "finetune=NETWORK"."""
    finetune = arg.startswith("finetune=")
    network = arg.removeprefix("finetune=")
    if finetune and not network:
        raise InputError('"finetune=" names no network: use e.g. --config folder:finetune=cifar10')
    data_dir = data_dir or (None if finetune else arg) or None
    if dataset == "folder" and data_dir is None:
        raise InputError("--config folder needs the folder of the images: --config.data_dir=DIR")
    source = open_source(dataset, "train", data_dir)
    count = len(source)
    looked_at = np.linspace(0, count - 1, min(count, 64)).astype(int)
    shapes = [next_decodable(source, int(i))["image"].shape for i in looked_at]

    config = default_config()
    config.dataset = dataset
    config.data_dir = data_dir

    # Network
    if finetune:
        folder = weights.find(network)
        model, meta = weights.read_config(folder)
        config.update({name: getattr(model, name) for name in MODEL_FIELDS})
        config.init_weights = network
        if "data" in meta:
            config.mean, config.std = tuple(meta["data"]["mean"]), tuple(meta["data"]["std"])
    else:
        side = np.median([min(shape[:2]) for shape in shapes])
        sizes = (32, 64, 96, 128) if count < 20_000 else (32, 64, 96, 128, 224)
        config.image_size = max((size for size in sizes if size <= 1.2 * side), default=32)
        config.patch_size = {32: 2, 64: 4, 96: 4}.get(config.image_size, 8)
        config.dim = 48 if count < 100_000 else 96
        config.depths = (1, 2, 1) if count < 100_000 else (2, 4, 2)
        config.in_channels = 1 if all(shape[2] == 1 for shape in shapes) else 3
        if config.in_channels == 1:
            config.mean, config.std = (0.5,), (0.25,)
    config.num_classes = len(source.class_names)

    # Augmentation. Evaluation then crops the centre; see resize_mode.
    config.flip = True
    config.random_resized_crop = True
    config.crop_min_area = 0.35
    config.label_smoothing = 0.1

    # Optimisation: at least 16 steps an epoch, where the images suffice.
    config.batch_size = min(128, max(8, 2 ** int(np.log2(max(count / 16, 1)))))
    config.epochs = int(np.clip(200_000 // count, 20, 100))
    config.optimizer = "adamw"
    config.learning_rate = float(f"{(0.001 if finetune else 0.002) * (config.batch_size / 128) ** 0.5:.1g}")
    config.weight_decay = 0.05
    config.warmup_epochs = 1.0
    config.ema_decay = 0.99
    return config

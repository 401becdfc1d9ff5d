"""Trains a spiking MLP: `spiking-mlp train` from a clone.

    python train.py --config configs/fashion_mnist.py:demo --workdir runs/demo
    python train.py --config configs/fashion_mnist.py --workdir runs/t2 --config.time_steps=2

`python train.py --help` explains the options and exit statuses.
"""

import sys

from spiking_mlp_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main(prog="train.py"))

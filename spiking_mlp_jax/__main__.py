"""`python -m spiking_mlp_jax` is `spiking-mlp`."""

import sys

from spiking_mlp_jax.cli.main import main

sys.exit(main())

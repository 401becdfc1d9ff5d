"""Which norm? BatchNorm, LayerNorm in the mixing blocks, tdBN and TEBN.

    spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --workers 2

tdBN multiplies a BatchNorm by the threshold. At the base's threshold of 1 that is BatchNorm itself, so they are
compared at 0.5 (`tdbn_half`, `half`). LayerNorm depends on its input, so such a network cannot be folded to integers.
Results: docs/results.md.
"""


def get_sweep():
    """Runs and their base."""
    return {
        "title": "Norms",
        "base": "configs/fashion_mnist.py:demo",
        "common": {"epochs": 5},
        "runs": {
            "base": {},  # norm = "batch", v_threshold = 1, T = 4
            "layer": {"norm": "layer"},
            "tebn": {"norm": "tebn"},
            "half": {"v_threshold": 0.5},
            "tdbn_half": {"norm": "tdbn", "v_threshold": 0.5},
        },
        "seeds": (0, 1, 2),
        "test_time_steps": (1, 2, 4, 6),
    }

"""Which norm? BatchNorm, LayerNorm in the mixing blocks, tdBN and TEBN.

    spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --workers 2

With the threshold 1 of the base, tdBN (its alpha 1) computes what BatchNorm does: their rows are the same network, and
would differ only with another `v_threshold`. LayerNorm depends on what it normalises: such a network cannot become one
of integers. docs/results.md has the results.
"""


def get_sweep():
    """Runs, and what they start from."""
    return {
        "title": "Norms",
        "base": "configs/fashion_mnist.py:demo",
        "runs": {
            "base": {},  # norm = "batch", T = 4
            "layer": {"norm": "layer"},
            "tdbn": {"norm": "tdbn"},
            "tebn": {"norm": "tebn"},
        },
        "seeds": (0, 1, 2),
        "test_time_steps": (1, 2, 4, 6),
    }

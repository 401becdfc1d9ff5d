"""Which norm? BatchNorm, LayerNorm in the mixing blocks, tdBN and TEBN.

    spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --workers 2

tdBN multiplies a BatchNorm by the threshold. At the threshold 1 of the base that is BatchNorm itself, so it is compared
at the threshold 0.5, with BatchNorm there (`half`) beside it. LayerNorm depends on what it normalises: such a network
cannot become one of integers. docs/results.md has the results.
"""


def get_sweep():
    """Runs, and what they start from."""
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

"""The membrane time constant, from no memory (tau 1) to slow neurons.

    spiking-mlp sweep configs/sweeps/tau.py --workdir runs/ablations --workers 2

A leak by a power of two is a shift: tau 1.5 and 3 have no integer network.
"""


def get_sweep():
    """Runs and their base."""
    return {
        "title": "Membrane time constant",
        "base": "configs/fashion_mnist.py:demo",
        "common": {"epochs": 5},
        "runs": {
            "tau1": {"tau": 1.0},
            "tau1.5": {"tau": 1.5},
            "base": {},  # tau = 2, T = 4
            "tau3": {"tau": 3.0},
            "tau4": {"tau": 4.0},
        },
        "seeds": (0, 1, 2),
        "test_time_steps": (1, 2, 4, 6),
    }

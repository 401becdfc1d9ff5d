"""How much does a time step buy? One network with T = 1, 2, 4 and 6.

    spiking-mlp sweep configs/sweeps/time_steps.py --workdir runs/ablations --workers 2

The network and the 20,000 + 10,000 images of `fashion_mnist:demo`, five epochs. Sweeps of this folder share the run
`base` in a common workdir. Results: docs/results.md.
"""


def get_sweep():
    """Runs and their base."""
    return {
        "title": "Time steps",
        "base": "configs/fashion_mnist.py:demo",
        "common": {"epochs": 5},
        "runs": {
            "t1": {"time_steps": 1},
            "t2": {"time_steps": 2},
            "base": {},  # T = 4
            "t6": {"time_steps": 6},
        },
        "seeds": (0, 1, 2),
        "test_time_steps": (1, 2, 4, 6),
    }

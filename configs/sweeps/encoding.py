"""What does spiking patch encoding add to plain strided convolutions between the stages?

    spiking-mlp sweep configs/sweeps/encoding.py --workdir runs/ablations --workers 2

The parameters differ: the table counts them. docs/results.md has the results.
"""


def get_sweep():
    """Runs, and what they start from."""
    return {
        "title": "Encoding between stages",
        "base": "configs/fashion_mnist.py:demo",
        "common": {"epochs": 5},
        "runs": {
            "base": {},  # encoding = "spe", T = 4
            "plain": {"encoding": "plain"},
        },
        "seeds": (0, 1, 2),
        "test_time_steps": (1, 2, 4, 6),
    }

"""What does spiking patch encoding add to plain strided convolutions between the stages?

    spiking-mlp sweep configs/sweeps/encoding.py --workdir runs/ablations --workers 2

Parameter counts differ and are in the table. Results: docs/results.md.
"""


def get_sweep():
    """Runs and their base."""
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

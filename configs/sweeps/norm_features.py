"""The channel block's norms: one scale per token, as in the official code, or one per channel, which folds exactly.

spiking-mlp sweep configs/sweeps/norm_features.py --workdir runs/ablations --workers 2
"""


def get_sweep():
    """Runs and their base."""
    return {
        "title": "Features of the channel block's norms",
        "base": "configs/fashion_mnist.py:demo",
        "common": {"epochs": 5},
        "runs": {
            "base": {},  # norm_features = "token", T = 4
            "channel": {"norm_features": "channel"},
        },
        "seeds": (0, 1, 2),
        "test_time_steps": (1, 2, 4, 6),
    }

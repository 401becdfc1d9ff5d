"""Surrogate gradients over their sharpness alpha, one line each.

spiking-mlp sweep configs/sweeps/surrogate.py --workdir runs/ablations --workers 2
"""


def get_sweep():
    """Runs and their base."""
    runs = {
        f"{surrogate}_{alpha:g}": {"surrogate": surrogate, "surrogate_alpha": alpha}
        for surrogate in ("sigmoid", "atan", "triangle", "rectangle")
        for alpha in (1.0, 2.0, 4.0, 8.0)
    }
    # The base itself, so that sweeps in one workdir train it once.
    runs["base"] = runs.pop("sigmoid_4")
    return {
        "title": "Surrogates",
        "base": "configs/fashion_mnist.py:demo",
        "common": {"epochs": 5},
        "runs": runs,
        "seeds": (0, 1, 2),
        "x": "surrogate_alpha",
    }

"""R^2 of Gabor fits to white noise, by field size: `python -m benchmarks.gabor_noise`.

This is the baseline above which a fit means anything.
"""

import numpy as np

from spiking_mlp_jax.analysis.fields.gabor import fit_gabor

FIELDS = 50


def main() -> None:
    """Print one line for each size."""
    print("| field, pixels | median R^2 | 90 % of the fits are below | share at 0.5 or above |\n|---|---|---|---|")
    for side in (5, 6, 8, 12, 16, 32):
        rng = np.random.default_rng(side)
        found = np.array([fit_gabor(rng.normal(size=(side, side))).explained for _ in range(FIELDS)])
        median, high = np.quantile(found, (0.5, 0.9))
        print(f"| {side} x {side} | {median:.2f} | {high:.2f} | {100 * np.mean(found >= 0.5):.0f} % |", flush=True)


if __name__ == "__main__":
    main()

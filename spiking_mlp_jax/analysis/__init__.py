"""Activity, receptive fields, evaluation, figures and reports of trained networks."""

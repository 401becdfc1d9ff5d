"""The one exception that stands for a user's mistake."""


class InputError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what to do.

    `train.py` and `spiking-mlp` print the sentence and exit with status 2; anything else is a bug and keeps
    its traceback.
    """

"""The one exception that stands for a user's mistake, and what its sentences suggest."""

import difflib


class InputError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what to do.

    `train.py` and `spiking-mlp` print the sentence and exit with status 2; anything else is a bug and keeps
    its traceback.
    """


def nearest(wrong: str, known) -> str:
    """`, did you mean "x"?` for the known name nearest to a wrong one, or a list of all when none is near."""
    known = list(known)
    close = difflib.get_close_matches(str(wrong), known, 1, 0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return "the known ones are " + ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")

"""The exceptions that are not bugs, and the statuses with which programs end; what sentences suggest."""

import difflib

# Statuses of train.py besides 0 (finished), 1 (a bug, with its traceback) and 130 (stopped at once, by a second
# Ctrl-C); docs/robustness.md says what to do after each.
EXIT_INPUT = 2
EXIT_NONFINITE = 3
EXIT_STORAGE = 4
EXIT_LOST = 5  # another process of the run died
EXIT_INTERRUPTED = 75  # "try again", as sysexits.h calls it: the same command continues


class InputError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what to do.

    `train.py` and `spiking-mlp` print the sentence and exit with status `exit_code`, 2 unless a subclass says
    otherwise; anything else is a bug and keeps its traceback.
    """

    exit_code = EXIT_INPUT


class NonFiniteError(InputError):
    """A training step whose loss or gradient is not finite; the sentence says how to reproduce it."""

    exit_code = EXIT_NONFINITE


class StorageError(InputError):
    """Something could not be written, such as for want of space; what was written before is whole."""

    exit_code = EXIT_STORAGE


def nearest(wrong: str, known) -> str:
    """`, did you mean "x"?` for the known name nearest to a wrong one, or a list of all when none is near."""
    known = list(known)
    close = difflib.get_close_matches(str(wrong), known, 1, 0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return "the known ones are " + ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")

"""Errors that are not bugs, exit statuses, and suggestions for messages."""

import difflib

# Exit statuses besides 0 (finished), 1 (a bug, with its traceback) and 130 (stopped at once by a second Ctrl-C);
# docs/robustness.md says what to do after each.
EXIT_INPUT = 2
EXIT_NONFINITE = 3
EXIT_STORAGE = 4
EXIT_LOST = 5  # another process of the run died
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: rerun the same command to resume


class InputError(ValueError):
    """Bad input; the message says what is wrong, where, and what to do.

    `spiking-mlp` prints the message and exits with status `exit_code`; any other exception is a bug and keeps its
    traceback.
    """

    exit_code = EXIT_INPUT


class NonFiniteError(InputError):
    """A training step whose loss or gradient is not finite; the message says how to reproduce it."""

    exit_code = EXIT_NONFINITE


class StorageError(InputError):
    """A failed write, e.g. because the disk is full; files written before are complete."""

    exit_code = EXIT_STORAGE


def nearest(wrong: str, known) -> str:
    """`did you mean "x"?` for the known name nearest to a wrong one; a list of the known names if none is near."""
    known = list(known)
    close = difflib.get_close_matches(str(wrong), known, 1, 0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return "the known ones are " + ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")

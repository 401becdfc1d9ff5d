"""Errors that are not bugs, exit statuses, and suggestions for messages."""

import difflib

# Exit statuses besides 0 (finished), 1 (a bug, with its traceback) and 130 (stopped at once by a second Ctrl-C);
# docs/robustness.md says what to do after each.
EXIT_INPUT = 2
EXIT_NONFINITE = 3
EXIT_STORAGE = 4
EXIT_LOST = 5  # a process of the run died, is stuck, or never started
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


class LostError(InputError):
    """A process of the run that is missing."""

    exit_code = EXIT_LOST


# Other names of config fields, as papers and other trainers have them.
ALIASES = {
    alias: name
    for name, aliases in {
        "learning_rate": "lr",
        "batch_size": "bs",
        "weight_decay": "wd",
        "time_steps": "t timesteps",
        "ema_decay": "ema",
        "max_steps": "steps",
        "optimizer": "opt",
        "schedule": "scheduler",
        "warmup_epochs": "warmup",
        "clip_norm": "clip grad_clip gradient_clipping",
        "num_classes": "classes",
        "in_channels": "channels",
        "image_size": "size img_size input_size resolution",
        "dim": "width hidden embed_dim",
        "depths": "layers",
        "v_threshold": "threshold vth",
        "surrogate_alpha": "alpha",
        "dtype": "precision bf16 amp",
        "init_weights": "pretrained weights checkpoint finetune",
        "weight_bits": "bits",
        "norm": "bn",
        "data_dir": "data data_path root",
        "rand_augment": "augment aug randaugment",
        "flip": "hflip",
        "random_erasing": "reprob",
        "label_smoothing": "smoothing",
        "accumulate": "grad_accum",
        "remat": "checkpointing",
        "neuron_backend": "backend",
    }.items()
    for alias in aliases.split()
}


MOST_NAMES = 100


def nearest(wrong: str, known) -> str:
    """`did you mean "x"?` for the known name nearest to a wrong one; a list of the known names if none is near.

    The list is complete up to MOST_NAMES: all fields of an experiment, not all tensors of a network.
    """
    known = list(known)
    alias = ALIASES.get(str(wrong).lower().replace("-", "_"))
    if alias in known:
        return f'did you mean "{alias}"?'
    close = difflib.get_close_matches(str(wrong), known, 1, 0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return "the known ones are " + ", ".join(map(str, known[:MOST_NAMES])) + more

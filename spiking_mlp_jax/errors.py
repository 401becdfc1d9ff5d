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
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "t": "time_steps",
    "timesteps": "time_steps",
    "ema": "ema_decay",
    "steps": "max_steps",
    "opt": "optimizer",
    "scheduler": "schedule",
    "warmup": "warmup_epochs",
    "clip": "clip_norm",
    "grad_clip": "clip_norm",
    "gradient_clipping": "clip_norm",
    "classes": "num_classes",
    "channels": "in_channels",
    "size": "image_size",
    "img_size": "image_size",
    "input_size": "image_size",
    "resolution": "image_size",
    "width": "dim",
    "hidden": "dim",
    "embed_dim": "dim",
    "layers": "depths",
    "threshold": "v_threshold",
    "vth": "v_threshold",
    "alpha": "surrogate_alpha",
    "precision": "dtype",
    "bf16": "dtype",
    "amp": "dtype",
    "pretrained": "init_weights",
    "weights": "init_weights",
    "checkpoint": "init_weights",
    "finetune": "init_weights",
    "bits": "weight_bits",
    "bn": "norm",
    "data": "data_dir",
    "data_path": "data_dir",
    "root": "data_dir",
    "augment": "rand_augment",
    "aug": "rand_augment",
    "randaugment": "rand_augment",
    "hflip": "flip",
    "reprob": "random_erasing",
    "smoothing": "label_smoothing",
    "grad_accum": "accumulate",
    "checkpointing": "remat",
    "backend": "neuron_backend",
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

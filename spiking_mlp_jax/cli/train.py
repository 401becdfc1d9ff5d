"""The command `train`, also run by `train.py`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from spiking_mlp_jax.cli.options import drop_output, positive, whole
from spiking_mlp_jax.errors import ALIASES, EXIT_INTERRUPTED, InputError, StorageError, nearest
from spiking_mlp_jax.utils.files import system_error
from spiking_mlp_jax.utils.paths import is_remote, output_folder, real_path

if TYPE_CHECKING:
    from ml_collections import config_dict

OPTIONS = (
    "--config",
    "--workdir",
    "--list-fields",
    "--coordinator",
    "--num_processes",
    "--process_id",
    "--timeout",
    "--flagfile",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parser(**options: Any) -> Any:
    """The command's parser; `options` are those of argparse.ArgumentParser."""
    parser = _Parser(allow_abbrev=False, **options)
    add = parser.add_argument
    add("--config", metavar="CONFIG", help="FILE.py, FILE.py:ARGUMENT or a shipped config, e.g. fashion_mnist:demo")
    add("--flagfile", metavar="FILE", help="text file with an option per line, as if they stood here")
    add("--workdir", metavar="DIR", help="folder for everything the run writes; gs:// works, too")
    add("--list-fields", action="store_true", help="print all fields of an experiment and exit")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, for several processes")
    add("--num_processes", type=positive, metavar="N", help="number of processes")
    add("--process_id", type=whole(0), metavar="I", help="which process this is, from 0")
    add("--timeout", type=positive, default=60, metavar="S", help="seconds of silence after which a process is dead")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "spiking-mlp train", description: str = "") -> int:
    """Run the command and return its exit status, see DESCRIPTION.

    Args:
        arguments: the command line without the program's name; None takes the process's.
        prog: the program's name in its help.
        description: its text in its help; "" for DESCRIPTION.
    """
    raw = argparse.RawDescriptionHelpFormatter
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if any(word.lstrip("-").startswith("flagfile") for word in arguments):
            arguments = _flags_of_files(arguments)
        chosen, words = parser(prog=prog, description=description or DESCRIPTION, formatter_class=raw).parse_known_args(
            arguments
        )
        if chosen.list_fields:
            from spiking_mlp_jax.train.config import fields_page

            print(fields_page(), end="")
            return 0
        return _train(chosen, experiment(chosen, words))
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # The disk may fill up while the plots are drawn.
        if not error.errno:
            raise
        refused = system_error(error, "a file of the run")
        print("error:", refused, file=sys.stderr)
        return refused.exit_code
    except KeyboardInterrupt:
        print("stopped: rerun the same command to resume from the last checkpoint, if any", file=sys.stderr)
        return 130
    finally:
        drop_output()


def _flags_of_files(arguments: Sequence[str]) -> list[str]:
    """The command line with the lines of its --flagfile FILE in place of that option."""
    from absl import flags

    try:
        return flags.FlagValues().read_flags_from_files(list(arguments))
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(f"--flagfile cannot be read ({error}): name a text file with an option per line") from error


def experiment(chosen: argparse.Namespace, words: Sequence[str]) -> config_dict.ConfigDict:
    """The experiment that a command line names.

    Args:
        chosen: from `parser`.
        words: its unknown arguments, overrides of fields: --config.NAME=VALUE.

    Raises:
        InputError: no or an impossible config, a mistake in an override, or an unknown option.
    """
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("-") and not option.startswith(("--config.", "--noconfig.")):
            from spiking_mlp_jax.train.config import FIELDS, MODEL_FIELDS

            name = option.lstrip("-").replace("-", "_")
            name = ALIASES.get(name, name)
            hint = f'did you mean "--config.{name}"?' if name in (*MODEL_FIELDS, *FIELDS) else nearest(option, OPTIONS)
            raise InputError(f'unexpected argument "{option}": {hint}')
        if not word.startswith("-") and "=" in word:
            raise InputError(f'unexpected argument "{word}": write overrides as --config.NAME=VALUE')
    if not chosen.config:
        raise InputError("--config is required, e.g. --config fashion_mnist:demo")
    # Imported here, so that --help and mistakes in the command line are answered at once.
    from spiking_mlp_jax.train.config import load_config

    return load_config(chosen.config, words)


def _train(chosen: argparse.Namespace, config: Any) -> int:
    from absl import logging

    from spiking_mlp_jax.train import loop, runtime

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    workdir = None if chosen.workdir is None else str(real_path(chosen.workdir))
    if workdir is None and not config.dry_run:
        raise InputError("--workdir is required, e.g. --workdir runs/demo")
    if workdir is not None and not is_remote(workdir):
        output_folder(workdir, "--workdir")
    runtime.join(chosen.coordinator, chosen.num_processes, chosen.process_id, chosen.timeout)
    with _one_message():
        result = loop.fit(config, workdir or "")
    runtime.leave()
    if not result.finished:
        return EXIT_INTERRUPTED
    if not result.main or not workdir or config.dry_run or config.eval_only:
        return 0
    if result.best_accuracy is None:
        raise InputError(
            "no weights and no plots, because no evaluation had a finite loss: retrain in a new workdir with a lower "
            "learning rate"
        )
    if is_remote(workdir):
        with contextlib.suppress(OSError):
            print(f"plots: copy {workdir} to a disk and run spiking-mlp plot on the copy")
        return 0
    from spiking_mlp_jax.analysis.plots import plot_workdir

    plot_workdir(workdir)
    return 0


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Drops what threads of Orbax and tensorboardX print about a write that failed: `fit` says it in one sentence."""
    import logging as python_logging

    from absl import logging

    def ours(record: python_logging.LogRecord) -> bool:
        return record.levelno < python_logging.ERROR or "orbax" not in record.pathname

    def in_thread(failed: Any) -> None:
        if not isinstance(failed.exc_value, OSError):
            before[0](failed)

    def unraisable(failed: Any) -> None:
        if not isinstance(failed.exc_value, OSError):
            before[1](failed)

    def uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        # TensorStore reports to an event loop that has ended with the failed save.
        if str(error) != "Event loop is closed":
            before[2](kind, error, trace)

    before = threading.excepthook, sys.unraisablehook, sys.excepthook
    handler = logging.get_absl_handler()
    handler.addFilter(ours)
    threading.excepthook, sys.unraisablehook, sys.excepthook = in_thread, unraisable, uncaught
    try:
        yield
    except StorageError:
        raise  # there is more of it when the process ends
    except BaseException:
        threading.excepthook, sys.unraisablehook, sys.excepthook = before
        raise
    else:
        threading.excepthook, sys.unraisablehook, sys.excepthook = before
    finally:
        handler.removeFilter(ours)


DESCRIPTION = """Trains a spiking MLP.

    spiking-mlp train --config fashion_mnist:demo --workdir runs/demo
    spiking-mlp train --config configs/fashion_mnist.py --workdir runs/t2 --config.time_steps=2

--config names what to train, --config.NAME=VALUE changes a field of it, --list-fields prints all of them.
The same command resumes an interrupted run.
Instead of training, --config.dry_run=True prints sizes and costs, and --config.eval_only=True evaluates the run's
newest checkpoint, or the weights that --config.init_weights names.

On a TPU pod, under SLURM and under Open MPI the same command in every process is one run; elsewhere add
--coordinator HOST:PORT --num_processes N --process_id I. See docs/multiprocess.md.

Exit statuses: 0 finished, 2 bad input, 3 loss not finite, 4 disk full, 5 a process died or is stuck, 75 interrupted
and saved, 130 stopped at once."""

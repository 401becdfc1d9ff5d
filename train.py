"""Trains a spiking MLP.

    python train.py --config configs/fashion_mnist.py:demo --workdir runs/demo
    python train.py --config configs/fashion_mnist.py --workdir runs/t2 --config.time_steps=2

--config FILE.py or FILE.py:ARGUMENT says what to train, --config.NAME=VALUE changes a field of it. The same
command continues an interrupted run. Instead of training, --config.dry_run=True prints sizes and costs, and
--config.eval_only=True evaluates the run's newest checkpoint, or the weights that --config.init_weights names.

On a TPU pod, under SLURM and under Open MPI the same command in every process is one run; elsewhere add
--coordinator HOST:PORT --num_processes N --process_id I. See docs/multiprocess.md.

Exit statuses: 0 finished, 2 bad input, 3 loss not finite, 4 disk full, 5 another process died, 75 interrupted and
saved, 130 stopped at once.
"""

import sys

from absl import app, flags, logging

from spiking_mlp_jax.errors import EXIT_INPUT, EXIT_INTERRUPTED, InputError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the run writes; gs:// works, too.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 of several listens.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
TIMEOUT = flags.DEFINE_integer("timeout", 60, "Seconds of silence after which a process counts as dead.", lower_bound=1)


def main(arguments):
    # Imported here, so that --help and mistakes in the command line are answered at once.
    from spiking_mlp_jax.train import runtime as processes
    from spiking_mlp_jax.train.loop import train

    logging.set_verbosity(logging.WARNING)
    config, workdir = flags.FLAGS.config, WORKDIR.value
    try:
        if len(arguments) > 1:
            raise InputError(f'"{arguments[1]}" means nothing here: write overrides as --config.NAME=VALUE')
        if workdir is None and not config.dry_run:
            raise InputError("say where to write with --workdir DIR, such as --workdir runs/demo")
        processes.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, TIMEOUT.value)
        result = train(config, workdir or "")
        processes.leave()
        if not result.finished:
            return EXIT_INTERRUPTED
        if result.main and workdir and not (config.dry_run or config.eval_only):
            if result.best_accuracy is None:
                raise InputError(
                    "there are no weights and no plots, because no evaluation had a finite loss: take a new workdir "
                    "and a lower learning rate"
                )
            if "://" in workdir:
                print(f"plots: copy {workdir} to a disk and run spiking-mlp plot on the copy")
                return None
            from spiking_mlp_jax.analysis.plots import plot_workdir

            plot_workdir(workdir)
    except InputError as error:
        return _fail(error)


def _parse(arguments):
    # Imported here, where Ctrl-C is already answered.
    from ml_collections import config_flags

    from spiking_mlp_jax.train.arguments import read_arguments

    try:
        if not {"--help", "-h", "-?", "--helpfull", "--helpshort"} & set(arguments):
            config, rest = read_arguments(arguments[1:])
            arguments = [arguments[0], *rest]
            config_flags.DEFINE_config_dict("config", config, sys_argv=arguments)
        return flags.FLAGS(arguments)
    except (InputError, flags.Error) as error:
        sys.exit(_fail(error))


def _fail(error):
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return error.exit_code if isinstance(error, InputError) else EXIT_INPUT


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:
        print("stopped: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)

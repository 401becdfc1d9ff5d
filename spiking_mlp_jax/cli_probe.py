"""The command `spiking-mlp probe`: looks inside trained networks."""

from __future__ import annotations

from spiking_mlp_jax import cli_probe_activity


def add_commands(commands, command, positive) -> None:
    """Adds the command's parsers.

    Args:
        commands: of argparse.
        command: function that makes one with a summary, a description, examples and a note.
        positive: type of whole numbers from 1 on.
    """
    parser = command(
        commands,
        "probe",
        "look inside a trained network",
        "Measures and draws what goes on in a trained network.",
        "spiking-mlp probe activity fashion_mnist",
    )
    parser.set_defaults(run=lambda chosen: parser.print_help())
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT")
    cli_probe_activity.add(kinds)

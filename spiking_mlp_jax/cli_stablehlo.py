"""The command `spiking-mlp export-stablehlo`."""

from __future__ import annotations


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""

"""The command `spiking-mlp hub`: a trained network as a folder that can be shared."""

from __future__ import annotations


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""

"""The `ray-soup` command: each subcommand is a thin shell around one function of the package."""

from ray_soup.cli import begin, export, finished, inputs, resume, soups  # each adds its commands to the group
from ray_soup.cli.group import main

__all__ = ["begin", "export", "finished", "inputs", "main", "resume", "soups"]

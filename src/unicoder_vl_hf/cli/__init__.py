"""The command `unicoder-vl`: its parser, and a module for each family of its subcommands."""

from .parser import build_parser, main

__all__ = ["build_parser", "main"]

"""`unicoder-vl`, the shell's way in: the parser, and a module for each family of commands."""

from .parser import build_parser, main

__all__ = ["build_parser", "main"]

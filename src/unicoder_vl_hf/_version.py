"""The version of the package, looked up when it is first asked for."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("unicoder-vl-hf")
except PackageNotFoundError:
    __version__ = "0+unknown"  # a source tree on the path that is not installed

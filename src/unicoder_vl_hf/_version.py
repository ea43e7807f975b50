"""The version of the package, looked up when it is first asked for."""

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def package_version() -> str:
    """The installed version, or `0+unknown` in a source tree on the path that is not installed."""
    try:
        return version("unicoder-vl-hf")
    except PackageNotFoundError:
        return "0+unknown"

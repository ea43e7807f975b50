"""Files behind a URL: of S3, GCS and HDFS by Arrow's own clients, and of what else fsspec knows, `fsspec+PROTOCOL://…`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class RemotePath:
    """
    A file or folder behind a URL, as far as reading needs what `pathlib.Path` has. It can be sent to other processes.

    Args:
        scheme (`str`): Scheme of the URL.
        path (`str`): Path in the file system, such as `bucket/photos`.
        filesystem (`pyarrow.fs.FileSystem`): The file system.
    """

    scheme: str
    path: str
    filesystem: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, url: str) -> "RemotePath":
        """Finds the file system of a URL. Raises ValueError where there is none."""
        from pyarrow.fs import FileSystem

        filesystem, path = FileSystem.from_uri(url)
        return cls(url.partition("://")[0], path, filesystem)

    @property
    def suffix(self) -> str:
        """The suffix of the name."""
        return PurePosixPath(self.path).suffix

    def open(self, mode: str = "rb") -> Any:
        """Opens the file to read from any place of it."""
        return self.filesystem.open_input_file(self.path)

    def walk(self) -> Iterator[tuple["RemotePath", str]]:
        """
        Yields all files below a folder with their paths below it, or the file itself: of each folder its files, by
        name, and then its folders. Raises FileNotFoundError where there is nothing.
        """
        from pyarrow.fs import FileSelector, FileType

        kind = self.filesystem.get_file_info(self.path).type
        if kind == FileType.NotFound:
            raise FileNotFoundError(f"{self} does not exist.")
        if kind == FileType.File:
            yield self, PurePosixPath(self.path).name
            return
        found = self.filesystem.get_file_info(FileSelector(self.path, recursive=True))
        root = PurePosixPath(self.path)
        below = [PurePosixPath(info.path).relative_to(root) for info in found if info.type == FileType.File]
        for file in sorted(below, key=lambda file: [*((1, folder) for folder in file.parts[:-1]), (0, file.name)]):
            yield RemotePath(self.scheme, str(root / file), self.filesystem), str(file)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

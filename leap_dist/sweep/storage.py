"""Where the results of a sweep are kept: a folder, or a copy of it at a URI that fsspec knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError, own_words
from leap_dist.files import user_path
from leap_dist.secrets import hide_secrets


class Storage:
    """The folder that ranks write to and, for an output that is a URI, the place that finished runs are copied to.

    The folder is a local path; ranks on several nodes need a file system that they share.
    """

    def __init__(self, output: str, default: Path) -> None:
        """output: a path, or a URI, whose runs are written to `default` first. Raises UserError for an unknown URI."""
        self._uri = output.rstrip("/") if "://" in output else None
        self.folder = (default if self._uri else user_path(output)).absolute()
        self._files: Any = None
        if self._uri:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            try:
                self._files, self._root = url_to_fs(self._uri)
                self._files.makedirs(self._root, exist_ok=True)
            except Exception as error:  # each file system raises its own kinds
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f'--output: got "{output}", which cannot be written to: {why}') from error

    def publish(self, name: str) -> None:
        """Copy a file or folder of the sweep to its URI, if it has one. Raises OSError where that fails."""
        if self._uri:
            path = self.folder / name
            source = f"{path}/" if path.is_dir() else str(path)  # with the slash: what is in it, whether there or not
            with _os_errors():
                self._files.put(source, f"{self._root}/{name}", recursive=path.is_dir())

    def lacking(self, names: Iterable[str]) -> list[str]:
        """The folders that have a file which their copy lacks, or has in another size. Raises OSError."""
        if not self._uri:
            return []
        with _os_errors():
            found = self._files.find(self._root, detail=True)
        there = {path.removeprefix(f"{self._root}/"): about["size"] for path, about in found.items()}
        here = {name: [path for path in (self.folder / name).rglob("*") if path.is_file()] for name in names}
        return [
            name
            for name, files in here.items()
            if any(there.get(path.relative_to(self.folder).as_posix()) != path.stat().st_size for path in files)
        ]


@contextmanager
def _os_errors() -> Iterator[None]:
    """Whatever a file system raises, as OSError: each has its own kinds."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(hide_secrets(own_words(error))) from error

"""Files and folders that are complete, or not there; and where the package's own are."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """The path beside `folder` that the block makes a folder of; it gets its name when the block ends well.

    An older folder of that name is replaced; it stays where the block fails.
    """
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def user_path(text: str) -> Path:
    """A path as a user writes it: "~" and "~name" are home folders, if there are such."""
    return Path(os.path.expanduser(text))


def write_text(path: Path, text: str) -> None:
    """The file is the old one or the new one, whenever this is cut off."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def shipped(name: str) -> Path:
    """The launchers or the configs: beside the package in a checkout, inside it where a wheel was installed."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name

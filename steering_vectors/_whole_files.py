"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str], *, or_folder: str = "") -> Iterator[Path]:
    """Yield a path beside ``path``, where the block writes a file that then takes the name ``path``.

    After an error or a crash, the old file is still there, or none. An existing file's mode stays. ``or_folder`` ends
    the message about a folder.

    Raises FileNotFoundError if the folder doesn't exist, IsADirectoryError if ``path`` is a folder, PermissionError if
    no file can be written in its folder, and OSError if ``path`` exists but is not a regular file.
    """
    target = Path(os.path.realpath(path))  # where a link points
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it{or_folder}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}: create it before saving")
    if target.exists() and not target.is_file():
        raise OSError(f"{path} exists and is not a regular file: give another name")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        _create(temporary, target)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _create(temporary: Path, target: Path) -> None:
    try:
        temporary.touch(exist_ok=False)
    except PermissionError as error:
        raise PermissionError(f"no file can be written in {target.parent}: its permissions don't allow it") from error

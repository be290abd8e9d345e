"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Give the name of a temporary file beside `path`, and put that file in its place when the block ends.

    If the block raises, `path` stays as it was, and the temporary file is removed.
    """
    temporary = f"{os.fspath(path)}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise

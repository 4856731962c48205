"""The two things that can go wrong outside our own code, each said in one sentence with its remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """A bad input: the message names the file or record, what is wrong with it, and the remedy."""


class StorageError(OSError):
    """A result or a record could not be written; what had been written before is untouched."""


@contextmanager
def explain_storage(path: str | os.PathLike) -> Iterator[None]:
    """Turn an operating-system failure while writing to `path` into a `StorageError` with a remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "the disk is full; free some space and start again, finished work is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "it cannot be written to; choose another folder or change its permissions"
        else:
            remedy = f"writing failed ({error.strerror or error}); check the disk and start again"
        raise StorageError(f"{path}: {remedy}.") from error

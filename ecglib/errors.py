"""What can go wrong outside our own code: bad input and failed writing, each said in one sentence
with its remedy.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """A bad input: the message names the file or record, what is wrong with it, and the remedy."""


class StorageError(OSError):
    """A result or a record could not be written; what had been written before is untouched."""


@contextmanager
def explain_reading(
    path: str | os.PathLike,
    absent: str = "listed but absent; download it again or remove it from the list",
) -> Iterator[None]:
    """Turn an operating-system failure while reading `path` into a `DataError` with a remedy;
    `absent` is said of a file that is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: {absent}.") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check the file and its "
            "permissions."
        ) from None


@contextmanager
def explain_storage(path: str | os.PathLike) -> Iterator[None]:
    """Turn an operating-system failure while writing to `path` into a `StorageError` with a
    remedy.
    """
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

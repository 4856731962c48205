"""Fetch a data set: checked, resumed, from its official address or a mirror.

    python -m ecglib.sources.download ptb-xl data/ptb-xl --only "records100/*"

pooch compares checksums, tries again after a failure and moves a finished file into place. The
downloader given to it here adds two things: it continues a broken transfer, and it keeps its
connections between thousands of small files. A second call fetches only what is missing or wrong.
"""

import argparse
import fnmatch
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ecglib.errors import DataError, StorageError, explain_storage
from ecglib.files import atomic_file, inside, read_json, write_json
from ecglib.sources.index_files import SUMS, read_sums

RETRIES = 3  # of pooch for each file at each address, with growing pauses between them
RETRIES_OF_LARGE_FILES = 20  # above a gigabyte; each goes on where the last one broke
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of data
PIECE = 1 << 16  # what a broken connection may lose
WORKERS = 4  # files at a time: thousands of small files, and a polite number of connections
GIGABYTE = 1e9
REFUSED = (400, 401, 403, 404, 410)  # HTTP: the server will not give this file, however often asked
BEYOND_THE_END = 416  # HTTP: the part is as long as the file or longer


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies: base addresses by preference, its size on disk, its index of checksums
    (SHA256SUMS.txt at its address, or the address of a Zenodo record), and the pattern of its part.
    """

    addresses: tuple[str, ...]
    gigabytes: float
    index: str = SUMS
    only: str = "*"


# PhysioNet's open mirror at Amazon follows it where a project is there.
_TABLE = pd.read_csv(Path(__file__).with_name("data_sets.csv"), index_col="name")
DATASETS: dict[str, DataSet] = {
    name: DataSet(tuple(row["addresses"].split()), row["gigabytes"], row["index"], row["only"])
    for name, row in _TABLE.iterrows()
}


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch: its path below the folder, and its checksum as pooch writes it and its
    size in bytes where they are known.
    """

    name: str
    checksum: str | None = None
    size: int = 0


def download(
    name: str,
    folder: str | Path,
    *,
    only: str = "*",
    addresses: Sequence[str] | None = None,
) -> Path:
    """Fetch the files of a data set (those that match `only`) that are missing or wrong below
    `folder`, and unpack zip files; returns the folder.

    `addresses` replaces the official ones, for a mirror of your own. Every file is checked against
    the data set's own SHA-256 (Zenodo: MD5) and appears under its name only when it is whole.
    DataError where no address gives a right file or the index names a path outside `folder`,
    StorageError where the disk is full or cannot be written to.
    """
    if name not in DATASETS:
        raise DataError(
            f"There is no data set {name!r} to download; choose one of {', '.join(DATASETS)}."
        )
    folder = Path(folder)
    data_set = DATASETS[name]
    bases = [base.rstrip("/") + "/" for base in addresses or data_set.addresses]
    with explain_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    listed = _read_index(folder, data_set, bases, official=not addresses)
    for file in listed:  # all of them before the first is fetched
        inside(folder, file.name, f"the index of {name}")
    chosen = [
        file
        for file in listed
        if fnmatch.fnmatchcase(file.name, only) and fnmatch.fnmatchcase(file.name, data_set.only)
    ]
    if not chosen:
        raise DataError(
            f"{name}: no file of its index matches {only!r}; choose one for names like "
            f"{listed[0].name}."
        )
    wanted = [file for file in chosen if not _is_unpacked(folder, file)]
    absent = [file for file in wanted if not (folder / file.name).is_file()]
    _check_space(folder, absent, data_set.gigabytes * GIGABYTE * len(absent) / len(chosen))
    _fetch_all(name, folder, wanted, bases)
    return folder


def _read_index(folder, data_set, bases, official):
    """The data set's files with their checksums, from the index in the folder or fetched to it."""
    import requests

    from_zenodo = data_set.index != SUMS
    name = "zenodo.json" if from_zenodo else SUMS
    parse = _zenodo_files if from_zenodo else _summed_files
    path = folder / name
    if path.exists():
        try:
            return parse(path)
        except DataError:
            path.unlink()  # damaged: fetch it again
    urls = [data_set.index] if from_zenodo and official else [base + name for base in bases]
    transfer = partial(_transfer, requests.Session(), lambda size: None)
    return _fetch(folder, RemoteFile(name), urls, transfer, parse, "the list of files ")


def _summed_files(path):
    """Files of a SHA256SUMS.txt; one without any, such as an error page, is a DataError."""
    files = [RemoteFile(name, f"sha256:{digest}") for name, digest in read_sums(path).items()]
    if not files:
        raise DataError(f"{path.name}: lists no file")
    return files


def _zenodo_files(path):
    """Files of a Zenodo record in its JSON form, which gives MD5 sums and sizes."""
    try:
        return [
            RemoteFile(str(file["key"]), str(file["checksum"]), int(file["size"]))
            for file in read_json(path)["files"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path.name}: not the description of a Zenodo record ({error})") from None


def _check_space(folder, absent, estimate):
    """StorageError where the files still to come do not fit on the disk."""
    known = [file.size for file in absent]
    # A zip file and what it holds lie side by side while it is unpacked.
    needed = max(estimate, sum(known)) + max(known, default=0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder}: {needed / GIGABYTE:.1f} GB are needed and {free / GIGABYTE:.1f} GB free; "
            "free some space or choose another folder. What is there stays."
        )


def _fetch_all(name, folder, wanted, bases):
    """Fetch files side by side; the first failure stops the rest, and finished files and parts
    stay.
    """
    import requests
    from tqdm import tqdm

    size = sum(file.size for file in wanted) or None
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        transfer = partial(_transfer, requests.Session(), bar.update)

        def fetch(file):
            _fetch(folder, file, [base + quote(file.name) for base in bases], transfer)
            if file.name.endswith(".zip"):
                _unpack(folder, file)

        for count, _ in enumerate(pool.map(fetch, wanted), 1):
            bar.set_postfix_str(f"{count:,} of {len(wanted):,} files", refresh=False)


def _fetch(folder, file, urls, transfer, parse=Path.exists, kind=""):
    """What `parse` makes of a file, fetched unless it is there and right, from the first address
    that has it so.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    path = folder / file.name
    part = path.with_name(f"{path.name}.part")
    failures = []
    for url in urls:
        store = pooch.create(folder, "", registry={file.name: file.checksum}, urls={file.name: url})
        store.retry_if_failed = RETRIES if file.size < GIGABYTE else RETRIES_OF_LARGE_FILES
        with explain_storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.checksum is None:  # nothing would tell a stale part from a new one
                part.unlink(missing_ok=True)
            try:
                store.fetch(file.name, downloader=partial(transfer, part))
                return parse(path)
            except DataError as error:
                path.unlink()
                failure = error
            except (ConnectionError, requests.HTTPError) as error:
                failure = error
            except requests.RequestException as error:  # its text names objects in memory
                failure = re.sub(r"(?<!^)(?=[A-Z])", " ", type(error).__name__).lower()
            except ValueError:
                failure = "wrong checksum"
        failures.append(f"{url}: {failure}")
    raise DataError(
        f"{path}: {kind}could not be fetched ({'; '.join(failures)}); check the network and start "
        "again."
    )


def _transfer(session, report, part, url, output_file, _pooch):
    """Bring `url` to `output_file` by way of `part`, which stays where the connection breaks and is
    continued by HTTP Range; `report` is told the bytes that arrive.

    pooch tries again after a requests.RequestException, not after the ConnectionError of a file
    that the server refuses.
    """
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        problem = f"HTTP {answer.status_code} {answer.reason}"
        if answer.status_code in REFUSED:
            raise ConnectionError(problem)
        if answer.status_code != BEYOND_THE_END:  # then the checksum judges the part
            if not answer.ok:
                raise requests.HTTPError(problem)
            resumed = answer.status_code == requests.codes.partial_content
            with part.open("ab" if resumed else "wb") as file:
                for piece in answer.iter_content(PIECE):
                    report(file.write(piece))
    shutil.move(part, output_file)


def _is_unpacked(folder, file):
    """Whether a zip file has been unpacked and removed, and what came out of it is still there."""
    note = folder / f"{file.name}.unpacked"
    if not note.exists() or (folder / file.name).exists():
        return False
    unpacked = read_json(note)
    return unpacked["checksum"] == file.checksum and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in unpacked["members"].items()
    )


def _unpack(folder, file):
    """Unpack a zip file beside itself, note what came out of it, and remove it; a damaged one is a
    DataError.
    """
    archive = folder / file.name
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {
                info.filename: info.file_size for info in opened.infolist() if not info.is_dir()
            }
            targets = [inside(folder, name, str(archive)) for name in members]
            for name, target in zip(members, targets):
                with (
                    opened.open(name) as packed,
                    atomic_file(target) as temporary,
                    temporary.open("wb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"{archive}: not a whole zip file ({error}); delete it and download again."
        ) from None
    write_json(folder / f"{file.name}.unpacked", {"checksum": file.checksum, "members": members})
    archive.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; a failure is one sentence on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ecglib.sources.download", description="Fetch one data set."
    )
    parser.add_argument("name", choices=list(DATASETS), metavar="name", help=", ".join(DATASETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", default="*", help="pattern of the files to fetch, such as 'records100/*'"
    )
    parser.add_argument(
        "--address", action="append", help="a mirror to use instead of the official addresses"
    )
    given = parser.parse_args(arguments)
    try:
        folder = download(given.name, given.folder, only=given.only, addresses=given.address)
    except (DataError, StorageError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.name} is complete in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

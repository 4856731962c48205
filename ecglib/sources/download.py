"""Fetch a data set: resumed, checked, from its official address or a mirror.

    python -m ecglib.sources.download ptb-xl data/ptb-xl --only "records100/*"

pooch compares checksums and moves a finished file into place; what it lacks, resuming a broken
transfer, is the downloader given to it here. A second call fetches only what is missing or wrong.
"""

import argparse
import fnmatch
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ecglib.errors import DataError, StorageError, explain_storage
from ecglib.files import atomic_file, inside, read_json, write_json
from ecglib.sources.index_files import SUMS

ATTEMPTS = 4  # in a row without a single new byte, at each address
BACKOFF = 1.0  # seconds before the second attempt, doubled each time
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of data
PIECE = 1 << 16  # what a broken connection may lose
WORKERS = 4  # files at a time: thousands of small files, and a polite number of connections
GIGABYTE = 1e9


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies: base addresses by preference, its index of checksums, its part, and
    its size on disk.
    """

    addresses: tuple[str, ...]
    gigabytes: float
    index: str = SUMS
    only: tuple[str, ...] = ("*",)


def _physionet(
    project: str, gigabytes: float, only: tuple[str, ...] = ("*",), mirror: bool = True
) -> DataSet:
    """A PhysioNet project, with PhysioNet's open mirror at Amazon where it has one."""
    mirrors = (f"https://physionet-open.s3.amazonaws.com/{project}/",) if mirror else ()
    return DataSet((f"https://physionet.org/files/{project}/", *mirrors), gigabytes, only=only)


_CINC_FOLDERS = {
    "georgia": 1.3,
    "chapman_shaoxing": 1.3,
    "ningbo": 4.2,
    "cpsc_2018": 1.4,
    "cpsc_2018_extra": 0.7,
    "ptb-xl": 2.7,
    "ptb": 1.4,
}
DATASETS: dict[str, DataSet] = {
    "ptb-xl": _physionet("ptb-xl/1.0.3", 3.1),
    "ludb": _physionet("ludb/1.0.1", 0.04),
    "nstdb": _physionet("nstdb/1.0.0", 0.04),
    "cinc2021": _physionet("challenge-2021/1.0.3", 13.8, mirror=False),
    **{
        f"cinc2021/{name}": _physionet(
            "challenge-2021/1.0.3", size, (f"training/{name}/*",), mirror=False
        )
        for name, size in _CINC_FOLDERS.items()
    },
    "code15": DataSet(
        ("https://zenodo.org/records/4916206/files/",), 72, "https://zenodo.org/api/records/4916206"
    ),
}


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch: its path below the folder, its checksum as pooch writes it, and its size
    where known.
    """

    name: str
    checksum: str
    size: int | None = None


def download(
    name: str,
    folder: str | Path,
    *,
    only: str = "*",
    addresses: Sequence[str] | None = None,
    unpack: bool = True,
    progress: bool = True,
) -> Path:
    """Fetch the files of a data set (those that match `only`) that are missing or wrong below
    `folder`; its path.

    `addresses` replaces the official ones, for a mirror of your own. Every file is checked against
    the data set's own SHA-256 (Zenodo: MD5) and appears under its name only when it is whole.
    DataError where no address gives a right file or the index names a path outside `folder`,
    StorageError where the disk is full or cannot be written to.
    """
    if name not in DATASETS:
        raise DataError(
            f"There is no data set {name!r} to download; choose one of {', '.join(DATASETS)}."
        )
    folder, data_set = Path(folder), DATASETS[name]
    bases = [base.rstrip("/") + "/" for base in addresses or data_set.addresses]
    with explain_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    listed = _index(folder, data_set, bases, bool(addresses))
    for file in listed:  # all of them before the first is fetched
        inside(folder, file.name, f"the index of {name}")
    chosen = [
        file
        for file in listed
        if _matches(file.name, [only]) and _matches(file.name, data_set.only)
    ]
    if not chosen:
        raise DataError(
            f"{name}: no file of its index matches {only!r}; choose one for names like {listed[0].name}."
        )
    missing = [
        file for file in _bar(chosen, f"checking {name}", progress) if not _is_here(folder, file)
    ]
    _check_space(folder, missing, data_set.gigabytes * GIGABYTE * len(missing) / len(chosen))
    _fetch_all(name, folder, missing, bases, progress)
    if unpack:
        for file in chosen:
            if file.name.endswith(".zip") and (folder / file.name).exists():
                _unpack(folder, file)
    return folder


def _index(
    folder: Path, data_set: DataSet, bases: Sequence[str], own_addresses: bool
) -> list[RemoteFile]:
    """The data set's files with their checksums, from the index in the folder or fetched to it."""
    from_zenodo = data_set.index != SUMS
    path = folder / ("zenodo.json" if from_zenodo else SUMS)
    parse = _zenodo_files if from_zenodo else _summed_files
    if path.exists():
        try:
            return parse(path)
        except DataError:
            pass  # damaged: fetch it again
    urls = (
        [base + path.name for base in bases]
        if own_addresses or not from_zenodo
        else [data_set.index]
    )
    failures = []
    fetched = path.with_name(f"{path.name}.new")
    with explain_storage(path):
        for url in urls:
            try:
                _Resume(path.with_name(f"{path.name}.part"), _session())(url, fetched)
                files = parse(fetched)
                os.replace(fetched, path)
                return files
            except (DataError, ConnectionError) as error:
                failures.append(f"{url}: {error}")
                fetched.unlink(missing_ok=True)
    why = "; ".join(failures)
    raise DataError(
        f"{path}: the list of files could not be fetched ({why}); check the network and start again."
    )


def _summed_files(path: Path) -> list[RemoteFile]:
    """Files of a SHA256SUMS.txt; a line of another form is a DataError, for instance an error page."""
    files = []
    for line in path.read_text(errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(\S.*?)\s*", line)
        if match is None and line.strip():
            raise DataError(f"{path.name}: the line {line[:60]!r} is not a checksum and a name")
        if match is not None:
            files.append(RemoteFile(match[2], f"sha256:{match[1].lower()}"))
    if not files:
        raise DataError(f"{path.name}: lists no file")
    return files


def _zenodo_files(path: Path) -> list[RemoteFile]:
    """Files of a Zenodo record in its JSON form, which gives MD5 sums and sizes."""
    try:
        return [
            RemoteFile(str(f["key"]), str(f["checksum"]), int(f["size"]))
            for f in read_json(path)["files"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path.name}: not the description of a Zenodo record ({error})") from None


def _is_here(folder: Path, file: RemoteFile) -> bool:
    """Whether the file is there with the right checksum, or has been unpacked."""
    import pooch

    path = folder / file.name
    if path.is_file():
        return pooch.hashes.hash_matches(str(path), file.checksum)
    note = path.with_name(f"{path.name}.unpacked")
    if not note.exists():
        return False
    unpacked = read_json(note)
    sizes = {
        name: (folder / name).stat().st_size if (folder / name).is_file() else -1
        for name in unpacked["members"]
    }
    return unpacked["checksum"] == file.checksum and sizes == unpacked["members"]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file name fits one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _bar(files: Sequence[RemoteFile], text: str, progress: bool) -> Iterable[RemoteFile]:
    """The files, under a progress bar."""
    from tqdm import tqdm

    return tqdm(files, desc=text, unit="file", disable=not progress, leave=False)


def _session() -> object:
    """One requests session: connections are kept between the thousands of small files."""
    import requests

    return requests.Session()


def _check_space(folder: Path, missing: Sequence[RemoteFile], estimate: float) -> None:
    """StorageError where the files still to come do not fit on the disk."""
    known = [file.size for file in missing]
    # A zip file and what it holds lie side by side while it is unpacked.
    needed = estimate if not known or None in known else max(estimate, sum(known)) + max(known)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder}: {needed / GIGABYTE:.1f} GB are needed and {free / GIGABYTE:.1f} GB free; free some space or "
            "choose another folder. What is there stays."
        )


def _fetch_all(
    name: str, folder: Path, missing: Sequence[RemoteFile], bases: Sequence[str], progress: bool
) -> None:
    """Fetch files side by side; the first failure stops the rest, and finished files and parts
    stay.
    """
    from tqdm import tqdm

    sizes = [file.size for file in missing]
    total = None if None in sizes else sum(sizes)
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not progress) as bar:
        pool, session = ThreadPoolExecutor(WORKERS), _session()
        try:
            jobs = [pool.submit(_fetch, folder, file, bases, session, bar) for file in missing]
            for count, job in enumerate(jobs, 1):
                job.result()
                bar.set_postfix_str(f"{count:,} of {len(missing):,} files", refresh=False)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fetch(
    folder: Path, file: RemoteFile, bases: Sequence[str], session: object, bar: object
) -> None:
    """Fetch one file from the first address that has it whole and right."""
    import pooch

    pooch.get_logger().setLevel("ERROR")
    target = inside(folder, file.name, "the index")
    resume = _Resume(target.with_name(f"{target.name}.part"), session, bar)
    failures = []
    with explain_storage(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for base in bases:
            for _ in range(
                2
            ):  # a wrong checksum may come from the part of an older version: once more from the start
                try:
                    url = base + quote(file.name)
                    pooch.retrieve(
                        url, file.checksum, target.name, target.parent, downloader=resume
                    )
                    return
                except ConnectionError as error:
                    failures.append(f"{base}: {error}")
                    break
                except ValueError:
                    failures.append(f"{base}: wrong checksum")
    raise DataError(
        f"{target}: could not be fetched ({'; '.join(failures)}); check the network and start again."
    )


class _Refused(ConnectionError):
    """The server answers that it does not have or give the file: asking again would not help."""


class _Resume:
    """A pooch downloader that continues `part` by HTTP Range, retries with growing pauses, and then
    hands it over.
    """

    def __init__(self, part: Path, session: object, bar: object = None) -> None:
        self.part, self.session, self.bar = part, session, bar

    def __call__(self, url: str, output_file: str | Path, pooch: object = None) -> None:
        """Bring `url` to `output_file`; ConnectionError after `ATTEMPTS` attempts that brought
        nothing new.
        """
        idle, before = 0, self._size()
        while True:
            try:
                self._continue(url)
                break
            except _Refused:
                raise
            except ConnectionError:
                idle = 1 if self._size() > before else idle + 1
                before = self._size()
                if idle >= ATTEMPTS:
                    raise
                time.sleep(BACKOFF * 2 ** (idle - 1))
        shutil.move(self.part, output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, url: str) -> None:
        """One request for what is missing; returns when the part is whole, else raises
        ConnectionError.
        """
        import requests

        have = self._size()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with self.session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                if (
                    answer.status_code == 416
                ):  # nothing lies beyond what is here: whole already, or not this file
                    whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
                    if whole == str(have):
                        return
                    self.part.unlink()
                    raise ConnectionError("the part does not fit the file, starting anew")
                if answer.status_code not in (200, 206):
                    refused = 400 <= answer.status_code < 500 and answer.status_code not in (
                        408,
                        429,
                    )
                    raise (_Refused if refused else ConnectionError)(
                        f"HTTP {answer.status_code} {answer.reason}"
                    )
                start = answer.headers.get("Content-Range", "")
                resumed = answer.status_code == 206 and start.startswith(f"bytes {have}-")
                if answer.status_code == 206 and not resumed:
                    raise ConnectionError("the server sent another range than asked for")
                self._receive(answer, have if resumed else 0)
        except requests.RequestException as error:
            raise ConnectionError(_in_short(error)) from error

    def _receive(self, answer: object, have: int) -> None:
        """Append the body of an answer at `have`; a body shorter than announced is a
        ConnectionError.
        """
        announced = answer.headers.get("Content-Length")
        with self.part.open("ab" if have else "wb") as file:
            for piece in answer.iter_content(PIECE):
                file.write(piece)
                if self.bar is not None:
                    self.bar.update(len(piece))
        if announced is not None and self._size() != have + int(announced):
            raise ConnectionError(
                f"the connection broke after {self._size():,} of {have + int(announced):,} bytes"
            )


def _in_short(error: Exception) -> str:
    """The kind of a network error, without the addresses of objects in memory that its text
    carries.
    """
    return re.sub(r"(?<!^)(?=[A-Z])", " ", type(error).__name__).lower()


def _unpack(folder: Path, file: RemoteFile) -> None:
    """Unpack a zip file beside itself, member by member, note what came out of it, and remove it."""
    archive = folder / file.name
    with _readable(archive) as opened:
        members = {info.filename: info.file_size for info in opened.infolist() if not info.is_dir()}
        for name in members:
            inside(folder, name, str(archive))
        for name, size in members.items():
            target = folder / name
            if not target.is_file() or target.stat().st_size != size:
                with (
                    atomic_file(target) as temporary,
                    opened.open(name) as source,
                    temporary.open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink, PIECE)
    write_json(folder / f"{file.name}.unpacked", {"checksum": file.checksum, "members": members})
    archive.unlink()


@contextmanager
def _readable(archive: Path) -> Iterator[zipfile.ZipFile]:
    """An open zip file; a damaged one is a DataError."""
    try:
        with zipfile.ZipFile(archive) as opened:
            yield opened
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"{archive}: not a whole zip file ({error}); delete it and download again."
        ) from None


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

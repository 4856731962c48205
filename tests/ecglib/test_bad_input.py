"""Bad input: one clear sentence that names the file or record and the remedy, and nothing already
written is lost.

The property tests mutate headers and index files: the outcome is records or a DataError, never
another exception.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ecglib.errors import DataError, StorageError
from ecglib.files import atomic_file, inside, write_json
from ecglib.records import LEADS, Records
from ecglib.sources.cinc2021 import read_cinc2021
from ecglib.sources.code15 import read_code15
from ecglib.sources.ludb import read_ludb, read_ludb_marks
from ecglib.sources.ptbxl import read_ptbxl
from ecglib.sources.wfdb_files import Header, read_header, read_millivolts
from ecglib.sources.wfdb_folder import read_wfdb_folder
from toolkit import (
    heart_signal,
    sums,
    write_cinc,
    write_code15,
    write_ludb,
    write_ptbxl,
    write_wfdb,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
REMEDIES = (
    "download",
    "give",
    "choose",
    "correct",
    "check",
    "add",
    "remove",
    "mend",
    "write",
    "fill",
    "use",
    "make",
    "delete",
    "keep",
    "read with",
    "resample",
    "join",
    "convert",
    "leave",
)


def refused(action: Callable[[], object], *words: str) -> str:
    """The message of the DataError that `action` must raise: one line with a remedy and these
    words.
    """
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and any(remedy in message for remedy in REMEDIES), message
    assert all(word in message for word in words), message
    return message


# Folders, columns, names

READERS = {
    "ptbxl": (read_ptbxl, write_ptbxl),
    "ludb": (read_ludb, write_ludb),
    "code15": (read_code15, write_code15),
    "marks": (read_ludb_marks, write_ludb),
    "cinc": (lambda folder: read_cinc2021(folder, "georgia"), None),
    "wfdb": (lambda folder: read_wfdb_folder(folder, "labels.csv"), None),
}


@pytest.mark.parametrize("name", READERS)
def test_missing_or_empty_folder(tmp_path: Path, name: str) -> None:
    refused(lambda: READERS[name][0](tmp_path / "nowhere"), "nowhere", "no such folder")
    refused(lambda: READERS[name][0](tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    "name, file, column",
    [
        ("ptbxl", "ptbxl_database.csv", "scp_codes"),
        ("ptbxl", "scp_statements.csv", "diagnostic_class"),
        ("ludb", "ludb.csv", "Rhythms"),
        ("code15", "exams.csv", "patient_id"),
        ("code15", "exams.csv", "AF"),
    ],
)
def test_missing_column_and_unreadable_csv(
    tmp_path: Path, name: str, file: str, column: str
) -> None:
    read, write = READERS[name]
    path = write(tmp_path) / file
    pd.read_csv(path).drop(columns=column).to_csv(path, index=False)
    refused(lambda: read(tmp_path), file, repr(column), "missing")
    for content in (b"", b'a,b\n"1', b"\xff\xfe\x00", b"\x00" * 100):
        path.write_bytes(content)
        refused(lambda: read(tmp_path), file)
    path.unlink()
    refused(lambda: read(tmp_path), file, "missing")


@pytest.mark.parametrize(
    "name, file", [("ptbxl", "ptbxl_database.csv"), ("ludb", "ludb.csv"), ("code15", "exams.csv")]
)
def test_an_index_without_records(tmp_path: Path, name: str, file: str) -> None:
    read, write = READERS[name]
    path = write(tmp_path) / file
    pd.read_csv(path).iloc[:0].to_csv(path, index=False)
    refused(lambda: read(tmp_path), file, "lists no record")


def test_unknown_names(tmp_path: Path) -> None:
    refused(lambda: read_ptbxl(tmp_path, "superklass"), "superklass", "superclass")
    refused(lambda: read_ptbxl(tmp_path, sampling_rate=250), "250")
    refused(lambda: read_cinc2021(tmp_path, "texas"), "texas", "georgia")
    write_cinc(tmp_path / "georgia" / "g1", ["E00001"], ["426783006"])
    refused(lambda: read_cinc2021(tmp_path, "georgia", classes=["AF", "XX"]), "'XX'", "AFL")
    refused(lambda: read_cinc2021(tmp_path / "georgia", "ptb"), "no record of ptb")


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("ecg_id", "x", "line 3"),
        ("strat_fold", 11, "1 to 10"),
        ("patient_id", 1.5, "not a whole number"),
        ("scp_codes", "{'NORM'", "not a list of statements"),
        ("ecg_id", 1, "twice"),
        ("filename_lr", "records100/9", "absent"),
    ],
)
def test_bad_values_in_the_ptbxl_index(
    tmp_path: Path, column: str, value: object, words: str
) -> None:
    path = write_ptbxl(tmp_path, 4) / "ptbxl_database.csv"
    index = pd.read_csv(path).astype(object)
    index.loc[1, column] = value
    index.to_csv(path, index=False)
    refused(lambda: read_ptbxl(tmp_path), words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("name,AF\na,1\n", "no column names the records"),
        ("record,AF\na,1\na,0\n", "twice"),
        ("record,AF\n,1\n", "line 2 has no record"),
        ("record,AF\n", "no column is a class"),
        ("record,note\na,hello\n", "no column is a class"),
        ("record,AF\na,\nb,1\n", "line 2 has no value for the class 'AF'"),
        ("record,AF,fold\na,1,12\n", "line 2 has fold 12"),
        ("record,AF,fold\na,1,x\n", "line 2 has fold 'x'"),
        ("record,labels\n", "lists no record"),
        ("record,AF\nb,1\n", "b.hea: listed but absent"),
    ],
)
def test_bad_label_files(tmp_path: Path, text: str, words: str) -> None:
    write_wfdb(tmp_path, "a", heart_signal())
    (tmp_path / "labels.csv").write_text(text)
    message = refused(lambda: read_wfdb_folder(tmp_path, "labels.csv"))
    assert words in message or "lists no record" in message
    refused(lambda: read_wfdb_folder(tmp_path, "labels.csv", classes=["LBBB"]))


# Records


def one_record(tmp_path: Path) -> Path:
    """A folder with one record `a` and its labels; the header's path."""
    (tmp_path / "labels.csv").write_text("record,AF\na,1\n")
    return write_wfdb(tmp_path, "a", heart_signal())


def read_one(tmp_path: Path, **options) -> Records:
    return read_wfdb_folder(tmp_path, "labels.csv", **options)


def test_record_listed_but_absent(tmp_path: Path) -> None:
    one_record(tmp_path).unlink()
    refused(lambda: read_one(tmp_path), "a.hea", "listed but absent")
    one_record(tmp_path)
    (tmp_path / "a.dat").unlink()
    refused(lambda: read_one(tmp_path), "a.dat", "listed but absent")


@pytest.mark.parametrize("left", [0, 1, 5000, 119_999])
def test_truncated_signal_file(tmp_path: Path, left: int) -> None:
    one_record(tmp_path)
    os.truncate(tmp_path / "a.dat", left)
    refused(lambda: read_one(tmp_path), "a.dat", "truncated")


def test_truncated_header_and_other_formats(tmp_path: Path) -> None:
    header = one_record(tmp_path)
    whole = header.read_text()
    header.write_text(whole[:200])
    refused(lambda: read_one(tmp_path), "a.hea", "12 signals announced")
    header.write_text("")
    refused(lambda: read_one(tmp_path), "a.hea", "empty")
    header.write_text(whole.replace(" 16 ", " 212 ", 12))
    refused(lambda: read_one(tmp_path), "a.hea")


def test_zero_gain_unknown_unit_and_wrong_rate(tmp_path: Path) -> None:
    header = one_record(tmp_path)
    whole = header.read_text()
    for old, new, words in (
        ("1000/mV 16 0 ", "0/mV 16 0 ", "lead I has gain zero"),
        ("1000/mV", "1000/mmHg", "'mmHg'"),
        ("a 12 500", "a 12 0", "sampling rate '0'"),
        ("a 12 500 5000", "a 12", "sampling rate"),
        ("a.dat", "../a.dat", "not a plain file name"),
        ("a.dat 16", "a.dat 16x2", "several samples a frame"),
        ("a 12", "a/3 12", "multi-segment"),
    ):
        header.write_text(whole.replace(old, new, 1))
        refused(lambda: read_one(tmp_path), "a.hea", words)  # noqa: B023


def test_missing_samples_are_counted_or_dropped(tmp_path: Path) -> None:
    one_record(tmp_path)
    signal = heart_signal(seed=2)
    signal[7, 1000:1100] = np.nan
    write_wfdb(tmp_path, "b", signal)
    signal[7] = np.nan
    write_wfdb(tmp_path, "c", signal)
    (tmp_path / "labels.csv").write_text("record,AF\na,1\nb,1\nc,1\n")
    records = read_one(tmp_path)
    left_out = records.left_out[["record_id", "lead", "action"]].values.tolist()
    assert left_out == [["b", "V2", "repaired"], ["c", "V2", "dropped"]]
    assert not np.isnan(records.millivolts()).any()
    refused(
        lambda: read_one(tmp_path, rules={"missing samples": "stop"}),
        "Record b",
        "V2",
        "missing samples",
    )


def test_eleven_leads(tmp_path: Path) -> None:
    one_record(tmp_path)
    write_wfdb(tmp_path, "b", heart_signal()[:11], leads=LEADS[:11])
    write_wfdb(
        tmp_path,
        "c",
        np.delete(heart_signal(), 2, 0),
        leads=tuple(lead for lead in LEADS if lead != "III"),
    )
    (tmp_path / "labels.csv").write_text("record,AF\na,1\nb,1\nc,1\n")
    records = read_one(tmp_path)
    assert list(records.table["record_id"]) == ["a", "c"]
    assert records.left_out[["lead", "action"]].values.tolist() == [
        ["V6", "dropped"],
        ["III", "repaired"],
    ]
    refused(
        lambda: read_one(tmp_path, rules={"lead missing": "stop"}),
        "Record b",
        "V6",
        "11 of 12 leads",
    )


def test_permuted_leads(tmp_path: Path) -> None:
    write_wfdb(tmp_path, "a", heart_signal()[[1, 0, *range(2, 12)]])
    (tmp_path / "labels.csv").write_text("record,AF\na,1\n")
    records = read_one(tmp_path)
    assert "channels hold II, I, III" in records.left_out["detail"].iloc[0]
    refused(
        lambda: read_one(tmp_path, rules={"Einthoven's law broken": "stop"}), "Record a", "permuted"
    )


def damage(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_wrong_checksum_in_the_header(tmp_path: Path) -> None:
    one_record(tmp_path)
    damage(tmp_path / "a.dat")
    refused(lambda: read_one(tmp_path), "a.hea", "checksum", "verify=False")
    assert len(read_one(tmp_path, verify=False)) == 1


def test_wrong_checksum_in_the_list(tmp_path: Path) -> None:
    write_ptbxl(tmp_path, 4)
    files = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    (tmp_path / "SHA256SUMS.txt").write_bytes(sums(files))
    assert len(read_ptbxl(tmp_path)) == 4
    signals = ("records100/00000/00002_lr.dat", "records100/00000/00003_lr.hea")
    for name in (*signals, "ptbxl_database.csv", "scp_statements.csv"):
        damage(tmp_path / name)
        refused(lambda: read_ptbxl(tmp_path), name, "SHA256SUMS.txt", "download the file again")  # noqa: B023
        (tmp_path / name).write_bytes(files[name])
    group = write_cinc(tmp_path / "training" / "georgia" / "g1", ["E00001"], ["426783006"])
    files = {f"training/georgia/g1/{path.name}": path.read_bytes() for path in group.iterdir()}
    (tmp_path / "SHA256SUMS.txt").write_bytes(sums(files))
    damage(group / "E00001.mat")
    refused(lambda: read_cinc2021(tmp_path, "georgia"), "E00001.mat", "SHA256SUMS.txt")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "x/../../secret", "a\0b", "link/secret"]
)
def test_paths_that_point_outside(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    write_wfdb(tmp_path, "secret", heart_signal())
    write_wfdb(outside, "secret", heart_signal())
    write_ptbxl(folder, 4)
    (folder / "link").symlink_to(outside)
    refused(lambda: inside(folder, name, "index"), repr(name)[1:-1])
    if "\0" in name:
        return
    index = pd.read_csv(folder / "ptbxl_database.csv")
    index.loc[2, "filename_lr"] = name
    index.to_csv(folder / "ptbxl_database.csv", index=False)
    refused(lambda: read_ptbxl(folder), "ecg_id 3", name, "points outside", "not opened")
    (folder / "labels.csv").write_text(f"record,AF\n{name},1\n")
    refused(lambda: read_wfdb_folder(folder, "labels.csv"), "line 2", name, "points outside")
    group = write_cinc(folder / "georgia" / "g1", ["E00001"], ["426783006"])
    (group / "link").symlink_to(outside)
    (group / "RECORDS").write_text(f"{name}\n")
    refused(lambda: read_cinc2021(folder, "georgia"), name, "points outside")


def test_structural_faults_can_be_counted_instead(tmp_path: Path) -> None:
    write_ptbxl(tmp_path, 6)
    (tmp_path / "records100/00000/00002_lr.hea").unlink()
    os.truncate(tmp_path / "records100/00000/00004_lr.dat", 100)
    records = read_ptbxl(tmp_path, rules={"unreadable": "drop"})
    assert len(records) == 4 and records.left_out["record_id"].tolist() == ["2", "4"]
    assert (
        records.left_out["fault"].eq("unreadable").all()
        and "truncated" in records.left_out["detail"].iloc[1]
    )


def test_damaged_hdf5_parts(tmp_path: Path) -> None:
    import h5py

    part = write_code15(tmp_path) / "exams_part0.hdf5"
    whole = part.read_bytes()
    for content in (whole[: len(whole) // 2], b"no HDF5 at all", b""):
        part.write_bytes(content)
        refused(lambda: read_code15(tmp_path), "exams_part0.hdf5", "download")
    records = read_code15(tmp_path, rules={"unreadable": "drop"})
    assert len(records) == 8 and records.left_out["record_id"].iloc[0] == "exams_part0.hdf5"
    changes = (
        (lambda file: file.pop("exam_id"), "lacks the dataset"),
        (lambda file: file["exam_id"].write_direct(np.arange(9)), "absent"),
        (
            lambda file: (file.pop("tracings"), file.update(tracings=np.zeros((9, 4096, 11)))),
            "4096, 11",
        ),
    )
    for change, words in changes:
        part.write_bytes(whole)
        with h5py.File(part, "r+") as file:
            change(file)
        refused(lambda: read_code15(tmp_path), "exams_part0.hdf5", words)  # noqa: B023


def test_damaged_wave_marks(tmp_path: Path) -> None:
    marks = write_ludb(tmp_path) / "data" / "1.v1"
    whole = marks.read_bytes()
    for content in (whole[:-2], whole[:5], b""):
        marks.write_bytes(content)
        refused(lambda: read_ludb_marks(tmp_path), "1.v1")
    marks.unlink()
    refused(lambda: read_ludb_marks(tmp_path), "1.v1", "absent")
    refused(lambda: read_ludb_marks(tmp_path, ["../../1"]), "points outside")


# Writing


def sound_records(count: int = 4) -> Records:
    table = pd.DataFrame({"record_id": range(count), "patient_id": "p", "fold": 1, "source": "s"})
    signals = np.stack([heart_signal(100, 2.0, i) for i in range(count)])
    return Records.from_millivolts(signals, 100, table, np.ones((count, 1)), ["A"])


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "cannot be written to"),
        (errno.EIO, "writing failed"),
    ],
)
def test_a_failed_save_keeps_what_was_there(
    tmp_path: Path, monkeypatch, number: int, words: str
) -> None:
    folder = sound_records().save(tmp_path / "records")
    before = Records.load(folder).fingerprint

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(StorageError, match=f"records: .*{words}"):
        sound_records(3).save(folder)
    assert Records.load(folder).fingerprint == before and os.listdir(tmp_path) == ["records"]


def test_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match="disk is full; free some space"):
        sound_records().save(tmp_path / "records")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_while_writing(tmp_path: Path) -> None:
    """In a process that may write files of at most 100 kB: the error of the system call, not of a
    simulation.
    """
    folder = sound_records().save(tmp_path / "records")
    code = (
        "import sys; sys.path[:0] = sys.argv[2].split(chr(58))\nimport resource\nfrom "
        "test_bad_input import sound_records\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, "
        "100_000))\nsound_records(400).save(sys.argv[1])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        folder,
        f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StorageError" in ran.stderr.splitlines()[-1] and "check the disk" in ran.stderr
    assert len(Records.load(folder)) == 4 and os.listdir(tmp_path) == ["records"]


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="records: "):
        sound_records().save(tmp_path / "file" / "records")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # never so for the superuser
        with pytest.raises(StorageError, match="choose another folder or change its permissions"):
            sound_records().save(closed / "records")

    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    write_json(tmp_path / "kept.json", {"a": 1})
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        StorageError, match=r"kept\.json: it cannot be written to; choose another folder"
    ):
        write_json(tmp_path / "kept.json", {"a": 2})
    assert (tmp_path / "kept.json").read_text() == '{\n  "a": 1\n}\n'


def test_an_error_of_the_program_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_file(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise KeyError("bug")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "file", ["records.json", "signals.npy", "targets.npy", "table.csv", "left_out.csv"]
)
def test_damaged_records_folder(tmp_path: Path, file: str) -> None:
    folder = sound_records().save(tmp_path / "records")
    for content in (b"", b"garbage", (folder / file).read_bytes()[:-20]):
        (folder / file).write_bytes(content)
        try:
            assert (
                len(Records.load(folder)) == 4
            )  # a CSV may lose its last characters and still be one
        except DataError as error:
            assert "records" in str(error) and "again" in str(error)
    (folder / file).unlink()
    refused(lambda: Records.load(folder), "records", "again")


# Properties: whatever is in a header or an index file

QUICK = settings(
    max_examples=120,
    deadline=timedelta(seconds=3),
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
ODD = st.sampled_from(
    [
        "",
        "nan",
        "inf",
        "-1",
        "0",
        "1",
        "1e400",
        "-0.0",
        "9" * 40,
        "1/2",
        "16x0",
        "16+",
        "16+99999999",
        "212",
        "8",
        "310",
        "516",
        "61",
        "(",
        "1000(",
        "1000()",
        "1000(x)/mV",
        "/",
        "/mV",
        "1000/",
        "µV",
        "..",
        "../a.dat",
        "/dev/zero",
        "a\0b",
        "#",
        "\ufeff",
        "１２",
        "0x10",
        "1_0",
        "None",
        "x" * 300,
    ]
)
KINDS = st.sampled_from(["field", "byte", "cut", "repeat line", "drop line", "swap"])
EDITS = st.lists(
    st.tuples(KINDS, st.integers(0, 10**6), ODD, st.integers(0, 255)), min_size=1, max_size=4
)


def mutate(content: bytes, edits: list, separator: str) -> bytes:
    """Apply edits to fields, bytes and lines."""
    for kind, place, odd, byte in edits:
        lines = content.decode("utf-8", "replace").split("\n")
        row = place % len(lines)
        if kind == "field":
            fields = lines[row].split(separator)
            fields[place // 7 % len(fields)] = odd
            lines[row] = separator.join(fields)
        elif kind == "repeat line":
            lines.insert(row, lines[row])
        elif kind == "drop line":
            del lines[row]
        content = "\n".join(lines).encode("utf-8", "replace")
        if kind == "byte" and content:
            content = (
                content[: place % len(content)]
                + bytes([byte])
                + content[place % len(content) + 1 :]
            )
        elif kind == "cut":
            content = content[: place % (len(content) + 1)]
        elif kind == "swap":
            content = content[place % (len(content) + 1) :] + content[: place % (len(content) + 1)]
    return content


@pytest.fixture(scope="module")
def header_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headers")
    write_cinc(folder / "georgia" / "g1", ["E00001"], ["426783006"], rate=100)
    write_wfdb(folder, "a", heart_signal(100), 100, comments=("age: 50",))
    (folder / "labels.csv").write_text("record,AF\na,1\n")
    for name in ("a.hea", "georgia/g1/E00001.hea"):
        (folder / f"{name}.original").write_bytes((folder / name).read_bytes())
    return folder


@QUICK
@given(edits=EDITS)
@example(edits=[("field", 8, "8", 0)] * 4)
@example(edits=[("field", 7 * 3, "9" * 11, 0), ("field", 7 + 6, "212", 0)])
def test_any_header_is_read_or_refused(header_folder: Path, edits: list) -> None:
    path = header_folder / "a.hea"
    path.write_bytes(mutate((header_folder / "a.hea.original").read_bytes(), edits, " "))
    try:
        header = read_header(path)
        assert isinstance(header, Header) and read_millivolts(header, verify=True).shape[0] == len(
            header.channels
        )
    except DataError as error:
        assert str(header_folder) in str(error) and "\n" not in str(error)
    try:
        assert len(read_wfdb_folder(header_folder, "labels.csv", verify=False)) == 1
    except DataError as error:
        assert str(error)


@QUICK
@given(
    content=st.binary(max_size=400)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_as_a_header(header_folder: Path, content: bytes) -> None:
    path = header_folder / "b.hea"
    path.write_bytes(content)
    try:
        read_millivolts(read_header(path))
    except DataError as error:
        assert str(header_folder) in str(error)


@QUICK
@given(edits=EDITS)
def test_any_cinc_header_is_read_or_refused(header_folder: Path, edits: list) -> None:
    path = header_folder / "georgia" / "g1" / "E00001.hea"
    path.write_bytes(mutate(Path(f"{path}.original").read_bytes(), edits, " "))
    try:
        assert len(read_cinc2021(header_folder, "georgia")) == 1
    except DataError as error:
        assert str(error)


INDEX_FILES = ("ptbxl_database.csv", "scp_statements.csv", "ludb.csv", "exams.csv", "labels.csv")


@pytest.fixture(scope="module", params=INDEX_FILES)
def index_file(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Callable]:
    folder = tmp_path_factory.mktemp("index")
    if request.param == "labels.csv":
        write_wfdb(folder, "a", heart_signal(100), 100)
        write_wfdb(folder, "b", heart_signal(100), 100)
        (folder / "labels.csv").write_text(
            "record,patient_id,fold,AF,LBBB,age\na,1,9,0,1,50\nb,2,10,1,0,60\n"
        )
        read = READERS["wfdb"][0]
    elif "ptb" in request.param or "scp" in request.param:
        write_ptbxl(folder, 4)
        read = lambda path: read_ptbxl(path, "all")  # noqa: E731
    elif request.param == "ludb.csv":
        write_ludb(folder, 2)
        read = lambda path: read_ludb(path, sampling_rate=500)  # noqa: E731
    else:
        write_code15(folder, 1, 2)
        read = read_code15
    return folder / request.param, (folder / request.param).read_bytes(), read


@settings(QUICK, max_examples=50)
@given(edits=EDITS)
def test_any_index_file_is_read_or_refused(
    index_file: tuple[Path, bytes, Callable], edits: list
) -> None:
    path, original, read = index_file
    path.write_bytes(mutate(original, edits, ","))
    try:
        assert isinstance(read(path.parent), Records)
    except DataError as error:
        assert str(error)

"""Each source read from small files in its real layout, and from the real files where they are at
hand.
"""

import hashlib
import http.server
import json
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecglib.errors import DataError, StorageError
from ecglib.records import LEADS
from ecglib.sources import download as downloads
from ecglib.sources import read_source
from ecglib.sources.cinc2021 import DATASETS, SCORED, class_codes, read_cinc2021
from ecglib.sources.code15 import read_code15, strip_zeros
from ecglib.sources.download import download
from ecglib.sources.index_files import ten_folds
from ecglib.sources.ludb import read_annotations, read_ludb, read_ludb_marks
from ecglib.sources.ptbxl import TASKS, read_ptbxl
from ecglib.sources.wfdb_files import read_header, read_millivolts
from ecglib.sources.wfdb_folder import read_wfdb_folder
from toolkit import (
    SHARED,
    annotation_bytes,
    heart_signal,
    sums,
    write_cinc,
    write_code15,
    write_ludb,
    write_ptbxl,
    write_wfdb,
)

CINC, LUDB, PTBXL = SHARED / "cinc2021-samples", SHARED / "ludb", SHARED / "ptb-xl-subset"
needs_cinc = pytest.mark.skipif(not CINC.is_dir(), reason="the CinC 2021 samples are not here")
needs_ludb = pytest.mark.skipif(not LUDB.is_dir(), reason="LUDB is not here")
needs_ptbxl = pytest.mark.skipif(not PTBXL.is_dir(), reason="the PTB-XL subset is not here")


# WFDB files


def test_signals_are_those_that_wfdb_reads(tmp_path: Path) -> None:
    import wfdb

    header = read_header(write_wfdb(tmp_path, "one", heart_signal(), gain="800(12)/mV"))
    expected = wfdb.rdrecord(str(tmp_path / "one")).p_signal.T
    np.testing.assert_allclose(read_millivolts(header, verify=True), expected, atol=1e-6)


@needs_cinc
def test_every_checksum_of_the_real_samples_holds() -> None:
    headers = [read_header(path) for path in sorted(CINC.glob("*/g1/*.hea"))]
    assert len(headers) == 67
    assert all(len(read_millivolts(header, verify=True)) == 12 for header in headers)


# PTB-XL


def test_ptbxl_layout(tmp_path: Path) -> None:
    records = read_ptbxl(write_ptbxl(tmp_path))
    assert (len(records), records.classes, records.signals.shape) == (
        20,
        ("HYP", "MI", "NORM"),
        (20, 12, 1000),
    )
    assert (
        set(records.table["fold"]) == set(range(1, 11))
        and records.table["patient_id"].nunique() == 10
    )
    np.testing.assert_allclose(records.millivolts([0])[0], heart_signal(100, seed=1), atol=0.00051)
    assert {task: len(read_ptbxl(tmp_path, task).classes) for task in TASKS}["rhythm"] == 1


@needs_ptbxl
def test_real_ptbxl_counts() -> None:
    records = read_ptbxl(PTBXL)
    counts = {name: value["any statement"] for name, value in records.about["class_counts"].items()}
    assert counts == {"NORM": 1164, "STTC": 622, "MI": 600, "CD": 535, "HYP": 311}
    assert (
        len(records),
        records.table["patient_id"].nunique(),
        records.about["without_class"],
    ) == (2550, 2496, 50)


# CinC 2021

PUBLISHED_COUNTS = {  # Table S1 of the CE-SSL paper
    "georgia": (
        "AF 570, IAVB 769, IRBBB 407, LAD 940, LBBB 231, LQRSV 374, NSIVCB 203, NSR 1752, "
        "PAC 639, LQT 1391, QAb 464, RBBB 542, SA 455, SB 1677, STach 1261, TAb 2306, "
        "TInv 812, VPB 357"
    ),
    "ptb-xl": (
        "AF 1514, CRBBB 542, IAVB 797, IRBBB 1118, LAD 5146, LAnFB 1626, LBBB 536, NSIVCB "
        "789, NSR 18092, PAC 398, PR 296, LPR 340, QAb 548, RAD 343, SA 772, SB 637, "
        "STach 826, TAb 2345, TInv 294"
    ),
    "ningbo": (
        "AFL 7615, BBB 385, CLBBB 213, CRBBB 1096, IAVB 893, IRBBB 246, LAD 1163, LAnFB "
        "380, LQRSV 794, NSIVCB 536, NSR 6299, PAC 1054, PR 1182, PRWP 638, PVC 1091, LQT "
        "337, QAb 828, RAD 638, SA 2550, SB 12670, STach 5687, TAb 5167, TInv 2720"
    ),
    "chapman": (
        "AF 1780, AFL 445, IAVB 247, LAD 382, LBBB 205, LQRSV 249, NSIVCB 235, NSR 1826, "
        "PAC 258, QAb 235, RAD 215, RBBB 454, SB 3889, STach 1568, TAb 1876, VPB 294"
    ),
}


@pytest.mark.parametrize(
    "dataset, size", [("georgia", 18), ("ptb-xl", 19), ("ningbo", 23), ("chapman", 16)]
)
def test_default_classes_are_ce_ssls(dataset: str, size: int) -> None:
    published = {
        name: int(count)
        for name, count in (item.split() for item in PUBLISHED_COUNTS[dataset].split(", "))
    }
    scored = pd.read_csv(SCORED, index_col="abbreviation")
    assert len(class_codes(dataset)) == size and list(class_codes(dataset)) == list(published)
    assert scored.loc[list(published), dataset].to_dict() == published


def test_scored_codes_are_the_challenges() -> None:
    codes = class_codes("georgia", ["AF", "RBBB", "CRBBB", "NSR", "VPB"])
    assert codes == {
        "AF": {"164889003"},
        "CRBBB": {"713427006"},
        "RBBB": {"59118001"},
        "NSR": {"426783006"},
        "VPB": {"17338001"},
    }
    assert class_codes("ningbo", merge_equivalent=True)["RBBB"] == {"59118001", "713427006"}
    assert (
        len(class_codes("cpsc_extra", merge_equivalent=True)) < len(class_codes("cpsc_extra")) == 23
    )


def test_cinc_oddities_lengths_and_rate(tmp_path: Path) -> None:
    group = tmp_path / "training" / "georgia" / "g1"
    write_cinc(
        group, ["E00001", "E00002"], ["426783006", "59118001,164934002"], record_line="E00001.mat"
    )
    write_cinc(
        group.with_name("g2"), ["E00003"], ["164865005"], rate=1000, seconds=12, gain="4880/mV"
    )
    write_cinc(
        group.with_name("g3"), ["E00004"], ["426783006"], rate=257, seconds=6, gain="1000/mv"
    )
    for folder in (tmp_path, tmp_path / "training", tmp_path / "training" / "georgia"):
        records = read_cinc2021(folder, "georgia")
        assert (
            records.signals.shape == (4, 12, 1000)
            and list(records.table["record_id"])[2] == "E00003"
        )
    found = Counter(zip(records.left_out["fault"], records.left_out["action"], strict=True))
    assert found == {
        ("header", "repaired"): 3,
        ("length", "cut"): 1,
        ("length", "padded with zeros"): 1,
    }
    assert records.targets[1, [records.classes.index("RBBB"), records.classes.index("TAb")]].all()
    assert (
        records.about["without_class"] == 1
        and np.isnan(records.table["age"][0])
        and records.table["age"][1] == 61
    )
    assert len(read_cinc2021(tmp_path, "georgia", keep_without_class=False)) == 3
    true = np.ptp(heart_signal(1000, 12, 0), axis=1)
    np.testing.assert_allclose(
        np.ptp(records.millivolts([2])[0], axis=1), true, rtol=0.25
    )  # not 4.88 times smaller


def test_chapman_and_ningbo_are_told_apart_by_number(tmp_path: Path) -> None:
    write_cinc(
        tmp_path / "chapman_ningbo" / "g1",
        ["JS00001", "JS10646", "JS10647", "JS45551"],
        ["164889003"] * 4,
    )
    assert list(read_cinc2021(tmp_path, "chapman").table["record_id"]) == ["JS00001", "JS10646"]
    assert list(read_cinc2021(tmp_path / "chapman_ningbo", "ningbo").table["record_id"]) == [
        "JS10647",
        "JS45551",
    ]


def test_cinc_ptbxl_takes_patients_from_ptbxls_index(tmp_path: Path) -> None:
    write_ptbxl(tmp_path / "ptb-xl-index", 4)
    write_cinc(tmp_path / "ptb-xl" / "g1", ["HR00001", "HR00002", "HR00003"], ["426783006"] * 3)
    alone = read_cinc2021(tmp_path, "ptb-xl")
    assert alone.table["patient_id"].nunique() == 3 and "several folds" in alone.about["split"]
    known = read_cinc2021(tmp_path, "ptb-xl", ptbxl_index=tmp_path / "ptb-xl-index")
    assert list(known.table["patient_id"]) == ["1000", "1000", "1001"] and list(
        known.table["fold"]
    ) == [1, 1, 2]


@needs_cinc
def test_all_67_real_samples_are_read_and_plausible() -> None:
    counts = {}
    for dataset in DATASETS:
        records = read_cinc2021(CINC, dataset)
        signals = records.millivolts()
        counts[dataset] = len(records)
        assert 0.4 < np.median(np.ptp(signals[:, 1], axis=1)) < 3.0 and np.abs(signals).max() < 10
        assert records.validate().empty and records.signals.shape[1:] == (12, 1000)
    assert counts == {
        "georgia": 24,
        "chapman": 7,
        "ningbo": 17,
        "cpsc": 6,
        "cpsc_extra": 6,
        "ptb-xl": 4,
        "ptb": 3,
    }


def test_resampling_removes_what_would_alias(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(
        2 * np.pi * 90 * np.arange(5000) / 500
    )  # would appear at 10 Hz after decimation to 100 Hz
    write_wfdb(tmp_path, "tone", heart_signal() * 0 + heart_signal(seed=3))
    write_wfdb(
        tmp_path,
        "noisy",
        heart_signal(seed=3) + np.outer([1, 1, 0, -1, 0.5, 0.5, 1, 1, 1, 1, 1, 1], tone),
    )
    (tmp_path / "labels.csv").write_text("record,AF\ntone,0\nnoisy,1\n")
    records = read_wfdb_folder(tmp_path, "labels.csv")
    difference = np.diff(records.millivolts(), axis=0)[0, :, 50:-50]
    assert np.abs(difference).max() < 0.01


# LUDB


def test_ludb_layout_uses_one_scale(tmp_path: Path) -> None:
    records = read_ludb(write_ludb(tmp_path))
    assert records.signals.shape == (4, 12, 5000)
    np.testing.assert_allclose(records.millivolts([0])[0], heart_signal(seed=1), atol=0.0006)
    assert records.validate().empty and read_ludb(tmp_path, sampling_rate=100).signals.shape == (
        4,
        12,
        1000,
    )
    positive = {
        name for name, value in zip(records.classes, records.targets[0], strict=True) if value
    }
    assert positive == {"SR", "1AVB", "LVH", "LAO/LAE"} and records.table["age"][0] == 90


def test_ludb_marks(tmp_path: Path) -> None:
    marks = read_ludb_marks(write_ludb(tmp_path), ["2"])
    assert len(marks) == 36 and set(marks["lead"]) == set(LEADS)
    first = marks[marks["lead"] == "V1"]
    assert first[["wave", "onset", "peak", "offset"]].to_numpy().tolist() == [
        ["P", 600, 620, 640],
        ["QRS", 660, 680, 700],
        ["T", 2000, 2100, 2200],
    ]
    assert read_ludb_marks(tmp_path, ["2"], sampling_rate=100)["peak"].tolist()[:3] == [
        124,
        136,
        420,
    ]


@pytest.mark.parametrize(
    "marks, waves",
    [
        (
            [(5, 1), (8, 40), (10, 39), (12, 27), (15, 40)],
            [("QRS", None, 5, 8), ("T", 10, 12, 15)],
        ),  # no onset
        ([(5, 1), (6, 39), (8, 40)], [("QRS", 5, 5, 8)]),  # onset behind the peak
        (
            [(1, 39), (2, 1), (4, 39), (6, 27), (9, 40)],
            [("QRS", 1, 2, None), ("T", 4, 6, 9)],
        ),  # no offset
        (
            [(1, 39), (2, 39), (4, 27), (5, 27), (8, 40), (9, 40)],
            [("T", 1, 4, 8), ("T", 2, 5, 9)],
        ),  # overlapping
        (
            [(1, 39), (9, 40), (11, 39), (12, 27), (14, 40)],
            [("T", 11, 12, 14)],
        ),  # borders without a peak
    ],
)
def test_odd_marks(tmp_path: Path, marks: list, waves: list) -> None:
    folder = write_ludb(tmp_path, 1)
    (folder / "data" / "1.v6").write_bytes(annotation_bytes(marks))
    found = read_ludb_marks(folder)
    found = found[found["lead"] == "V6"][["wave", "onset", "peak", "offset"]]
    assert [
        tuple(None if value is pd.NA else value for value in row) for row in found.to_numpy()
    ] == waves


@needs_ludb
def test_real_ludb_and_its_marks() -> None:
    records = read_ludb(LUDB, sampling_rate=500)
    assert len(records) == 200 and records.left_out.empty and records.validate().empty
    expected = {
        "SR": 143,
        "SBRAD": 25,
        "AFIB": 15,
        "AFLT": 3,
        "1AVB": 10,
        "3AVB": 5,
        "IRBBB": 29,
        "LVH": 108,
    }
    assert {name: records.about["class_counts"][name] for name in expected} == expected
    limb = records.signals[:, :3].astype(int)
    assert np.abs(limb[:, 1] - limb[:, 0] - limb[:, 2]).max() == 0  # exact on the counts
    marks = read_ludb_marks(LUDB)
    assert marks["wave"].value_counts().to_dict() == {"QRS": 21965, "T": 19661, "P": 16797}
    assert marks["record_id"].nunique() == 200 and not (marks["onset"] > marks["peak"]).any()
    assert (
        90 < (2 * (marks["offset"] - marks["onset"]))[marks["wave"] == "QRS"].median() < 100
    )  # ms


@needs_ludb
@pytest.mark.parametrize("record, lead", [(1, "i"), (116, "v1"), (200, "avf")])
def test_marks_are_those_that_wfdb_reads(record: int, lead: str) -> None:
    import wfdb

    theirs = wfdb.rdann(str(LUDB / "data" / str(record)), lead)
    symbols = {39: "(", 40: ")", 24: "p", 1: "N", 27: "t"}
    ours = read_annotations(LUDB / "data" / f"{record}.{lead}")
    assert ours and [(s, symbols[c]) for s, c in ours] == list(
        zip(theirs.sample.tolist(), theirs.symbol, strict=True)
    )


# CODE-15 %


def test_code15_layout(tmp_path: Path) -> None:
    records = read_code15(write_code15(tmp_path))
    assert records.signals.shape == (16, 12, 1000) and records.classes == (
        "1dAVb",
        "RBBB",
        "LBBB",
        "SB",
        "AF",
        "ST",
    )
    assert records.about["filler_rows"] == 2 and records.about["not_downloaded"] == 0
    assert records.left_out["action"].tolist() == ["padded with zeros"] * 8  # the 7 s recordings
    assert records.table.groupby("patient_id")["fold"].nunique().max() == 1
    assert records.targets[4].tolist() == [0, 0, 0, 0, 0, 1]  # in the file ST stands before AF
    assert records.table["sex"].tolist()[:2] == [1, 0]
    short = records.millivolts([1])[0]
    assert (
        np.abs(short[:, 700:]).max() == 0 and np.abs(short[:, :10]).max() > 0
    )  # starts at once, ends in zeros


def test_code15_unit_parts_and_empty_tracings(tmp_path: Path) -> None:
    import h5py

    write_code15(tmp_path)
    (tmp_path / "exams_part1.hdf5").unlink()
    with h5py.File(tmp_path / "exams_part0.hdf5", "r+") as file:
        file["tracings"][3] = 0
        file["exam_id"][-1] = 77
    records = read_code15(tmp_path, millivolts_per_unit=0.1)
    assert (
        len(records) == 7
        and records.about["not_downloaded"] == 8
        and records.about["not_in_index"] == 1
    )
    dropped = records.left_out[records.left_out["action"] == "dropped"]
    assert dropped[["record_id", "fault"]].values.tolist() == [["103", "flat lead"]]
    assert np.abs(records.millivolts()).max() < 0.5


def test_strip_zeros_keeps_inner_zeros() -> None:
    tracing = np.zeros((10, 2))
    tracing[3, 0] = tracing[6, 1] = 1.0
    assert strip_zeros(tracing).shape == (4, 2) and strip_zeros(np.zeros((5, 2))).shape == (5, 2)


# Any WFDB folder


def test_wfdb_folder_with_class_columns(tmp_path: Path) -> None:
    for name in ("0001", "deep/0002", "0003"):
        write_wfdb((tmp_path / name).parent, Path(name).name, heart_signal(seed=int(name[-1])))
    (tmp_path / "labels.csv").write_text(
        "record,patient_id,AF,LBBB,height,sex\n0001,007,1,0,180.5,1\ndeep/0002,007,0,1,170,0\n0003,8,0,0,160,1\n"
    )
    records = read_wfdb_folder(tmp_path, "labels.csv")
    assert records.classes == ("AF", "LBBB") and records.targets.tolist() == [
        [1, 0],
        [0, 1],
        [0, 0],
    ]
    table = records.table
    assert list(table["patient_id"]) == ["007", "007", "8"] and table["fold"][0] == table["fold"][1]
    assert records.about["not_classes"] == ["height", "sex"] and table["height"].tolist() == [
        180.5,
        170.0,
        160.0,
    ]
    assert read_wfdb_folder(tmp_path, tmp_path / "labels.csv", classes=["LBBB"]).classes == (
        "LBBB",
    )


def test_wfdb_folder_with_a_labels_column_and_folds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_wfdb(tmp_path, name, heart_signal(seed=ord(name)))
    (tmp_path / "labels.csv").write_text("filename,labels,fold\na.hea,AF; LBBB,9\nb,,10\n")
    records = read_wfdb_folder(tmp_path, "labels.csv")
    assert records.classes == ("AF", "LBBB") and records.targets.tolist() == [[1, 1], [0, 0]]
    assert records.table["fold"].tolist() == [9, 10] and records.about["without_class"] == 1


def test_ten_folds_keep_patients_whole_and_classes_even() -> None:
    generator = np.random.default_rng(0)
    patients = np.repeat([f"p{i}" for i in range(1000)], generator.integers(1, 4, 1000))
    targets = (generator.random((len(patients), 4)) < [0.4, 0.1, 0.03, 0.01]).astype(np.uint8)
    folds = ten_folds(patients, targets)
    assert pd.Series(folds).groupby(patients).nunique().max() == 1 and set(folds) == set(
        range(1, 11)
    )
    fold_of = pd.Series(folds, patients).groupby(level=0).first()
    carriers = pd.DataFrame(targets).groupby(patients).max().groupby(fold_of).sum()
    spread = (
        carriers.max() - carriers.min()
    ).to_numpy()  # patients with each class, between the folds
    assert spread[3] <= 1 and (spread <= [8, 4, 2, 1]).all()
    order = generator.permutation(len(patients))
    again = ten_folds(patients[order], targets[order])
    np.testing.assert_array_equal(again, folds[order])  # whatever the order of files


# Download, from a server on this machine


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` (name -> bytes) and misbehaves as `faults` say: name -> list of faults, one
    used up a request.
    """

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        server = self.server
        server.requests.append((name, self.headers.get("Range")))
        fault = server.faults.get(name, []).pop(0) if server.faults.get(name) else None
        if fault == "error" or name not in server.files:
            self.send_error(503 if fault == "error" else 404)
            return
        body = server.files[name]
        start = 0
        if self.headers.get("Range") and fault != "ignore range":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        part = body[start:] if fault != "corrupt" else bytes(len(body) - start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if fault == "drop" else part)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Keep the tests quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    body = np.random.default_rng(0).bytes(600_000)
    started.files = {
        "records100/00000/1.dat": body,
        "records100/00000/1.hea": b"1 12 100 1000\n",
        "RECORDS": b"x\n",
    }
    started.files["SHA256SUMS.txt"] = sums(started.files)
    started.faults, started.requests = {}, []
    started.address = f"http://127.0.0.1:{started.server_address[1]}/"
    threading.Thread(target=started.serve_forever, args=(0.02,), daemon=True).start()
    yield started
    started.shutdown()
    started.server_close()


def fetch(server, folder: Path, **options) -> None:
    download("ptb-xl", folder, **{"addresses": [server.address], **options})


def is_complete(server, folder: Path) -> bool:
    right = all((folder / name).read_bytes() == body for name, body in server.files.items())
    return right and not list(folder.rglob("*.part"))


def test_download_and_a_second_call_fetches_nothing(server, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path)
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == []


def test_download_fetches_only_what_is_missing_or_wrong(server, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    (tmp_path / "RECORDS").unlink()
    (tmp_path / "records100/00000/1.hea").write_text("damaged")
    server.requests.clear()
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path)
    assert {name for name, _ in server.requests} == {"RECORDS", "records100/00000/1.hea"}


def test_download_resumes_after_dropped_connections(server, tmp_path: Path) -> None:
    server.faults["records100/00000/1.dat"] = ["drop", "drop", "drop"]
    server.faults["SHA256SUMS.txt"] = ["drop"]
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path)
    starts = [
        int((asked or "bytes=0-")[6:-1])
        for name, asked in server.requests
        if name.endswith("1.dat")
    ]
    assert (
        len(starts) == 4 and np.diff(starts).min() > 50_000
    )  # each request goes on where the last one broke


def test_download_starts_anew_where_the_server_ignores_ranges(server, tmp_path: Path) -> None:
    server.faults["records100/00000/1.dat"] = ["drop", "ignore range"]
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path)


def test_download_survives_corrupted_bytes_errors_and_a_stale_part(server, tmp_path: Path) -> None:
    server.faults = {
        "records100/00000/1.dat": ["corrupt"],
        "RECORDS": ["error", "error"],
        "SHA256SUMS.txt": ["error"],
    }
    (tmp_path / "records100/00000").mkdir(parents=True)
    (tmp_path / "records100/00000/1.hea.part").write_bytes(
        b"of another version, and longer than the file"
    )
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path)


def test_download_continues_a_part_left_by_a_killed_run(server, tmp_path: Path) -> None:
    name = "records100/00000/1.dat"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / f"{name}.part").write_bytes(server.files[name][:123_456])
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path) and (name, "bytes=123456-") in server.requests


def test_download_falls_to_the_next_mirror(server, tmp_path: Path) -> None:
    nothing_there = "http://127.0.0.1:9/"
    fetch(server, tmp_path, addresses=[nothing_there, server.address])
    assert is_complete(server, tmp_path)


def test_download_gives_up_in_one_sentence(server, tmp_path: Path) -> None:
    server.faults["records100/00000/1.dat"] = ["corrupt"] * 10
    with pytest.raises(
        DataError, match=r"1\.dat: could not be fetched .*wrong checksum.*start again"
    ):
        fetch(server, tmp_path)
    assert not (tmp_path / "records100/00000/1.dat").exists()
    with pytest.raises(DataError, match="list of files could not be fetched.*start again"):
        fetch(server, tmp_path / "new", addresses=["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match="no data set 'ptbxl'"):
        download("ptbxl", tmp_path)


def test_download_asks_once_for_a_file_that_is_refused(server, tmp_path: Path) -> None:
    del server.files["RECORDS"]
    with pytest.raises(DataError, match="RECORDS: could not be fetched .*HTTP 404"):
        fetch(server, tmp_path)
    assert [name for name, _ in server.requests].count("RECORDS") == 1


@pytest.mark.parametrize("name", ["../../evil", "/evil", "records100/../../evil"])
def test_download_never_leaves_its_folder(server, tmp_path: Path, name: str) -> None:
    server.files["SHA256SUMS.txt"] = sums({"RECORDS": b"x\n", name: b"bad"})
    with pytest.raises(DataError, match="points outside"):
        fetch(server, tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("evil")) and [asked for asked, _ in server.requests] == [
        "SHA256SUMS.txt"
    ]


def test_download_says_when_the_disk_is_too_small(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(StorageError, match=r"3\.1 GB are needed and 0\.0 GB free"):
        fetch(server, tmp_path)


def test_download_of_a_part_and_the_command_line(
    server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["ptb-xl", str(tmp_path), "--address", server.address]
    assert downloads.main([*arguments, "--only", "*.hea"]) == 0
    assert (tmp_path / "records100/00000/1.hea").exists() and not (tmp_path / "RECORDS").exists()
    assert downloads.main([*arguments, "--only", "nothing*"]) == 1
    assert "no file of its index matches 'nothing*'" in capsys.readouterr().err


def test_download_unpacks_zenodo_parts(server, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        archive.writestr("exams_part0.hdf5", b"h" * 5000)
    body = (tmp_path / "part.zip").read_bytes()
    entry = {
        "key": "exams_part0.zip",
        "checksum": f"md5:{hashlib.md5(body).hexdigest()}",
        "size": len(body),
    }
    server.files = {"exams_part0.zip": body, "zenodo.json": json.dumps({"files": [entry]}).encode()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            downloads.DATASETS,
            "code15",
            downloads.DataSet(("",), 0.001, "https://zenodo.invalid/api"),
        )
        for _ in range(2):
            download("code15", tmp_path / "code", addresses=[server.address])
    assert (tmp_path / "code/exams_part0.hdf5").read_bytes() == b"h" * 5000
    assert not (tmp_path / "code/exams_part0.zip").exists()
    assert [name for name, _ in server.requests] == ["zenodo.json", "exams_part0.zip"]


def test_a_slow_failing_download_keeps_finished_files(server, tmp_path: Path) -> None:
    server.faults["records100/00000/1.dat"] = ["drop"] + ["error"] * 50
    begun = time.monotonic()
    with pytest.raises(DataError):
        fetch(server, tmp_path)
    assert (
        time.monotonic() - begun < 10
        and (tmp_path / "records100/00000/1.dat.part").stat().st_size > 200_000
    )
    server.faults.clear()
    fetch(server, tmp_path)
    assert is_complete(server, tmp_path)


def test_a_folder_is_told_apart_by_its_index_file(tmp_path):
    write_wfdb(tmp_path / "own", "a", heart_signal())
    (tmp_path / "own" / "labels.csv").write_text("record,AF\na,1\n")
    found = {
        "ptb": write_ptbxl(tmp_path / "ptb"),
        "ludb": write_ludb(tmp_path / "ludb"),
        "code": write_code15(tmp_path / "code"),
        "own": tmp_path / "own",
    }
    for name, folder in found.items():
        records = read_source(folder, sampling_rate=100)
        assert (
            len(records)
            and records.sampling_rate == 100
            and records.signals.shape[1:] == (12, 1000)
        ), name
        assert {"source", "simulated", "task"} <= set(records.about), name
    with pytest.raises(DataError, match="holds none of ptbxl_database.csv"):
        read_source(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_source(tmp_path / "absent")

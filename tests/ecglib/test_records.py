"""`Records`: saved and loaded, selected, validated; and `assemble`, which repairs, drops or stops
by stated rules.
"""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecglib.errors import DataError
from ecglib.records import (
    LEADS,
    LEFT_OUT_COLUMNS,
    MISSING,
    Records,
    find_faults,
    limb_permutation,
    to_counts,
)
from ecglib.sources.assemble import RULES, Recording, assemble
from ecglib.sources.wfdb_folder import read_wfdb_folder
from toolkit import heart_signal, write_wfdb


def make_records(count: int = 6, seed: int = 0, **changes) -> Records:
    """Sound records of 2 s at 100 Hz, two a patient."""
    signals = np.stack([heart_signal(100, 2.0, seed + i) for i in range(count)])
    table = pd.DataFrame(
        {
            "record_id": [f"r{i}" for i in range(count)],
            "patient_id": [f"p{i // 2}" for i in range(count)],
            "fold": [i % 10 + 1 for i in range(count)],
            "source": "test",
            "age": 50.5,
        }
    )
    targets = np.eye(3, dtype=np.uint8)[np.arange(count) % 3]
    parts = {
        "sampling_rate": 100.0,
        "table": table,
        "targets": targets,
        "classes": ("A", "B", "C"),
        **changes,
    }
    return Records.from_millivolts(parts.pop("signals", signals), *parts.values())


def recording(
    signal: np.ndarray, name: str = "r", rate: float = 100, leads: tuple[str, ...] = LEADS
) -> Recording:
    row = {"record_id": name, "patient_id": name, "fold": 1, "source": "test"}
    return Recording(leads, np.array(signal, dtype=np.float32), rate, row, np.array([1], np.uint8))


def put_together(*recordings: Recording, rules: dict | None = None) -> Records:
    return assemble([("test", recordings)], ["A"], 100, 10.0, {"source": "test"}, rules)


def sound(seed: int = 0) -> np.ndarray:
    return heart_signal(100, 10.0, seed)


# Save, load, select


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    records = make_records()
    records.about["note"] = "kept"
    loaded = Records.load(records.save(tmp_path / "records"))
    np.testing.assert_array_equal(loaded.signals, records.signals)
    np.testing.assert_array_equal(loaded.targets, records.targets)
    pd.testing.assert_frame_equal(loaded.table, records.table, check_dtype=False)
    assert (loaded.classes, loaded.scale, loaded.sampling_rate) == (
        records.classes,
        records.scale,
        100.0,
    )
    assert loaded.fingerprint == records.fingerprint and loaded.about == {"note": "kept"}
    assert list(loaded.left_out.columns) == list(LEFT_OUT_COLUMNS)


def test_loaded_signals_stay_on_disk(tmp_path: Path) -> None:
    make_records().save(tmp_path / "records")
    loaded = Records.load(tmp_path / "records")
    assert isinstance(loaded.signals, np.memmap) and not loaded.signals.flags.writeable


def test_millivolts_and_missing_samples() -> None:
    signals = np.stack([sound()])
    signals[0, 3, 5] = np.nan
    counts = to_counts(signals)
    assert counts[0, 3, 5] == MISSING and to_counts(np.array([40.0, -40.0])).tolist() == [
        32767,
        -32767,
    ]
    records = make_records(1, signals=signals)
    values = records.millivolts()
    assert np.isnan(values[0, 3, 5]) and values.dtype == np.float32
    np.testing.assert_allclose(values[0, 2], signals[0, 2], atol=0.00051)


def test_fingerprint_changes_with_what_matters(tmp_path: Path) -> None:
    base = make_records()
    other_signal = base.millivolts()
    other_signal[0, 0, 0] += 0.01
    other_table = base.table.assign(fold=3)
    changed = [
        make_records(signals=other_signal),
        make_records(targets=1 - base.targets),
        make_records(table=other_table),
        make_records(classes=("A", "B", "D")),
        make_records(sampling_rate=101.0),
        base.select([1, 0, 2, 3, 4, 5]),
    ]
    prints = {base.fingerprint, *(records.fingerprint for records in changed)}
    assert len(prints) == 7 and make_records().fingerprint == base.fingerprint
    assert make_records(table=base.table.assign(age=1.0)).fingerprint == base.fingerprint


def test_select_by_mask_and_by_position() -> None:
    records = make_records()
    mask = records.table["patient_id"] == "p1"
    assert list(records.select(mask.to_numpy()).table["record_id"]) == ["r2", "r3"]
    chosen = records.select([5, 0])
    assert list(chosen.table["record_id"]) == ["r5", "r0"] and len(chosen.select([])) == 0
    np.testing.assert_array_equal(chosen.signals, records.signals[[5, 0]])
    with pytest.raises(DataError, match="does not exist among 6 records"):
        records.select([6])
    with pytest.raises(DataError, match="mask has"):
        records.select(np.array([True]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"signals": np.zeros((6, 11, 5))}, r"\(records, 12, time\)"),
        ({"targets": np.zeros((5, 3))}, "one row a record"),
        ({"classes": ("A",)}, "one column a class"),
        ({"table": pd.DataFrame({"record_id": range(6)})}, "lacks the column 'patient_id'"),
        ({"sampling_rate": 0.0}, "must both be positive"),
    ],
)
def test_parts_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_records(**changes)


# Atomic saving

KILLED = """
import numpy as np, pandas as pd
from ecglib.records import Records
table = pd.DataFrame({"record_id": range(4000), "patient_id": "p", "fold": 1, "source": "s"})
while True:
    for value in (1, 2):
        signals = np.full((4000, 12, 500), value, np.int16)
        targets = np.full((4000, 1), value)
        records = Records(signals, 0.001, 100, table, targets, ["A"], known_fingerprint=str(value))
        records.save(FOLDER)
        print(value, flush=True)
"""


def test_a_kill_while_saving_leaves_old_or_new(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    generator = np.random.default_rng(1)
    for _ in range(3):
        code = KILLED.replace("FOLDER", repr(str(folder)))
        running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        running.stdout.readline()  # one save is complete
        time.sleep(generator.uniform(0.0, 0.3))
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        running.stdout.close()
        candidates = [
            folder,
            *tmp_path.glob(".records.*.old"),
        ]  # between two renames the old one stands aside
        whole = next(path for path in candidates if path.exists())
        loaded = Records.load(whole)
        value = int(loaded.fingerprint)
        assert (
            len(loaded) == 4000
            and (loaded.signals == value).all()
            and (loaded.targets == value).all()
        )


# Faults: found, named, repaired


def faulty(kind: str) -> np.ndarray:
    signal = sound(3)
    if kind == "missing samples":
        signal[8, 100:120] = np.nan
    elif kind == "flat lead":
        signal[8] = 0.0
    elif kind == "saturated":
        signal[8] = np.clip(50 * signal[8], -0.6, 0.6)
    elif kind == "absurd amplitude":
        signal[8, 50] = 25.0
    elif kind == "Einthoven's law broken":
        signal[[0, 1]] = signal[[1, 0]]
    return signal


@pytest.mark.parametrize(
    "fault",
    ["missing samples", "flat lead", "saturated", "absurd amplitude", "Einthoven's law broken"],
)
def test_validate_names_record_and_lead(fault: str) -> None:
    signals = np.stack([sound(), sound(1), faulty(fault)])
    found = make_records(3, signals=signals).validate()
    assert found["record_id"].tolist() == ["r2"] and found["fault"].tolist() == [fault]
    assert found["lead"].tolist() == ["limb leads" if fault.startswith("Ein") else "V3"]
    assert make_records().validate().empty


def test_permuted_limb_leads_are_named() -> None:
    (index, lead, fault, detail), *others = find_faults(
        np.stack([faulty("Einthoven's law broken")])
    )
    assert not others and detail == "permuted: the channels hold II, I, III, aVR, aVL, aVF"


@pytest.mark.parametrize(
    "order", [(1, 0, 2, 3, 4, 5), (0, 1, 2, 4, 3, 5), (2, 1, 0, 5, 4, 3), (5, 4, 3, 2, 1, 0)]
)
def test_permuted_limb_leads_are_repaired(order: tuple[int, ...]) -> None:
    signal = sound(3)
    permuted = signal.copy()
    permuted[:6] = signal[list(order)]
    assert limb_permutation(permuted) == tuple(np.argsort(order))
    records = put_together(recording(permuted))
    np.testing.assert_allclose(records.millivolts()[0], signal, atol=0.00051)
    assert records.left_out[["fault", "action"]].values.tolist() == [
        ["Einthoven's law broken", "repaired"]
    ]


@pytest.mark.parametrize("lost", [("III",), ("I", "aVR"), ("aVR", "aVL", "aVF", "III")])
def test_lost_limb_leads_follow_from_the_others(lost: tuple[str, ...]) -> None:
    signal = sound(3)
    left = tuple(lead for lead in LEADS if lead not in lost)
    records = put_together(recording(signal[[LEADS.index(lead) for lead in left]], leads=left))
    np.testing.assert_allclose(records.millivolts()[0], signal, atol=0.002)
    assert records.left_out["fault"].tolist() == ["lead missing"] and records.validate().empty


def test_other_lead_orders_and_spellings() -> None:
    names = tuple(f"Lead {lead.lower()}" for lead in reversed(LEADS))
    records = put_together(recording(sound(3)[::-1], leads=names))
    np.testing.assert_allclose(records.millivolts()[0], sound(3), atol=0.00051)


@pytest.mark.parametrize(
    "change, fault, action",
    [
        (lambda s: s.__setitem__((8, slice(0, 200)), np.nan), "missing samples", "dropped"),
        (lambda s: s.__setitem__((8, slice(0, 50)), np.nan), "missing samples", "repaired"),
        (lambda s: s.__setitem__(8, 0.0), "flat lead", "dropped"),
        (lambda s: s.__setitem__(3, 0.0), "flat lead", "repaired"),
        (lambda s: s.__setitem__((8, 50), 25.0), "absurd amplitude", "repaired"),
        (lambda s: s.__imul__(100.0), "absurd amplitude", "dropped"),
        (lambda s: s.__imul__(0.001), "flat lead", "dropped"),
        (lambda s: s.__setitem__(8, np.clip(50 * s[8], -0.6, 0.6)), "saturated", "kept"),
    ],
)
def test_each_fault_is_settled_by_its_rule(change, fault: str, action: str) -> None:
    signal = sound(3)
    change(signal)
    records = put_together(recording(sound(1), "good"), recording(signal, "bad"))
    row = records.left_out.iloc[-1]
    assert (row["record_id"], row["fault"], row["action"]) == ("bad", fault, action)
    assert list(records.table["record_id"]) == (
        ["good"] if action == "dropped" else ["good", "bad"]
    )


def test_rules_can_be_replaced() -> None:
    good, bad = recording(sound(1), "good"), recording(faulty("Einthoven's law broken"), "bad")
    assert len(put_together(good, bad, rules={"Einthoven's law broken": "drop"})) == 1
    assert len(put_together(good, bad, rules={"Einthoven's law broken": "keep"})) == 2
    with pytest.raises(
        DataError, match="Record bad, limb leads: Einthoven's law broken .*mend the file"
    ):
        put_together(good, bad, rules={"Einthoven's law broken": "stop"})
    for rules in ({"Einthoven": "drop"}, {"flat lead": "ignore"}):
        with pytest.raises(DataError, match="There is no rule"):
            put_together(good, rules=rules)


@pytest.mark.parametrize("fault", RULES)
def test_no_rule_loses_a_record_silently(fault: str) -> None:
    if fault in ("lead missing", "unreadable"):
        return  # not faults of the signal: tested above and in test_bad_input
    records = put_together(recording(sound(1), "good"), recording(faulty(fault), "bad"))
    assert len(records) == 2 or "bad" in set(records.left_out["record_id"])


# Streaming


def test_reading_does_not_hold_all_records_in_memory() -> None:
    def stream(count: int) -> Iterator[Recording]:
        for number in range(count):
            yield recording(signal, str(number))

    signal, peaks = sound(), []
    for count in (600, 2400):
        tracemalloc.start()
        assemble([("test", stream(count))], ["A"], 100, 10.0, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    int16_of_the_difference = 1800 * 12 * 1000 * 2  # 43 MB
    assert peaks[1] - peaks[0] < 0.1 * int16_of_the_difference


def test_wfdb_folder_counts_in_left_out_survive_saving(tmp_path: Path) -> None:
    write_wfdb(tmp_path, "a", heart_signal())
    write_wfdb(tmp_path, "b", faulty("flat lead"), 100)
    (tmp_path / "labels.csv").write_text("record,A\na,1\nb,0\n")
    records = read_wfdb_folder(tmp_path, "labels.csv")
    loaded = Records.load(records.save(tmp_path / "saved"))
    assert loaded.left_out["fault"].tolist() == ["flat lead"] and loaded.left_out[
        "lead"
    ].tolist() == ["V3"]

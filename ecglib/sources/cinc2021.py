"""PhysioNet/Computing in Cardiology Challenge 2021 (Reyna et al., CinC 2021; PhysioNet
challenge-2021 1.0.3).

`cinc2021_classes.csv` holds the challenge's 30 scored diagnoses with their SNOMED codes and how
often each data set has them (its dx_mapping_scored.csv), and the name under which codes that the
challenge scores alike are merged. `cinc2021_sets.csv` holds the data sets: folder names in use,
what record names begin with and the numbers that follow (JS00001 to JS10646 are Chapman-Shaoxing,
JS10647 and above Ningbo), and in `more_than` how many occurrences a scored code must exceed there
to be a class (CE-SSL: 200).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.files import inside
from ecglib.records import Records
from ecglib.sources.assemble import Rules, assemble
from ecglib.sources.index_files import Checksums, class_counts, existing_folder, ten_folds
from ecglib.sources.ptbxl import INDEX as PTBXL_INDEX
from ecglib.sources.ptbxl import read_ptbxl_index
from ecglib.sources.wfdb_files import read_wfdb

SCORED = Path(__file__).with_name("cinc2021_classes.csv")
NO_PATIENTS = (
    "by record: the headers name no patients, so one patient's records may lie in several folds"
)


@dataclass(frozen=True)
class Part:
    """One data set of the challenge, a row of `cinc2021_sets.csv`."""

    folders: list[str]
    names: str
    numbers: range
    more_than: int

    def holds(self, record: str) -> bool:
        """Whether a record of this name belongs to the data set."""
        match = re.fullmatch(rf"{self.names}(\d+)", record)
        return match is not None and int(match[1]) in self.numbers


DATASETS: dict[str, Part] = {
    row.dataset: Part(row.folders.split(), row.names, range(row.first, row.last + 1), row.more_than)
    for row in pd.read_csv(Path(__file__).with_name("cinc2021_sets.csv")).itertuples()
}


def dataset_of(folder: Path) -> str | None:
    """The one of `DATASETS` that a folder of this name holds, None for another name; DataError for
    a name that several have.
    """
    datasets = [name for name, part in DATASETS.items() if folder.name in part.folders]
    if len(datasets) > 1:
        raise DataError(
            f"{folder}: a folder of this name holds {' and '.join(datasets)}; separate them and "
            "name each after its data set, such as WFDB_Ningbo."
        )
    return datasets[0] if datasets else None


def read_cinc2021(
    folder: str | Path,
    dataset: str,
    *,
    sampling_rate: float = 100,
    seconds: float = 10.0,
    classes: Sequence[str] | None = None,
    merge_equivalent: bool = False,
    keep_without_class: bool = True,
    ptbxl_index: str | Path | None = None,
    verify: bool = True,
    rules: Rules | None = None,
) -> Records:
    """One of `DATASETS` below its own folder, the challenge's `training` folder or the root, with
    SNOMED classes.

    Default classes are CE-SSL's for Georgia (18), PTB-XL (19), Ningbo (23) and Chapman (16), else
    all scored ones that occur; `classes` takes abbreviations. Longer recordings are cut, shorter
    ones padded with zeros, both noted. CE-SSL leaves out records without a class
    (`keep_without_class=False`); either way their number is in `about`. The headers name no
    patients, so each record counts as one and folds are split by record; for PTB-XL the path of its
    `ptbxl_database.csv` brings the true patients and folds. Raises DataError.
    """
    if dataset not in DATASETS:
        raise DataError(
            f"There is no CinC 2021 data set {dataset!r}; choose one of {', '.join(DATASETS)}."
        )
    part = DATASETS[dataset]
    folder = existing_folder(folder, f"CinC 2021's {part.folders[0]}")
    listing = _headers(folder, dataset, part)
    codes = class_codes(dataset, classes, merge_equivalent)
    checksums = Checksums.of(listing[0].parent, verify, levels=4)
    patients = _ptbxl_patients(Path(ptbxl_index)) if ptbxl_index else {}
    about = {
        "source": "CinC 2021",
        "simulated": False,
        "task": "diagnoses",
        "dataset": dataset,
        "folder": listing[0].parent.parent.name,
        "merge_equivalent": merge_equivalent,
        "codes": {name: sorted(wanted) for name, wanted in codes.items()},
        "split": "PTB-XL's patients and folds" if patients else NO_PATIENTS,
        "without_class": 0,
        "without_class_kept": keep_without_class,
    }

    def read(path):
        patient, fold = _patient(path, patients)
        row = {"record_id": path.stem, "patient_id": patient, "fold": fold}
        recording = _recording(path, checksums, codes, row, f"cinc2021 {dataset}")
        about["without_class"] += not recording.target.any()
        if keep_without_class or recording.target.any():
            yield recording

    files = ((path.stem, read(path)) for path in listing)
    records = assemble(files, codes, sampling_rate, seconds, about, rules)
    if not patients:
        records.table["fold"] = ten_folds(records.table["record_id"], records.targets)
    about["class_counts"] = class_counts(records.classes, records.targets)
    return records


def _recording(path, checksums, codes, row, source):
    """One record with its row and target; its header's comments hold them as `name: text`, of which
    the first of each name counts. A header without diagnoses is a DataError.
    """
    recording = read_wfdb(path, checksums)
    parts = [comment.partition(":") for comment in reversed(recording.comments)]
    fields = {name.strip().lower(): text.strip() for name, _, text in parts}
    if "dx" not in fields:
        raise DataError(
            f"{path}: the line with the diagnoses (#Dx:) is missing; download the header again."
        )
    found = {code.strip() for code in fields["dx"].split(",")} - {""}
    recording.row = row | {
        "source": source,
        "age": float(pd.to_numeric(fields.get("age"), errors="coerce")),
        "sex": {"m": 0.0, "f": 1.0}.get(fields.get("sex", "")[:1].lower(), np.nan),  # as in PTB-XL
        "codes": ";".join(sorted(found)),
    }
    target = [not found.isdisjoint(wanted) for wanted in codes.values()]
    recording.target = np.array(target, dtype=np.uint8)
    return recording


def class_codes(
    dataset: str, classes: Sequence[str] | None = None, merge_equivalent: bool = False
) -> dict[str, set[str]]:
    """Class name -> SNOMED codes that count for it, in the order of the challenge's list of scored
    diagnoses.

    With `merge_equivalent` the pairs that the challenge scores alike (CLBBB and LBBB, CRBBB and
    RBBB, PAC and SVPB, PVC and VPB) become one class, named LBBB, RBBB, PAC or PVC.
    """
    scored = pd.read_csv(SCORED, dtype={"code": str}).set_index("abbreviation", drop=False)
    if classes is None:
        classes = scored.index[scored[dataset] > DATASETS[dataset].more_than]
    unknown = [name for name in classes if name not in scored.index]
    if unknown:
        raise DataError(
            f"There is no scored diagnosis {unknown[0]!r}; choose among {', '.join(scored.index)}."
        )
    names = scored["merged" if merge_equivalent else "abbreviation"]
    return {name: set(scored["code"][names == name]) for name in dict.fromkeys(names[classes])}


def _headers(folder, dataset, part):
    """Header files of one data set, in order of their names, from its RECORDS lists or else from
    what is there.
    """
    named = [folder / above / name for above in ("", "training") for name in part.folders]
    groups = []
    for root in [path for path in named if path.is_dir()] or [folder]:
        groups += [root, *sorted(filter(Path.is_dir, root.iterdir()))]
    # Where several groups have a record of one name, the first counts.
    paths = [path for group in reversed(groups) for path in _listed(group)]
    headers = {path.stem: path for path in paths if part.holds(path.stem)}
    if not headers:
        raise DataError(
            f"{folder}: holds no record of {dataset} (names {part.names}...); give its folder, the "
            "training folder or the root of the challenge."
        )
    return [headers[name] for name in sorted(headers)]


def _listed(group):
    """Headers of one folder: those in its RECORDS list, where it has one, else all that are
    there.
    """
    listing = group / "RECORDS"
    if not listing.is_file():
        return group.glob("*.hea")
    lines = map(str.strip, listing.read_text(errors="replace").splitlines())
    # A higher list names folders, with a slash at the end.
    names = [line for line in lines if line[-1:] not in {"", "/"}]
    return [inside(group, f"{name}.hea", str(listing)) for name in names]


def _ptbxl_patients(path):
    """(patient_id, fold) from PTB-XL's own index by the names here: HRnnnnn is ecg_id nnnnn."""
    index = read_ptbxl_index(path / PTBXL_INDEX if path.is_dir() else path)
    patients = zip(index["patient_id"].astype(str), index["strat_fold"])
    return dict(zip(index["ecg_id"].map("HR{:05d}".format), patients))


def _patient(path, patients):
    """Patient and fold of a record: itself and 0, which is set later, or from PTB-XL's index."""
    if not patients:
        return path.stem, 0
    if path.stem not in patients:
        raise DataError(
            f"{path}: is not in PTB-XL's index; give the ptbxl_database.csv of version 1.0.1 or "
            "1.0.2."
        )
    return patients[path.stem]

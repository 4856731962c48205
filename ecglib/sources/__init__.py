"""Where records come from: each module reads one source and returns `ecglib.records.Records`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ecglib.errors import DataError
from ecglib.records import Records
from ecglib.sources import cinc2021, code15, ludb, ptbxl
from ecglib.sources.cinc2021 import read_cinc2021
from ecglib.sources.code15 import read_code15
from ecglib.sources.index_files import existing_folder
from ecglib.sources.ludb import read_ludb
from ecglib.sources.ptbxl import read_ptbxl
from ecglib.sources.wfdb_folder import read_wfdb_folder

LABELS = "labels.csv"
# The file by which a folder is recognised -> its reader, called with folder, task and rate in Hz.
READERS: Mapping[str, Callable[[Path, str, int], Records]] = {
    ptbxl.INDEX: lambda folder, task, rate: read_ptbxl(folder, task, sampling_rate=rate),
    code15.INDEX: lambda folder, task, rate: read_code15(folder, sampling_rate=rate),
    ludb.INDEX: lambda folder, task, rate: read_ludb(folder, sampling_rate=rate),
    LABELS: lambda folder, task, rate: read_wfdb_folder(folder, LABELS, sampling_rate=rate),
}


def read_source(folder: str | Path, task: str = "superclass", sampling_rate: int = 100) -> Records:
    """The records of any folder that the study knows, recognised by its index file; DataError for
    any other folder.

    The data sets of CinC 2021 have no index and are known by the names of their folders (WFDB_Ga or
    georgia, ...). `task` is a PTB-XL label set and is ignored by the other sources, which have one
    set of classes each.
    """
    folder = existing_folder(folder, "the ECG files")
    for index, read in READERS.items():
        if (folder / index).exists():
            return read(folder, task, sampling_rate)
    datasets = [name for name, part in cinc2021.DATASETS.items() if folder.name in part.folders]
    if len(datasets) > 1:
        raise DataError(
            f"{folder}: a folder of this name holds {' and '.join(datasets)}; separate them and "
            "name each after its data set, such as WFDB_Ningbo."
        )
    if not datasets:
        raise DataError(
            f"{folder}: holds none of ptbxl_database.csv (PTB-XL), exams.csv (CODE-15 %), ludb.csv "
            "(LUDB) or labels.csv (your own WFDB records, see the README), and has no name of a "
            "CinC 2021 data set such as WFDB_Ga; give the folder that does."
        )
    return read_cinc2021(folder, datasets[0], sampling_rate=sampling_rate, keep_without_class=False)

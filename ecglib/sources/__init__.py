"""Where records come from: each module reads one source and returns `ecglib.records.Records`.

A new source is a file and an entry here.
"""

from pathlib import Path
from pkgutil import resolve_name

from ecglib.errors import DataError
from ecglib.records import Records
from ecglib.sources.index_files import existing_folder

# The file by which a folder is recognised: where its reader is. Only the reader asked for is
# imported, so that an edit of one leaves the runs that do not read with it as they are.
READERS = {
    "ptbxl_database.csv": "ecglib.sources.ptbxl:read_ptbxl",
    "exams.csv": "ecglib.sources.code15:read_code15",
    "ludb.csv": "ecglib.sources.ludb:read_ludb",
    "labels.csv": "ecglib.sources.wfdb_folder:read_wfdb_folder",
}
CINC2021 = "ecglib.sources.cinc2021"  # recognised by the names of its folders


def read_source(folder: str | Path, task: str = "superclass", sampling_rate: int = 100) -> Records:
    """The records of any folder that the study knows, recognised by its index file; DataError for
    any other folder.

    The data sets of CinC 2021 have no index and are known by the names of their folders (WFDB_Ga or
    georgia, ...). `task` is a PTB-XL label set and is ignored by the other sources, which have one
    set of classes each.
    """
    folder = existing_folder(folder, "the ECG files")
    for index, reader in READERS.items():
        if (folder / index).exists():
            options = {"task": task} if index == "ptbxl_database.csv" else {}
            return resolve_name(reader)(folder, sampling_rate=sampling_rate, **options)
    cinc2021 = resolve_name(CINC2021)
    dataset = cinc2021.dataset_of(folder)
    if dataset is None:
        raise DataError(
            f"{folder}: holds none of ptbxl_database.csv (PTB-XL), exams.csv (CODE-15 %), ludb.csv "
            "(LUDB) or labels.csv (your own WFDB records, see the README), and has no name of a "
            "CinC 2021 data set such as WFDB_Ga; give the folder that does."
        )
    return cinc2021.read_cinc2021(
        folder, dataset, sampling_rate=sampling_rate, keep_without_class=False
    )

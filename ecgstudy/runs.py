"""What a run is, where its result lies, and the grid of runs.

Each run has a folder below `<folder>/runs`, named after the run and a hash of everything that can
change its result: settings, data, and the source of its function. While a run is going it works in
a hidden folder beside it, so that a killed run continues; the finished folder appears in one step
and holds `run.json` (settings used, metrics, timings, machine, versions),
`predictions.safetensors` and `model.safetensors`.
"""

import os
import platform
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from ecglib.checkpoints import load_state, load_tensors, save_tensors
from ecglib.errors import DataError, StorageError, explain_storage
from ecglib.files import read_json, replace_folder, short_hash, write_json
from ecglib.records import Records
from ecgstudy.code import code_of

IDENTITY = ("method", "data", "labels", "fraction", "seed")
MEASURED = ("split", "metric", "value", "low", "high", "n_records", "n_patients", "seconds")
TABLE_COLUMNS = (*IDENTITY, *MEASURED)
# Their versions can change a number.
PACKAGES = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "safetensors")
RESULT = "run.json"
PREDICTIONS = "predictions.safetensors"
MODEL = "model.safetensors"
LISTS = "run_lists"  # below a results folder
PRETRAINED = "pretrained_encoders"  # a group of lists: one pretrained encoder each
BACKBONES = "pretrained_backbones"  # and of this one: one start for semi-supervised training each
MAKERS = {  # of the lists
    PRETRAINED: "notebooks 03 to 08",
    "label_efficiency": "notebook 09_probe_and_fine_tune",
    "fusion": "notebook 10_fusion",
    BACKBONES: "notebook 11_low_rank_adaptation",
    "semi_supervised": "notebook 12_semi_supervised",
    "self_evolving": "notebook 13_self_evolving",
}


@dataclass(frozen=True)
class RunSpec:
    """Everything that identifies a run; runs with equal specs have equal results on one machine.

    data is the data set's name and data_key the fingerprint of its records; labels the label set;
    fraction the share of labelled training records; settings every other value that the run uses;
    code the fingerprint of the source of its function, which `run_or_load` fills in.
    """

    method: str
    data: str
    data_key: str
    labels: str
    fraction: float
    seed: int
    settings: Mapping = field(default_factory=dict)
    code: str = ""

    @property
    def key(self) -> str:
        """Hash of the spec, independent of the order of its settings."""
        return short_hash(asdict(self))

    @property
    def name(self) -> str:
        """Folder name: readable first, then the key."""
        method = "-".join(filter(None, [self.method, self.settings.get("protocol")]))
        name = f"{method}-{self.labels}-{self.fraction:g}-seed{self.seed}-{self.key}"
        return name.replace(" ", "_").replace("/", "_")

    def of(self, function: Callable) -> Self:
        """The spec with a code fingerprint, that of `function` where it has none."""
        return self if self.code else replace(self, code=code_of(function))

    def value(self, name: str) -> object:
        """A field or a setting of the spec by its name, None where it has neither."""
        return getattr(self, name, self.settings.get(name))


@dataclass
class Result:
    """What a run's function returns.

    metrics: rows with split, metric, value, low, high, n_records, n_patients. predictions: arrays
    by name. model: the trained network, or None. seconds: what the computation took, over
    interruptions. notes: anything else, JSON-like.
    """

    metrics: list[dict]
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    model: torch.nn.Module | None = None
    seconds: float = 0.0
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished run on disk."""

    spec: RunSpec
    folder: Path
    about: dict

    def rows(self) -> list[dict]:
        """The metrics as rows of the study's tables (`TABLE_COLUMNS`).

        Settings that are plain text, such as encoder and protocol, are columns, too.
        """
        settings = self.spec.settings.items()
        shared = {name: value for name, value in settings if isinstance(value, str)}
        shared |= {name: getattr(self.spec, name) for name in IDENTITY}
        seconds = self.about["seconds"]
        return [{**shared, **metric, "seconds": seconds} for metric in self.about["metrics"]]

    def predictions(self) -> dict[str, np.ndarray]:
        """The arrays that the run kept."""
        tensors, _ = load_tensors(self.folder / PREDICTIONS)
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def weights(self, part: str = "") -> dict[str, torch.Tensor]:
        """The trained network's tensors, or those of a part, such as "encoder.", by the names that
        they have in it.
        """
        tensors, _ = load_tensors(self.folder / MODEL)
        names = [name for name in tensors if name.startswith(part)]
        return {name.removeprefix(part): tensors[name] for name in names}

    def load(
        self,
        network: torch.nn.Module,
        part: str = "",
    ) -> torch.nn.Module:
        """`network` with the weights that the run kept, or with those of a part; DataError where
        they are another network's.
        """
        load_state(network, self.weights(part), self.folder / MODEL)
        return network


def open_run(folder: str | Path) -> Run:
    """A finished run by its folder; DataError where it is not there."""
    about = read_json(Path(folder) / RESULT)
    return Run(RunSpec(**about["spec"]), Path(folder), about)


def find_run(key: str, results: str | Path) -> Run | None:
    """The finished run of that key below `results`, None where there is none."""
    found = sorted((Path(results) / "runs").glob(f"[!.]*-{key}/{RESULT}"))
    return open_run(found[0].parent) if found else None


Compute = Callable[[RunSpec, Path], Result]  # with a workspace that survives a kill


def run_or_load(spec: RunSpec, function: Compute, folder: str | Path) -> Run:
    """The run of `spec`: opened if it is below `folder`, else computed by `function(spec,
    workspace)` and kept.

    A spec without a code fingerprint gets that of `function`, so that an edited method is another
    run. `workspace` is a folder that survives a kill; `train.fit` keeps its checkpoint there.
    Raises StorageError where the result cannot be written.
    """
    spec = spec.of(function)
    target = Path(folder) / "runs" / spec.name
    if (target / RESULT).exists():
        return Run(spec, target, read_json(target / RESULT))
    workspace = target.with_name(f".{spec.name}.partial")
    with explain_storage(workspace):
        workspace.mkdir(parents=True, exist_ok=True)
    result = function(spec, workspace)
    about = _keep(spec, result, workspace)
    with explain_storage(target):
        replace_folder(workspace, target)
    return Run(spec, target, about)


def _keep(spec: RunSpec, result: Result, workspace: Path) -> dict:
    """Write a result to its workspace, `run.json` last, and return the content of `run.json`."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    about = {
        "spec": asdict(spec),
        "key": spec.key,
        "metrics": result.metrics,
        "notes": result.notes,
        "seconds": result.seconds,
        "machine": machine(),
        "packages": {"python": platform.python_version(), **packages},
    }
    arrays = result.predictions.items()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays}
    save_tensors(workspace / PREDICTIONS, tensors)
    if result.model is not None:
        identity = {"method": spec.method, "key": spec.key}
        save_tensors(workspace / MODEL, result.model.state_dict(), identity)
    # Only a run in progress needs the optimizer's state.
    (workspace / "checkpoint.safetensors").unlink(missing_ok=True)
    write_json(workspace / RESULT, about)
    return about


def run_all(
    pairs: Sequence[tuple[RunSpec, Compute]],
    folder: str | Path,
    progress_bar: bool = True,
    workers: int = 1,
) -> list[Run]:
    """Every run of pairs of spec and function, computing what is missing.

    A failed run does not stop the others; the failures are named together at the end. A full disk
    or an unwritable folder stops at once. With several `workers`, processes of one thread each
    work side by side: small networks gain little from threads.
    """
    outcomes = (_try_run(*pair, folder) for pair in pairs)
    if workers > 1:
        parallel = Parallel(workers, return_as="generator", inner_max_num_threads=1)
        outcomes = parallel(delayed(_try_run)(*pair, folder) for pair in pairs)
    outcomes = list(tqdm(outcomes, total=len(pairs), disable=not progress_bar, unit="run"))
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} runs failed and the others are kept: "
            f"{'; '.join(failed)}. Mend the cause and run again; only these are repeated."
        )
    return outcomes


def _try_run(spec: RunSpec, function: Compute, folder: str | Path) -> Run | str:
    """The run, or the sentence on why it failed; its traceback is kept in its workspace."""
    spec = spec.of(function)
    try:
        return run_or_load(spec, function, folder)
    except StorageError:
        raise
    except Exception as error:
        path = Path(folder) / "runs" / f".{spec.name}.partial" / "error.txt"
        path.write_text(traceback.format_exc())
        return f"{spec.name} ({type(error).__name__}: {error})"


def keep_runs(
    runs: Iterable[Run],
    name: str,
    results: str | Path,
) -> None:
    """Note below `results` that these runs stand behind `name`: a table, or `group/member`.

    Later notebooks ask the runs of the list and no older ones.
    """
    names = [run.folder.name for run in runs]
    write_json(Path(results) / LISTS / f"{name}.json", {"runs": names})


def kept_runs(
    name: str,
    results: str | Path,
    records: Records | None = None,
) -> list[Run]:
    """The runs noted as `name`, made on `records` where these are given.

    DataError, with the notebook to run, where the list or a run is missing or is about other
    records.
    """
    path = Path(results) / LISTS / f"{name}.json"
    maker = MAKERS.get(name.partition("/")[0], "the notebook that makes it")
    if not path.exists():
        raise DataError(f"{path}: is missing; run {maker} first.")
    folders = [Path(results) / "runs" / folder for folder in read_json(path)["runs"]]
    for folder in folders:
        if not (folder / RESULT).exists():
            raise DataError(f"{path}: its run {folder.name} is gone; run {maker} again.")
    runs = [open_run(folder) for folder in folders]
    if records is not None and {run.spec.data_key for run in runs} - {records.fingerprint}:
        raise DataError(f"{path}: lists runs on other records; run {maker} again.")
    return runs


def kept_group(
    group: str,
    results: str | Path,
    records: Records | None = None,
) -> dict[str, Run]:
    """The one run of each list `group/member`, by member; DataError as in `kept_runs`."""
    members = sorted(path.stem for path in (Path(results) / LISTS / group).glob("*.json"))
    if not members:
        what = group.removesuffix("s").replace("_", " ")
        raise DataError(f"{results}: holds no {what}; run {MAKERS[group]} first.")
    return {name: kept_runs(f"{group}/{name}", results, records)[0] for name in members}


def table(folder: str | Path) -> pd.DataFrame:
    """One row for each metric of every finished run below `folder`, with `TABLE_COLUMNS`."""
    found = sorted((Path(folder) / "runs").glob(f"[!.]*/{RESULT}"))
    return tidy(row for path in found for row in open_run(path.parent).rows())


def tidy(rows: Iterable[dict], extra: Sequence[str] = ()) -> pd.DataFrame:
    """Rows as the study's table with the `extra` columns after method, sorted by what identifies a
    run and measure.
    """
    columns = ["method", *extra, *TABLE_COLUMNS[1:]]
    frame = pd.DataFrame(list(rows), columns=columns)
    return frame.sort_values(columns[: columns.index("value")], ignore_index=True)


def machine() -> dict:
    """What the run was computed on: processor, cores, threads, memory, accelerator, system."""
    known = hasattr(os, "sysconf")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
    cores = Path("/proc/cpuinfo")
    model = re.search("model name.*: (.+)", cores.read_text()) if cores.exists() else None
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }

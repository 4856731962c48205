"""What a run is, where its result lies, and the grid of runs.

One folder a run below `<folder>/runs`, named after the run and a hash of everything that can change
its result. While a run is going it works in a hidden folder beside it, so that a killed run
continues; the finished folder appears in one step and holds `run.json` (settings used, metrics,
timings, machine, versions), `predictions.safetensors` and `model.safetensors`.
"""

import os
import platform
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from ecglib.checkpoints import load_tensors, save_tensors
from ecglib.errors import DataError, StorageError, explain_storage
from ecglib.files import read_json, replace_folder, short_hash, write_json
from ecglib.records import Records

TABLE_COLUMNS = (
    "method",
    "data",
    "labels",
    "fraction",
    "seed",
    "split",
    "metric",
    "value",
    "low",
    "high",
    "n_records",
    "n_patients",
    "seconds",
)
PACKAGES = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "safetensors")
RESULT, PREDICTIONS, MODEL = "run.json", "predictions.safetensors", "model.safetensors"
LISTS = "run_lists"  # below a results folder


@dataclass(frozen=True)
class RunSpec:
    """Everything that identifies a run; two runs with equal specs have equal results on one kind of
    machine.

    data is the data set's name and data_key the fingerprint of its records; labels the label set;
    fraction the share of labelled training records; settings every other value that the run uses.
    """

    method: str
    data: str
    data_key: str
    labels: str
    fraction: float
    seed: int
    settings: Mapping = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of the spec, independent of the order of its settings."""
        return short_hash(asdict(self))

    @property
    def name(self) -> str:
        """Folder name: readable first, then the key."""
        method = "-".join(filter(None, [self.method, self.settings.get("protocol")]))
        return f"{method}-{self.labels}-{self.fraction:g}-seed{self.seed}-{self.key}".replace(
            " ", "_"
        ).replace("/", "_")

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
        """The metrics as rows of the study's tables (`TABLE_COLUMNS`)."""
        return _rows(self.about)

    def predictions(self) -> dict[str, np.ndarray]:
        """The arrays that the run kept."""
        return {
            name: tensor.numpy()
            for name, tensor in load_tensors(self.folder / PREDICTIONS)[0].items()
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained network's tensors."""
        return load_tensors(self.folder / MODEL)[0]


def open_run(folder: str | Path) -> Run:
    """A finished run by its folder; DataError where it is not there."""
    about = read_json(Path(folder) / RESULT)
    return Run(RunSpec(**about["spec"]), Path(folder), about)


def find_run(key: str, results: str | Path) -> Run | None:
    """The finished run of that key below `results`, None where there is none."""
    found = sorted((Path(results) / "runs").glob(f"[!.]*-{key}"))
    return open_run(found[0]) if found else None


def run_or_load(
    spec: RunSpec, function: Callable[[RunSpec, Path], Result], folder: str | Path
) -> Run:
    """The run of `spec`: opened if it is below `folder`, else computed by `function(spec,
    workspace)` and kept.

    `workspace` is a folder that survives a kill; `train.fit` keeps its checkpoint there. Raises
    StorageError where the result cannot be written.
    """
    target = Path(folder) / "runs" / spec.name
    if (target / RESULT).exists():
        return Run(spec, target, read_json(target / RESULT))
    workspace = target.with_name(f".{spec.name}.partial")
    with explain_storage(workspace):
        workspace.mkdir(parents=True, exist_ok=True)
    result = function(spec, workspace)
    about = {
        "spec": asdict(spec),
        "key": spec.key,
        "metrics": result.metrics,
        "notes": result.notes,
        "seconds": result.seconds,
        "machine": machine(),
        "packages": package_versions(),
    }
    save_tensors(
        workspace / PREDICTIONS,
        {
            name: torch.from_numpy(np.ascontiguousarray(values))
            for name, values in result.predictions.items()
        },
    )
    if result.model is not None:
        save_tensors(
            workspace / MODEL, result.model.state_dict(), {"method": spec.method, "key": spec.key}
        )
    (workspace / "checkpoint.safetensors").unlink(
        missing_ok=True
    )  # only a run in progress needs the optimizer's state
    write_json(workspace / RESULT, about)
    with explain_storage(target):
        replace_folder(workspace, target)
    return Run(spec, target, about)


def run_grid(
    specs: Iterable[RunSpec],
    function: Callable[[RunSpec, Path], Result],
    folder: str | Path,
    progress_bar: bool = True,
    workers: int = 1,
) -> list[Run]:
    """Every run of a grid, computing what is missing; a failed run does not stop the others.

    With several `workers`, processes of one thread each work side by side: small networks gain
    little from threads, so two runs on two cores take about as long as one. A full disk or an
    unwritable folder stops at once. Otherwise the failures are named together at the end.
    """
    specs = list(specs)
    outcomes: Iterable[Run | str]
    if workers > 1:
        parallel = Parallel(workers, return_as="generator", inner_max_num_threads=1)
        outcomes = parallel(delayed(_try_run)(spec, function, folder) for spec in specs)
    else:
        outcomes = (_try_run(spec, function, folder) for spec in specs)
    outcomes = list(tqdm(outcomes, total=len(specs), disable=not progress_bar, unit="run"))
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    finished = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(failed) + len(finished)} runs failed and the others are kept: {'; '.join(failed)}. "
            "Mend the cause and run again; only these are repeated."
        )
    return finished


def _try_run(
    spec: RunSpec, function: Callable[[RunSpec, Path], Result], folder: str | Path
) -> Run | str:
    """The run, or the sentence on why it failed; its traceback is kept in its workspace."""
    try:
        return run_or_load(spec, function, folder)
    except StorageError:
        raise
    except Exception as error:
        path = Path(folder) / "runs" / f".{spec.name}.partial" / "error.txt"
        path.write_text(traceback.format_exc())
        return f"{spec.name} ({type(error).__name__}: {error})"


def keep_list(runs: Iterable[Run], name: str, results: str | Path) -> None:
    """Note below `results` which runs are behind the table `name`; later notebooks ask these and no
    older ones.
    """
    write_json(Path(results) / LISTS / f"{name}.json", {"runs": [run.folder.name for run in runs]})


def listed_runs(name: str, results: str | Path, records: Records, notebook: str) -> list[Run]:
    """The runs noted as `name`; DataError where the list or a run is missing, or was made on other
    records.
    """
    path = Path(results) / LISTS / f"{name}.json"
    if not path.exists():
        raise DataError(f"{path}: is missing; run notebook {notebook} first.")
    runs = [open_run(Path(results) / "runs" / run) for run in read_json(path)["runs"]]
    if any(run.spec.data_key != records.fingerprint for run in runs):
        raise DataError(f"{path}: lists runs on other records; run notebook {notebook} again.")
    return runs


def table(folder: str | Path) -> pd.DataFrame:
    """One row a metric of every finished run below `folder`, with `TABLE_COLUMNS`."""
    found = sorted((Path(folder) / "runs").glob(f"[!.]*/{RESULT}"))
    return tidy(row for path in found for row in _rows(read_json(path)))


def tidy(rows: Iterable[dict], extra: Sequence[str] = ()) -> pd.DataFrame:
    """Rows as the study's table with the `extra` columns after method, sorted by what identifies a
    run and measure.
    """
    columns = [TABLE_COLUMNS[0], *extra, *TABLE_COLUMNS[1:]]
    frame = pd.DataFrame(list(rows), columns=columns)
    order = ["method", *extra, "data", "labels", "fraction", "seed", "split", "metric"]
    return frame.sort_values(order, ignore_index=True)


def _rows(about: dict) -> list[dict]:
    """Metrics of one `run.json` as table rows, with its settings that are plain text, such as
    encoder and protocol.
    """
    spec = about["spec"]
    shared = {name: value for name, value in spec["settings"].items() if isinstance(value, str)}
    shared |= {name: spec[name] for name in ("method", "data", "labels", "fraction", "seed")}
    return [{**shared, **metric, "seconds": about["seconds"]} for metric in about["metrics"]]


def machine() -> dict:
    """What the run was computed on: processor, cores, threads, memory, accelerator, operating
    system.
    """
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }

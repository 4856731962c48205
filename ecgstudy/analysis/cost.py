"""What one iteration of a method costs: time, memory, and what has to be stored."""

import re
import resource
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from ecglib.checkpoints import save_tensors
from ecglib.lora import low_rank_layers, save_adapter
from ecglib.records import LEADS, Records
from ecglib.semisup import Adaptation
from ecglib.train import autocast, fit, linear_schedule
from ecgstudy.analysis.figures import (
    MARKERS,
    PALETTE,
    draw_line,
    finish,
    legend_line,
    looks,
    method_colours,
    method_label,
    panels,
    require_columns,
)
from ecgstudy.arms.semi_supervised import Recipe, make_network
from ecgstudy.runs import machine


def saved_bytes(function: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass of `function()`, each storage once, without
    `parameters`.
    """
    kept = {}  # the storages are held, so that none is freed and its place given to another

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def measure(
    method: str,
    recipe: Recipe,
    adaptation: Adaptation,
    classes: int,
    samples: int,
    iterations: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict:
    """One row of adaptation_cost.csv: a method on white noise of `samples` per record, whose time
    is that of any signal.

    An iteration is a batch with its augmentation, forward and backward pass, and the optimizer's
    step; the median of `iterations` after a first one. Where layers are deactivated by chance the
    saved bytes are the mean over as many draws. stored_bytes is the file of the adapter, or of the
    whole network where every weight is trained. peak_bytes is the memory of the process (of the
    device on a GPU), so call this in a process of its own: `measure_apart`.
    """
    settings = replace(adaptation, crop_seconds=samples / 100.0, steps=iterations + 1)
    records = _noise(2 * round(settings.batch_size * (1 + settings.ratio)), classes, samples)
    pools = np.arange(len(records)).reshape(2, -1)
    network = make_network(settings.backbone, classes, 0)
    objective, source, notes = recipe.prepare(network, records, pools, settings, 0, device)
    objective.train()
    parameters = list(objective.parameters())
    saved = []
    for step in range(iterations):
        torch.manual_seed(step)
        with autocast(device, dtype):
            saved.append(saved_bytes(lambda step=step: objective.loss(source(step)), parameters))
    options = {"schedule": linear_schedule, "log_every": 1, "dtype": dtype}
    history = fit(objective, source, settings.steps, **options)
    about = machine()
    name = about["processor"] if about["accelerator"] == "none" else about["accelerator"]
    return {
        "method": method,
        "backbone": settings.backbone,
        "trained_parameters": notes["trained_parameters"],
        "stored_bytes": _stored(network),
        "seconds_per_iteration": history["seconds"].diff().median(),  # that of all but the first
        "peak_bytes": _peak(device),
        "saved_activation_bytes": round(statistics.mean(saved)),
        "rank_pass_seconds": notes.get("rank_pass_seconds", 0.0),
        "machine": f"{name}, {about['threads']} threads",
    }


def measure_apart(*arguments, **options) -> dict:
    """`measure` in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *arguments, **options).result()


def _noise(count: int, classes: int, samples: int) -> Records:
    """Records of white noise at 100 Hz with random labels."""
    generator = np.random.default_rng(0)
    names = np.arange(count).astype(str)
    table = pd.DataFrame({"record_id": names, "patient_id": names, "fold": 1, "source": "noise"})
    signals = generator.integers(-1000, 1000, (count, len(LEADS), samples), dtype=np.int16)
    targets = (generator.random((count, classes)) < 0.2).astype(np.uint8)
    return Records(
        signals,
        0.001,
        100.0,
        table,
        targets,
        map(str, range(classes)),
    )


def _stored(network: nn.Module) -> int:
    """Bytes of the file that this network needs besides its backbone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stored.safetensors")
        if low_rank_layers(network):
            save_adapter(network, path)
        else:
            save_tensors(path, network.state_dict())
        return path.stat().st_size


def _peak(device: str) -> int:
    """Most memory so far in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell the peak of the parent, from before the fork
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


HOLLOW = {"markerfacecolor": "white"}
COSTS = {
    "seconds_per_iteration": ("Seconds an iteration", 1.0),
    "saved_activation_bytes": ("Activations kept (MiB)", 2**20),
    "stored_bytes": ("Stored for the task (kB)", 1e3),
}


def plot_cost(
    costs: pd.DataFrame,
    summary: pd.DataFrame,
    title: str | None = None,
) -> Figure:
    """Macro AUROC over time, memory and storage: a point per method.

    costs has method and the columns of `COSTS` (see `measure`), summary method, value, low, high.
    """
    scores = ["method", "value", "low", "high"]
    require_columns(costs, ("method", *COSTS), "table of costs")
    require_columns(summary, scores, "summary")
    table = costs.merge(summary[scores], on="method")
    colours = method_colours(table["method"])
    markers = looks(table["method"], MARKERS)
    figure, grid = panels(len(COSTS), (13.5, 4.6), sharey=True)
    for axes, (column, (name, unit)) in zip(grid[0], COSTS.items()):
        for method, rows in table.groupby("method", sort=False):
            look = {"color": colours[method], "marker": markers[method], "linestyle": "none"}
            draw_line(
                axes,
                rows[column] / unit,
                rows,
                label=method_label(method),
                **look,
            )
        axes.set_xlabel(name)
        axes.set_xscale("log") if column == "stored_bytes" else axes.set_xlim(left=0)
    grid[0, 0].set_ylabel("Macro AUROC (95 % interval)")
    return finish(figure, title, grid[0, 0].get_legend_handles_labels()[0])


def plot_ranks(
    scores: pd.DataFrame,
    ranks: pd.DataFrame,
    title: str | None = None,
) -> Figure:
    """Importance of each layer on a logarithmic axis, in the order of the network; filled where it
    gets the full rank.

    scores and ranks have the layers as index and the same columns, ways to score; each gets a panel
    with its own scale. Colours tell the parts of the network, the first piece of a layer's name.
    """
    require_columns(scores, (), "table of scores")
    require_columns(ranks, scores.columns, "table of ranks")
    layers = scores.index
    parts = layers.str.split(".").str[0]
    colours = looks(parts, PALETTE)
    figure, grid = panels(len(scores.columns), (9.5, 1.6 + 0.26 * len(layers)), sharey=True)
    dot = {"marker": "o", "linestyle": "", "markersize": 7}
    for axes, score in zip(grid[0], scores):
        for height, part in enumerate(parts):
            full = ranks[score].iloc[height] == ranks[score].max()
            look = {"color": colours[part], **dot, **({} if full else HOLLOW)}
            axes.plot(scores[score].iloc[height], height, **look)
        axes.set(title=score, xlabel="Importance", xscale="log")
    grid[0, 0].set_yticks(range(len(layers)), layers)
    grid[0, 0].set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    legend = [legend_line(part, colour, **dot) for part, colour in colours.items()]
    full, *fewer = np.unique(ranks)[::-1]
    legend.append(legend_line(f"rank {full}", "0.2", **dot))
    legend += [legend_line(f"rank {rank}", "0.2", **dot, **HOLLOW) for rank in fewer]
    return finish(figure, title, legend)

"""What tests share: tiny records and networks, files of every data set, checks of training."""

import copy
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from ecglib.augment import gaussian_noise, time_out
from ecglib.batches import Batch, CropBatches, SemiBatch, SemiBatches, step_generator
from ecglib.checkpoints import CHECKPOINT, load_tensors
from ecglib.encoders.xresnet1d import XResNet1d
from ecglib.records import LEADS, LIMB_FROM_I_AND_II, Records
from ecglib.selfsup import Pretraining
from ecglib.train import (
    fit,
)
from ecgstudy.methods import pretraining
from ecgstudy.runs import Run
from ecgstudy.study import Study


def tiny_records(count: int = 40, seed: int = 0) -> Records:
    """Noise in which class B doubles the amplitude: learnable by anything."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    signals = generator.normal(size=(count, 12, 200)) * (0.5 + 0.5 * labels)[:, None, None]
    table = pd.DataFrame(
        {
            "record_id": [f"r{i}" for i in range(count)],
            "patient_id": [f"p{i}" for i in range(count)],
            "fold": 1 + np.arange(count) % 10,
            "source": "test",
        }
    )
    return Records.from_millivolts(
        signals, 100, table, np.stack([1 - labels, labels], 1), ("A", "B")
    )


def labelled_records(count: int = 120) -> Records:
    """Noise in which class B is louder, spread over ten folds."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(count) % 2
    signals = generator.normal(size=(count, 12, 200)) * (0.7 + 0.4 * labels)[:, None, None]
    names = [f"{i:03d}" for i in range(count)]
    place = {
        "record_id": names,
        "patient_id": names,
        "fold": 1 + np.arange(count) % 10,
        "source": "test",
    }
    targets = np.stack([1 - labels, labels], 1)
    records = Records.from_millivolts(signals, 100, pd.DataFrame(place), targets, ("A", "B"))
    records.about["task"] = "ab"
    return records


TRANSFORMS = (time_out, gaussian_noise)


class TinyEncoder(nn.Sequential):
    """`(batch, 12, time)` -> 16 features, with the batch norm and the dropout that a resume must
    get right.
    """

    feature_size = 16

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(12, 16, 7, stride=5),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        )


def tiny_batch(size: int = 8, time: int = 100, step: int = 0) -> Batch:
    """Noise, the same for the same step."""
    signals = torch.randn(size, 12, time, generator=step_generator(1, step))
    return Batch(signals, torch.zeros(size, 2), torch.arange(size), step_generator(0, step))


class Stop(Exception):
    pass


def check_resume(make: Callable[[], nn.Module], folder: Path, crop_seconds: float = 1.0) -> None:
    """A run killed after its checkpoint of step 4 ends, started again, in the weights of an
    undisturbed one.
    """

    def train(name: str, watch: Callable[[int], dict] | None = None) -> nn.Module:
        torch.manual_seed(3)
        records, objective = tiny_records(), make()
        batches = CropBatches(records, np.arange(len(records)), 8, crop_seconds, seed=3)
        fit(
            objective,
            batches,
            8,
            learning_rate=0.01,
            folder=folder / name,
            seed=3,
            checkpoint_every=4,
            log_every=2,
            dtype="float32",
            watch=watch,
        )
        return objective

    def interrupt(step: int) -> dict:
        if step == 6:
            raise Stop
        return {}

    straight = train("straight")
    with pytest.raises(Stop):
        train("broken", interrupt)
    assert int(load_tensors(folder / "broken" / CHECKPOINT)[1]["step"]) == 4
    resumed = train("broken")
    for (name, ours), theirs in zip(
        resumed.state_dict().items(), straight.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def check_determinism(make: Callable[[], nn.Module]) -> None:
    """The loss is a function of weights and step alone: the transforms draw from the batch's
    generator.
    """
    losses = []
    for global_seed, step in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(5)
        objective = make().eval()  # dropout, which fit seeds, is off
        torch.manual_seed(global_seed)
        losses.append(
            objective.loss(Batch(tiny_batch().signals, None, None, step_generator(0, step))).item()
        )
    assert losses[0] == losses[1] != losses[2]


class Louder:
    """A transform that multiplies by 1, 2, 3, ... at each call, so that every view is another."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, signals: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.calls += 1
        return signals * self.calls


CLASSES = 3


class Linear(nn.Sequential):
    """Logits linear in the signals, so that numpy can follow; counts what passes through."""

    def __init__(self, classes: int = CLASSES, scale: float = 1.0) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12 * 20, classes))
        self[1].weight.data.normal_(std=0.06 * scale)
        self.sizes: list[int] = []

    def forward(self, signals: Tensor) -> Tensor:
        self.sizes.append(len(signals))
        return super().forward(signals)

    def slow(self, signals: Tensor) -> np.ndarray:
        """The same in numpy."""
        flat = signals.flatten(1).numpy().astype(np.float64)
        return flat @ self[1].weight.detach().numpy().T + self[1].bias.detach().numpy()


def semi_batch(labelled: int = 4, unlabelled: int = 6, step: int = 0, pool: int = 10) -> SemiBatch:
    """Noise, the same for the same step; the unlabelled ones are different records of a pool."""
    generator = step_generator(2, step)
    targets = torch.randint(0, 2, (labelled, CLASSES), generator=generator).float()
    return SemiBatch(
        torch.randn(labelled, 12, 20, generator=generator),
        targets,
        torch.arange(labelled),
        step_generator(0, step),
        torch.randn(unlabelled, 12, 20, generator=generator),
        torch.randperm(pool, generator=generator)[:unlabelled],
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    p = sigmoid(logits)
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p))


def check_semi_resume(make: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """A run killed after its checkpoint of step 4 ends, started again, in the state of an
    undisturbed one.
    """

    def train(name: str, stop: int | None = None) -> tuple[nn.Module, list[dict]]:
        torch.manual_seed(3)
        objective = make()

        def watch(step: int) -> dict:
            if step == stop:
                raise Stop
            return objective.report()

        batches = SemiBatches(tiny_records(), np.arange(8), np.arange(8, 40), 4, 2, 0.5, seed=3)
        history = fit(
            objective,
            batches,
            8,
            learning_rate=0.01,
            folder=folder / name,
            seed=3,
            checkpoint_every=4,
            log_every=3,
            dtype="float32",
            watch=watch,
        )
        return objective, history.drop(columns="seconds").to_dict("records")

    straight, expected = train("straight")
    with pytest.raises(Stop):
        train("broken", stop=6)
    assert int(load_tensors(folder / "broken" / CHECKPOINT)[1]["step"]) == 4
    resumed, history = train("broken")
    for (name, ours), theirs in zip(
        resumed.state_dict().items(), straight.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert repr(history) == repr(expected), "what is reported, too, resumes"
    return straight


PRETRAINING = Pretraining(
    encoder="xresnet1d_narrow",
    steps=6,
    batch_size=8,
    crop_seconds=1.0,
    learning_rate=0.003,
    weight_decay=0.01,
    transforms={"gaussian_noise": {"scale": 0.1}},
    options={"hidden": 16, "outputs": 8},
)


def pretrain(records: Records, folder: Path, seed: int = 0) -> Run:
    """A tiny SimCLR pretraining, kept below `folder`."""
    return Study(records, folder).run(pretraining("simclr", PRETRAINING, seed))


def plain_conv1d(encoder: XResNet1d) -> nn.Module:
    """The same network, `(batch, leads, time)` -> features, with one-dimensional layers and the
    same weights.
    """
    twin = copy.deepcopy(encoder)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                layer = nn.Conv1d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[1],
                    child.stride[1],
                    child.padding[1],
                    bias=child.bias is not None,
                )
                layer.weight.data = child.weight.data.squeeze(2).clone(
                    memory_format=torch.contiguous_format
                )
                if child.bias is not None:
                    layer.bias.data = child.bias.data.clone()
            elif isinstance(child, nn.BatchNorm2d):
                layer = nn.BatchNorm1d(child.num_features)
                layer.load_state_dict(child.state_dict())
            elif isinstance(child, nn.MaxPool2d):
                layer = nn.MaxPool1d(3, 2, 1)
            elif isinstance(child, nn.AvgPool2d):
                layer = nn.AvgPool1d(2, 2, ceil_mode=True)
            else:
                continue
            setattr(module, name, layer)
    return _Pooled(twin)


class _Pooled(nn.Module):
    """Stem, stages and pooling on (batch, channels, time)."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages = twin.stem, twin.stages

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        features = self.stages(self.stem(signals))
        return torch.cat([features.amax(dim=2), features.mean(dim=2)], dim=1)


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def heart_signal(rate: float = 500, seconds: float = 10.0, seed: int = 0) -> np.ndarray:
    """Twelve leads `(12, time)` in mV that obey Einthoven's law: three waves a beat, other sizes in
    each lead.
    """
    generator = np.random.default_rng(seed)
    time = np.arange(round(rate * seconds)) / rate
    phase = (time * generator.uniform(0.9, 1.6)) % 1 - 0.4
    waves = [
        np.exp(-0.5 * ((phase - at) / width) ** 2)
        for at, width in ((-0.18, 0.03), (0.0, 0.012), (0.25, 0.05))
    ]
    sizes = (
        np.array([0.1, 1.0, 0.25])
        * generator.uniform(0.6, 1.4, (8, 3))
        * generator.choice([-1, 1], (8, 1))
    )
    sizes[1] = sizes[0] * [
        1.5,
        0.4,
        1.2,
    ]  # II never a multiple of I, so that the order of the limb leads can be told
    eight = sizes @ np.stack(waves) + 0.01 * generator.standard_normal((8, len(time)))
    return np.concatenate([LIMB_FROM_I_AND_II @ eight[:2], eight[2:]])


def write_wfdb(
    folder: Path,
    name: str,
    millivolts: np.ndarray,
    rate: float = 500,
    *,
    comments: tuple[str, ...] = (),
    leads: tuple[str, ...] = LEADS,
    suffix: str = "dat",
    offset: int = 0,
    gain: str = "1000/mV",
    record_line: str | None = None,
) -> Path:
    """One record of format 16 with right checksums; NaN becomes the mark of a missing sample. The
    header's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.where(
        np.isnan(millivolts), -32768, np.rint(np.nan_to_num(millivolts) * 1000)
    ).astype("<i2")
    (folder / f"{name}.{suffix}").write_bytes(b"\0" * offset + counts.T.tobytes())
    place = f"16+{offset}" if offset else "16"
    sums = [(int(row.astype(np.int64).sum()) + 32768) % 65536 - 32768 for row in counts]
    lines = [f"{record_line or name} {len(leads)} {rate:g} {counts.shape[1]}"]
    lines += [
        f"{name}.{suffix} {place} {gain} 16 0 {row[0]} {total} 0 {lead}"
        for row, total, lead in zip(counts, sums, leads, strict=True)
    ]
    header = folder / f"{name}.hea"
    header.write_text("\n".join([*lines, *(f"#{comment}" for comment in comments)]) + "\n")
    return header


def write_ptbxl(folder: Path, count: int = 20) -> Path:
    """A PTB-XL folder of `count` records at 100 Hz, two records a patient, all ten folds."""
    rows = []
    for number in range(1, count + 1):
        name = f"records100/00000/{number:05d}_lr"
        write_wfdb(
            folder / "records100/00000", f"{number:05d}_lr", heart_signal(100, seed=number), 100
        )
        statement = ("NORM", "IMI", "LVH")[number % 3]
        rows.append(
            {
                "ecg_id": number,
                "patient_id": 1000.0 + (number - 1) // 2,
                "age": 60,
                "sex": number % 2,
                "scp_codes": str({statement: 100.0, "SR": 0.0}),
                "strat_fold": (number - 1) // 2 % 10 + 1,
                "filename_lr": name,
                "filename_hr": name.replace("100", "500").replace("lr", "hr"),
            }
        )
    pd.DataFrame(rows).to_csv(folder / "ptbxl_database.csv", index=False)
    statements = pd.DataFrame(
        {
            "diagnostic": [1, 1, 1, np.nan],
            "form": np.nan,
            "rhythm": [np.nan] * 3 + [1],
            "diagnostic_class": ["NORM", "MI", "HYP", np.nan],
            "diagnostic_subclass": ["NORM", "IMI", "LVH", np.nan],
        },
        index=["NORM", "IMI", "LVH", "SR"],
    )
    statements.to_csv(folder / "scp_statements.csv")
    return folder


def write_cinc(
    folder: Path,
    names: list[str],
    codes: list[str],
    rate: float = 500,
    seconds: float = 10.0,
    **header: str,
) -> Path:
    """A group folder of the CinC 2021 layout: .mat files with 24 bytes before the samples, and
    RECORDS.
    """
    for position, (name, code) in enumerate(zip(names, codes, strict=True)):
        comments = (
            "Age: NaN" if position == 0 else "Age: 61",
            "Sex: Female",
            f"Dx: {code}",
            "Rx: Unknown",
        )
        signal = heart_signal(rate, seconds, position)
        write_wfdb(folder, name, signal, rate, comments=comments, suffix="mat", offset=24, **header)
    (folder / "RECORDS").write_text("\n".join(names) + "\n")
    return folder


def annotation_bytes(marks: list[tuple[int, int]]) -> bytes:
    """A WFDB annotation file of (sample, code), a long step written as the format's skip."""
    words, last = [], 0
    for sample, code in marks:
        step = sample - last
        if step > 1023:
            words += [59 << 10, step >> 16, step & 0xFFFF]
            step = 0
        words.append((code << 10) + step)
        last = sample
    return struct.pack(f"<{len(words) + 1}H", *words, 0)


def write_ludb(folder: Path, count: int = 4) -> Path:
    """A LUDB folder: headers with a gain for each lead, one mark file per lead, ludb.csv."""
    rows = []
    for number in range(1, count + 1):
        signal = heart_signal(500, seed=number)
        header = write_wfdb(
            folder / "data", str(number), signal, leads=tuple(lead.lower() for lead in LEADS)
        )
        lines = header.read_text().splitlines()
        leads = [
            line.replace("1000/mV 16", f"{700 + 90 * i}({i})/mV 0")
            for i, line in enumerate(lines[1:])
        ]
        lines = [lines[0], *leads]
        header.write_text("\n".join(lines) + "\n")
        marks = [
            (600, 39),
            (620, 24),
            (640, 40),
            (660, 39),
            (680, 1),
            (700, 40),
            (2000, 39),
            (2100, 27),
            (2200, 40),
        ]
        for lead in LEADS:
            (folder / "data" / f"{number}.{lead.lower()}").write_bytes(annotation_bytes(marks))
        rows.append(
            {
                "ID": number,
                "Sex": "F\n",
                "Age": ">89\n" if number == 1 else "51\n",
                "Rhythms": "Sinus rhythm",
                "Electric axis of the heart": "Electric axis of the heart: normal",
                "Conduction abnormalities": "I degree av block" if number % 2 else None,
                "Hypertrophies": "Left ventricular hypertrophy\nLeft atrial overload",
            }
        )
    columns = (
        "Extrasystolies",
        "Cardiac pacing",
        "Ischemia",
        "Non-specific repolarization abnormalities",
        "Other states",
    )
    pd.DataFrame(rows).assign(**dict.fromkeys(columns)).to_csv(folder / "ludb.csv", index=False)
    return folder


def write_code15(folder: Path, parts: int = 2, each: int = 8) -> Path:
    """A CODE-15 % folder: exams.csv and HDF5 parts of 7 s and 10 s tracings, each part with a
    filler row at its end.
    """
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in range(parts):
        tracings = np.zeros((each + 1, 4096, 12), dtype=np.float32)
        exam_ids = np.zeros(each + 1, dtype=np.int64)
        for place in range(each):
            exam = 100 * (part + 1) + place
            length = 2800 if place % 2 else 4000
            start = (4096 - length) // 2
            tracings[place, start : start + length] = heart_signal(400, length / 400, exam).T
            exam_ids[place] = exam
            classes = {
                name: place % 6 == i
                for i, name in enumerate(("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"))
            }
            rows.append(
                {
                    "exam_id": exam,
                    "age": 50,
                    "is_male": bool(place % 2),
                    "nn_predicted_age": 48.0,
                    **classes,
                    "patient_id": exam // 2,
                    "normal_ecg": False,
                    "trace_file": f"exams_part{part}.hdf5",
                }
            )
        with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
            file["tracings"], file["exam_id"] = tracings, exam_ids
    pd.DataFrame(rows).to_csv(folder / "exams.csv", index=False)
    return folder


def sums(files: dict[str, bytes]) -> bytes:
    """SHA256SUMS.txt of these files."""
    return "".join(
        f"{hashlib.sha256(body).hexdigest()} {name}\n" for name, body in files.items()
    ).encode()

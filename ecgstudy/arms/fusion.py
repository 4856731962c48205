"""The fusion study as runs: members and their checks, every comparator, fine-tuning, gains."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.checkpoints import load_state
from ecglib.encoders import make_encoder
from ecglib.encoders.vit1d import ViT1d
from ecglib.errors import DataError
from ecglib.evaluate.metrics import macro_auroc
from ecglib.fusion import (
    FusionBatches,
    FusionNetwork,
    FusionPerceptron,
    draw_tokens,
    gather,
    matched_hidden,
    stack_logits,
    token_weights,
    train_stack,
)
from ecglib.labels import label_subsets
from ecglib.probe import PENALTIES, chosen_probes, feature_scale, standardise, unit_length
from ecglib.records import Records
from ecglib.supervised import Training, train_classifier
from ecglib.train import parameter_groups
from ecgstudy.arms.pretrain import encode_records, encode_run, pretraining_spec
from ecgstudy.arms.starts import start_weights
from ecgstudy.arms.supervised import classifier_result, scored_result
from ecgstudy.arms.transfer import grid_subsets
from ecgstudy.runs import MODEL, Result, Run, RunSpec, run_grid, run_or_load

Cell = tuple[float, int]  # fraction and seed
Member = Run | Mapping[Cell, Run]  # one encoder for all label subsets, or one for each
NETWORKS: dict[str, dict] = {
    "dvme": {"mixing": "attention"},
    "dvme_random_start": {"mixing": "attention", "votes": False},
    "uniform_attention": {"mixing": "uniform"},
    "softmax_gate": {"mixing": "gate"},
    "perceptron": {},
}
PROBES = ("alone", "best_single", "concatenation", "mean_of_logits")
# Side by side, the features of K members are about K times as large, and with them the penalties
# that suit them.
CONCATENATED_PENALTIES = (*PENALTIES, 10 * PENALTIES[-1])
CLASS_BLOCKS = 4  # last blocks of a transformer whose [CLS] tokens are its member's features


class ClassTokens(nn.Module):
    """A ViT1d as a member: [CLS] of its last four blocks, `(batch, leads, time)` mV -> `(batch, 4 x
    width)`.
    """

    def __init__(self, encoder: ViT1d) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, signals: Tensor) -> Tensor:
        return self.encoder.class_tokens(signals, blocks=CLASS_BLOCKS)


def member_encoder(run: Run) -> nn.Module:
    """The encoder that `run` keeps, its output the member's features: [CLS] tokens for a
    transformer.
    """
    encoder = make_encoder(run.spec.settings["encoder"])
    load_state(encoder, run.weights(), run.folder / MODEL)
    return ClassTokens(encoder) if isinstance(encoder, ViT1d) else encoder


def as_member(run: Run, records: Records, results: str | Path, device: str = "cpu") -> Run:
    """`run` itself, or for a transformer a run with the [CLS] tokens of every record, encoded once
    and kept.
    """
    need_same_records(run.spec.method, run, records)
    if not isinstance(make_encoder(run.spec.settings["encoder"]), ViT1d):
        return run
    kept = {name: run.spec.settings[name] for name in ("encoder", "crop_seconds")}
    spec = pretraining_spec(
        run.spec.method,
        records,
        run.spec.seed,
        {**kept, "pretraining": run.spec.key, "class_blocks": CLASS_BLOCKS},
    )

    def encode(spec: RunSpec, workspace: Path) -> Result:
        module, started = member_encoder(run).to(device), time.perf_counter()
        features = encode_records(module, records, spec.settings["crop_seconds"], device)
        return Result([], {"features": features}, module.encoder, time.perf_counter() - started)

    return run_or_load(spec, encode, results)


def supervised_member(
    trained: Iterable[Run],
    records: Records,
    cells: Iterable[Cell],
    results: str | Path,
    encoder: str,
    device: str = "cpu",
    workers: int = 1,
) -> dict[Cell, Run]:
    """The encoders trained from scratch with the labels of each cell alone, so that no other label
    leaks in.

    `trained` are the supervised runs of notebook 09; their features are encoded once and kept.
    DataError where the run of a cell is missing.
    """
    found = {
        (run.spec.fraction, run.spec.seed): run
        for run in trained
        if run.spec.value("protocol") == "supervised" and run.spec.value("encoder") == encoder
    }
    cells = list(cells)
    for fraction, seed in cells:
        if (fraction, seed) not in found:
            raise DataError(
                f"supervised: no {encoder} was trained from scratch at {fraction:.0%} with seed {seed}; "
                "run notebook 09_probe_and_fine_tune with this fraction and seed."
            )
        need_same_records("supervised", found[fraction, seed], records)
    sources = {found[cell].spec.key: found[cell] for cell in cells}
    specs = [
        pretraining_spec(
            "supervised_features",
            records,
            cell[1],
            {
                "encoder": encoder,
                "crop_seconds": found[cell].spec.settings["crop_seconds"],
                "trained": found[cell].spec.key,
            },
        )
        for cell in cells
    ]

    def encode(spec: RunSpec, workspace: Path) -> Result:
        weights = start_weights(sources[spec.settings["trained"]])
        return encode_run(records, device, weights)(spec, workspace)

    runs = run_grid(specs, encode, results, progress_bar=False, workers=workers)
    return dict(zip(cells, runs, strict=True))


def run_of(member: Member, cell: Cell) -> Run:
    """The run whose features stand for a member in one cell."""
    return member if isinstance(member, Run) else member[cell]


def need_same_records(name: str, run: Run, records: Records) -> None:
    """DataError where a member was made on other records or on another split.

    A run's `data_key` is the checksum of signals, targets and folds together.
    """
    if run.spec.data_key != records.fingerprint:
        raise DataError(
            f"{name}: its features were computed on other records or on another split (checksum "
            f"{run.spec.data_key[:12]}, here {records.fingerprint[:12]} for {len(records)} records); run the notebook "
            "that makes this encoder again, on these records."
        )


def member_features(name: str, run: Run, records: Records) -> np.ndarray:
    """Features `(records, d)` of a member; DataError where they are of other records, of another
    split, or too few.
    """
    need_same_records(name, run, records)
    features = run.predictions()["features"]
    if len(features) != len(records):
        raise DataError(
            f"{name}: has features of {len(features)} records, not of {len(records)}; encode it again."
        )
    return features


class FusionData:
    """What every fusion of a study shares: label subsets, prepared features of the members, and the
    members' probes.

    `fractions` are all fractions of the study, `seeds` says how many label subsets each of them
    has. Features are standardised with the unlabelled training pool and brought to unit length, as
    for any probe. DataError where a member does not fit the records, naming it, and where there are
    fewer than two.
    """

    def __init__(
        self,
        records: Records,
        fractions: Sequence[float],
        seeds: Mapping[float, int],
        members: Mapping[str, Member],
    ) -> None:
        check_members(list(members))
        self.records, self.members, self.fractions = records, dict(members), list(fractions)
        self.subsets, self.split = grid_subsets(records, fractions, seeds), records.split
        self.cells = list(self.subsets)
        self.features = {name: self._prepared(name, member) for name, member in members.items()}

    def _prepared(self, name: str, member: Member) -> Tensor:
        """Features `(1, records, d)`, or `(cells, records, d)` where the encoder differs by cell."""
        runs = [member] if isinstance(member, Run) else [member[cell] for cell in self.cells]
        raw = [member_features(name, run, self.records) for run in runs]
        return torch.stack(
            [unit_length(standardise(each, each[self.split["train"]])).float() for each in raw]
        )

    @cached_property
    def probes(self) -> dict[str, tuple[Tensor, Tensor, list[float]]]:
        """Each member's probes: weights `(cells, d, classes)`, bias `(cells, classes)`, penalties,
        one a cell.
        """
        return {name: self.probed(features) for name, features in self.features.items()}

    def probed(
        self, features: Tensor, penalties: Sequence[float] = PENALTIES
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Probes of features `(1 or cells, records, d)`, the penalty of each chosen on fold 9."""
        groups = (
            [self.subsets]
            if len(features) == 1
            else [{cell: self.subsets[cell]} for cell in self.cells]
        )
        weights, bias, strengths = [], [], []
        for each, subsets in zip(features, groups, strict=True):
            probes, chosen = chosen_probes(
                each, self.records.targets, subsets, self.split, penalties, self.records.classes
            )
            places = torch.arange(len(chosen)), torch.from_numpy(chosen)
            weights.append(probes.weights[places].mT.float())
            bias.append(probes.bias[places].float())
            strengths += [probes.penalties[place] for place in chosen]
        return torch.cat(weights), torch.cat(bias), strengths

    def probe_logits(self, name: str, split: str) -> Tensor:
        """Logits `(cells, n, classes)` of a member's probes."""
        weights, bias, _ = self.probes[name]
        return self.features[name][:, self.split[split]] @ weights + bias[:, None]


def check_members(names: Sequence[str]) -> None:
    """DataError where there is nothing to fuse."""
    if len(names) < 2:
        alone = names[0] if names else "no encoder"
        raise DataError(
            f"{alone}: a single member cannot be fused; add at least one more encoder to the members."
        )


def fusion_spec(
    data: FusionData,
    method: str,
    names: Sequence[str],
    cell: Cell,
    settings: Mapping,
    protocol: str = "frozen",
) -> RunSpec:
    """What identifies the fusion of some members with the labels of one cell."""
    records, keys = (
        data.records,
        {name: run_of(data.members[name], cell).spec.key for name in names},
    )
    own = {
        "protocol": protocol,
        "members": "+".join(names),
        "member_keys": keys,
        "fractions": data.fractions,
    }
    return RunSpec(
        method,
        records.name,
        records.fingerprint,
        records.about["task"],
        *cell,
        {**(settings if method in NETWORKS else {}), **own},
    )


def fuse(
    data: FusionData,
    method: str,
    settings: Mapping,
    results: str | Path,
    names: Sequence[str] | None = None,
    cells: Sequence[Cell] | None = None,
) -> list[Run]:
    """The frozen runs of one method: one of PROBES, without training, or of NETWORKS, by default of
    all members.
    """
    names, cells = list(names or data.members), list(data.cells if cells is None else cells)
    if method != "alone":
        check_members(names)
    specs = [fusion_spec(data, method, names, cell, settings) for cell in cells]
    return run_grid(specs, fused_run(data, names, cells), results, progress_bar=False)


def fused_run(
    data: FusionData, names: Sequence[str], cells: Sequence[Cell]
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`; all `cells` are fitted together when the first is asked
    for.
    """
    fitted: dict[Cell, Result] = {}

    def run(spec: RunSpec, workspace: Path) -> Result:
        if not fitted:
            started = time.perf_counter()
            fit = _fit_networks if spec.method in NETWORKS else _read_probes
            fitted.update(fit(data, names, cells, spec))
            for result in fitted.values():
                result.seconds = (time.perf_counter() - started) / len(fitted)
        result = fitted[spec.fraction, spec.seed]
        probabilities = {name: result.predictions.pop(name) for name in ("validation", "test")}
        scored = scored_result(data.records, probabilities, data.subsets[spec.fraction, spec.seed])
        result.metrics, result.predictions = (
            scored.metrics,
            {**scored.predictions, **result.predictions},
        )
        return result

    return run


def _read_probes(
    data: FusionData, names: Sequence[str], cells: Sequence[Cell], spec: RunSpec
) -> dict[Cell, Result]:
    """Results of a comparator that needs probes only."""
    places = {cell: data.cells.index(cell) for cell in cells}
    logits, notes = _PROBE_LOGITS[spec.method](data, list(names))
    return {
        cell: Result(
            [],
            {name: torch.sigmoid(values[place]).numpy() for name, values in logits.items()},
            notes={name: values[place] for name, values in notes.items()},
        )
        for cell, place in places.items()
    }


def _alone(data: FusionData, names: list[str]) -> tuple[dict[str, Tensor], dict]:
    """Logits `(cells, n, classes)` of both splits and notes `(cells,)`: one member's probes."""
    (name,) = names
    return {split: data.probe_logits(name, split) for split in ("validation", "test")}, {
        "penalty": data.probes[name][2]
    }


def _mean_of_logits(data: FusionData, names: list[str]) -> tuple[dict[str, Tensor], dict]:
    """As `_alone`: every member has one vote."""
    return {
        split: torch.stack([data.probe_logits(name, split) for name in names]).mean(dim=0)
        for split in ("validation", "test")
    }, {}


def _best_single(data: FusionData, names: list[str]) -> tuple[dict[str, Tensor], dict]:
    """As `_alone`, each cell with the member whose probe is best on fold 9."""
    logits = {}
    for split in ("validation", "test"):
        logits[split] = torch.stack([data.probe_logits(name, split) for name in names])
    best = np.argmax([_validation_scores(data, each) for each in logits["validation"]], axis=0)
    chosen = torch.from_numpy(best), torch.arange(len(best))
    return {split: each[chosen] for split, each in logits.items()}, {
        "member": [names[place] for place in best]
    }


def _concatenation(data: FusionData, names: list[str]) -> tuple[dict[str, Tensor], dict]:
    """As `_alone`: one probe on the features of all members side by side."""
    features = [data.features[name] for name in names]
    largest = max(map(len, features))
    side_by_side = torch.cat([each.expand(largest, -1, -1) for each in features], dim=2)
    weights, bias, penalties = data.probed(side_by_side, CONCATENATED_PENALTIES)
    return {
        split: side_by_side[:, data.split[split]] @ weights + bias[:, None]
        for split in ("validation", "test")
    }, {"penalty": penalties}


_PROBE_LOGITS = {
    "alone": _alone,
    "best_single": _best_single,
    "concatenation": _concatenation,
    "mean_of_logits": _mean_of_logits,
}


def _validation_scores(data: FusionData, logits: Tensor) -> np.ndarray:
    """Macro AUROC on fold 9 of logits `(models, n, classes)`."""
    targets = data.records.targets[data.split["validation"]]
    return np.array([macro_auroc(targets, each, data.records.classes) for each in logits.numpy()])


def make_stack(
    method: str, sizes: Sequence[int], classes: int, settings: Mapping, seeds: Sequence[int]
) -> FusionNetwork | FusionPerceptron:
    """Untrained models of a method, one for each of `seeds`."""
    shared = {"dropout": settings["dropout"], "seeds": seeds}
    shape = {name: settings[name] for name in ("width", "heads", "hidden")}
    if method == "perceptron":
        return FusionPerceptron(
            len(seeds), sizes, classes, hidden=matched_hidden(sizes, classes, **shape), **shared
        )
    return FusionNetwork(len(seeds), sizes, classes, **shape, **shared, **NETWORKS[method])


def _fit_networks(
    data: FusionData, names: Sequence[str], cells: Sequence[Cell], spec: RunSpec
) -> dict[Cell, Result]:
    """Train one stack at each learning rate and keep, for each cell, the rate that is best on fold
    9.
    """
    settings, places = spec.settings, [data.cells.index(cell) for cell in cells]
    features = [data.features[name] for name in names]
    features = [each[places] if len(each) > 1 else each for each in features]
    seeds = [seed for _, seed in cells]
    batches = FusionBatches(
        features,
        data.records.targets,
        [data.subsets[cell] for cell in cells],
        seeds,
        settings["steps"],
        settings["batch_size"],
    )
    stacks, scores = [], []
    for rate in sorted(settings["learning_rates"]):
        sizes = [each.shape[2] for each in features]
        stack = make_stack(spec.method, sizes, len(data.records.classes), settings, seeds)
        if stack.votes is not None:
            stack.start_from(
                torch.cat([data.probes[name][0][places] for name in names], dim=1),
                torch.stack([data.probes[name][1][places] for name in names], dim=1),
            )
        train_stack(stack, batches, settings["steps"], rate, settings["token_dropout"])
        stacks.append(stack)
        scores.append(
            _validation_scores(
                data, stack_logits(stack, features, data.split["validation"], len(cells))
            )
        )
    best = np.argmax(scores, axis=0)  # of equal ones the smallest rate
    kept = spec.method == "dvme"  # fine-tuning may start from it
    return {
        cell: _network_result(
            data,
            model_of(stacks[best[place]], place),
            [each[[place]] if len(each) > 1 else each for each in features],
            sorted(settings["learning_rates"])[best[place]],
            kept,
        )
        for place, cell in enumerate(cells)
    }


def model_of(stack: nn.Module, place: int) -> nn.Module:
    """A stack of the one model at `place`."""
    alone = copy.deepcopy(stack)
    for parameter in alone.parameters():
        parameter.data = parameter.data[[place]].clone()
    return alone


def _network_result(
    data: FusionData, network: nn.Module, features: Sequence[Tensor], rate: float, kept: bool
) -> Result:
    """Probabilities of both splits and token weights on fold 9 of one cell; the network where it
    may be tuned on.
    """
    arrays = {
        name: torch.sigmoid(stack_logits(network, features, data.split[name], 1)[0]).numpy()
        for name in ("validation", "test")
    }
    if isinstance(network, FusionNetwork):
        positions = torch.from_numpy(data.split["validation"])
        targets = torch.from_numpy(data.records.targets[data.split["validation"]])[None]
        weights = token_weights(network, gather(features, positions[None]), targets)
        arrays |= {f"tokens/{name}": values[0].numpy() for name, values in weights.items()}
    return Result([], arrays, network if kept else None, notes={"learning_rate": rate})


class FusedClassifier(nn.Module):
    """Encoders and their fusion as one network: `(batch, leads, time)` mV -> logits `(batch,
    classes)`.

    Features are scaled as for the frozen fusion, with the training pool's mean and deviation from
    before fine-tuning. `windows` are the seconds of each encoder's windows where the encoders are
    frozen, see `score_signals`; fine-tuned ones answer for windows together.
    """

    windows: tuple[float, ...] = ()

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        network: FusionNetwork,
        references: Sequence[Tensor],
        token_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.encoders, self.network, self.token_dropout = (
            nn.ModuleList(encoders),
            network,
            token_dropout,
        )
        for place, reference in enumerate(references):
            mean, deviation = feature_scale(reference)
            self.register_buffer(f"mean{place}", mean.float())
            self.register_buffer(f"deviation{place}", deviation.float())

    def features(self, signals: Tensor) -> Tensor:
        """What the encoders say of signals `(n, leads, time)`, side by side, `(n, d)`."""
        return torch.cat([encoder(signals).float() for encoder in self.encoders], dim=1)

    def answer(self, features: Tensor) -> Tensor:
        """Logits `(n, classes)` of such features."""
        parts = [
            unit_length(
                (part - self.get_buffer(f"mean{place}")) / self.get_buffer(f"deviation{place}")
            )
            for place, part in enumerate(features.split(self.network.sizes, dim=1))
        ]
        keep = None
        if self.training:
            keep = draw_tokens(
                len(features), len(parts), self.token_dropout, device=features.device
            )
        return self.network(torch.cat(parts, dim=1)[None], keep)[0]

    def forward(self, signals: Tensor) -> Tensor:
        return self.answer(self.features(signals))


def fused_classifier(frozen: Run, members: Sequence[Run], records: Records) -> FusedClassifier:
    """The network of the run `frozen` on the encoders of its `members`, which can be trained on.

    It answers for a window what the frozen fusion would answer for the window's features.
    """
    train, settings = records.split["train"], frozen.spec.settings
    raw = [torch.from_numpy(run.predictions()["features"][train]).double() for run in members]
    network = make_stack(
        "dvme", [each.shape[1] for each in raw], len(records.classes), settings, [0]
    )
    load_state(network, frozen.weights(), frozen.folder / MODEL)
    return FusedClassifier(
        [member_encoder(run) for run in members], network, raw, settings["token_dropout"]
    )


def finetuned_fusion_run(
    data: FusionData,
    frozen: Sequence[Run],
    device: str = "cpu",
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: train encoders and fusion on from the `frozen` run of
    the same labels.

    The encoders learn at `encoder_factor` times the rate of the fusion. Other settings are those of
    `train_classifier`.
    """
    starts = {(run.spec.fraction, run.spec.seed): run for run in frozen}

    def run(spec: RunSpec, workspace: Path) -> Result:
        start, settings = starts[spec.fraction, spec.seed], spec.settings
        members = [
            run_of(data.members[name], (spec.fraction, spec.seed))
            for name in settings["members"].split("+")
        ]
        classifier = fused_classifier(start, members, data.records)
        groups = parameter_groups(classifier.encoders, settings["weight_decay"])
        groups = [{**group, "learning_rate_factor": settings["encoder_factor"]} for group in groups]
        groups.append({"params": list(classifier.network.parameters()), "weight_decay": 0.0})
        labelled = label_subsets(data.records, data.fractions, spec.seed)[spec.fraction]
        history = train_classifier(
            classifier,
            data.records,
            labelled,
            spec.seed,
            Training.of({**settings, "encoder": settings["members"]}),
            workspace,
            device,
            groups=groups,
        )
        return classifier_result(classifier, data.records, labelled, settings, history, device)

    return run

"""The fusion study as runs: members, every way to use their features together, and fine-tuning."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.encoders import encoder_maker, make_encoder
from ecglib.encoders.vit1d import ViT1d
from ecglib.errors import DataError
from ecglib.evaluate.metrics import macro_auroc
from ecglib.fusion import (
    FusionBatches,
    FusionNetwork,
    FusionPerceptron,
    gather,
    matched_hidden,
    model_of,
    stack_logits,
    token_weights,
    train_stack,
)
from ecglib.probe import PENALTIES, chosen_probes, feature_scale, standardise, unit_length
from ecglib.records import Records
from ecglib.settings import Settings
from ecglib.supervised import Training
from ecglib.train import parameter_groups
from ecgstudy.arms.pretrain import Encode, encoded_result
from ecgstudy.arms.supervised import SPLITS, Labelled, scored
from ecgstudy.runs import Result, Run
from ecgstudy.study import LabelSubset, Study

Member = Run | Mapping[LabelSubset, Run]  # one encoder for all label subsets, or one for each
# Logits `(subsets, n, classes)` of both splits, and notes, one for each subset.
Combination = tuple[dict[str, Tensor], dict]
# Side by side, the features of K members are about K times as large, and with them the penalties
# that suit them.
CONCATENATED_PENALTIES = (*PENALTIES, 10 * PENALTIES[-1])
CLASS_BLOCKS = 4  # last blocks of a transformer whose [CLS] tokens are its member's features


@dataclass(frozen=True)
class FusionSettings(Settings):
    """How a fusion of frozen encoders is built and trained.

    Tokens have `width` dimensions and attention `heads` heads; `hidden` units stand before the
    classes. `token_dropout` is the share of whole tokens dropped while training. Each of the
    `learning_rates` trains `steps` steps of `batch_size` records; the best on fold 9 is kept.
    """

    width: int
    heads: int
    hidden: int
    dropout: float
    token_dropout: float
    steps: int
    batch_size: int
    learning_rates: Sequence[float]

    @property
    def network(self) -> dict:
        """The options of a FusionNetwork."""
        names = ("width", "heads", "hidden", "dropout", "token_dropout")
        return {name: getattr(self, name) for name in names}


# Members.


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
    encoder = run.load(make_encoder(run.spec.settings["encoder"]))
    return ClassTokens(encoder) if isinstance(encoder, ViT1d) else encoder


@dataclass(frozen=True)
class EncodeTokens(Encode):
    """The [CLS] tokens of every record, by the transformer that `start` keeps."""

    def compute(self, study: Study, workspace: Path) -> Result:
        module = member_encoder(self.start).to(study.device)
        return replace(encoded_result(study, module, self.crop_seconds), model=module.encoder)


def as_member(study: Study, run: Run) -> Run:
    """`run` itself, or for a transformer a run with the [CLS] tokens of every record."""
    encoder = run.spec.settings["encoder"]
    if not isinstance(make_encoder(encoder), ViT1d):
        return run
    own = (run.spec.method, encoder, run.spec.settings["crop_seconds"], run.spec.seed)
    return study.run(EncodeTokens(*own, run, {"class_blocks": CLASS_BLOCKS}))


def supervised_member(
    study: Study, trained: Iterable[Run], subsets: Iterable[LabelSubset], encoder: str
) -> dict[LabelSubset, Run]:
    """The encoders trained from scratch with the labels of each subset alone, so that no other
    label leaks in.

    `trained` are the runs of notebook 09; their features are encoded once and kept. DataError where
    the run of a subset is missing.
    """
    found = {
        tuple(map(run.spec.value, ("protocol", "encoder", "fraction", "seed"))): run
        for run in trained
    }
    jobs = {}
    for subset in subsets:
        run = found.get(("supervised", encoder, subset.fraction, subset.seed))
        if run is None:
            raise DataError(
                f"supervised: no {encoder} was trained from scratch at {subset.fraction:.0%} with "
                f"seed {subset.seed}; run notebook 09_probe_and_fine_tune with this fraction and "
                "seed."
            )
        seconds = run.spec.settings["crop_seconds"]
        jobs[subset] = Encode("supervised_features", encoder, seconds, subset.seed, run)
    return dict(zip(jobs, study.grid(jobs.values(), progress_bar=False), strict=True))


def check_members(names: Sequence[str]) -> None:
    """DataError where there is nothing to fuse."""
    if len(names) < 2:
        raise DataError(
            f"{', '.join(names) or 'no encoder'}: a single member cannot be fused; add at least "
            "one more encoder to the members."
        )


class FusionData:
    """What every fusion of a study shares: label subsets, prepared features of the members, and the
    members' probes.

    Features are standardised with the unlabelled training pool and brought to unit length, as for
    any probe. DataError where a member does not fit the records, naming it, and where there are
    fewer than two.
    """

    def __init__(
        self, records: Records, subsets: Iterable[LabelSubset], members: Mapping[str, Member]
    ) -> None:
        check_members(list(members))
        self.records = records
        self.split = records.split
        self.positions = {subset: subset.positions(records) for subset in subsets}
        self.subsets = list(self.positions)
        self.members = {
            name: dict.fromkeys(self.subsets, member) if isinstance(member, Run) else member
            for name, member in members.items()
        }
        self.features = {name: self._prepared(name) for name in members}

    def _prepared(self, name: str) -> Tensor:
        """Features `(1, records, d)`, or `(subsets, records, d)` where the encoder differs by
        subset.
        """
        prepared = []
        runs = {run.spec.key: run for run in map(self.members[name].get, self.subsets)}
        for run in runs.values():
            if run.spec.data_key != self.records.fingerprint:
                raise DataError(
                    f"{name}: its features were computed on other records or on another split "
                    f"(checksum {run.spec.data_key[:12]}, here {self.records.fingerprint[:12]} for "
                    f"{len(self.records)} records); run the notebook that makes this encoder "
                    "again, on these records."
                )
            raw = run.predictions()["features"]
            prepared.append(unit_length(standardise(raw, raw[self.split["train"]])).float())
        return torch.stack(prepared)

    @cached_property
    def probes(self) -> dict[str, "MemberProbes"]:
        """Each member's probes."""
        return {name: self.probed(features) for name, features in self.features.items()}

    def probed(self, features: Tensor, penalties: Sequence[float] = PENALTIES) -> "MemberProbes":
        """Probes of features `(1 or subsets, records, d)`, the penalty of each chosen on fold 9."""
        groups = [self.positions]
        if len(features) > 1:
            groups = [{subset: positions} for subset, positions in self.positions.items()]
        rest = (self.split, self.records.classes, penalties)
        probes = [
            chosen_probes(each, self.records.targets, positions, *rest)
            for each, positions in zip(features, groups, strict=True)
        ]
        weights = torch.cat([each.weights.mT.float() for each in probes])
        bias = torch.cat([each.bias.float() for each in probes])
        logits = {
            split: features[:, self.split[split]] @ weights + bias[:, None] for split in SPLITS
        }
        return MemberProbes(weights, bias, sum((each.penalties for each in probes), ()), logits)

    def votes(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Logits of the members' own probes, `(members, subsets, n, classes)` of both splits."""
        each = [self.probes[name].logits for name in names]
        return {split: torch.stack([logits[split] for logits in each]) for split in SPLITS}

    def validation_scores(self, logits: Tensor) -> list[float]:
        """Macro AUROC on fold 9 of logits `(models, n, classes)`."""
        targets = self.records.targets[self.split["validation"]]
        return [macro_auroc(targets, each, self.records.classes) for each in logits.numpy()]


class MemberProbes(NamedTuple):
    """Probes of one encoder, one for each label subset: weights `(subsets, d, classes)`, bias
    `(subsets, classes)`, penalties, and logits `(subsets, n, classes)` of both splits.
    """

    weights: Tensor
    bias: Tensor
    penalties: tuple[float, ...]
    logits: dict[str, Tensor]


# Ways to use the members without training.


def alone(data: FusionData, names: list[str]) -> Combination:
    """One member's probes."""
    (name,) = names
    return data.probes[name].logits, {"penalty": data.probes[name].penalties}


def mean_of_logits(data: FusionData, names: list[str]) -> Combination:
    """Every member has one vote."""
    return {split: each.mean(dim=0) for split, each in data.votes(names).items()}, {}


def best_single(data: FusionData, names: list[str]) -> Combination:
    """Each subset with the member whose probe is best on fold 9."""
    votes = data.votes(names)
    best = np.argmax([data.validation_scores(each) for each in votes["validation"]], axis=0)
    chosen = torch.from_numpy(best), torch.arange(len(best))
    notes = {"member": [names[place] for place in best]}
    return {split: each[chosen] for split, each in votes.items()}, notes


def concatenation(data: FusionData, names: list[str]) -> Combination:
    """One probe on the features of all members side by side."""
    features = [data.features[name] for name in names]
    largest = max(map(len, features))
    joint = torch.cat([each.expand(largest, -1, -1) for each in features], dim=2)
    probes = data.probed(joint, CONCATENATED_PENALTIES)
    return probes.logits, {"penalty": probes.penalties}


# Untrained stacks of fusions, one for each seed.


def tokens_stack(
    sizes: Sequence[int], classes: int, settings: FusionSettings, seeds: Sequence[int], **options
) -> FusionNetwork:
    """A token for each encoder, mixed by attention unless `options` say otherwise."""
    return FusionNetwork(seeds, sizes, classes, **settings.network, **options)


def perceptron_stack(
    sizes: Sequence[int], classes: int, settings: FusionSettings, seeds: Sequence[int]
) -> FusionPerceptron:
    """A perceptron on all features with as many parameters."""
    options = {"dropout": settings.dropout, "token_dropout": settings.token_dropout}
    hidden = matched_hidden(sizes, classes, **settings.network)
    return FusionPerceptron(seeds, sizes, classes, hidden=hidden, **options)


# Fitted for all label subsets together, when the first is asked for.


@dataclass(frozen=True, eq=False)
class Fits:
    """Members fused without training: `combine` is one of the functions above."""

    data: FusionData
    names: list[str]
    subsets: list[LabelSubset]
    combine: Callable
    keep = False

    def about(self) -> dict:
        """The settings of the training."""
        return {}

    @property
    def places(self) -> list[int]:
        """Where the subsets stand among those of the data."""
        return [self.data.subsets.index(subset) for subset in self.subsets]

    def fit(self) -> list[Result]:
        """The probabilities of each subset, not yet scored."""
        logits, notes = self.combine(self.data, self.names)
        results = []
        for place in self.places:
            own = {name: values[place] for name, values in notes.items()}
            arrays = _probabilities({split: each[place] for split, each in logits.items()})
            results.append(Result([], arrays, notes=own))
        return results

    @cached_property
    def fitted(self) -> dict[LabelSubset, Result]:
        """The result of each subset, not yet scored."""
        started = time.perf_counter()
        results = dict(zip(self.subsets, self.fit(), strict=True))
        seconds = (time.perf_counter() - started) / len(results)
        return {subset: replace(each, seconds=seconds) for subset, each in results.items()}

    def result(self, subset: LabelSubset) -> Result:
        """The scores of one subset."""
        return scored(self.fitted[subset], self.data.records, self.data.positions[subset])


@dataclass(frozen=True, eq=False)
class TrainedFits(Fits):
    """Members fused by training what `combine(sizes, classes, settings, seeds, **options)` makes,
    one for each seed. With `keep` the trained networks are kept, to be tuned on or explained.
    """

    settings: FusionSettings
    options: Mapping
    keep: bool

    def about(self) -> dict:
        return {**asdict(self.settings), "options": dict(self.options)}

    def fit(self) -> list[Result]:
        """Each subset has the learning rate that is best on fold 9, of equal ones the smallest."""
        data = self.data
        features = [_at(data.features[name], self.places) for name in self.names]
        rates = sorted(self.settings.learning_rates)
        stacks = [self._trained_stack(features, rate) for rate in rates]
        validation = data.split["validation"]
        logits = [stack_logits(stack, features, validation) for stack in stacks]
        scores = list(map(data.validation_scores, logits))
        results = []
        for place, best in enumerate(np.argmax(scores, axis=0)):
            network = model_of(stacks[best], place)
            arrays = network_arrays(data, network, [_at(each, [place]) for each in features])
            kept = network if self.keep else None
            results.append(Result([], arrays, kept, notes={"learning_rate": rates[best]}))
        return results

    def _trained_stack(self, features: list[Tensor], rate: float) -> nn.Module:
        """A model for each subset, trained at one learning rate."""
        data = self.data
        settings = self.settings
        seeds = [subset.seed for subset in self.subsets]
        positions = [data.positions[subset] for subset in self.subsets]
        sizes = [each.shape[2] for each in features]
        stack = self.combine(
            sizes,
            len(data.records.classes),
            settings,
            seeds,
            **self.options,
        )
        if stack.votes is not None:
            probes = [data.probes[name] for name in self.names]
            weights = torch.cat([each.weights for each in probes], dim=1)
            bias = torch.stack([each.bias for each in probes], dim=1)
            stack.start_from(weights[self.places], bias[self.places])
        targets = data.records.targets
        batches = FusionBatches(
            features, targets, positions, seeds, settings.steps, settings.batch_size
        )
        train_stack(stack, batches, rate)
        return stack


def _at(features: Tensor, places: list[int]) -> Tensor:
    """Features of the subsets at some places; those that are alike for all stay as they are."""
    return features[places] if len(features) > 1 else features


def _probabilities(logits: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """What a result keeps of the logits `(n, classes)` of both splits."""
    return {f"{split}/probabilities": torch.sigmoid(logits[split]).numpy() for split in SPLITS}


def network_arrays(
    data: FusionData, network: nn.Module, features: Sequence[Tensor]
) -> dict[str, np.ndarray]:
    """Probabilities of both splits, and token weights on fold 9 where there are tokens."""
    arrays = _probabilities(
        {split: stack_logits(network, features, data.split[split])[0] for split in SPLITS}
    )
    if isinstance(network, FusionNetwork):
        positions = data.split["validation"]
        targets = torch.from_numpy(data.records.targets[positions])[None]
        inputs = gather(features, torch.from_numpy(positions)[None])
        weights = token_weights(network, inputs, targets)
        arrays |= {f"tokens/{name}": values[0].numpy() for name, values in weights.items()}
    return arrays


def origin_of_members(members: Mapping[str, Run], protocol: str) -> dict:
    """The settings that tell which members are fused, and how they are used."""
    keys = {name: run.spec.key for name, run in members.items()}
    return {"protocol": protocol, "members": "+".join(members), "member_keys": keys}


@dataclass(frozen=True)
class Fused(Labelled):
    """The fusion of some frozen members with the labels of one subset, see `Fits`."""

    method: str
    fits: Fits

    @property
    def rebuild(self) -> str:
        """Where the network is kept, it is put together with the members' encoders."""
        return "ecgstudy.arms.trained:fused_encoders" if self.fits.keep else ""

    def settings(self) -> Mapping:
        members = {name: self.fits.data.members[name][self.subset] for name in self.fits.names}
        origin = origin_of_members(members, "frozen")
        return self.fits.about() | origin | super().settings()

    def compute(self, study: Study, workspace: Path) -> Result:
        return self.fits.result(self.subset)


class EncodersAndHead(nn.Module):
    """Encoders and what was trained on their frozen features as one network: `(batch, leads, time)`
    mV -> logits `(batch, classes)`.

    `head` maps `(1, batch, d)` to logits, as a stack of one fusion does. Features are scaled as it
    saw them: standardised by `references`, each encoder's features `(n, d)` of the training pool
    from before fine-tuning, and of unit length for each encoder. `windows` are the seconds of each
    encoder's windows where the encoders are frozen, see `score_signals`; fine-tuned ones answer for
    windows together.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        head: nn.Module,
        references: Sequence[Tensor],
        windows: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = head
        self.windows = windows
        self.sizes = [reference.shape[1] for reference in references]
        mean, deviation = feature_scale(torch.cat(references, dim=1))
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())

    def features(self, signals: Tensor) -> Tensor:
        """What the encoders say of signals `(n, leads, time)`, side by side, `(n, d)`."""
        return torch.cat([encoder(signals).float() for encoder in self.encoders], dim=1)

    def answer(self, features: Tensor) -> Tensor:
        """Logits `(n, classes)` of such features."""
        scaled = (features - self.mean) / self.deviation
        parts = map(unit_length, scaled.split(self.sizes, dim=1))
        return self.head(torch.cat(list(parts), dim=1)[None])[0]

    def forward(self, signals: Tensor) -> Tensor:
        return self.answer(self.features(signals))


def fused_classifier(frozen: Run, members: Sequence[Run], records: Records) -> EncodersAndHead:
    """The network of the run `frozen` on the encoders of its `members`, which can be trained on.

    It answers for a window what the frozen fusion would answer for the window's features.
    """
    settings = FusionSettings.of(frozen.spec.settings)
    train = records.split["train"]
    raw = [torch.from_numpy(run.predictions()["features"][train]).double() for run in members]
    sizes = [each.shape[1] for each in raw]
    options = frozen.spec.settings["options"]
    network = frozen.load(
        tokens_stack(
            sizes,
            len(records.classes),
            settings,
            [0],
            **options,
        )
    )
    return EncodersAndHead(list(map(member_encoder, members)), network, raw)


@dataclass(frozen=True)
class TunedFusion(Labelled):
    """Encoders and fusion trained on from `frozen`, a kept fusion of `members` with these labels.

    The encoders learn at `encoder_factor` times the rate of the fusion. `training.encoder` names
    the members.
    """

    frozen: Run
    members: Mapping[str, Run]
    training: Training
    encoder_factor: float

    @property
    def method(self) -> str:
        """That of the frozen fusion."""
        return self.frozen.spec.method

    def settings(self) -> Mapping:
        own = {"encoder_factor": self.encoder_factor, "start_key": self.frozen.spec.key}
        origin = origin_of_members(self.members, "fine-tuned")
        return asdict(self.training) | own | origin | super().settings()

    def reaches(self) -> tuple[Callable, ...]:
        names = [run.spec.settings["encoder"] for run in self.members.values()]
        return tuple(map(encoder_maker, names))

    def compute(self, study: Study, workspace: Path) -> Result:
        classifier = fused_classifier(self.frozen, list(self.members.values()), study.records)
        groups = [
            {**group, "learning_rate_factor": self.encoder_factor}
            for group in parameter_groups(classifier.encoders, self.training.weight_decay)
        ]
        groups.append({"params": list(classifier.head.parameters()), "weight_decay": 0.0})
        return self.train(study, classifier, workspace, groups)

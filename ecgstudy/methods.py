"""Every method of the study: one entry says how it is trained and how tables and figures show it.

The entries stand in `methods.json`, each with its kind, one of the classes below, and that class's
fields. A new method is one file with its objective and one entry there, or from elsewhere
`METHODS["mine"] = SelfSupervised("Mine", "tab:pink", "my_module:Mine")`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

from ecglib.files import read_json
from ecglib.selfsup import Pretraining
from ecglib.semisup import Adaptation
from ecgstudy.arms.fusion import (
    Fits,
    Fused,
    FusionData,
    FusionSettings,
    TrainedFits,
    check_members,
)
from ecgstudy.arms.pretrain import Pretrain
from ecgstudy.arms.self_evolving import Arm
from ecgstudy.arms.semi_supervised import Adapted, Recipe, Start
from ecgstudy.runs import Run
from ecgstudy.study import LabelSubset, Study


@dataclass(frozen=True)
class Method:
    """How a method is shown: `label` in tables and figures, `colour` in figures.

    `noise` says whether it is scored under noise in notebook 15.
    """

    label: str
    colour: str
    noise: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class SelfSupervised(Method):
    """A method that pretrains an encoder without labels.

    `objective` is the "module:name" of a class that is made as `objective(encoder, transforms,
    **options)` and has `.encoder` and `.loss(batch)`; `batches` that of the batches it learns
    from.
    """

    what = "self-supervised method"
    objective: str
    batches: str = "ecglib.batches:CropBatches"


@dataclass(frozen=True)
class SemiSupervised(Method):
    """A method that adapts a pretrained backbone to few labels, with unlabelled records beside.

    `objective` is the "module:name" of `make(network, task)`, see `ecglib.semisup.Task`, `adapt`
    that of a way to adapt the network, which gets the `options`, see `arms.semi_supervised`.
    `unlabelled` says whether it learns from unlabelled records.
    """

    what = "semi-supervised method"
    objective: str
    adapt: str = "ecgstudy.arms.semi_supervised:every_weight"
    unlabelled: bool = True
    options: Mapping = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The functions themselves."""
        functions = map(resolve_name, (self.objective, self.adapt))
        return Recipe(*functions, self.unlabelled, self.options)


@dataclass(frozen=True)
class SelfEvolving(Method):
    """An arm of the study in which unlabelled records arrive in stages.

    `learner` is the "module:name" of its way to learn, `options` are the other fields of
    `arms.self_evolving.Arm`.
    """

    what = "arm"
    learner: str = "ecgstudy.arms.self_evolving:distl"
    options: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class FusionOfProbes(Method):
    """A way to use several encoders without training: `combine` is the "module:name" of
    `combine(data, names)`, see `arms.fusion`.
    """

    what = "fusion"
    combine: str

    def fits(self, settings: FusionSettings, *shared: object) -> Fits:
        """The fits of some members with some subsets of labels."""
        return Fits(*shared, resolve_name(self.combine))


@dataclass(frozen=True)
class TrainedFusion(Method):
    """A fusion of frozen encoders that is trained: `stack` is the "module:name" of `stack(sizes,
    classes, settings, seeds, **options)`. With `keep` its networks are kept.
    """

    what = "fusion"
    stack: str = "ecgstudy.arms.fusion:tokens_stack"
    options: Mapping = field(default_factory=dict)
    keep: bool = False

    def fits(self, settings: FusionSettings, *shared: object) -> TrainedFits:
        """The fits of some members with some subsets of labels."""
        return TrainedFits(*shared, resolve_name(self.stack), settings, self.options, self.keep)


def _listed(path: Path) -> dict[str, Method]:
    """The entries of a file, by name."""
    kinds = (Method, *Method.__subclasses__())
    classes = {kind.__name__: kind for kind in kinds}
    return {name: classes[row.pop("kind")](**row) for name, row in read_json(path).items()}


METHODS = _listed(Path(__file__).with_name("methods.json"))
SPARE_COLOURS = ("#fbafe4", "#ece133", "#56b4e9", "#730014", "#4a6a2f", "#3b3b98")


def method(name: str) -> Method:
    """The entry of a method; one that has none gets a label and a spare colour of its own."""
    spare = SPARE_COLOURS[sum(name.encode()) % len(SPARE_COLOURS)]
    return METHODS.get(name, Method(name.replace("_", " "), spare))


def names_of(*kinds: type[Method]) -> list[str]:
    """Names of the methods of some kinds."""
    return [name for name, entry in METHODS.items() if isinstance(entry, kinds)]


def _entry(name: str, *kinds: type[Method]) -> Method:
    """The entry of a method that is of one of the kinds; ValueError for others."""
    if name not in names_of(*kinds):
        known = ", ".join(names_of(*kinds))
        raise ValueError(f"There is no {kinds[0].what} {name!r}; choose from {known}.")
    return METHODS[name]


def pretraining(name: str, settings: Pretraining, seed: int = 0) -> Pretrain:
    """The job that pretrains an encoder by a self-supervised method; ValueError for others."""
    entry = _entry(name, SelfSupervised)
    objective = resolve_name(entry.objective)
    return Pretrain(name, objective, settings, seed, resolve_name(entry.batches))


def adapted(
    names: Iterable[str], start: Start, subsets: Sequence[LabelSubset], settings: Adaptation
) -> list[Adapted]:
    """The jobs of semi-supervised methods from one start; ValueError for other methods."""
    recipes = {name: _entry(name, SemiSupervised).recipe for name in names}
    return [
        Adapted(subset, name, start, settings, recipe)
        for name, recipe in recipes.items()
        for subset in subsets
    ]


def evolving(names: Iterable[str]) -> dict[str, Arm]:
    """The arms of these names for `self_evolving.evolve`; ValueError for other methods."""
    entries = {name: _entry(name, SelfEvolving) for name in names}
    return {
        name: Arm(resolve_name(entry.learner), **entry.options) for name, entry in entries.items()
    }


def fuse(
    study: Study,
    data: FusionData,
    name: str,
    settings: FusionSettings,
    members: Sequence[str] = (),
    subsets: Sequence[LabelSubset] = (),
) -> list[Run]:
    """The runs of one fusion method, of all members and subsets of `data` unless some are given.

    In one process, for all subsets are fitted together. ValueError for other methods, DataError for
    a single member.
    """
    entry = _entry(name, TrainedFusion, FusionOfProbes)
    members = list(members or data.members)
    if name != "alone":
        check_members(members)
    fits = entry.fits(settings, data, members, list(subsets or data.subsets))
    jobs = [Fused(subset, name, fits) for subset in fits.subsets]
    return study.grid(jobs, workers=1, progress_bar=False)

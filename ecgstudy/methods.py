"""Every method of the study: one entry says how it is trained and how tables and figures show it.

A new method is one file with its objective and one entry here, or from elsewhere
`METHODS["mine"] = SelfSupervised("Mine", "tab:pink", "my_module:Mine")`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name

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
from ecgstudy.arms.self_evolving import LABELS_ALONE, Arm, distl, fixmatch
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
    that of a way to adapt the network, see `arms.semi_supervised`. `unlabelled` says whether it
    learns from unlabelled records.
    """

    what = "semi-supervised method"
    objective: str
    adapt: str = "ecgstudy.arms.semi_supervised:every_weight"
    unlabelled: bool = True

    @property
    def recipe(self) -> Recipe:
        """The functions themselves."""
        names = (self.objective, self.adapt)
        return Recipe(*map(resolve_name, names), unlabelled=self.unlabelled)


@dataclass(frozen=True)
class SelfEvolving(Method):
    """An arm of the study in which unlabelled records arrive in stages."""

    what = "arm"
    arm: Arm


@dataclass(frozen=True)
class FusionOfProbes(Method):
    """A way to use several encoders without training: `combine` is the "module:name" of
    `combine(data, names)`, see `arms.fusion`.
    """

    what = "fusion"
    combine: str

    def fits(self, *shared: object, settings: FusionSettings) -> Fits:
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

    def fits(self, *shared: object, settings: FusionSettings) -> TrainedFits:
        """The fits of some members with some subsets of labels."""
        return TrainedFits(*shared, resolve_name(self.stack), settings, self.options, self.keep)


ADAPT = "ecgstudy.arms.semi_supervised:"
FIXMATCH = "ecglib.semisup.fixmatch:"
CE_SSL = "ecglib.semisup.ce_ssl:make_ce_ssl"
CUTMIX = "ecglib.semisup.ce_ssl:make_supervised_cutmix"
METHODS: dict[str, Method] = {
    "supervised": Method("supervised", "black"),
    "random": Method("never trained", "0.6"),
    "simclr": SelfSupervised("SimCLR", "#0173b2", "ecglib.selfsup.simclr:SimCLR"),
    "byol": SelfSupervised("BYOL", "#de8f05", "ecglib.selfsup.byol:BYOL"),
    "swav": SelfSupervised("SwAV", "#029e73", "ecglib.selfsup.swav:SwAV"),
    "cpc": SelfSupervised("CPC", "#d55e00", "ecglib.selfsup.cpc:CPC"),
    "dino": SelfSupervised("DINO", "#cc78bc", "ecglib.selfsup.dino:DINO"),
    "patient_pairs": SelfSupervised(
        "patient pairs",
        "#ca9161",
        "ecglib.selfsup.patient_pairs:PatientPairs",
        "ecglib.batches:PatientBatches",
    ),
    "frozen": Method("linear probe", "0.6", noise=False),
    "ce_ssl": SemiSupervised("CE-SSL", "#0173b2", CE_SSL, f"{ADAPT}allocated_and_deactivated"),
    "ce_ssl_without_deactivation": SemiSupervised(
        "CE-SSL without deactivation", "#56b4e9", CE_SSL, f"{ADAPT}allocated", noise=False
    ),
    "ce_ssl_without_allocation": SemiSupervised(
        "CE-SSL without allocation", "#029e73", CE_SSL, f"{ADAPT}deactivated", noise=False
    ),
    "ce_ssl_without_norm": SemiSupervised(
        "CE-SSL without norm",
        "#949494",
        CUTMIX,
        f"{ADAPT}allocated_and_deactivated",
        False,
        noise=False,
    ),
    "fixmatch": SemiSupervised("FixMatch", "#d55e00", f"{FIXMATCH}make_fixmatch"),
    "supervised_cutmix": SemiSupervised(
        "supervised with CutMix", "black", CUTMIX, unlabelled=False
    ),
    "flexmatch": SemiSupervised("FlexMatch", "#de8f05", f"{FIXMATCH}make_flexmatch", noise=False),
    "softmatch": SemiSupervised("SoftMatch", "#ca9161", f"{FIXMATCH}make_softmatch", noise=False),
    "mixed_teacher": SemiSupervised(
        "MixedTeacher", "#cc78bc", "ecglib.semisup.mixed_teacher:make_mixed_teacher", noise=False
    ),
    "fixmatch_lora": SemiSupervised(
        "FixMatch with LoRA", "#ece133", f"{FIXMATCH}make_fixmatch", f"{ADAPT}low_rank", noise=False
    ),
    "fixmatch_adalora": SemiSupervised(
        "FixMatch with AdaLoRA",
        "#fbafe4",
        f"{FIXMATCH}make_adalora",
        f"{ADAPT}singular",
        noise=False,
    ),
    "fixmatch_dylora": SemiSupervised(
        "FixMatch with DyLoRA", "#730014", f"{FIXMATCH}make_fixmatch", f"{ADAPT}nested", noise=False
    ),
    "oracle": SelfEvolving(
        "oracle", "0.6", Arm(distl, pretext=0.0, unlabelled=False, all_labels=True), noise=False
    ),
    "distl": SelfEvolving("DISTL", "#0173b2", Arm(distl, taught=True)),
    "supervised_noised": SelfEvolving("supervised with noise", "black", LABELS_ALONE),
    "noisy_student": SelfEvolving(
        "noisy student", "#de8f05", Arm(distl, pretext=0.0, taught=True), noise=False
    ),
    "dino_fine_tuned": SelfEvolving(
        "DINO, fine-tuned", "#cc78bc", Arm(distl, pretext=1.0, tuned=True), noise=False
    ),
    "distl_without_correction": SelfEvolving(
        "DISTL without correction", "#56b4e9", Arm(distl, corrected=False, taught=True), noise=False
    ),
    "distl_without_noise": SelfEvolving(
        "DISTL without noise", "#029e73", Arm(distl, noised=False, taught=True), noise=False
    ),
    "fixmatch_noised": SelfEvolving(
        "FixMatch with the same noise", "#d55e00", Arm(fixmatch), noise=False
    ),
    "dvme": TrainedFusion("DVME", "#0173b2", keep=True),
    "dvme_random_start": TrainedFusion(
        "DVME from random weights", "#56b4e9", options={"votes": False}, noise=False
    ),
    "uniform_attention": TrainedFusion(
        "uniform attention", "#de8f05", options={"mixing": "uniform"}, noise=False
    ),
    "softmax_gate": TrainedFusion(
        "softmax gate", "#029e73", options={"mixing": "gate"}, noise=False
    ),
    "perceptron": TrainedFusion(
        "matched perceptron", "#d55e00", "ecgstudy.arms.fusion:perceptron_stack", noise=False
    ),
    "alone": FusionOfProbes("one encoder", "0.6", "ecgstudy.arms.fusion:alone", noise=False),
    "best_single": FusionOfProbes(
        "best single encoder", "black", "ecgstudy.arms.fusion:best_single", noise=False
    ),
    "concatenation": FusionOfProbes(
        "concatenation + logistic", "#ca9161", "ecgstudy.arms.fusion:concatenation", noise=False
    ),
    "mean_of_logits": FusionOfProbes(
        "mean of logits", "#949494", "ecgstudy.arms.fusion:mean_of_logits", noise=False
    ),
}
SPARE_COLOURS = ("#fbafe4", "#ece133", "#56b4e9", "#730014", "#4a6a2f", "#3b3b98")


def method(name: str) -> Method:
    """The entry of a method; one that has none gets a label and a spare colour of its own."""
    if name in METHODS:
        return METHODS[name]
    place = sum(name.encode()) % len(SPARE_COLOURS)
    return Method(name.replace("_", " "), SPARE_COLOURS[place])


def names_of(kind: type[Method]) -> list[str]:
    """Names of the methods of one kind."""
    return [name for name, entry in METHODS.items() if isinstance(entry, kind)]


def _entry(name: str, *kinds: type[Method]) -> Method:
    """The entry of a method that is of one of the kinds; ValueError for others."""
    if not isinstance(METHODS.get(name), kinds):
        known = ", ".join(each for kind in kinds for each in names_of(kind))
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
    return {name: _entry(name, SelfEvolving).arm for name in names}


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
    fits = entry.fits(data, members, list(subsets or data.subsets), settings=settings)
    jobs = [Fused(subset, name, fits) for subset in fits.subsets]
    return study.grid(jobs, workers=1, progress_bar=False)

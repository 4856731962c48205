"""Every method of the study: one entry says how it is trained and how tables and figures show it.

A new method is one file with its objective and one entry here, or from elsewhere
`METHODS["mine"] = SelfSupervised("Mine", "tab:pink", "my_module:Mine")`.
"""

from dataclasses import dataclass
from pkgutil import resolve_name

from ecglib.selfsup import Pretraining
from ecgstudy.arms.pretrain import Pretrain


@dataclass(frozen=True)
class Method:
    """How a method is shown: `label` in tables and figures, `colour` in figures."""

    label: str
    colour: str


@dataclass(frozen=True)
class SelfSupervised(Method):
    """A method that pretrains an encoder without labels.

    `objective` is the "module:name" of a class that is made as `objective(encoder, transforms,
    **options)` and has `.encoder` and `.loss(batch)`; `batches` that of the batches it learns
    from.
    """

    objective: str
    batches: str = "ecglib.batches:CropBatches"


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
}
SPARE_COLOURS = ("#fbafe4", "#ece133", "#56b4e9", "#730014", "#4a6a2f", "#3b3b98")


def method(name: str) -> Method:
    """The entry of a method; one that has none gets a label and a spare colour of its own."""
    if name in METHODS:
        return METHODS[name]
    place = sum(name.encode()) % len(SPARE_COLOURS)
    return Method(name.replace("_", " "), SPARE_COLOURS[place])


def pretraining(name: str, settings: Pretraining, seed: int = 0) -> Pretrain:
    """The job that pretrains an encoder by a self-supervised method; ValueError for others."""
    entry = METHODS.get(name)
    if not isinstance(entry, SelfSupervised):
        known = [key for key, value in METHODS.items() if isinstance(value, SelfSupervised)]
        raise ValueError(f"{name!r} is no self-supervised method; choose from {', '.join(known)}.")
    objective = resolve_name(entry.objective)
    return Pretrain(name, objective, settings, seed, resolve_name(entry.batches))

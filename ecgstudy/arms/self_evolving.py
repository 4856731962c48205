"""Self-evolving training in stages: at T = 0 a few labelled records, at T = 1, 2, 3 more and more
unlabelled ones.

Every arm goes on at each stage from its own network of the stage before, and all from the same one
of T = 0, with as many steps (not as much computation: the pretext shows a record several times). A
run is one arm, stage and label subset.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ecglib.augment import named_transforms
from ecglib.batches import SemiBatches
from ecglib.encoders.transformer import set_drop_path
from ecglib.errors import DataError
from ecglib.evaluate.metrics import expected_calibration_error
from ecglib.labels import label_subsets
from ecglib.records import Records
from ecglib.semisup.distl import DISTL, StageBatches
from ecglib.semisup.fixmatch import FixedThreshold, FixMatch
from ecglib.settings import Settings
from ecglib.supervised import Classifier, Training, new_classifier
from ecglib.train import fit
from ecgstudy.arms.supervised import SPLITS, Labelled, classifier_result
from ecgstudy.runs import MODEL, Result, Run
from ecgstudy.study import LabelSubset, Study

Pools = tuple[np.ndarray, np.ndarray]  # positions of labelled and unlabelled records
Learned = tuple[nn.Module, Callable]  # an objective and its batches
STUDENT = "network."  # of an objective's weights, those that are scored


@dataclass(frozen=True)
class Evolution(Settings):
    """How a network evolves over the stages T = 1 to `stages`, and how it is trained at T = 0.

    `encoder` is a vision transformer of `encoders.ENCODERS`. `steps` and `learning_rate` hold for
    each stage, `first_steps` and `first_learning_rate` for T = 0. `transforms` and `drop_path`,
    stochastic depth, are the student's noise. The labelled records come again after every
    `correction_every` unlabelled ones. `threshold` is FixMatch's, `options` are DISTL's.
    """

    encoder: str
    stages: int
    first_steps: int
    first_learning_rate: float
    steps: int
    learning_rate: float
    batch_size: int
    crop_seconds: float
    weight_decay: float
    dropout: float
    drop_path: float
    correction_every: float
    threshold: float
    transforms: Mapping[str, Mapping]
    options: Mapping


@dataclass(frozen=True)
class Arm:
    """What an arm of the study does with the records that arrive.

    `learner(job, study, network, pools, steps)` gives its objective around a network and the
    batches of the labelled and unlabelled records at the positions `pools`. `pretext` is DISTL's
    weight where it is not that of the options. `noised`: the student sees noise. `corrected`: the
    labelled records come again. `unlabelled`: it learns from records without labels. `all_labels`:
    it is told the labels of all that arrived. `taught`: its teacher is scored and goes on beside
    the student. `tuned`: half of the steps go to fine-tuning on the labels.
    """

    learner: Callable
    pretext: float | None = None
    noised: bool = True
    corrected: bool = True
    unlabelled: bool = True
    all_labels: bool = False
    taught: bool = False
    tuned: bool = False


def stage_pools(
    records: Records,
    fraction: float,
    seed: int,
    stages: int,
) -> list[np.ndarray]:
    """Positions of the records at each T: the labelled `fraction` at 0, then all that have arrived,
    up to the whole.

    Whole patients, nested; what arrives at each stage has the same size, 30 % three times after 10
    %. DataError where a stage brings no record.
    """
    if stages < 1:
        raise DataError(
            f"Records without labels cannot arrive in {stages} stages; choose 1 or more."
        )
    # Counted down from the whole, so that the last share is 1 and not what rounding makes of it.
    later = [1.0 - (1.0 - fraction) * (stages - stage) / stages for stage in range(1, stages + 1)]
    shares = [fraction, *later]
    subsets = label_subsets(records, shares, seed)
    pools = [subsets[share] for share in shares]
    arriving = np.diff(list(map(len, pools)))
    if not arriving.all():
        raise DataError(
            f"The unlabelled fold that arrives at T = {1 + np.argmin(arriving)} is empty "
            f"({len(pools[0])} of {len(pools[-1])} records are labelled); label a smaller share or "
            "use fewer stages."
        )
    return pools


@dataclass(frozen=True)
class Evolved(Labelled):
    """One arm at one stage, which goes on from the run of the stage before; without it, T = 0.

    Scored is the student, as in the paper; where there is a teacher its probabilities and measures
    are kept as well (column `network` of the table).
    """

    method: str
    arm: Arm
    evolution: Evolution
    previous: Run | None = None
    rebuild = "ecgstudy.arms.self_evolving:kept_student"

    @property
    def stage(self) -> int:
        """T."""
        return 1 + self.previous.spec.settings["stage"] if self.previous else 0

    @property
    def stage_seed(self) -> int:
        """Each stage draws batches of its own."""
        return self.seed + 1000 * self.stage

    def settings(self) -> Mapping:
        arm = {**asdict(self.arm), "learner": self.arm.learner.__name__}
        previous = self.previous.spec.key if self.previous else "none"
        own = {"protocol": f"stage{self.stage}", "stage": self.stage, "previous": previous}
        return {**asdict(self.evolution), **own, "arm": arm}

    def compute(self, study: Study, workspace: Path) -> Result:
        settings = self.evolution
        arm = self.arm
        pools = stage_pools(study.records, self.fraction, self.seed, settings.stages)
        labelled = pools[self.stage if arm.all_labels else 0]
        unlabelled = np.setdiff1d(pools[self.stage], labelled) if arm.unlabelled else labelled[:0]
        network = new_classifier(study.records, self.seed, Training.of(asdict(settings)))
        network = network.to(study.device)
        set_drop_path(network.encoder, settings.drop_path if arm.noised else 0.0)
        steps = settings.first_steps
        if self.previous:
            steps = settings.steps
            self._check_previous()
            self.previous.load(network, STUDENT)
        own = steps // 2 if arm.tuned else steps
        data = (labelled, unlabelled)
        objective, history = self._train(study, network, data, own, self.previous, workspace)
        final = network
        if arm.tuned:
            final = copy.deepcopy(network)
            tuning = replace(self, arm=LABELS_ALONE)
            _, more = tuning._train(study, final, (labelled, labelled[:0]), steps - own)
            history += [{**row, "seconds": row["seconds"] + history[-1]["seconds"]} for row in more]
        result = self._scored(study, final, "student", labelled, history)
        goes_on = arm.taught or arm.tuned
        result.model = objective if goes_on else nn.ModuleDict({"network": final})
        if arm.taught:
            taught = self._scored(study, objective.teacher, "teacher", labelled, history)
            result.metrics += taught.metrics
            arrays = taught.predictions.items()
            result.predictions |= {f"teacher/{name}": a for name, a in arrays if name != "labelled"}
        return result

    def _check_previous(self) -> None:
        """DataError where the run of the stage before is gone."""
        if not (self.previous.folder / MODEL).exists():
            raise DataError(
                f"{self.method}: stage {self.stage} goes on from {self.previous.folder.name}, "
                f"which is not there; run stage {self.stage - 1} first."
            )

    def _train(
        self,
        study: Study,
        network: Classifier,
        pools: Pools,
        steps: int,
        previous: Run | None = None,
        folder: Path | None = None,
    ) -> tuple[nn.Module, list[dict]]:
        """Train `network` in place; its objective, which goes on from `previous`, and the
        history.
        """
        settings = self.evolution
        torch.manual_seed(self.stage_seed)
        objective, batches = self.arm.learner(self, study, network, pools, steps)
        before = previous.weights() if previous else {}
        if "center" in before:
            # Teacher, heads and centre go on, too; but each stage has a progress of its own.
            objective.load_state_dict({**before, "progress": objective.progress})
        history = fit(
            objective.to(study.device),
            batches,
            steps,
            learning_rate=settings.learning_rate if self.previous else settings.first_learning_rate,
            weight_decay=settings.weight_decay,
            seed=self.stage_seed,
            folder=folder,
        )
        return objective, history.to_dict("records")

    def _scored(
        self, study: Study, network: nn.Module, name: str, labelled: np.ndarray, history: list[dict]
    ) -> Result:
        """The result of a network with calibration errors among the metrics, and whose they are."""
        seconds = self.evolution.crop_seconds
        result = classifier_result(study, network, labelled, seconds, history)
        for split in SPLITS:
            targets, _ = study.records.split_truth(split)
            error = expected_calibration_error(
                targets, result.predictions[f"{split}/probabilities"]
            )
            row = next(row for row in result.metrics if row["split"] == split)
            own = {"metric": "expected_calibration_error", "value": error}
            result.metrics.append({**row, **own, "low": np.nan, "high": np.nan})
        origin = {"stage": self.stage, "network": name}
        result.metrics = [row | origin for row in result.metrics]
        return result


def distl(
    job: Evolved,
    study: Study,
    network: Classifier,
    pools: Pools,
    steps: int,
) -> Learned:
    """DISTL."""
    settings = job.evolution
    arm = job.arm
    every = settings.correction_every if arm.corrected else math.inf
    crops = (settings.batch_size, settings.crop_seconds)
    batches = StageBatches(
        study.records,
        *pools,
        *crops,
        every,
        job.stage_seed,
        study.device,
    )
    pretext = {} if arm.pretext is None else {"pretext": arm.pretext}
    options = {**settings.options, "noised": arm.noised, **pretext}
    transforms = named_transforms(settings.transforms if arm.noised else {})
    unlabelled_steps = batches.unlabelled_steps(steps)
    return DISTL(network, transforms, unlabelled_steps=unlabelled_steps, **options), batches


def fixmatch(
    job: Evolved,
    study: Study,
    network: Classifier,
    pools: Pools,
    steps: int,
) -> Learned:
    """FixMatch with the other arms' noise: its own strong view shuffles leads and turns time
    round.
    """
    settings = job.evolution
    crops = (settings.batch_size // 2, 1, settings.crop_seconds)
    batches = SemiBatches(study.records, *pools, *crops, job.stage_seed, study.device)
    transforms = named_transforms(settings.transforms)
    return FixMatch(network, FixedThreshold(settings.threshold), transforms), batches


LABELS_ALONE = Arm(distl, pretext=0.0, unlabelled=False)  # T = 0 of every arm


def evolve(
    study: Study, arms: Mapping[str, Arm], subsets: Sequence[LabelSubset], evolution: Evolution
) -> list[Run]:
    """Every stage of every arm for some label subsets, computing what is missing, one stage after
    the other. The runs of T = 0 are those of `supervised_noised`.
    """
    for subset in subsets:
        stage_pools(study.records, subset.fraction, subset.seed, evolution.stages)
    first = "supervised_noised"
    runs = study.grid(Evolved(subset, first, LABELS_ALONE, evolution) for subset in subsets)
    latest = {(name, run.spec.seed): run for name in arms for run in runs}
    for _ in range(evolution.stages):
        done = study.grid(
            Evolved(subset, name, arm, evolution, latest[name, subset.seed])
            for name, arm in arms.items()
            for subset in subsets
        )
        latest = {(run.spec.method, run.spec.seed): run for run in done}
        runs += done
    return runs


def kept_student(run: Run, records: Records, results: Path) -> nn.Module:
    """The student that a stage kept; DataError where it was not the student that was scored."""
    settings = run.spec.settings
    if settings["arm"]["tuned"]:
        raise DataError(
            f"{run.folder.name}: keeps what goes on to the next stage, not the network that was "
            "fine-tuned to be scored; choose another arm."
        )
    return run.load(new_classifier(records, run.spec.seed, Training.of(settings)), STUDENT)

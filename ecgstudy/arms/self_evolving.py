"""Self-evolving training in stages: at T = 0 a few labelled records, at T = 1, 2, 3 more and more
unlabelled ones.

Every arm goes on at each stage from its own network of the stage before, and all from the same one
of T = 0, with as many steps (not as much computation: the pretext shows a record several times). A
run is one arm, stage and label subset; it names the run that it goes on from.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ecglib.augment import named_transforms
from ecglib.batches import SemiBatches
from ecglib.encoders import encoder_maker
from ecglib.encoders.transformer import set_drop_path
from ecglib.errors import DataError
from ecglib.evaluate.metrics import expected_calibration_error
from ecglib.labels import label_subsets
from ecglib.records import TRAINING_FOLDS, Records
from ecglib.semisup.distl import DISTL, StageBatches
from ecglib.semisup.fixmatch import FixedThreshold, FixMatch
from ecglib.supervised import Classifier, Training, new_classifier
from ecglib.train import fit
from ecgstudy.arms.supervised import classifier_result
from ecgstudy.code import code_of
from ecgstudy.runs import RESULT, Result, Run, RunSpec, open_run, run_grid

ARMS = {  # what each does with the unlabelled records; "oracle" is the only one that sees their labels
    "distl": {},
    "supervised": {"pretext": 0.0},
    "oracle": {"pretext": 0.0},
    "dino": {"pretext": 1.0},
    "noisy_student": {"pretext": 0.0},
    "distl_without_correction": {},
    "distl_without_noise": {"noised": False},
    "fixmatch": {},
}
LABELLED_ONLY = ("supervised", "oracle")
WITH_TEACHER = ("distl", "noisy_student", "distl_without_correction", "distl_without_noise")


def stage_pools(
    records: Records,
    fraction: float,
    seed: int,
    stages: int = 3,
    folds: Iterable[int] = TRAINING_FOLDS,
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
    shares = [
        fraction,
        *(1.0 - (1.0 - fraction) * (stages - stage) / stages for stage in range(1, stages + 1)),
    ]
    subsets = label_subsets(records, shares, seed, folds)
    pools = [subsets[share] for share in shares]
    for stage in range(1, stages + 1):
        if len(pools[stage]) == len(pools[stage - 1]):
            raise DataError(
                f"The unlabelled fold that arrives at T = {stage} is empty ({len(pools[0])} of {len(pools[-1])} records"
                " are labelled); label a smaller share or use fewer stages."
            )
    return pools


def stage_spec(
    records: Records, arm: str, stage: int, fraction: float, seed: int, settings: Mapping
) -> RunSpec:
    """What identifies one arm at T = `stage`, with the name of the run before it; at T = 0 all arms
    are supervised.
    """
    if arm not in ARMS:
        raise ValueError(f"There is no arm {arm!r}; choose from {', '.join(ARMS)}.")
    arm = arm if stage else "supervised"
    previous = (
        stage_spec(records, arm, stage - 1, fraction, seed, settings).name if stage else "none"
    )
    return RunSpec(
        arm,
        records.name,
        records.fingerprint,
        records.about["task"],
        fraction,
        seed,
        {**settings, "protocol": f"stage{stage}", "stage": stage, "previous": previous},
        code_of(self_evolving_run, encoder_maker(settings["encoder"])),
    )


def evolve(
    records: Records,
    arms: Sequence[str],
    fraction: float,
    seeds: int,
    settings: Mapping,
    results: str | Path,
    device: str = "cpu",
    workers: int = 1,
) -> list[Run]:
    """Every stage of every arm for some label subsets, computing what is missing, one stage after
    the other.
    """
    for seed in range(seeds):
        stage_pools(
            records, fraction, seed, settings["stages"]
        )  # an empty fold is told once, not once a run
    runs, function = [], self_evolving_run(records, results, device)
    for stage in range(settings["stages"] + 1):
        present = arms if stage else ["supervised"]
        specs = [
            stage_spec(records, arm, stage, fraction, seed, settings)
            for arm in present
            for seed in range(seeds)
        ]
        runs += run_grid(specs, function, results, workers=workers)
    return runs


def self_evolving_run(
    records: Records, results: str | Path, device: str = "cpu"
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: one stage of one arm, from the run below `results` that
    it names.

    Scored is the student, as in the paper; where there is a teacher its probabilities and measures
    are kept as well (column `network` of the table). DataError where the run of the stage before is
    missing.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        settings, stage, arm = spec.settings, spec.settings["stage"], spec.method
        pools = stage_pools(records, spec.fraction, spec.seed, settings["stages"])
        labelled, unlabelled = _split_pool(arm, pools, stage)
        network = new_classifier(records, spec.seed, Training.of(settings)).to(device)
        set_drop_path(
            network.encoder, 0.0 if arm == "distl_without_noise" else settings["drop_path"]
        )
        before = previous_weights(spec, results)
        if before:
            own = {name: value for name, value in before.items() if name.startswith("network.")}
            nn.ModuleDict({"network": network}).load_state_dict(own)
        seed = spec.seed + 1000 * stage  # each stage draws its own batches
        first = "" if stage else "first_"
        steps, rate = settings[f"{first}steps"], settings[f"{first}learning_rate"]
        half = (
            steps // 2
        )  # the pretext alone, then fine-tuning: together as many steps as any other arm
        budget = (half, rate) if arm == "dino" else (steps, rate)
        objective, history = _train(
            arm,
            network,
            before,
            records,
            labelled,
            unlabelled,
            seed,
            settings,
            budget,
            workspace,
            device,
        )
        final = network
        if arm == "dino":
            final = copy.deepcopy(network)
            _, more = _train(
                "supervised",
                final,
                {},
                records,
                labelled,
                unlabelled[:0],
                seed,
                settings,
                (steps - half, rate),
                None,
                device,
            )
            history += [{**row, "seconds": row["seconds"] + history[-1]["seconds"]} for row in more]
        return _scored(objective, final, arm, records, labelled, settings, history, device)

    return run


def previous_weights(spec: RunSpec, results: str | Path) -> dict[str, torch.Tensor]:
    """What the stage before left, nothing for T = 0; DataError where that run is missing."""
    if not spec.settings["stage"]:
        return {}
    folder = Path(results) / "runs" / spec.settings["previous"]
    if not (folder / RESULT).exists():
        raise DataError(
            f"{spec.name}: stage {spec.settings['stage']} goes on from {folder.name}, which is not there; "
            f"run stage {spec.settings['stage'] - 1} first."
        )
    return open_run(folder).weights()


def _split_pool(arm: str, pools: Sequence[np.ndarray], stage: int) -> tuple[np.ndarray, np.ndarray]:
    """Records that an arm may see with their labels at this stage, and those without."""
    labelled = pools[stage] if arm == "oracle" else pools[0]
    unlabelled = np.setdiff1d(pools[stage], labelled)
    return labelled, unlabelled[:0] if arm in LABELLED_ONLY else unlabelled


def _train(
    arm: str,
    network: Classifier,
    before: Mapping[str, torch.Tensor],
    records: Records,
    labelled: np.ndarray,
    unlabelled: np.ndarray,
    seed: int,
    settings: Mapping,
    budget: tuple[int, float],
    folder: Path | None,
    device: str,
) -> tuple[nn.Module, list[dict]]:
    """The objective after training `network` in place with a `budget` of steps and their rate, and
    the history.
    """
    torch.manual_seed(seed)
    steps, rate = budget
    transforms = [] if arm == "distl_without_noise" else named_transforms(settings["transforms"])
    if arm == "fixmatch":
        batches = SemiBatches(
            records,
            labelled,
            unlabelled,
            settings["batch_size"] // 2,
            1,
            settings["crop_seconds"],
            seed,
            device,
        )
        # Its own strong view shuffles leads and turns time round; here every arm has the same
        # noise.
        objective = FixMatch(
            network,
            FixedThreshold(len(records.classes), settings["threshold"]),
            transforms=transforms,
        )
    else:
        every = float("inf") if arm == "distl_without_correction" else settings["correction_every"]
        batches = StageBatches(
            records,
            labelled,
            unlabelled,
            settings["batch_size"],
            settings["crop_seconds"],
            every,
            seed,
            device,
        )
        objective = DISTL(
            network,
            transforms,
            unlabelled_steps=batches.unlabelled_steps(steps),
            **{**settings["options"], **ARMS[arm]},
        )
        if (
            "center" in before
        ):  # teacher, heads and centre too; but each stage has a progress of its own
            objective.load_state_dict({**before, "progress": objective.progress})
    history = fit(
        objective.to(device),
        batches,
        steps,
        learning_rate=rate,
        weight_decay=settings["weight_decay"],
        seed=seed,
        folder=folder,
    )
    return objective, history.to_dict("records")


def _scored(
    objective: nn.Module,
    final: Classifier,
    arm: str,
    records: Records,
    labelled: np.ndarray,
    settings: Mapping,
    history: list[dict],
    device: str,
) -> Result:
    """The result of a stage: scores of the student, those of its teacher where it has one, and what
    goes on.
    """
    networks = {"student": final}
    if isinstance(objective, DISTL) and arm in WITH_TEACHER:
        networks["teacher"] = objective.teacher
    results = {
        name: classifier_result(network, records, labelled, settings, history, device)
        for name, network in networks.items()
    }
    for name, result in results.items():
        result.metrics += _calibration_rows(records, result.predictions, labelled)
        for row in result.metrics:
            row |= {"stage": settings["stage"], "network": name}
    result = results["student"]
    if "teacher" in results:
        result.metrics += results["teacher"].metrics
        result.predictions |= {
            f"teacher/{name}": values
            for name, values in results["teacher"].predictions.items()
            if name != "labelled"
        }
    # A stage without a teacher leaves its student alone.
    result.model = (
        objective if arm in WITH_TEACHER or arm == "dino" else nn.ModuleDict({"network": final})
    )
    return result


def _calibration_rows(
    records: Records, probabilities: Mapping[str, np.ndarray], labelled: np.ndarray
) -> list[dict]:
    """Expected calibration error on folds 9 and 10 as rows of the study's tables."""
    split, patients = records.split, records.table["patient_id"].iloc[labelled].nunique()
    return [
        {
            "split": name,
            "metric": "expected_calibration_error",
            "low": np.nan,
            "high": np.nan,
            "value": expected_calibration_error(
                records.targets[split[name]], probabilities[f"{name}/probabilities"]
            ),
            "n_records": len(labelled),
            "n_patients": patients,
        }
        for name in ("validation", "test")
    ]

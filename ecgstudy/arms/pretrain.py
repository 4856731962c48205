"""One pretraining as a run: train an objective, watch it learn or collapse, encode every record
once.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import apply, named_transforms
from ecglib.batches import CropBatches, step_generator
from ecglib.checkpoints import load_state
from ecglib.encoders import make_encoder
from ecglib.evaluate.metrics import class_auroc
from ecglib.evaluate.windows import encode_windows, evaluation
from ecglib.probe import fit_probes
from ecglib.records import Records
from ecglib.selfsup import Pretraining
from ecglib.train import autocast, fit, precision
from ecgstudy.runs import MODEL, PRETRAINED, Result, Run, keep_runs, kept_group
from ecgstudy.study import Job, Study

# Labelled training records, and at most as many validation records, that the online probe sees.
WATCHED = 250
LOOKS = 12  # rows of the history
# Alignment is measured between these views whatever a method trains on, so that methods can be
# compared.
VIEWS = {
    "channel_resize": {"low": 0.5, "high": 2.0},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views `(n, d)` on the unit sphere, 0 when they agree (Wang &
    Isola 2020, eq. 2).
    """
    distance = F.normalize(first, dim=1) - F.normalize(second, dim=1)
    return float(distance.square().sum(dim=1).mean())


def uniformity(features: Tensor) -> float:
    """log mean exp(-2 |x - y|^2) over pairs of `(n, d)` on the unit sphere; 0: collapse, lower:
    more even (eq. 3).
    """
    squared = torch.pdist(F.normalize(features, dim=1)).square()
    return float(torch.logsumexp(-2.0 * squared, dim=0) - math.log(len(squared)))


def effective_rank(features: Tensor) -> float:
    """exp(entropy of the singular values of the centred `(n, d)` features) (Roy & Vetterli 2007): 1
    is collapse.
    """
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double())
    share = values / values.sum().clamp_min(1e-30)
    return float(torch.special.entr(share).sum().exp())


class Watch:
    """`watch(step)` for `train.fit`: what the encoder knows at this moment, on the same records for
    every method.

    online_probe: macro AUROC on fold 9 of logistic probes on `WATCHED` labelled records; alignment
    of two augmented views of a crop and uniformity, both of features centred over the records;
    effective_rank of the features.
    """

    def __init__(
        self, encoder: nn.Module, records: Records, crop_seconds: float, device: torch.device | str
    ) -> None:
        self.encoder = encoder
        self.transforms = named_transforms(VIEWS)
        generator = np.random.default_rng(0)
        labelled = records.targets.any(axis=1)
        pools = [records.split[name] for name in ("train", "validation")]
        chosen = [generator.permutation(pool[labelled[pool]])[:WATCHED] for pool in pools]
        self.training = len(chosen[0])
        indices = np.concatenate(chosen)
        length = round(crop_seconds * records.sampling_rate)
        start = (records.signals.shape[2] - length) // 2
        crops = np.nan_to_num(records.millivolts(indices)[:, :, start : start + length])
        self.signals = torch.from_numpy(crops).to(device)
        self.targets = records.targets[indices]

    def __call__(self, step: int) -> dict:
        generator = step_generator(0, 0, self.signals.device)
        plain = self._encode(self.signals)
        views = [self._encode(apply(self.transforms, self.signals, generator)) for _ in range(2)]
        first, second = (view - view.mean(dim=0) for view in views)
        return {
            "online_probe": self._probe(plain),
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
            "effective_rank": effective_rank(plain),
        }

    def _encode(self, signals: Tensor) -> Tensor:
        """Features `(records, d)` in evaluation mode."""
        device = signals.device
        with evaluation(self.encoder), torch.inference_mode(), autocast(device, precision(device)):
            return torch.cat([self.encoder(part).float() for part in signals.split(128)]).cpu()

    def _probe(self, features: Tensor) -> float:
        """Macro AUROC on the validation records of a probe with a middling penalty."""
        features = (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)
        own = np.arange(self.training)
        probes = fit_probes(features[own], self.targets[own], [own], [100.0])
        scores = features[self.training :].double() @ probes.weights[0, 0].T
        return float(np.nanmean(class_auroc(self.targets[self.training :], scores.numpy())))


@dataclass(frozen=True)
class Pretrain(Job):
    """An encoder trained on the signals of folds 1-8 without labels, then every record encoded.

    `objective(encoder, transforms, **pretraining.options)` is the method. No label is used except
    by the online probe, which does not touch the encoder. The result keeps the encoder's weights
    and `features` `(records, feature_size)`.
    """

    method: str
    objective: Callable[..., nn.Module]
    pretraining: Pretraining
    seed: int = 0
    batches: Callable = CropBatches

    def settings(self) -> Mapping:
        return asdict(self.pretraining)

    def compute(self, study: Study, workspace: Path) -> Result:
        settings = self.pretraining
        records = study.records
        torch.manual_seed(self.seed)
        encoder = make_encoder(settings.encoder)
        transforms = named_transforms(settings.transforms)
        model = self.objective(encoder, transforms, **settings.options).to(study.device)
        training = records.split["train"]
        crops = (settings.batch_size, settings.crop_seconds)
        batches = self.batches(records, training, *crops, self.seed, study.device)
        watch = Watch(model.encoder, records, settings.crop_seconds, study.device)
        before = {"step": 0, "learning_rate": 0.0, "seconds": 0.0, **watch(0)}
        history = fit(
            model,
            batches,
            settings.steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            seed=self.seed,
            folder=workspace,
            log_every=max(1, settings.steps // LOOKS),
            watch=watch,
        )
        result = encoded_result(study, model.encoder, settings.crop_seconds)
        rank = effective_rank(torch.from_numpy(result.predictions["features"][training]))
        result.notes = {"history": [before, *history.to_dict("records")], "effective_rank": rank}
        result.seconds += float(history["seconds"].iloc[-1])
        return result


@dataclass(frozen=True)
class Encode(Job):
    """Every record encoded by an encoder that is not trained here: as it starts, or that of a run.

    `method` is "random" for an encoder that was never trained. `about` tells more of where the
    encoder comes from. Like a pretraining it keeps the encoder and `features`.
    """

    method: str
    encoder: str
    crop_seconds: float
    seed: int = 0
    start: Run | None = None
    about: Mapping = field(default_factory=dict)

    def settings(self) -> Mapping:
        start = {"start_key": self.start.spec.key} if self.start else {}
        return {"encoder": self.encoder, "crop_seconds": self.crop_seconds, **self.about, **start}

    def compute(self, study: Study, workspace: Path) -> Result:
        torch.manual_seed(self.seed)
        encoder = make_encoder(self.encoder).to(study.device)
        if self.start is not None:
            load_state(encoder, start_weights(self.start), self.start.folder / MODEL)
        return encoded_result(study, encoder, self.crop_seconds)


def untrained(start: Run) -> Encode:
    """The control of a pretrained encoder: the same one with the same seed, never trained."""
    settings = start.spec.settings
    return Encode("random", settings["encoder"], settings["crop_seconds"], start.spec.seed)


def start_weights(run: Run) -> dict[str, Tensor]:
    """The encoder's weights of a finished pretraining, or of a finished training with labels."""
    return run.weights("encoder.") or run.weights()


def encoded_result(study: Study, encoder: nn.Module, crop_seconds: float) -> Result:
    """An encoder with its `features` `(records, feature_size)` of every record: the mean over
    overlapping windows as long as the crops.
    """
    started = time.perf_counter()
    features = encode_windows(
        encoder, study.records, np.arange(len(study.records)), crop_seconds, study.device
    )
    return Result([], {"features": features}, encoder, time.perf_counter() - started)


def keep_pretrained(run: Run, results: str | Path) -> None:
    """Note which run stands for its method, so that later notebooks find it."""
    keep_runs([run], f"{PRETRAINED}/{run.spec.method}", results)


def pretrained_runs(study: Study) -> dict[str, Run]:
    """The noted run of each method, by name; DataError where there is none, or where one is gone
    or about other records.
    """
    return kept_group(PRETRAINED, study.results, study.records)

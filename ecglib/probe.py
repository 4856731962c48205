"""Hundreds of L2-regularised logistic probes on cached features, fitted as one batched problem.

A probe of one class on one label subset minimises the objective of scikit-learn's
LogisticRegression(C=1/penalty),

sum_i log(1 + exp(-s_i (w x_i + b))) + penalty/2 |w|^2,   s_i = +1 or -1, the sum over the subset, b
not penalised.

The solution lies in the span of the subset's rows, so each subset is centred and turned into its
principal axes, where the Hessian is nearly diagonal. Newton's method with conjugate gradients then
moves all classes and penalties of all subsets of like size at once: one step of it is two matrix
products. The gradient proves how far a solution is from the minimum, see `fit_probes`.
"""

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ecglib.errors import DataError
from ecglib.evaluate.metrics import AbsentClassWarning, absent_classes, class_auroc
from ecglib.train import TrainingError

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
# A subset joins a group if it has at least this share of the records of the group's largest, ...
LIKE_SIZE = 0.75
# ... and if the group's feature matrices then hold no more numbers than this: a processor's cache,
# a GPU's share of memory.
NUMBERS_TOGETHER = {"cpu": 2**18, "cuda": 2**27}
STILL_RUNNING = 0.9  # finished problems leave the products once no more than this share is running
NEWTON_STEPS, GRADIENT_STEPS, HALVINGS = 100, 200, 40


class Probes(NamedTuple):
    """weights `(subsets, penalties, classes, d)`, bias `(subsets, penalties, classes)`, both
    float64, and penalties; where a penalty was chosen for each subset, that axis is gone.
    """

    weights: Tensor
    bias: Tensor
    penalties: tuple[float, ...]

    def at(self, chosen: np.ndarray) -> "Probes":
        """The probes with each subset's penalty at `chosen (subsets,)`."""
        places = torch.arange(len(chosen)), torch.as_tensor(chosen)
        penalties = tuple(self.penalties[place] for place in chosen)
        return Probes(self.weights[places], self.bias[places], penalties)

    def logits(self, features: Tensor | np.ndarray) -> Tensor:
        """Logits `(subsets, penalties, n, classes)` of features `(n, d)` on their device."""
        features = _as_double(features)
        if features.shape[1] != self.weights.shape[-1]:
            raise DataError(
                f"The probes were fitted on {self.weights.shape[-1]} features and cannot score "
                f"records with {features.shape[1]}; use the features of the same encoder."
            )
        weights, bias = self.weights.to(features.device), self.bias.to(features.device)
        return features @ weights.mT + bias[..., None, :]


def standardise(features: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> Tensor:
    """Features `(n, d)` as float64 z-scores: minus the mean of `reference (m, d)`, divided by its
    standard deviation.

    The reference is the unlabelled training pool, so that every label subset sees the same
    features. A column that is constant there is only centred. DataError where a feature is not a
    number.
    """
    mean, deviation = feature_scale(_as_features(reference))
    return (_as_features(features) - mean) / deviation


def feature_scale(reference: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(d,)` of the columns, 1 in place of the deviation of a constant
    one.
    """
    mean, deviation = reference.mean(dim=0), reference.std(dim=0, correction=0)
    # What is left of a constant column after averaging is rounding, not variation.
    constant = deviation <= torch.finfo(torch.float32).eps * mean.abs()
    return mean, deviation.masked_fill(constant, 1.0)


def unit_length(features: Tensor) -> Tensor:
    """Each record's features `(n, d)` scaled to length sqrt(d): its direction counts, as in
    contrastive losses.

    Otherwise a few loud or unusual records outweigh the others where labels are few.
    """
    return F.normalize(features, dim=1) * features.shape[1] ** 0.5


def fit_probes(
    features: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    subsets: Sequence[np.ndarray],
    penalties: Sequence[float] = PENALTIES,
    *,
    classes: Sequence[str] | None = None,
    names: Sequence[Hashable] | None = None,
    tolerance: float = 1e-5,
) -> Probes:
    """Probes of features `(n, d)` on 0/1 targets `(n, classes)`, one for each subset of positions,
    penalty and class.

    Computed in float64 on the device of the features; equal subsets are solved once. Each w lies
    within `tolerance` (Euclidean norm) of the exact one: with b at its minimum the objective is
    penalty-strongly convex in w, hence penalty * |w - w*| <= |dL/dw| + radius * |dL/db|, radius
    being the largest norm of a centred row. The iteration ends on this bound and on a Newton step
    of b below `tolerance`.

    A class that all or none of a subset's records have gets w = 0 and the log odds of its rate
    (half a record added to each side); an `AbsentClassWarning` names the class and the subset (by
    `names`, or numbers from 0). DataError for an empty subset, features that are not numbers and
    unfit shapes; TrainingError where the bound is not reached.
    """
    features = _as_features(features)
    labels = _as_labels(targets, len(features)).to(features.device)
    names = range(len(subsets)) if names is None else names
    chosen = {
        name: _as_positions(subset, len(features), name)
        for name, subset in zip(names, subsets, strict=True)
    }
    penalties = tuple(float(penalty) for penalty in penalties)
    if not chosen or not penalties or not all(0 < penalty < np.inf for penalty in penalties):
        raise DataError(
            f"Probes need label subsets and penalties above 0, not {len(chosen)} subsets with "
            f"{penalties}."
        )
    _warn_absent(labels.cpu().numpy(), chosen, classes)
    most = NUMBERS_TOGETHER[features.device.type] // features.shape[1]
    solved = {}
    for group in groups_of_like_size(chosen.values(), most):
        weights, bias = _fit_group(features, labels, group, penalties, tolerance)
        for place, subset in enumerate(group):
            solved[subset.tobytes()] = weights[place], bias[place]
    weights, bias = zip(*(solved[subset.tobytes()] for subset in chosen.values()))
    return Probes(torch.stack(weights), torch.stack(bias), penalties)


def choose_penalty(
    probes: Probes,
    features: Tensor | np.ndarray,
    targets: np.ndarray,
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Position of each subset's penalty `(subsets,)`: that of the largest macro AUROC on validation
    records `(n, d)`.

    One penalty a subset, not a class: with few validation records a choice for each class would
    follow noise. Of equal ones the strongest penalty is taken. Classes absent from the targets `(n,
    classes)` are left out, in a warning. DataError where all are absent.
    """
    targets = _as_double(targets).cpu().numpy()
    absent = absent_classes(targets, classes)
    if len(absent) == targets.shape[1]:
        raise DataError(
            "No class has both positive and negative validation records; no penalty can be chosen."
        )
    if absent:
        warnings.warn(
            f"The penalty is chosen without {', '.join(absent)}: all or no validation record has "
            "it.",
            AbsentClassWarning,
            stacklevel=2,
        )
    # Logits do not saturate, as probabilities do.
    logits = probes.logits(features).cpu().numpy()
    areas = [[class_auroc(targets, each) for each in penalties] for penalties in logits]
    macro = np.nanmean(areas, axis=2)
    strongest_first = np.argsort(probes.penalties, kind="stable")[::-1]
    return strongest_first[np.argmax(macro[:, strongest_first], axis=1)]


def probe_subsets(
    features: Tensor | np.ndarray,
    targets: np.ndarray,
    subsets: Mapping[Hashable, np.ndarray],
    split: Mapping[str, np.ndarray],
    penalties: Sequence[float] = PENALTIES,
    classes: Sequence[str] | None = None,
) -> dict[Hashable, dict]:
    """One encoder probed on every label subset: key, such as (fraction, seed), -> penalty and
    probabilities.

    features `(n, d)` and targets `(n, classes)` are those of all records, split the positions of
    `Records.split`. Features are standardised with the training records and brought to unit length,
    the penalty is chosen on validation. Each value holds "penalty", "validation/probabilities" and
    "test/probabilities", `(records of the split, classes)`. DataError where a subset holds records
    outside the training ones.
    """
    for key, subset in subsets.items():
        if not np.isin(np.arange(len(features))[subset], split["train"]).all():
            raise DataError(
                f"Label subset {key} holds records outside the training folds; take it from "
                "label_subsets."
            )
    features = unit_length(standardise(features, features[split["train"]]))
    probes = chosen_probes(features, targets, subsets, split, penalties, classes)
    scores = {
        f"{name}/probabilities": torch.sigmoid(probes.logits(features[split[name]])).cpu().numpy()
        for name in ("validation", "test")
    }
    return {
        key: {
            "penalty": probes.penalties[place],
            **{name: values[place] for name, values in scores.items()},
        }
        for place, key in enumerate(subsets)
    }


def chosen_probes(
    features: Tensor,
    targets: np.ndarray,
    subsets: Mapping[Hashable, np.ndarray],
    split: Mapping[str, np.ndarray],
    penalties: Sequence[float] = PENALTIES,
    classes: Sequence[str] | None = None,
) -> Probes:
    """Probes of prepared features `(n, d)` on every subset, each with its penalty from validation:
    weights `(subsets, classes, d)`.
    """
    probes = fit_probes(
        features, targets, list(subsets.values()), penalties, classes=classes, names=list(subsets)
    )
    validation = split["validation"]
    return probes.at(choose_penalty(probes, features[validation], targets[validation], classes))


def probe_layer(
    features: np.ndarray,
    targets: np.ndarray,
    subset: np.ndarray,
    split: Mapping[str, np.ndarray],
    penalties: Sequence[float] = PENALTIES,
    classes: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """A probe as a linear layer on features as they are: weights `(classes, d)` and bias
    `(classes,)`.

    As in `probe_subsets`, for one subset, but without unit length, which no linear layer can do.
    """
    raw = _as_double(features)
    reference = raw[split["train"]]
    prepared = standardise(raw, reference)
    probes = chosen_probes(prepared, targets, {"its own": subset}, split, penalties, classes)
    mean, deviation = feature_scale(reference)
    weights = probes.weights[0] / deviation
    return weights, probes.bias[0] - weights @ mean


def _as_double(values: Tensor | np.ndarray) -> Tensor:
    """Values as float64, a tensor on its device; arrays are copied, for they may be read-only."""
    if isinstance(values, Tensor):
        return values.detach().double()
    return torch.from_numpy(np.array(values, np.float64))


def _as_features(features: Tensor | np.ndarray) -> Tensor:
    """Features `(n, d)` as float64 on their device, or DataError."""
    features = _as_double(features)
    if features.ndim != 2 or not features.numel():
        raise DataError(
            f"Features {tuple(features.shape)} must be a matrix (records, features) that is not "
            "empty."
        )
    wrong = torch.nonzero(~torch.isfinite(features).all(dim=1)).flatten()
    if len(wrong):
        raise DataError(
            f"The features of the record at position {int(wrong[0])} are not all numbers "
            f"({len(wrong)} such records in all); encode it again with an encoder whose training "
            "has not diverged."
        )
    return features


def _as_labels(targets: Tensor | np.ndarray, records: int) -> Tensor:
    """Targets `(records, classes)` as float64, or DataError."""
    labels = _as_double(targets)
    if labels.ndim != 2 or len(labels) != records or not ((labels == 0) | (labels == 1)).all():
        raise DataError(
            f"Targets {tuple(labels.shape)} must hold 0 or 1 for each of {records} records and "
            "each class; pass the targets of the same records as the features."
        )
    return labels


def _as_positions(subset: np.ndarray, records: int, name: Hashable) -> np.ndarray:
    """Sorted positions of a subset given as positions or mask, or DataError."""
    subset = np.asarray(subset)
    try:
        positions = np.sort(np.arange(records)[subset]) if subset.size else subset
    except IndexError as error:
        raise DataError(f"Label subset {name} does not fit {records} records: {error}.") from error
    if not len(positions):
        raise DataError(f"Label subset {name} holds no record; use a larger fraction.")
    return positions


def _warn_absent(
    labels: np.ndarray, chosen: Mapping[Hashable, np.ndarray], classes: Sequence[str] | None
) -> None:
    """Name once, in one warning, the classes that lack positive or negative records, with their
    subsets.
    """
    found: dict[str, list[str]] = {}
    for name, subset in chosen.items():
        for absent in absent_classes(labels[subset], classes):
            found.setdefault(absent, []).append(str(name))
    if found:
        listed = [f"{absent} in subset {', '.join(names)}" for absent, names in found.items()]
        warnings.warn(
            "All or none of a label subset's records have a class, whose score is constant there: "
            f"{'; '.join(listed)}.",
            AbsentClassWarning,
            stacklevel=3,
        )


def groups_of_like_size(subsets: Iterable[np.ndarray], most: int) -> list[list[np.ndarray]]:
    """The different subsets, in groups that waste little when filled up to their longest, of `most`
    records or one subset.
    """
    different = {subset.tobytes(): subset for subset in subsets}.values()
    groups: list[list[np.ndarray]] = []
    for subset in sorted(different, key=len, reverse=True):
        longest = len(groups[-1][0]) if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= most
        if fits and len(subset) >= LIKE_SIZE * longest:
            groups[-1].append(subset)
        else:
            groups.append([subset])
    return groups


def _fit_group(
    features: Tensor,
    labels: Tensor,
    group: list[np.ndarray],
    penalties: tuple[float, ...],
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Weights `(g, penalties, classes, d)` and bias `(g, penalties, classes)` of subsets of like
    size.

    Shorter subsets are filled up with rows of zeros. The ones of the intercept are 0 there too, so
    that these rows have no part in any product with the transposed matrix.
    """
    longest, device = len(group[0]), features.device
    filled = np.array([np.resize(subset, longest) for subset in group])
    positions = torch.from_numpy(filled).to(device)
    counts = torch.tensor([len(subset) for subset in group], device=device)[:, None]
    present = (torch.arange(longest, device=device) < counts).to(features.dtype)[:, :, None]
    rows, positive = features[positions] * present, labels[positions] * present
    mean = rows.sum(dim=1, keepdim=True) / counts[:, :, None]
    rows = (rows - mean) * present
    axes = _principal_axes(rows)
    rows = torch.cat([rows @ axes, present], dim=2)
    hits = positive.sum(dim=1)
    absent = (hits == 0) | (hits == counts)
    signs = ((1 - 2 * positive) * present * ~absent[:, None]).mT
    penalty = torch.tensor(penalties, dtype=rows.dtype, device=device)
    solution = _minimise(
        rows,
        signs.repeat(1, len(penalties), 1),
        penalty.repeat_interleave(labels.shape[1]),
        tolerance,
    )
    solution = solution.unflatten(1, (len(penalties), -1))  # (g, penalties, classes, r)
    weights = solution[..., :-1] @ axes.mT[:, None]
    bias = solution[..., -1] - (weights @ mean.mT[:, None]).squeeze(3)
    constant = torch.log((hits + 0.5) / (counts - hits + 0.5))
    return weights, torch.where(absent[:, None], constant[:, None], bias)


def _principal_axes(rows: Tensor) -> Tensor:
    """Orthonormal columns `(g, d, min(n, d))` that span the rows `(g, n, d)` and make them
    uncorrelated.
    """
    span = torch.linalg.qr(rows.mT).Q if rows.shape[1] < rows.shape[2] else None
    inside = rows if span is None else rows @ span
    turned = torch.linalg.eigh(inside.mT @ inside).eigenvectors
    return turned if span is None else span @ turned


def _minimise(rows: Tensor, signs: Tensor, penalty: Tensor, tolerance: float) -> Tensor:
    """Coefficients `(g, k, r)` of all k problems of g subsets with rows `(g, n, r)`, the last
    column the intercept.

    signs `(g, k, n)` are -1 for a positive record, 1 for a negative one and 0 for one without a say
    (a problem that has no other is at its minimum from the start, with 0); penalty `(k,)`. Newton's
    method with a halving line search; problems that have reached the bound of `fit_probes` in all
    subsets are set aside. TrainingError where one has not in `NEWTON_STEPS`.
    """
    radius = rows[:, :, :-1].norm(dim=2).amax(dim=1)[:, None]
    ridge = F.pad(penalty[:, None].expand(-1, rows.shape[2] - 1), (0, 1))  # none on the intercept
    single = rows.float()
    solution = rows.new_zeros(len(rows), len(penalty), rows.shape[2])
    running = torch.arange(len(penalty), device=rows.device)
    current, logits, first = solution.clone(), torch.zeros_like(signs), None
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(signs * logits)  # the probability of the class that a record has not
        gradient = (signs * wrong) @ rows + ridge * current
        curvature = wrong * (1 - wrong)
        intercept = gradient[..., -1].abs()
        bound = (gradient[..., :-1].norm(dim=2) + radius * intercept) / ridge[:, 0]
        bound = bound.maximum(intercept / (curvature @ rows[:, :, -1:]).squeeze(2))
        solution[:, running] = current
        first = bound if first is None else first
        live = (bound > tolerance).any(dim=0)
        if not live.any():
            return solution
        running, ridge = running[live], ridge[live]
        state = current, logits, signs, curvature, gradient, bound, first
        current, logits, signs, curvature, gradient, bound, first = _keep(live, *state)
        # Far from the minimum a rough direction does as well; near it, no more than the tolerance
        # asks for.
        accuracy = (bound / first).sqrt().clamp(1e-3, 0.1).maximum(0.3 * tolerance / bound)
        accuracy = accuracy.masked_fill(bound <= tolerance, np.inf)
        direction = _newton_direction(single, curvature, ridge, gradient, accuracy)
        current, logits = _line_search(rows, signs, ridge, current, logits, gradient, direction)
    raise TrainingError(
        f"Probes with penalties from {ridge[:, 0].min():g} have not converged in {NEWTON_STEPS} "
        f"Newton steps: they may be {bound.max():.1e} from the minimum, {tolerance:.0e} is asked "
        "for; use stronger penalties or standardise the features."
    )


def _keep(live: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Of tensors `(g, k, ...)` the problems that are still live."""
    return [tensor[:, live] for tensor in tensors]


def _newton_direction(
    rows: Tensor, curvature: Tensor, ridge: Tensor, gradient: Tensor, accuracy: Tensor
) -> Tensor:
    """-(rows' curvature rows + ridge)^-1 gradient, `(g, k, r)`, by conjugate gradients with the
    Hessian's diagonal.

    curvature `(g, k, n)`, ridge `(k, r)`; accuracy `(g, k)` is relative, infinite for a problem
    that is to stand still. In the float32 of the rows, for a direction need not be exact. Problems
    that are done leave the products.
    """
    smallest = torch.finfo(rows.dtype).tiny
    scale = gradient.norm(dim=2, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    residual = (-gradient / scale).to(rows.dtype)
    curvature, ridge = curvature.to(rows.dtype), ridge.to(rows.dtype)
    running, result = torch.arange(len(ridge), device=rows.device), torch.zeros_like(residual)
    inverse, columns = 1 / (curvature @ rows.square() + ridge), rows.mT
    step = inverse * residual
    energy = torch.linalg.vecdot(residual, step)[..., None]
    target = energy * accuracy[..., None].to(rows.dtype).square()
    for _ in range(GRADIENT_STEPS):
        wanted = energy > target
        live = wanted.any(dim=0).flatten()
        remaining = int(live.sum())
        if not remaining:
            break
        if remaining <= STILL_RUNNING * len(live):
            running, ridge = running[live], ridge[live]
            state = residual, curvature, inverse, step, energy, target, wanted
            residual, curvature, inverse, step, energy, target, wanted = _keep(live, *state)
        product = ((step @ columns).mul_(curvature) @ rows).addcmul_(ridge, step)
        length = torch.where(wanted, energy / torch.linalg.vecdot(step, product)[..., None], 0)
        result.index_add_(1, running, length * step)
        residual.addcmul_(length, product, value=-1)
        downhill = inverse * residual
        before, energy = energy, torch.linalg.vecdot(residual, downhill)[..., None]
        step = torch.addcmul(downhill, energy / before.clamp_min_(smallest), step)
    return result.to(gradient.dtype) * scale


def _line_search(
    rows: Tensor,
    signs: Tensor,
    ridge: Tensor,
    current: Tensor,
    logits: Tensor,
    gradient: Tensor,
    direction: Tensor,
) -> tuple[Tensor, Tensor]:
    """The coefficients `(g, k, r)` and logits `(g, k, n)` after the longest of 1, 1/2, 1/4 ...
    steps that descends.
    """

    def objective(coefficients: Tensor, logits: Tensor) -> Tensor:
        loss = F.softplus(signs * logits, threshold=40).sum(dim=2, keepdim=True)
        return loss + 0.5 * (ridge * coefficients.square()).sum(dim=2, keepdim=True)

    change = direction @ rows.mT
    slope = (gradient * direction).sum(dim=2, keepdim=True)
    start = objective(current, logits)
    length = torch.ones_like(start)
    for _ in range(HALVINGS):
        moved, shifted = current + length * direction, logits + length * change
        # The last steps change the objective by less than its rounding.
        rising = objective(moved, shifted) > start + 1e-4 * length * slope + 1e-12 * start.abs()
        if not rising.any():
            break
        length = torch.where(rising, length / 2, length)
    return moved, shifted

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
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import eigh, qr, vecdot
from torch.nn.utils.rnn import pad_sequence

from ecglib.errors import DataError
from ecglib.evaluate.metrics import (
    AbsentClassWarning,
    absent_classes,
    class_auroc,
    warn_of_absent_classes,
)
from ecglib.train import TrainingError

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
# A subset joins a group if it has at least this share of the records of the group's largest, ...
LIKE_SIZE = 0.75
# ... and if the group's feature matrices then hold no more numbers than this: a processor's cache,
# a GPU's share of memory.
NUMBERS_TOGETHER = {"cpu": 2**18, "cuda": 2**27}
STILL_RUNNING = 0.9  # finished problems leave the products once no more than this share is running
NEWTON_STEPS, GRADIENT_STEPS, HALVINGS = 100, 200, 40
TOLERANCE = 1e-5  # of a probe's weights

Values = Tensor | np.ndarray
Subsets = Mapping[Hashable, np.ndarray]  # positions of labelled records, or masks
Split = Mapping[str, np.ndarray]  # positions, as in `Records.split`


class Probes(NamedTuple):
    """weights `(subsets, penalties, classes, d)`, bias `(subsets, penalties, classes)`, both
    float64, and penalties; where a penalty was chosen for each subset, that axis is gone.
    """

    weights: Tensor
    bias: Tensor
    penalties: tuple[float, ...]

    def at(self, chosen: np.ndarray) -> "Probes":
        """The probes with each subset's penalty at `chosen (subsets,)`."""
        places = np.arange(len(chosen)), chosen
        penalties = tuple(self.penalties[place] for place in chosen)
        return Probes(self.weights[places], self.bias[places], penalties)

    def logits(self, features: Values) -> Tensor:
        """Logits `(subsets, penalties, n, classes)` of features `(n, d)` on their device."""
        features = _as_double(features)
        if features.shape[1] != self.weights.shape[-1]:
            raise DataError(
                f"The probes were fitted on {self.weights.shape[-1]} features and cannot score "
                f"records with {features.shape[1]}; use the features of the same encoder."
            )
        weights, bias = (each.to(features.device) for each in self[:2])
        return features @ weights.mT + bias[..., None, :]


def standardise(features: Values, reference: Values) -> Tensor:
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
    features: Values,
    targets: Values,
    subsets: Subsets | Sequence[np.ndarray],
    penalties: Sequence[float] = PENALTIES,
    classes: Sequence[str] | None = None,
) -> Probes:
    """Probes of features `(n, d)` on 0/1 targets `(n, classes)`, one for each subset of positions,
    penalty and class.

    Computed in float64 on the device of the features; equal subsets are solved once. Each w lies
    within `TOLERANCE` (Euclidean norm) of the exact one: with b at its minimum the objective is
    penalty-strongly convex in w, hence penalty * |w - w*| <= |dL/dw| + radius * |dL/db|, radius
    being the largest norm of a centred row. The iteration ends on this bound and on a Newton step
    of b below `TOLERANCE`.

    A class that all or none of a subset's records have gets w = 0 and the log odds of its rate
    (half a record added to each side); an `AbsentClassWarning` names the class and the subset (by
    its key, or numbers from 0). DataError for an empty subset, features that are not numbers and
    unfit shapes; TrainingError where the bound is not reached.
    """
    features = _as_features(features)
    records, width = features.shape
    labels = _as_labels(targets, records)
    named = subsets if isinstance(subsets, Mapping) else dict(enumerate(subsets))
    chosen = {name: _as_positions(subset, records, name) for name, subset in named.items()}
    if not (chosen and penalties and all(0 < penalty < np.inf for penalty in penalties)):
        raise DataError(
            f"Probes need label subsets and penalties above 0, not {len(chosen)} subsets with "
            f"{penalties}."
        )
    _warn_of_constant_scores(labels.cpu().numpy(), chosen, classes)
    labels = labels.to(features.device)
    solved = {}
    for group in groups_of_like_size(
        chosen.values(), NUMBERS_TOGETHER[features.device.type] // width
    ):
        fitted = _fit_group(features, labels, group, penalties)
        for subset, *solution in zip(group, *fitted):
            solved[subset.tobytes()] = solution
    weights, bias = zip(*(solved[subset.tobytes()] for subset in chosen.values()))
    return Probes(torch.stack(weights), torch.stack(bias), tuple(map(float, penalties)))


def choose_penalty(
    probes: Probes, features: Values, targets: Values, classes: Sequence[str] | None = None
) -> np.ndarray:
    """Position of each subset's penalty `(subsets,)`: that of the largest macro AUROC on validation
    records `(n, d)`.

    One penalty a subset, not a class: with few validation records a choice for each class would
    follow noise. Of equal ones the strongest penalty is taken. Classes absent from the targets `(n,
    classes)` are left out, in a warning. DataError where all are absent.
    """
    targets = _as_double(targets).cpu().numpy()
    warn_of_absent_classes(targets, classes, "penalty", "chosen")
    # Logits do not saturate, as probabilities do.
    logits = probes.logits(features).cpu().numpy()
    areas = [[class_auroc(targets, each) for each in penalties] for penalties in logits]
    strongest_first = np.argsort(probes.penalties, kind="stable")[::-1]
    macro = np.nanmean(areas, axis=2)[:, strongest_first]
    return strongest_first[macro.argmax(axis=1)]


def probe_subsets(
    features: Values,
    targets: Values,
    subsets: Subsets,
    split: Split,
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
    probes = chosen_probes(features, targets, subsets, split, classes)
    found = {key: {"penalty": penalty} for key, penalty in zip(subsets, probes.penalties)}
    for name in ("validation", "test"):
        scores = torch.sigmoid(probes.logits(features[split[name]]))
        for key, score in zip(subsets, scores.cpu().numpy()):
            found[key][f"{name}/probabilities"] = score
    return found


def chosen_probes(
    features: Tensor,
    targets: Values,
    subsets: Subsets,
    split: Split,
    classes: Sequence[str] | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> Probes:
    """Probes of prepared features `(n, d)` on every subset, each with its penalty from validation:
    weights `(subsets, classes, d)`.
    """
    probes = fit_probes(features, targets, subsets, penalties, classes)
    validation = split["validation"]
    return probes.at(choose_penalty(probes, features[validation], targets[validation], classes))


def probe_layer(
    features: Values,
    targets: Values,
    subset: np.ndarray,
    split: Split,
    classes: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """A probe as a linear layer on features as they are: weights `(classes, d)` and bias
    `(classes,)`.

    As in `probe_subsets`, for one subset, but without unit length, which no linear layer can do.
    """
    features = _as_features(features)
    mean, deviation = feature_scale(features[split["train"]])
    prepared = (features - mean) / deviation
    probes = chosen_probes(prepared, targets, {"its own": subset}, split, classes)
    weights = probes.weights[0] / deviation
    return weights, probes.bias[0] - weights @ mean


def _as_double(values):
    """Values as float64, a tensor on its device; arrays are copied, for they may be read-only."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    return tensor.detach().double()


def _as_features(features):
    """Features `(n, d)` as float64 on their device, or DataError."""
    features = _as_double(features)
    if features.ndim != 2 or not features.numel():
        raise DataError(
            f"Features {tuple(features.shape)} must be a matrix (records, features) that is not "
            "empty."
        )
    wrong = (~features.isfinite().all(dim=1)).nonzero()
    if len(wrong):
        raise DataError(
            f"The features of the record at position {int(wrong[0])} are not all numbers "
            f"({len(wrong)} such records in all); encode it again with an encoder whose training "
            "has not diverged."
        )
    return features


def _as_labels(targets, records):
    """Targets `(records, classes)` as float64, or DataError."""
    labels = _as_double(targets)
    if labels.ndim != 2 or len(labels) != records or not ((labels == 0) | (labels == 1)).all():
        raise DataError(
            f"Targets {tuple(labels.shape)} must hold 0 or 1 for each of {records} records and "
            "each class; pass the targets of the same records as the features."
        )
    return labels


def _as_positions(subset, records, name):
    """Sorted positions of a subset given as positions or mask, or DataError."""
    try:
        positions = np.sort(np.arange(records)[subset])
    except IndexError as error:
        raise DataError(f"Label subset {name} does not fit {records} records: {error}.") from error
    if not len(positions):
        raise DataError(f"Label subset {name} holds no record; use a larger fraction.")
    return positions


def _warn_of_constant_scores(labels, chosen, classes):
    """Name once, in one warning, the classes that lack positive or negative records, with their
    subsets.
    """
    found = defaultdict(list)
    for name, subset in chosen.items():
        for absent in absent_classes(labels[subset], classes):
            found[absent].append(str(name))
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
    groups = []
    longest = np.inf
    for subset in sorted(different, key=len, reverse=True):
        if len(subset) < LIKE_SIZE * longest or (len(groups[-1]) + 1) * longest > most:
            groups.append([])
            longest = len(subset)
        groups[-1].append(subset)
    return groups


def _fit_group(features, labels, group, penalties):
    """Weights `(g, penalties, classes, d)` and bias `(g, penalties, classes)` of subsets of like
    size.

    Shorter subsets are filled up with rows of zeros. The ones of the intercept are 0 there too, so
    that these rows have no part in any product with the transposed matrix.
    """
    rows, positive, present = (
        pad_sequence([each[subset] for subset in group], batch_first=True)
        for each in (features, labels, torch.ones_like(features[:, :1]))
    )
    counts = present.sum(dim=1)  # (g, 1)
    mean = rows.sum(dim=1, keepdim=True) / counts[:, :, None]
    rows = (rows - mean) * present
    axes = _principal_axes(rows)
    hits = positive.sum(dim=1)
    absent = hits % counts == 0  # none or all
    signs = ((1 - 2 * positive) * present * ~absent[:, None]).mT
    solution = _minimise(
        torch.cat([rows @ axes, present], dim=2),
        signs.repeat(1, len(penalties), 1),
        features.new_tensor(penalties).repeat_interleave(labels.shape[1]),
    )
    solution = solution.unflatten(1, (len(penalties), -1))  # (g, penalties, classes, r)
    weights = solution[..., :-1] @ axes.mT[:, None]
    bias = solution[..., -1] - (weights @ mean.mT[:, None]).squeeze(3)
    constant = torch.log((hits + 0.5) / (counts - hits + 0.5))
    return weights, torch.where(absent[:, None], constant[:, None], bias)


def _principal_axes(rows):
    """Orthonormal columns `(g, d, min(n, d))` that span the rows `(g, n, d)` and make them
    uncorrelated.
    """
    if rows.shape[1] < rows.shape[2]:
        span = qr(rows.mT).Q
        return span @ _principal_axes(rows @ span)
    return eigh(rows.mT @ rows).eigenvectors


def _minimise(rows, signs, penalty):
    """Coefficients `(g, k, r)` of all k problems of g subsets with rows `(g, n, r)`, the last
    column the intercept.

    signs `(g, k, n)` are -1 for a positive record, 1 for a negative one and 0 for one without a say
    (a problem that has no other is at its minimum from the start, with 0); penalty `(k,)`. Newton's
    method with a halving line search; problems that have reached the bound of `fit_probes` in all
    subsets are set aside. TrainingError where one has not in `NEWTON_STEPS`.
    """
    radius = rows[:, :, :-1].norm(dim=2).amax(dim=1)[:, None]
    ridge = F.pad(penalty[:, None].expand(-1, rows.shape[2] - 1), (0, 1))  # none on the intercept
    solution = rows.new_zeros(len(rows), *ridge.shape)
    running = torch.arange(len(penalty), device=rows.device)
    current, logits, first = solution.clone(), torch.zeros_like(signs), None
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(signs * logits)  # the probability of the class that a record has not
        gradient = (signs * wrong) @ rows + ridge[running] * current
        curvature = wrong * (1 - wrong)
        intercept = gradient[..., -1].abs()
        bound = (gradient[..., :-1].norm(dim=2) + radius * intercept) / penalty[running]
        bound = bound.maximum(intercept / (curvature @ rows[:, :, -1:]).squeeze(2))
        solution[:, running] = current
        first = bound if first is None else first
        live = (bound > TOLERANCE).any(dim=0)
        if not live.any():
            return solution
        # Far from the minimum a rough direction does as well; near it, no more than the tolerance
        # asks for.
        accuracy = (bound / first[:, running]).sqrt().clamp(1e-3, 0.1)
        accuracy = accuracy.maximum(0.3 * TOLERANCE / bound).masked_fill(bound <= TOLERANCE, np.inf)
        running, signs = running[live], signs[:, live]
        state = _keep(live, current, logits, gradient, curvature, accuracy)
        current, logits = _newton_step(rows, signs, ridge[running], *state)
    raise TrainingError(
        f"Probes with penalties from {penalty[running].min():g} have not converged in "
        f"{NEWTON_STEPS} Newton steps: they may be {bound.max():.1e} from the minimum, "
        f"{TOLERANCE:.0e} is asked for; use stronger penalties or standardise the features."
    )


def _keep(live, *tensors):
    """Of tensors `(g, k, ...)` the problems that are still live."""
    return [tensor[:, live] for tensor in tensors]


def _newton_step(rows, signs, ridge, current, logits, gradient, curvature, accuracy):
    """The coefficients `(g, k, r)` and logits `(g, k, n)` after the longest of 1, 1/2, 1/4 ...
    Newton steps that descends.
    """

    def objective(coefficients, logits):
        loss = F.softplus(signs * logits, threshold=40).sum(2, keepdim=True)
        return loss + 0.5 * (ridge * coefficients.square()).sum(2, keepdim=True)

    direction = _newton_direction(rows.float(), ridge.float(), gradient, curvature, accuracy)
    change = direction @ rows.mT
    slope = (gradient * direction).sum(2, keepdim=True)
    start = objective(current, logits)
    length = torch.ones_like(start)
    for _ in range(HALVINGS):
        moved, shifted = current + length * direction, logits + length * change
        # The last steps change the objective by less than its rounding.
        rising = objective(moved, shifted) > start + 1e-4 * length * slope + 1e-12 * start
        if not rising.any():
            break
        length = torch.where(rising, length / 2, length)
    return moved, shifted


def _newton_direction(rows, ridge, gradient, curvature, accuracy):
    """-(rows' curvature rows + ridge)^-1 gradient, `(g, k, r)`, by conjugate gradients with the
    Hessian's diagonal.

    curvature `(g, k, n)`, ridge `(k, r)`; accuracy `(g, k)` is relative, infinite for a problem
    that is to stand still. In float32, for a direction need not be exact. Problems that are done
    leave the products.
    """
    scale = gradient.norm(dim=2, keepdim=True).clamp_min(1e-300)
    residual = (-gradient / scale).float()
    curvature = curvature.float()
    result = torch.zeros_like(residual)
    running = torch.arange(len(ridge), device=rows.device)
    inverse = 1 / (curvature @ rows.square() + ridge)
    step = inverse * residual
    energy = vecdot(residual, step)
    target = energy * accuracy.float().square()
    for _ in range(GRADIENT_STEPS):
        wanted = energy > target
        live = wanted.any(dim=0)
        remaining = int(live.sum())
        if not remaining:
            break
        if remaining <= STILL_RUNNING * len(live):
            running, ridge = running[live], ridge[live]
            residual, curvature, inverse, step, energy, target, wanted = _keep(
                live, residual, curvature, inverse, step, energy, target, wanted
            )
        product = ((step @ rows.mT).mul_(curvature) @ rows).addcmul_(ridge, step)
        length = torch.where(wanted, energy / vecdot(step, product), 0)[..., None]
        result.index_add_(1, running, length * step)
        residual.addcmul_(length, product, value=-1)
        downhill = inverse * residual
        before = energy.clamp_min(1e-37)
        energy = vecdot(residual, downhill)
        step = torch.addcmul(downhill, (energy / before)[..., None], step)
    return result.double() * scale

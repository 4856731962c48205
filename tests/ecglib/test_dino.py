"""DINO: its loss and centre, the teacher, crops that know their place, and resuming."""

import numpy as np
import pytest
import torch
from torch import nn

from ecglib.batches import Batch, step_generator
from ecglib.ema import momentum_for_steps
from ecglib.encoders.transformer import DropPath, set_drop_path
from ecglib.encoders.vit1d import ViT1d
from ecglib.errors import DataError
from ecglib.selfsup.crops import MultiCrop
from ecglib.selfsup.dino import DINO, dino_loss, next_center
from ecglib.train import fit
from toolkit import TRANSFORMS, Louder, TinyEncoder, check_determinism, check_resume, tiny_batch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny_vit() -> ViT1d:
    encoder = ViT1d(patch=10, width=24, depth=2, heads=3, length=100)
    set_drop_path(encoder, 0.2)
    return encoder


def tiny_dino(encoder: nn.Module | None = None, **settings) -> DINO:
    return DINO(
        encoder or tiny_vit(),
        TRANSFORMS,
        **{"prototypes": 32, "hidden": 24, "bottleneck": 8, "local_views": 2, **settings},
    )


def slow_dino(student: np.ndarray, teacher: np.ndarray, center: np.ndarray) -> float:
    def softmax(x: np.ndarray) -> np.ndarray:
        x = np.exp(x.astype(float))
        return x / x.sum()

    terms = [
        -np.sum(softmax((teacher[a, i] - center) / 0.04) * np.log(softmax(student[b, i] / 0.1)))
        for a in range(len(teacher))
        for b in range(len(student))
        if a != b
        for i in range(student.shape[1])
    ]
    return float(np.mean(terms))


def test_loss_equals_a_slow_numpy_version():
    student, teacher, center = torch.rand(5, 6, 9), torch.rand(2, 6, 9), torch.rand(9)
    ours = dino_loss(list(student), list(teacher), center).item()
    assert ours == pytest.approx(
        slow_dino(student.numpy(), teacher.numpy(), center.numpy()), rel=1e-5
    )


def test_closed_forms_and_symmetry():
    teacher, center = torch.rand(2, 4, 8), torch.rand(8)
    even = dino_loss(torch.zeros(5, 4, 8), teacher, center)
    assert even.item() == pytest.approx(np.log(8)), "a student without an opinion"
    sure = 10 * torch.eye(8)[:4].repeat(5, 1, 1)
    assert dino_loss(sure, sure[:2], torch.zeros(8)).item() == pytest.approx(0, abs=1e-5)
    student = torch.rand(5, 4, 8)
    swapped = dino_loss(student[[1, 0, 4, 3, 2]], teacher[[1, 0]], center)
    torch.testing.assert_close(dino_loss(student, teacher, center), swapped)
    torch.testing.assert_close(
        dino_loss(student, teacher + 3.0, center), dino_loss(student, teacher, center)
    )
    flat = (
        dino_loss(student, center.expand(2, 4, 8), center),
        dino_loss(student, torch.zeros(2, 4, 8), torch.zeros(8)),
    )
    torch.testing.assert_close(*flat)  # a teacher that says its centre says nothing


def test_a_view_is_not_asked_about_itself():
    student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8)
    other = teacher.clone()
    other[0] = torch.randn(4, 8)  # changes what view 1 must say, and nothing for view 0
    gradients = [
        torch.autograd.grad(dino_loss(student, aim, torch.zeros(8)), student)[0]
        for aim in (teacher, other)
    ]
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_loss_and_center_agree_with_lightly():
    lightly = pytest.importorskip("lightly.loss")
    student, teacher = torch.rand(6, 5, 8), torch.rand(2, 5, 8)
    reference = lightly.DINOLoss(output_dim=8, warmup_teacher_temp_epochs=0)
    center = torch.zeros(8)
    for _ in range(2):
        torch.testing.assert_close(
            dino_loss(student, teacher, center), reference(list(teacher), list(student))
        )
        center = next_center(center, teacher)
        torch.testing.assert_close(center, reference.center.flatten())


def test_center_is_a_moving_average_of_the_teacher():
    center, teacher = torch.rand(4), torch.rand(2, 3, 4)
    expected = 0.9 * center.numpy() + 0.1 * teacher.numpy().reshape(6, 4).mean(axis=0)
    np.testing.assert_allclose(next_center(center, list(teacher)).numpy(), expected, rtol=1e-6)
    objective = tiny_dino()
    objective.loss(tiny_batch())
    moved = objective.center.clone()
    assert moved.abs().max() > 0
    objective.eval().loss(tiny_batch())
    assert torch.equal(objective.center, moved), "only training moves it"


def test_gradients_reach_the_student_alone_and_its_last_layer_after_a_while():
    objective = tiny_dino(frozen=0.5)
    objective.loss(tiny_batch()).backward()
    for name, parameter in objective.named_parameters():
        student = name.startswith("student")
        assert parameter.requires_grad == student and (parameter.grad is not None) == student, name
    last = objective.student_head.prototypes.weight
    assert last.grad.abs().max() == 0
    objective.after_step(0.5)
    objective.loss(tiny_batch()).backward()
    assert last.grad.abs().max() > 0
    teacher = torch.rand(2, 3, 4, requires_grad=True)
    dino_loss(torch.rand(3, 3, 4, requires_grad=True), teacher, torch.zeros(4)).backward()
    assert teacher.grad is None


def test_teacher_is_the_average_of_the_student_and_is_what_is_probed():
    objective = tiny_dino(momentum=0.9)
    assert objective.encoder is not objective.student
    for parameter in objective.student.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    objective.after_step(0.5)
    for name, value in objective.encoder.state_dict().items():
        torch.testing.assert_close(
            value, 0.95 * before[name] + 0.05 * objective.student.state_dict()[name], msg=name
        )
    assert any(name.startswith("encoder.") for name in objective.state_dict())


def test_teacher_has_neither_dropout_nor_stochastic_depth():
    objective = tiny_dino().train()
    assert [m.p for m in objective.student.modules() if isinstance(m, DropPath)] == pytest.approx(
        [0.0, 0.2]
    )
    assert all(m.p == 0 for m in objective.encoder.modules() if isinstance(m, nn.Dropout))
    signals = torch.randn(4, 12, 100)
    assert torch.equal(objective.encoder(signals), objective.encoder(signals))
    assert not torch.equal(objective.student(signals), objective.student(signals))


def test_crops_know_where_they_began():
    seen = []

    class Spy(ViT1d):
        def forward(self, signals: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
            seen.append((signals, start))
            return super().forward(signals, start)

    batch = tiny_batch()
    DINO(
        Spy(patch=10, width=24, depth=1, heads=3, length=100),
        prototypes=8,
        hidden=8,
        bottleneck=4,
        local_views=3,
    ).loss(batch)
    assert [tuple(signals.shape) for signals, _ in seen] == [
        (16, 12, 80),
        (16, 12, 80),
        (24, 12, 40),
    ]
    for signals, starts in seen:
        assert (starts % 10 == 0).all() and len(starts.unique()) > 1
        for i, (crop, start) in enumerate(zip(signals, starts, strict=True)):
            assert torch.equal(crop, batch.signals[i % 8, :, start : start + signals.shape[2]])


def test_the_teacher_sees_the_long_views_only_and_loss_is_that_of_the_parts():
    objective, batch = tiny_dino(TinyEncoder()).eval(), tiny_batch()
    # Whole records, each louder than the last.
    objective.crops = MultiCrop(objective.student, (1.0, 1.0, 1.0), [Louder()])
    nn.init.normal_(objective.teacher_head.layers[4].bias)
    objective.center.normal_().mul_(0.1)
    views = [gain * batch.signals for gain in (1, 2, 3)]
    student = np.stack(
        [objective.student_head(objective.student(view)).detach().numpy() for view in views]
    )
    teacher = np.stack(
        [objective.teacher_head(objective.encoder(view)).numpy() for view in views[:2]]
    )
    expected = slow_dino(student, teacher, objective.center.numpy())
    assert objective.loss(batch).item() == pytest.approx(expected, rel=1e-4)


def test_works_with_an_encoder_without_positions_and_without_local_views():
    for settings in ({}, {"local_views": 0}, {"norm": True}):
        loss = tiny_dino(TinyEncoder(), **settings).loss(tiny_batch())
        loss.backward()
        assert torch.isfinite(loss)


def tones(step: int) -> Batch:
    """Records of four kinds, each with its own tone at any phase in noise; targets: the kind."""
    generator = step_generator(7, step)
    kind = torch.randint(4, (16,), generator=generator)
    angle = (3 + 4 * kind[:, None]) * torch.arange(100) / 100 + torch.rand(
        16, 1, generator=generator
    )
    noise = 0.2 * torch.randn(16, 12, 100, generator=generator)
    return Batch(torch.sin(2 * np.pi * angle)[:, None] + noise, kind, torch.arange(16), generator)


def test_training_tells_kinds_apart_without_collapse():
    objective = DINO(
        tiny_vit(),
        prototypes=32,
        hidden=32,
        bottleneck=16,
        local_views=2,
        norm=True,
        center_momentum=0.5,
        momentum=momentum_for_steps(120, 10),
    )
    history = fit(objective, tones, 120, learning_rate=3e-3, dtype="float32")
    assert history["loss"].iloc[-1] < 1.0 < history["loss"].iloc[0], (
        "log(32) = 3.5 where nothing is learnt"
    )
    objective.eval()
    batches = [tones(step) for step in range(1000, 1006)]
    signals, kinds = (
        torch.cat([b.signals for b in batches]),
        torch.cat([b.targets for b in batches]),
    )
    said = torch.softmax(
        (objective.teacher_head(objective.encoder(signals)) - objective.center) / 0.04, dim=1
    )
    winners = [said[kinds == kind].mean(dim=0).argmax().item() for kind in range(4)]
    assert len(set(winners)) >= 2, "not one prototype for all"
    assert -(said * said.log()).sum(dim=1).mean() < 1.0, "and not all prototypes for each"


def test_resumed_equals_undisturbed(tmp_path):
    check_resume(lambda: tiny_dino(norm=True), tmp_path)


def test_randomness_comes_from_the_batch():
    check_determinism(tiny_dino)


def test_bad_inputs_are_one_sentence():
    with pytest.raises(DataError, match="DINO needs at least two records"):
        tiny_dino().loss(tiny_batch(1))
    with pytest.raises(
        DataError, match="0.4 of a 20-sample crop does not fit .in steps of 10 samples"
    ):
        tiny_dino().loss(tiny_batch(time=20))
    with pytest.raises(DataError, match="-1 local views"):
        tiny_dino(local_views=-1)

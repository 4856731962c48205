"""SwAV: balanced codes, swapped prediction, the queue, prototypes, and the window crops that it
shares with DINO.
"""

import numpy as np
import pytest
import torch
from torch import nn

from ecglib.batches import CropBatches, step_generator
from ecglib.errors import DataError
from ecglib.selfsup.crops import random_windows, window_length
from ecglib.selfsup.dino import next_center
from ecglib.selfsup.heads import Prototypes
from ecglib.selfsup.swav import SwAV, sinkhorn, swav_loss
from ecglib.train import fit
from toolkit import (
    TRANSFORMS,
    TinyEncoder,
    check_determinism,
    check_resume,
    tiny_batch,
    tiny_records,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny_swav(**settings) -> SwAV:
    """SwAV with six prototypes and batches of eight."""
    return SwAV(
        TinyEncoder(),
        TRANSFORMS,
        **{
            "prototypes": 6,
            "hidden": 8,
            "outputs": 4,
            "batch_size": 8,
            "queue": 2,
            "views": 4,
            **settings,
        },
    )


def slow_sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    codes = np.exp(scores.astype(float) / epsilon)
    for _ in range(iterations):
        for k in range(codes.shape[1]):
            codes[:, k] *= codes.shape[0] / codes.shape[1] / codes[:, k].sum()
        for i in range(codes.shape[0]):
            codes[i] /= codes[i].sum()
    return codes


def cosines(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(shape) - 1


def test_sinkhorn_equals_a_slow_numpy_version():
    scores = cosines(12, 5)
    expected = slow_sinkhorn(scores.numpy(), 0.05, 3)
    np.testing.assert_allclose(sinkhorn(scores).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_sinkhorn_rows_sum_to_one_and_columns_to_their_share():
    scores = cosines(40, 8)
    off = []
    for iterations in (1, 3, 200):
        codes = sinkhorn(scores, 0.05, iterations)
        torch.testing.assert_close(codes.sum(dim=1), torch.ones(40))
        off.append((codes.sum(dim=0) - 5).abs().max().item())
    assert off[0] > off[1] > off[2] and off[2] < 1e-3, "columns come ever closer to 40 / 8"
    torch.testing.assert_close(sinkhorn(torch.ones(6, 3)), torch.full((6, 3), 1 / 3))  # all alike
    order = torch.randperm(40)
    torch.testing.assert_close(sinkhorn(scores[order]), sinkhorn(scores)[order])
    assert not sinkhorn(scores.requires_grad_()).requires_grad


def test_sinkhorn_breaks_ties_away_from_one_prototype_and_does_not_overflow():
    favourite = cosines(30, 3) * 0.1 + torch.tensor([1.0, 0.0, 0.0])
    assert (favourite.argmax(dim=1) == 0).all()
    assert torch.bincount(sinkhorn(favourite).argmax(dim=1), minlength=3).min() >= 5
    assert torch.isfinite(sinkhorn(100 * cosines(8, 4), 0.01)).all()


def test_balancing_copies_of_a_batch_gives_the_codes_of_the_batch():
    scores = cosines(10, 4)
    torch.testing.assert_close(sinkhorn(scores.repeat(9, 1))[:10], sinkhorn(scores))


def slow_swav(scores: np.ndarray, codes: np.ndarray, temperature: float) -> float:
    terms = []
    for c in range(len(codes)):
        for v in range(len(scores)):
            for i in range(scores.shape[1]):
                p = np.exp(scores[v, i] / temperature)
                if v != c:
                    terms.append(-np.sum(codes[c, i] * np.log(p / p.sum())))
    return float(np.mean(terms))


def test_loss_equals_a_slow_numpy_version_and_its_closed_form():
    scores, codes = cosines(5, 7, 6), torch.softmax(cosines(2, 7, 6), dim=2)
    assert swav_loss(scores, codes).item() == pytest.approx(
        slow_swav(scores.numpy(), codes.numpy(), 0.1), rel=1e-5
    )
    assert swav_loss(
        torch.zeros(3, 4, 9), torch.softmax(cosines(2, 4, 9), dim=2)
    ).item() == pytest.approx(np.log(9))
    flipped = swav_loss(scores[[1, 0, 2, 3, 4]], codes[[1, 0]])
    torch.testing.assert_close(swav_loss(scores, codes), flipped)


def test_sinkhorn_and_loss_agree_with_lightly():
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    scores = cosines(6, 8, 5)
    torch.testing.assert_close(
        sinkhorn(scores[0]), lightly.sinkhorn(scores[0]), rtol=1e-3, atol=1e-6
    )
    theirs = lightly.SwaVLoss()(list(scores[:2]), list(scores[2:]))
    ours = swav_loss(scores, torch.stack([sinkhorn(scores[0]), sinkhorn(scores[1])]))
    torch.testing.assert_close(ours, theirs.squeeze())


def test_the_objective_is_the_loss_of_its_parts():
    objective, batch = tiny_swav(queue=0, frozen=0.0).eval(), tiny_batch()
    objective.crops.transforms = []
    embeddings = objective.projector(objective.encoder(batch.signals)).detach()
    units = embeddings / embeddings.norm(dim=1, keepdim=True)
    scores = np.repeat((units @ objective.prototypes.weight.detach().T).numpy()[None], 4, axis=0)
    codes = np.repeat(slow_sinkhorn(scores[0], 0.05, 3)[None], 2, axis=0)
    assert objective.loss(batch).item() == pytest.approx(slow_swav(scores, codes, 0.1), rel=1e-3)


def test_gradients_reach_everything_that_learns_and_prototypes_only_after_a_while():
    objective = tiny_swav(frozen=0.5)
    objective.loss(tiny_batch()).backward()
    assert objective.prototypes.weight.grad.abs().max() == 0, "frozen"
    assert all(p.grad.abs().max() > 0 for p in objective.encoder[0].parameters())
    objective.after_step(0.5)
    objective.loss(tiny_batch()).backward()
    assert objective.prototypes.weight.grad.abs().max() > 0


def test_prototypes_have_length_one_after_a_step():
    objective = tiny_swav()
    objective.prototypes.weight.data *= torch.linspace(0.1, 5, 6)[:, None]
    objective.after_step(0.1)
    torch.testing.assert_close(objective.prototypes.weight.norm(dim=1), torch.ones(6))


def test_prototypes_give_cosines_in_float32_under_autocast():
    prototypes, features = Prototypes(64, 10), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        scores = prototypes(features)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores, torch.cosine_similarity(features[:, None], prototypes.weight[None], dim=2)
    )


def test_queue_holds_the_latest_embeddings_and_joins_when_full():
    objective = tiny_swav(queue_from=0.2)
    embeddings = [nn.functional.normalize(torch.randn(2, 8, 4), dim=2) for _ in range(4)]

    def alone(step: int) -> torch.Tensor:
        return torch.stack(
            [sinkhorn(view) for view in embeddings[step] @ objective.prototypes.weight.T]
        )

    def with_queue(step: int) -> torch.Tensor:
        joint = torch.cat(embeddings[step - 2 : step + 1][::-1], dim=1)
        return torch.stack([sinkhorn(view)[:8] for view in joint @ objective.prototypes.weight.T])

    for step, expected in enumerate((alone, alone, with_queue, with_queue)):
        torch.testing.assert_close(objective.codes(embeddings[step]), expected(step), msg=str(step))
        torch.testing.assert_close(objective.queue[:, :8], embeddings[step])
        objective.after_step((step + 1) / 4)
    late = tiny_swav(queue_from=0.9)
    late.load_state_dict(objective.state_dict())
    late.after_step(0.8)
    torch.testing.assert_close(
        late.codes(embeddings[0]), alone(0), msg="full, but too early in the run"
    )


def test_the_queue_stands_still_in_evaluation():
    objective = tiny_swav().eval()
    objective.loss(tiny_batch())
    assert objective.queued == 0 and objective.queue.abs().max() == 0


def test_local_views_are_windows_and_global_views_whole():
    seen = []

    class Spy(TinyEncoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return super().forward(x)

    batch = tiny_batch()
    SwAV(Spy(), queue=0, views=6, local_views=4).loss(batch)
    assert [tuple(x.shape) for x in seen] == [(16, 12, 100), (32, 12, 50)]
    assert torch.equal(seen[0][:8], batch.signals)
    windows = batch.signals.unfold(2, 50, 1).permute(0, 2, 1, 3)
    for view in seen[1].chunk(4):
        assert (windows == view[:, None]).flatten(2).all(dim=2).any(dim=1).all(), (
            "each is a cut of its record"
        )


def test_windows_start_at_multiples_everywhere_and_their_starts_are_true():
    signals, generator = torch.randn(500, 2, 100), step_generator(0, 0)
    windows, starts = random_windows(signals, 40, generator, multiple=20)
    assert set(starts.tolist()) == {0, 20, 40, 60}
    for i in range(20):
        assert torch.equal(windows[i], signals[i, :, starts[i] : starts[i] + 40])
    assert (
        window_length(1000, 0.8, 25) == 800
        and window_length(250, 0.5, 25) == 125
        and window_length(10, 0.7) == 7
    )
    for share, multiple in ((0.0, 1), (1.2, 1), (0.1, 25)):
        with pytest.raises(DataError, match="does not fit"):
            window_length(100, share, multiple)


def _part_of_the_batch(rank: int, folder: str) -> None:
    """One of two processes: its half of the codes, twice (without and with the queue), and DINO's
    centre.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=2
    )
    objective = tiny_swav(queue=1, queue_from=0.0)
    objective.load_state_dict(torch.load(f"{folder}/start.pt"))
    whole = torch.load(f"{folder}/embeddings.pt")
    half = whole[:, 4 * rank : 4 * rank + 4]
    results = [objective.codes(half), objective.codes(half), next_center(torch.zeros(4), half)]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_codes_and_the_centre_of_the_joint_batch(tmp_path):
    objective = tiny_swav(queue=1, queue_from=0.0)
    embeddings = nn.functional.normalize(torch.randn(2, 8, 4), dim=2)
    torch.save(objective.state_dict(), tmp_path / "start.pt")
    torch.save(embeddings, tmp_path / "embeddings.pt")
    torch.multiprocessing.spawn(_part_of_the_batch, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for step in range(2):
        joint = torch.cat([first[step], second[step]], dim=1)
        torch.testing.assert_close(joint, objective.codes(embeddings), msg=str(step))
    for center in (first[2], second[2]):
        torch.testing.assert_close(center, next_center(torch.zeros(4), embeddings))


def test_training_spreads_records_over_prototypes():
    objective, records = tiny_swav(batch_size=16, views=2), tiny_records()
    batches = CropBatches(records, np.arange(40), 16, 1.0, 0)
    history = fit(objective, batches, 80, learning_rate=0.01, dtype="float32")
    assert history["loss"].iloc[-1] < 0.85 * history["loss"].iloc[0]
    objective.eval()
    signals = torch.from_numpy(records.millivolts(np.arange(40)))
    winners = objective.prototypes(objective.projector(objective.encoder(signals))).argmax(dim=1)
    assert len(winners.unique()) >= 3


def test_resumed_equals_undisturbed(tmp_path):
    check_resume(lambda: tiny_swav(local_views=2), tmp_path)


def test_randomness_comes_from_the_batch():
    check_determinism(lambda: tiny_swav(local_views=2))


def test_bad_inputs_are_one_sentence():
    with pytest.raises(DataError, match="SwAV needs at least two records"):
        tiny_swav().loss(tiny_batch(1))
    with pytest.raises(DataError, match="batches of 8 records, this one has 5"):
        tiny_swav().loss(tiny_batch(5))
    with pytest.raises(DataError, match="two full-length views, not 1"):
        tiny_swav(views=4, local_views=3)

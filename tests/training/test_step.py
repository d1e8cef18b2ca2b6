"""Moments, figures and gradients of a step against plain float64 sums and autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_source import ToySource, toy_config, toy_trainer

from sparsify_vlm.coders import Clt, CltConfig, joint_loss
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role
from sparsify_vlm.replacement.measures import LayerSums
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.sources import TokenBatch
from sparsify_vlm.training.step import JointStep, StepPlan, check_finite, moments


def made_up_clt(dtype: torch.dtype = torch.float64) -> Clt:
    clt = Clt(CltConfig(8, ["a", "b", "c"], num_latents=32, k=4, n_targets=3), dtype=dtype)
    torch.manual_seed(3)
    for p in clt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return clt


def test_moments_are_those_of_each_role_about_its_own_mean() -> None:
    batch = ToySource(dtype=torch.float64).global_batch(0)
    found = moments(batch, torch.float64, World())
    assert found.tokens == 48
    torch.testing.assert_close(found.mean_x, batch.x.mean(1))
    torch.testing.assert_close(found.mean_y, batch.y.mean(1))
    for row, wanted in enumerate((None, Role.IMAGE, Role.TEXT)):
        y = batch.y if wanted is None else batch.y[:, batch.role == wanted]
        expected = (y - y.mean(1, keepdim=True)).square().sum((1, 2))
        torch.testing.assert_close(found.variance[row], expected)


def test_moments_in_float32_are_exact_far_from_zero() -> None:
    """A sum of squares minus a squared sum would lose all digits here."""
    batch = ToySource(dtype=torch.float64).global_batch(0)
    far = TokenBatch(batch.x, (batch.y + 1000).float(), batch.role)
    found = moments(far, torch.float32, World()).variance
    expected = moments(batch, torch.float64, World()).variance
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("micro", [1, 3, 100])
def test_gradient_is_that_of_the_mean_of_the_batches_losses(micro: int) -> None:
    batches = [ToySource(dtype=torch.float64).global_batch(i) for i in range(2)]
    clt, plain = made_up_clt(), made_up_clt()
    step = JointStep(clt, World(), StepPlan(grad_acc_steps=2, micro_acc_steps=micro))
    for batch in batches:
        step.add(batch, moments(batch, torch.float64, World()), k=4)
    figures = step.finish()
    loss = sum(joint_loss(plain, batch.x, batch.y) for batch in batches) / 2
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert figures.loss == pytest.approx(loss.item(), rel=1e-12)
    for a, b in zip(clt.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_figures_by_role() -> None:
    batch = ToySource(dtype=torch.float64).global_batch(0)
    clt = made_up_clt()
    step = JointStep(clt, World(), StepPlan(1, 2))
    step.add(batch, moments(batch, torch.float64, World()), k=4)
    figures = step.finish()
    latents = clt.encode(batch.x)
    outputs = torch.stack([y for y in clt.decode(latents, batch.x) if y is not None])
    for row, wanted in enumerate((None, Role.IMAGE, Role.TEXT)):
        chosen = slice(None) if wanted is None else batch.role == wanted
        y, y_hat = batch.y[:, chosen], outputs[:, chosen]
        variance = (y - y.mean(1, keepdim=True)).square().sum((1, 2))
        torch.testing.assert_close(figures.fvu[row], (y - y_hat).square().sum((1, 2)) / variance)
    active = torch.stack([latent.dense(32) > 0 for latent in latents if latent is not None])
    for row, wanted in enumerate((None, Role.IMAGE, Role.TEXT)):
        chosen = slice(None) if wanted is None else batch.role == wanted
        torch.testing.assert_close(figures.l0[row], active[:, chosen].sum(2).double().mean(1))
    assert torch.equal(figures.fired, active.any(1))


def test_figures_are_those_of_an_evaluation_of_the_same_tokens() -> None:
    """Training and `evaluate` mean the same by FVU and L0, in total and by role."""
    batch = ToySource(dtype=torch.float64).global_batch(0)
    clt = made_up_clt()
    step = JointStep(clt, World(), StepPlan(1, 3))
    step.add(batch, moments(batch, torch.float64, World()), k=4)
    figures, sums = step.finish(), LayerSums(clt)
    sums.add(batch.x, batch.y, batch.role)
    torch.testing.assert_close(figures.fvu, sums.fvu("full"))
    torch.testing.assert_close(figures.l0, sums.l0())


def test_batch_of_one_role_has_no_figure_for_the_other() -> None:
    batch = ToySource(dtype=torch.float64).global_batch(0)
    batch.role[:] = Role.TEXT
    step = JointStep(made_up_clt(), World(), StepPlan())
    step.add(batch, moments(batch, torch.float64, World()), k=4)
    fvu = step.finish().fvu
    assert fvu[1].isnan().all()
    assert torch.equal(fvu[0], fvu[2])


@pytest.mark.parametrize(
    ("table", "value", "what"),
    [("x", float("nan"), "input"), ("y", float("inf"), "output"), ("x", float("-inf"), "input")],
)
def test_broken_activations_are_named_and_the_checkpoint_kept(
    tmp_path: Path, table: str, value: float, what: str
) -> None:
    def spoil(number: int, batch: TokenBatch) -> None:
        if number == 7:
            getattr(batch, table)[1, 5, 2] = value

    trainer = toy_trainer(toy_config(tmp_path), ToySource(spoil=spoil))
    with pytest.raises(UserError) as caught:
        trainer.fit()
    assert f"the {what} of layers.1.mlp" in str(caught.value)
    assert "batch 7" in str(caught.value)
    assert "Step 5 is kept" in str(caught.value)
    assert trainer.run.last_step() == 5


def test_check_finite_passes_good_values() -> None:
    batch = ToySource().global_batch(0)
    check_finite(moments(batch, torch.float32, World()), made_up_clt().cfg, 0, "")


def test_divergence_is_said(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path, lr=1e30, optimizer="adam", lr_warmup_steps=0))
    with pytest.raises(UserError, match="smaller --lr"):
        trainer.fit()


def test_loss_falls_and_dead_latents_are_counted(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = []
    cfg = toy_config(tmp_path, max_steps=150, optimizer="adam", num_latents=128, k=8)
    trainer = toy_trainer(cfg, on_step=lines.append)
    trainer.fit()
    first, last = lines[0], lines[-1]
    assert isinstance(first["loss"], float)
    assert isinstance(last["loss"], float)
    assert first["loss"] == pytest.approx(3.0, abs=1e-5)  # decoders 0: every FVU is 1
    assert last["loss"] < 2.5
    assert last["tokens"] == 150 * 48
    never = trainer.since_fired == 150 * 48
    assert all(a >= b for a, b in zip(trainer.dead_shares(), never.double().mean(1), strict=True))
    dead = (trainer.since_fired > 100).double().mean()
    assert last["dead"] == pytest.approx(float(dead))
    by_coder = (trainer.since_fired > 100).double().mean(1).tolist()
    assert last["dead_layers"] == pytest.approx(by_coder)


def test_k_falls_linearly(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path, k_decay_steps=10, num_latents=128))
    expected = [round(80 * (1 - i / 10) + 4 * i / 10) for i in range(10)] + [4, 4]
    for step, k in enumerate(expected):
        trainer.step = step
        assert trainer.active_latents() == k


def test_autoencoder_decoders_keep_unit_norm(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, transcode=False, cross_layer=0, optimizer="adam")
    source = ToySource()
    trainer = toy_trainer(cfg, source)
    for number in range(3):
        batch = source.global_batch(number)
        same = TokenBatch(batch.y, batch.y, batch.role)
        trainer.optimizers.begin(number)
        figures = trainer._gradient(iter([(number, same)]), k=4)
        assert figures is not None
        trainer._update(figures)
    # Adam moves off the sphere by second order in the learning rate; the next step renormalises.
    for tables in trainer.clt.W_dec:
        norms = tables[0].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=2e-2)


def test_batches_without_tokens_change_nothing(tmp_path: Path) -> None:
    """Every sample of the first two batches was bad: training starts with the third."""

    class Holes(ToySource):
        def global_batch(self, number: int) -> TokenBatch:
            batch = super().global_batch(max(number - 2, 0))
            if number >= 2:
                return batch
            return TokenBatch(batch.x[:, :0], batch.y[:, :0], batch.role[:0])

    with_holes = toy_trainer(toy_config(tmp_path, run_name="holes", max_steps=8), Holes())
    with_holes.fit()
    whole = toy_trainer(toy_config(tmp_path, run_name="whole", max_steps=6))
    whole.fit()
    for a, b in zip(with_holes.clt.parameters(), whole.clt.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_gradient_is_dropped_where_the_data_ends(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, max_steps=None, grad_acc_steps=2)
    trainer = toy_trainer(cfg, ToySource(n_batches=None))  # a stream of 7
    trainer.fit()
    assert trainer.step == 3
    assert all(p.grad is None for p in trainer.clt.parameters())

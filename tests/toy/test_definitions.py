"""The functions that the notebook defines, taken from its cells: are they the equations beside them?"""

import math
import os
from types import SimpleNamespace
from unittest import mock

import matplotlib
import nbformat
import pytest
import torch
from toy.run_notebook import NOTEBOOK, tagged

import neon_core.merge


@pytest.fixture(scope="module")
def toy() -> SimpleNamespace:
    """Names defined by the cells tagged `setup` and `definitions`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    names: dict = {}
    with mock.patch.dict(os.environ, NEON_TOY="fast"), matplotlib.rc_context():
        for cell in (*tagged(notebook, "setup"), *tagged(notebook, "definitions")):
            exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture
def theta(toy):
    return toy.initial_weights(toy.Diffusion, 3)


@pytest.fixture
def theta_ar(toy):
    weights = toy.initial_weights(toy.Autoregressive, 3)
    return weights | {"mu1": torch.tensor(0.3), "log_std1": torch.tensor(-0.4)}


def test_it_merges_with_the_function_that_all_backbones_use(toy):
    assert toy.neon_merge is neon_core.merge.neon_merge


def test_weights_have_the_published_names_and_count(toy):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers = ["inb", *(f"mbs.{i}.l" for i in range(4)), "out"]
    assert set(toy.Diffusion().state_dict()) == {f"{n}.{p}" for n in layers for p in ("weight", "bias")}
    assert count(toy.Diffusion()) == 4418
    head = {f"head2.net.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}
    assert set(toy.Autoregressive().state_dict()) == {"mu1", "log_std1"} | head
    assert count(toy.Autoregressive()) == 4420


def test_frechet_distance_equals_the_general_formula(toy):
    torch.manual_seed(0)
    x = torch.randn(500, 2) @ torch.tensor([[1.3, 0.4], [-0.2, 0.6]]) + torch.tensor([0.5, -1.0])
    C = torch.cov(x.T.double())
    roots = torch.linalg.eigvals(C @ toy.SIGMA).real.sqrt().sum()  # tr (C Sigma)^(1/2)
    expected = x.double().mean(0).square().sum() + C.trace() + toy.SIGMA.trace() - 2 * roots
    assert toy.frechet(x) == pytest.approx(float(expected), rel=1e-9)


def test_points_with_the_target_s_moments_score_zero(toy):
    x = toy.noise(0, 1000).double() @ torch.linalg.cholesky(toy.SIGMA).T
    assert toy.frechet(x) == pytest.approx(0, abs=1e-6)


def test_starting_noise_is_a_function_of_its_seed_with_exact_moments(toy):
    z = toy.noise(5, 300)
    assert torch.equal(z, toy.noise(5, 300)) and not torch.equal(z, toy.noise(6, 300))
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("zeta", [0.9, 1.0, 1.1])
def test_sampler_is_the_papers_with_its_noise_term_and_last_step_written_out(toy, theta, zeta):
    K, tiny = 20, 1e-9
    f = [math.cos((t / K + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(K)]
    abar = [value / f[0] for value in f]
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    x = z
    with torch.no_grad():
        for t in reversed(range(K)):
            e = toy.eps(theta, x, torch.tensor(t / (K - 1)))
            score = -e / (math.sqrt(1 - abar[t]) + tiny)
            x0 = (x + (1 - abar[t]) * zeta * score) / (math.sqrt(abar[t]) + tiny)
            if t == 0:
                x = x0
                break
            alpha = abar[t] / abar[t - 1]
            v = (1 - abar[t - 1]) / (1 - abar[t] + tiny) * (1 - alpha / (abar[t] + tiny))
            sigma = math.sqrt(max(v, 0))  # eta = 1
            direction = math.sqrt(max(1 - abar[t - 1] - sigma**2, 0)) * e
            x = math.sqrt(abar[t - 1]) * x0 + direction + sigma * torch.randn_like(x)
    torch.testing.assert_close(toy.sample(lambda x, s: toy.eps(theta, x, s), z, zeta), x, atol=1e-4, rtol=1e-4)


def test_perfect_network_reaches_the_target_with_many_steps_and_is_too_narrow_with_twenty(toy):
    z = toy.noise(0, 2000).double()
    assert toy.frechet(toy.sample(toy.perfect, z, K=1000)) < 1e-4
    narrow = torch.linalg.eigvalsh(toy.covariance(toy.sample(toy.perfect, z, K=20)))
    assert narrow[0] < 0.9 and narrow[1] < 0.9 * 3


def test_denoising_loss_of_a_network_that_predicts_zero_is_one(toy, theta):
    zero = {name: torch.zeros_like(value) for name, value in theta.items()}
    torch.manual_seed(0)
    assert float(toy.denoising_loss(zero, toy.draw_real(0, 20_000))) == pytest.approx(1, abs=0.02)


def test_negative_log_likelihood_equals_torch_distributions(toy, theta_ar):
    x = toy.draw_real(1, 50)
    mu2, log_std2 = toy.functional_call(toy.autoregressive, theta_ar, (x[:, 0],))
    first = torch.distributions.Normal(theta_ar["mu1"], theta_ar["log_std1"].exp()).log_prob(x[:, 0])
    second = torch.distributions.Normal(mu2, log_std2.exp()).log_prob(x[:, 1])
    torch.testing.assert_close(toy.nll(theta_ar, x), -(first + second).mean())


def test_temperature_scales_both_standard_deviations(toy, theta_ar):
    z = torch.tensor([[0.7, 1.0], [0.7, -1.0]])
    x = toy.sample_ar(theta_ar, z, tau=0.5)
    torch.testing.assert_close(x[:, 0], torch.full((2,), float(0.3 + 0.5 * math.exp(-0.4) * 0.7)))
    _, log_std2 = toy.functional_call(toy.autoregressive, theta_ar, (x[:1, 0],))
    torch.testing.assert_close(x[0, 1] - x[1, 1], log_std2.exp()[0].detach())  # 2 x 0.5 std


def test_training_takes_one_adam_step_per_batch_in_order(toy, theta_ar):
    x = toy.draw_real(2, 2048 + 10)
    snapshots = toy.train(toy.nll, theta_ar, x, epochs=2, lr=1e-3, keep=(1,))
    assert set(snapshots) == {1, 2}
    values = {name: value.clone().requires_grad_() for name, value in theta_ar.items()}
    adam = torch.optim.Adam(values.values(), lr=1e-3)
    for batch in (x[:2048], x[2048:], x[:2048], x[2048:]):
        adam.zero_grad()
        toy.nll(values, batch).backward()
        adam.step()
    for name, value in values.items():
        torch.testing.assert_close(snapshots[2][name], value.detach(), atol=1e-6, rtol=1e-5)


def test_preconditioner_of_a_constant_gradient_is_its_inverse(toy):
    g = torch.tensor([3.0, -0.5, 0.0], dtype=torch.float64).expand(7, 3)
    expected = torch.tensor([1 / (3 + 1e-8), 1 / (0.5 + 1e-8), 1e8], dtype=torch.float64)
    torch.testing.assert_close(toy.adam_preconditioner(g), expected)


def test_cosine_is_plus_or_minus_one_for_parallel_gradients(toy):
    g = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P = toy.adam_preconditioner(g)
    assert toy.cosine(g, 2 * g, P, tiny=1e-18) == pytest.approx(1)
    assert toy.cosine(g, -3 * g, P, tiny=1e-18) == pytest.approx(-1)


def test_cosine_predicts_the_change_of_the_loss_under_a_small_neon_step(toy, theta_ar):
    """L(theta_neon) - L(theta_base) = w eta <g_d, P g_s> to first order, as section 6 says."""
    real, narrow = toy.draw_real(3, 2000), 0.5 * toy.draw_real(4, 2000)
    g_d, g_s = toy.gradients(toy.nll, theta_ar, real), toy.gradients(toy.nll, theta_ar, narrow)
    P = toy.adam_preconditioner(g_d)
    eta, w = 1e-5, 0.7
    step, syn, start = eta * P * g_s.mean(0), {}, 0
    base = {name: value.double() for name, value in theta_ar.items()}
    for name, value in base.items():
        syn[name] = value - step[start : start + value.numel()].view_as(value)
        start += value.numel()
    with torch.no_grad():
        before, after = (toy.nll(t, real.double()) for t in (base, toy.neon_merge(base, syn, w)))
    predicted = w * eta * (g_d.mean(0) * P * g_s.mean(0)).sum()
    assert float(after - before) == pytest.approx(float(predicted), rel=0.02)


def test_best_w_is_the_vertex_of_a_parabola_between_grid_points(toy):
    ws = toy.np.linspace(-2, 2, 9)
    assert toy.best_w(ws, 0.3 * (ws - 0.37) ** 2 + 1) == pytest.approx(0.37)
    assert toy.best_w(ws, ws) == -2  # a minimum at the edge stays there

"Calibration: exact samplers pass, wrong ones are caught, p-values are p-values, and bad input gets one clear line"
import math
import pytest, torch
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.likelihood import ExactChain, InverseProblem, Likelihood
from rtb_nb.metrics import *
from rtb_nb.operators import Matrix
from rtb_nb.schedule import Cosine

def gaussian_joint(dim, n, seed):
    "x ~ N(0, 1), y = x + noise: truths, measurements, and samplers of N(mean + shift sd, scale var)"
    torch.manual_seed(seed)
    x, sigma = torch.randn(n, dim), .7
    ys, var = x + sigma*torch.randn(n, dim), sigma**2/(1+sigma**2)
    sampler = lambda scale=1., shift=0.: lambda y: y/(1+sigma**2) + shift*var**.5 + (scale*var)**.5*torch.randn(64, dim)
    return x, ys, sampler

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('dim', [1, 2, 8])
def test_exact_passes_and_faults_are_flagged(dim, seed):
    x, ys, sampler = gaussian_joint(dim, 500, 10*dim+seed)
    exact = calibration(x, ys, sampler())
    assert exact['tarp_off'] < .05 and min(exact['tarp_p'], exact['sbc_p']) > 1e-3
    narrow, biased = calibration(x, ys, sampler(scale=.5)), calibration(x, ys, sampler(shift=.5))
    assert max(narrow['tarp_p'], narrow['sbc_p'], biased['sbc_p'], narrow['p'], biased['p']) < .01 and narrow['tarp_off'] > .05
    if dim == 8: assert biased['tarp_p'] < .01 and biased['tarp_off'] > .05
    wide = calibration(x, ys, sampler(scale=2.))
    assert max(wide['tarp_p'], wide['sbc_p']) < .01
    assert exact['simulations'] == 500 and exact['samples'] == 64 and exact['finite'] == 1

def test_exact_chain_is_calibrated():
    torch.manual_seed(0)
    cov = torch.tensor([[1., .8], [.8, 1.]])/4
    prior = Diffusion(GaussianDenoiser(torch.zeros(2), cov, Cosine(.5)), (2,), 10, .05)
    problem = InverseProblem(prior, Likelihood(Matrix(torch.tensor([[1., 0.]])), .1))
    x, ys = problem.simulate(500)
    zero, one = (ExactChain(problem, torch.tensor([[v]]), keep=False).posterior() for v in (0., 1.))  # the mean is affine in y
    def exact(y, scale=1., shift=0.):
        return zero.mean + y*(one.mean-zero.mean) + shift*zero.stddev + scale**.5*(zero.sample((64,)) - zero.mean)
    found = calibration(x, ys, exact)
    assert found['tarp_off'] < .05 and found['p'] > .01
    for fault in (dict(scale=.5), dict(shift=.5)):
        found = calibration(x, ys, lambda y: exact(y, **fault))
        assert max(found['p'], found['sbc_p']) < .01, fault

@pytest.mark.parametrize('ranks', [sbc, tarp])
def test_p_values_are_uniform_under_the_null(ranks):
    torch.manual_seed(1)
    p = torch.stack([uniformity(ranks(torch.randn(60, 2), torch.randn(60, 16, 2))) for _ in range(400)])
    for level in (.05, .2, .5): assert abs((p < level).double().mean() - level) < 4*(level*(1-level)/400)**.5

def test_ranks_of_ties_and_of_known_places():
    assert sbc(torch.tensor([[5.]]), torch.arange(4.).reshape(1, 4, 1)).item() > .8
    assert sbc(torch.tensor([[-1.]]), torch.arange(4.).reshape(1, 4, 1)).item() < .2
    u = sbc(torch.zeros(2000, 1), torch.zeros(2000, 8, 1))  # all ties: nothing but the added uniform number
    assert uniformity(u) > .01 and 0 < u.min() and u.max() < 1
    assert torch.equal(sbc(torch.zeros(30, 1), torch.zeros(30, 8, 1), seed=3), sbc(torch.zeros(30, 1), torch.zeros(30, 8, 1), seed=3))
    x, s = torch.randn(50, 3), torch.randn(50, 9, 3)
    assert torch.equal(sbc(x, s), sbc(x.exp(), s.exp()))
    near = tarp(x, s, reference=x)
    assert near.shape == (50, 1) and near.max() < 1/10
    assert tarp(x, s, reference=torch.randn(50, 4, 3)).shape == (50, 4) and tarp(x, s).shape == (50, 4)

def test_tarp_is_the_share_of_samples_nearer_to_the_reference():
    torch.manual_seed(2)
    x, s, r = 1e3+torch.randn(40, 1, 3, 3), 1e3+torch.randn(40, 12, 1, 3, 3), 1e3+torch.randn(40, 2, 1, 3, 3)
    u = tarp(x, s, r)
    for i in range(40):
        for j in range(2):
            nearer = sum(((v-r[i, j])**2).sum() < ((x[i]-r[i, j])**2).sum() for v in s[i])
            assert nearer/13 <= u[i, j] <= (nearer+1)/13
    one = tarp(x, s, r[:, 0])
    assert torch.equal((one*13).floor(), (u[:, :1]*13).floor())

def test_coverage_of_known_ranks():
    levels, inside, se = expected_coverage((torch.arange(1000)+.5)/1000, points=11)
    assert torch.allclose(inside, levels, atol=1e-9) and levels[0] == 0 and levels[-1] == 1 and inside[-1] == 1
    assert torch.allclose(se[1:-1], (levels*(1-levels)/999).sqrt()[1:-1], atol=1e-9)
    squared = expected_coverage(((torch.arange(1000)+.5)/1000)**2, 11)[1]
    assert torch.allclose(squared, levels.sqrt(), atol=1e-3)
    copies = expected_coverage(torch.rand(100, 1).expand(-1, 5))
    assert copies[1].shape == copies[2].shape == (51,)

def test_copies_of_a_rank_carry_no_news():
    u = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))**1.2
    assert abs(uniformity(u) - uniformity(u.expand(-1, 30))) < 1e-9 and torch.equal(uniformity(u), uniformity(u[:, 0]))
    assert uniformity(torch.full((100,), .5)) < 1e-6 and uniformity(torch.ones(100)) < 1e-6

def test_prior_in_place_of_the_posterior():
    x, ys, sampler = gaussian_joint(4, 300, 5)
    ignorant = lambda y: torch.randn(64, 4)
    assert calibration(x, ys, ignorant)['tarp_p'] > .01 and calibration(x, ys, ignorant, reference=ys)['tarp_p'] < 1e-6
    assert calibration(x, ys, sampler(), reference=ys)['tarp_p'] > .01

def test_diverged_samples_give_nan_not_a_verdict():
    x, ys, sampler = gaussian_joint(2, 30, 0)
    def breaks(y): return sampler()(y) if y[0, 0] < .5 else torch.full((64, 2), math.nan)
    found = calibration(x, ys, breaks)
    assert all(math.isnan(found[k]) for k in ('p', 'tarp_p', 'tarp_off', 'sbc_p'))
    assert found['finite'] == pytest.approx((ys[:, 0] < .5).float().mean().item())
    assert sbc(x, draw_each(breaks, ys)).isnan().any() and expected_coverage(torch.full((30,), math.nan))[1].isnan().all()

x, s = torch.zeros(30, 2), torch.zeros(30, 8, 2)
bad = [
    (lambda: draw_each(lambda y: torch.zeros(int(y), 2), torch.tensor([[4.], [5.]])), ValueError, r'\[\(4, 2\), \(5, 2\)\]'),
    (lambda: draw_each(lambda y: y, torch.zeros(0, 2)), ValueError, r'one at least, got \(0, 2\)'),
    (lambda: sbc(x, s[:10]), ValueError, r'got \(30, 2\) and \(10, 8, 2\)'),
    (lambda: sbc(x[:, 0], s[..., 0]), ValueError, 'must belong together'),
    (lambda: sbc(x, s[..., :1]), ValueError, r'\(30, 8, 1\)'),
    (lambda: tarp(x, s[:, :3]), ValueError, 'at least four samples of each measurement, got 3'),
    (lambda: tarp(x, s, torch.zeros(30, 3)), ValueError, r'reference must be \(30, 2\)'),
    (lambda: tarp(x, s, torch.zeros(2)), ValueError, r'got \(2,\)'),
    (lambda: tarp(x, s, torch.zeros(30, 0, 2)), ValueError, r'got \(30, 0, 2\)'),
    (lambda: expected_coverage(torch.rand(5)), ValueError, 'at least 20 simulations, got 5'),
    (lambda: expected_coverage(torch.rand(30), 1), ValueError, 'at least two points, got 1'),
    (lambda: uniformity(torch.arange(30)), ValueError, 'got 2.0'),
    (lambda: uniformity(torch.tensor(.5)), ValueError, 'at least one value'),
    (lambda: uniformity(torch.rand(30), 0), ValueError, 'terms must be .* got 0'),
    (lambda: calibration(x, x[:4], lambda y: s[0]), ValueError, 'got 30 and 4'),
]

@pytest.mark.parametrize('call, error, text', bad)
def test_bad_input_gets_one_clear_line(call, error, text):
    with pytest.raises(error, match=text) as e: call()
    assert '\n' not in str(e.value)

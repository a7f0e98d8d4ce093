"Calibration: exact samplers pass, wrong ones are caught, p-values are p-values"
import math
import numpy as np, pytest, torch
from torch.distributions import Normal
from rtb_nb.beds import plane
from rtb_nb.calibration import *
from rtb_nb.exact import ExactChain

def gaussian_joint(dim, n, seed):
    "x ~ N(0, 1), y = x + noise: truths, measurements, samplers of N(mean+shift sd, scale var)"
    torch.manual_seed(seed)
    x, sigma = torch.randn(n, dim), .7
    ys, var = x + sigma*torch.randn(n, dim), sigma**2/(1+sigma**2)
    def sampler(scale=1., shift=0.):
        spread = lambda: (scale*var)**.5*torch.randn(64, dim)
        return lambda y: y/(1+sigma**2) + shift*var**.5 + spread()
    return x, ys, sampler

# ---- verdicts

@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('dim', [1, 2, 8])
def test_exact_passes_and_faults_are_flagged(dim, seed):
    x, ys, sampler = gaussian_joint(dim, 500, 10*dim+seed)
    exact = calibration(x, ys, sampler())
    assert exact['tarp_off'] < .05 and min(exact['tarp_p'], exact['sbc_p']) > 1e-3
    narrow, biased = (calibration(x, ys, sampler(*k)) for k in ((.5, 0.), (1., .5)))
    assert max(narrow['tarp_p'], narrow['sbc_p'], narrow['p']) < .01
    assert narrow['tarp_off'] > .05
    assert max(biased['sbc_p'], biased['p']) < .01
    if dim == 8: assert biased['tarp_p'] < .01 and biased['tarp_off'] > .05
    wide = calibration(x, ys, sampler(scale=2.))
    assert max(wide['tarp_p'], wide['sbc_p']) < .01
    assert exact['simulations'] == 500 and exact['samples'] == 64 and exact['finite'] == 1

def test_exact_chain_is_calibrated():
    torch.manual_seed(0)
    problem = plane(10, mean=(0., 0.))
    x, ys = problem.simulate(500)
    zero, one = (ExactChain(problem, torch.tensor([[v]]), keep=False).posterior()
                 for v in (0., 1.))
    def exact(y, scale=1., shift=0.): # the mean is affine in y
        mean = zero.mean + y*(one.mean-zero.mean) + shift*zero.stddev
        return mean + scale**.5*(zero.sample((64,)) - zero.mean)
    found = calibration(x, ys, exact)
    assert found['tarp_off'] < .05 and found['p'] > .01
    for fault in (dict(scale=.5), dict(shift=.5)):
        found = calibration(x, ys, lambda y: exact(y, **fault))
        assert max(found['p'], found['sbc_p']) < .01, fault

def test_prior_in_place_of_the_posterior():
    x, ys, sampler = gaussian_joint(4, 300, 5)
    ignorant = lambda y: torch.randn(64, 4)
    assert calibration(x, ys, ignorant)['tarp_p'] > .01
    assert calibration(x, ys, ignorant, reference=ys)['tarp_p'] < 1e-3
    assert calibration(x, ys, sampler(), reference=ys)['tarp_p'] > .01

# ---- p-values

def held(p, levels=(.05, .01, .001), strict=True):
    "The share of p-values below each level is the level, or below it"
    p = torch.as_tensor(p, dtype=torch.float64)
    for a in levels:
        found, error = (p < a).double().mean().item(), 4*(a/len(p))**.5
        assert found < a + error and (found > a - error or not strict), (a, found)

@pytest.mark.parametrize('n', [20, 50, 100])
def test_one_column_is_rejected_as_rarely_as_it_says(n):
    u = torch.rand(3000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    held([uniformity(v).item() for v in u])

@pytest.mark.parametrize('n', [20, 60])
@pytest.mark.parametrize('ranks', [sbc, tarp])
def test_pooled_columns_are_rejected_no_more_often(ranks, n):
    torch.manual_seed(n)
    mix = torch.tensor([[1., 0.], [.9, .4]])
    draw = lambda *shape: torch.randn(*shape, 2)@mix.T
    p = [uniformity(ranks(draw(n), draw(n, 16))).item() for _ in range(600)]
    held(p, (.05, .01, .001), strict=False)
    assert sum(v < .05 for v in p) > 6 and sum(v < .5 for v in p) > 240 # nor all too rarely

def test_both_verdicts_of_a_record_hold_at_twenty_simulations():
    torch.manual_seed(3)
    mix = torch.tensor([[1., 0., 0.], [.9, .4, 0.], [.5, .5, .7]])
    draw, ys = lambda n: torch.randn(n, 3)@mix.T, torch.zeros(20, 1)
    runs = [calibration(draw(20), ys, lambda y: draw(9), seed=i) for i in range(150)]
    for k in ('tarp_p', 'sbc_p'): held([r[k] for r in runs], (.5, .2, .05))
    held([r['p'] for r in runs], (.05, .01), strict=False)

def test_many_columns_do_not_dilute_the_verdict():
    x, ys, sampler = gaussian_joint(200, 100, 7)
    assert calibration(x, ys, sampler(shift=.5))['sbc_p'] < 1e-3
    assert calibration(x, ys, sampler())['sbc_p'] > .01

def test_copies_of_a_rank_carry_no_news():
    u = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))**1.2
    assert abs(uniformity(u) - uniformity(u.expand(-1, 30))) < 1e-4
    assert torch.equal(uniformity(u), uniformity(u[:, 0]))
    assert uniformity(torch.full((100,), .5)) < 1e-4 and uniformity(torch.ones(100)) < 1e-4

def test_a_verdict_repeats_and_leaves_the_stream_alone():
    x, ys, _ = gaussian_joint(2, 30, 0)
    kept = torch.randn(64, 2)
    state = torch.get_rng_state()
    assert calibration(x, ys, lambda y: kept) == calibration(x, ys, lambda y: kept)
    assert uniformity(torch.linspace(.01, .99, 31)) > .5
    assert torch.equal(state, torch.get_rng_state())

# ---- ranks

def test_ranks_of_ties_and_of_known_places():
    low, high = torch.tensor([[-1.]]), torch.tensor([[5.]])
    four = torch.arange(4.).reshape(1, 4, 1)
    assert sbc(high, four).item() > .8 and sbc(low, four).item() < .2
    u = sbc(torch.zeros(200, 1), torch.zeros(200, 8, 1)) # all ties: only the added number
    assert uniformity(u) > .01 and 0 < u.min() and u.max() < 1
    tied = lambda: sbc(torch.zeros(30, 1), torch.zeros(30, 8, 1), seed=3)
    assert torch.equal(tied(), tied())
    x, s = torch.randn(50, 3), torch.randn(50, 9, 3)
    assert torch.equal(sbc(x, s), sbc(x.exp(), s.exp()))
    assert torch.equal(sbc(x, s), sbc(x.double().numpy(), s.numpy()))
    near = tarp(x, s, reference=x)
    assert near.shape == (50, 1) and near.max() < 1/10
    assert tarp(x, s, reference=torch.randn(50, 4, 3)).shape == tarp(x, s).shape == (50, 4)

def test_tarp_is_the_share_of_samples_nearer_to_the_reference():
    torch.manual_seed(2)
    x, s, r = (1e3+torch.randn(40, *k, 1, 3, 3) for k in ((), (12,), (2,)))
    u = tarp(x, s, r)
    for i in range(40):
        for j in range(2):
            far = lambda v: ((v-r[i, j])**2).sum()
            nearer = sum(far(v) < far(x[i]) for v in s[i])
            assert nearer/13 <= u[i, j] <= (nearer+1)/13
    one = tarp(x, s, r[:, 0])
    assert torch.equal((one*13).floor(), (u[:, :1]*13).floor())

def test_coverage_of_known_ranks():
    u = (torch.arange(1000)+.5)/1000
    levels, inside, se = expected_coverage(u, points=np.int64(11))
    assert torch.allclose(inside, levels, atol=1e-9)
    assert levels[0] == 0 and levels[-1] == inside[-1] == 1
    assert torch.allclose(se[1:-1], (levels*(1-levels)/999).sqrt()[1:-1], atol=1e-9)
    assert torch.allclose(expected_coverage(u**2, 11)[1], levels.sqrt(), atol=1e-3)
    copies = expected_coverage(torch.rand(100, 1).expand(-1, 5))
    assert copies[1].shape == copies[2].shape == (51,)

# ---- intervals

@pytest.mark.parametrize('level', [.5, .9, .99])
@pytest.mark.parametrize('n', [2, 4, 16, 19, 100])
def test_intervals_of_an_exact_sampler_hold_their_level(n, level):
    torch.manual_seed(n)
    exact = Normal(torch.linspace(-3, 3, 5000).double(), .1)
    found = interval_coverage(exact.sample((n,)), exact, level)
    assert found.item() == pytest.approx(level, abs=4*(.5/n)**.5/5000**.5)

def test_intervals_of_wrong_samplers():
    torch.manual_seed(0)
    unit = Normal(torch.zeros(2000).double(), 1.)
    x = torch.randn(100, 2000)
    ninety = lambda scale: 2*unit.cdf(unit.icdf(torch.tensor(.95))*scale)[0].item() - 1
    for scale in (.5, 2.):
        assert interval_coverage(scale*x, unit).item() == pytest.approx(ninety(scale), abs=.012)
    assert interval_coverage(x+1, unit) < .8
    # the places of 19 samples and a level of .9 are the smallest and the largest
    few = x[:19].double()
    ends = unit.cdf(few.amax(0)) - unit.cdf(few.amin(0))
    assert interval_coverage(few, unit).item() == pytest.approx(ends.mean().item(), abs=1e-9)

def test_central_coverage_of_known_ranks():
    u = ((torch.arange(1000)+.5)/1000).expand(3, -1)
    for level in (.5, .9): assert central_coverage(u, level).tolist() == [level]*3
    low = u < .1 # of which the upper half lies above .05
    assert torch.allclose(central_coverage(u, .9, low), torch.tensor(.5).double())
    assert torch.equal(central_coverage(u, .9, low), central_coverage(u[:, :100], .9))
    images = low.reshape(3, 10, 100) # of the events' shape
    assert torch.equal(central_coverage(u, .9, images), central_coverage(u, .9, low))
    none = low & (torch.arange(3) != 1)[:, None]
    assert central_coverage(u, .5, none).isnan().tolist() == [False, True, False]

@pytest.mark.parametrize('n', [4, 9, 19])
def test_central_coverage_of_exact_and_narrow_samplers(n):
    "Pixels may be chosen by the mean of truth and samples, and not by the truth"
    torch.manual_seed(n)
    x = torch.randn(2000, 50, dtype=torch.float64)
    mean = (x + torch.randn_like(x))/2
    def drawn(scale): return mean[:, None] + (.5*scale)**.5*torch.randn(2000, n, 50).double()
    def held(samples, level, where=None):
        v = central_coverage(sbc(x, samples), level, where)
        v = v[v.isfinite()]
        return v.mean().item(), 4*(v.std()/len(v)**.5).item()
    exact, narrow = drawn(1.), drawn(.5)
    alike = torch.cat([x[:, None], exact], 1).mean(1) > 1
    for level in (.5, .9):
        for where in (None, alike):
            found, error = held(exact, level, where)
            assert found == pytest.approx(level, abs=error)
        found, error = held(exact, level, x > 1)
        assert found < level - 5*error/4
        found, error = held(narrow, level)
        assert found < level - 5*error/4

# ---- broken samples

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_diverged_samples_give_nan_not_a_verdict(value):
    x, ys, sampler = gaussian_joint(2, 30, 0)
    def breaks(y): return sampler()(y) if y[0, 0] < .5 else torch.full((64, 2), value)
    found = calibration(x, ys, breaks)
    assert all(math.isnan(found[k]) for k in ('p', 'tarp_p', 'tarp_off', 'sbc_p'))
    assert found['finite'] == pytest.approx((ys[:, 0] < .5).float().mean().item())
    assert sbc(x, draw_each(breaks, ys)).isnan().any()
    lost = torch.full((30,), math.nan)
    assert expected_coverage(lost)[1].isnan().all() and uniformity(lost).isnan()
    ranks = torch.tensor([[.5, math.nan], [.5, .5]]) # lost, unless it does not count
    assert central_coverage(ranks).isnan().tolist() == [True, False]
    assert central_coverage(ranks, where=ranks.isfinite()).tolist() == [1., 1.]
    samples = torch.zeros(9, 2)
    samples[4, 1] = value
    assert interval_coverage(samples, Normal(torch.zeros(2), 1.)).isnan()

# ---- bad input: one line that names the value

x, s, unit = torch.zeros(30, 2), torch.zeros(30, 8, 2), Normal(torch.zeros(2), 1.)
def uneven(y): return torch.zeros(int(y), 2)
bad = [
    (lambda: draw_each(uneven, [[4.], [5.]]), ValueError, r'\[\(4, 2\), \(5, 2\)\]'),
    (lambda: draw_each(lambda y: y, torch.zeros(0, 2)), ValueError, r'at least, got \(0, 2\)'),
    (lambda: draw_each(lambda y: y, torch.zeros(3)), ValueError, r'got \(3,\)'),
    (lambda: sbc(x, s[:10]), ValueError, r'got \(30, 2\) and \(10, 8, 2\)'),
    (lambda: sbc(x[:, 0], s[..., 0]), ValueError, 'must belong together'),
    (lambda: sbc(x, s[..., :1]), ValueError, r'\(30, 8, 1\)'),
    (lambda: sbc(x, torch.tensor(0.)), ValueError, r'\(30, 2\) and \(\)'),
    (lambda: sbc(x, s, seed=-1), ValueError, 'seed must .* got -1'),
    (lambda: tarp(x, s[:, :3]), ValueError, 'four samples of each measurement, got 3'),
    (lambda: tarp(x, s, torch.zeros(30, 3)), ValueError, r'reference must be \(30, 2\)'),
    (lambda: tarp(x, s, torch.zeros(2)), ValueError, r'got \(2,\)'),
    (lambda: tarp(x, s, torch.zeros(30, 0, 2)), ValueError, r'got \(30, 0, 2\)'),
    (lambda: expected_coverage(torch.rand(5)), ValueError, 'at least 20 simulations, got 5'),
    (lambda: expected_coverage(torch.rand(30), 1), ValueError, 'points must .* got 1'),
    (lambda: expected_coverage(torch.rand(30, 0)), ValueError, 'none per simulation'),
    (lambda: central_coverage(torch.rand(3), 1.), ValueError, r'level .* in \(0, 1\), got 1.0'),
    (lambda: central_coverage(torch.rand(3, 2), where=torch.ones(3, 4)), ValueError,
     r'where must be \(3, 2\) .* got \(3, 4\)'),
    (lambda: central_coverage(torch.full((3,), 2.)), ValueError, 'got 2.0'),
    (lambda: uniformity(torch.arange(30)), ValueError, 'got 2.0'),
    (lambda: uniformity(torch.tensor(.5)), ValueError, 'at least one value'),
    (lambda: uniformity(torch.rand(30), 0), ValueError, 'terms must be .* got 0'),
    (lambda: uniformity(torch.rand(30), 2.5), ValueError, 'terms must be .* got 2.5'),
    (lambda: calibration(x, x[:4], lambda y: s[0]), ValueError, 'got 30 and 4'),
    (lambda: calibration(x[:9], x[:9], lambda y: s[0]), ValueError, '20 simulations, got 9'),
    (lambda: interval_coverage(x[:1], unit), ValueError, 'two samples .* got 1'),
    (lambda: interval_coverage(x[:0], unit), ValueError, r'one value .* \(0, 2\)'),
    (lambda: interval_coverage(x, unit, 1.), ValueError, r'level .* in \(0, 1\), got 1.0'),
    (lambda: interval_coverage(x, unit, '90%'), ValueError, "level must .* got '90%'"),
]

@pytest.mark.parametrize('call, error, text', bad)
def test_bad_input_gets_one_clear_line(call, error, text):
    with pytest.raises(error, match=text) as e: call()
    assert '\n' not in str(e.value)

def test_samples_that_are_drawn_already_are_scored_alike():
    x, ys, sampler = gaussian_joint(2, 40, 3)
    torch.manual_seed(0)
    whole = calibration(x, ys, sampler())
    torch.manual_seed(0)
    assert score_calibration(x, draw_each(sampler(), ys)) == whole

"Evidence against closed forms; what is broken is nan, what is undefined None"
import math, warnings
import numpy as np, pytest, torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from rtb_nb.amortise import joint_paths, paired_log_weights
from rtb_nb.beds import plane
from rtb_nb.evidence import *
from rtb_nb.exact import BestDrift, ExactChain
from rtb_nb.guidance import CLA, DPS
from rtb_nb.likelihood import InverseProblem, Tilted, residual_chi2

# ---- bounds

@pytest.mark.parametrize('dim', [1, 5])
def test_bounds_enclose_log_z(dim):
    torch.manual_seed(dim)
    y, sigma, n = torch.full((dim,), .7), .6, 20_000
    gauss = lambda m, s: MultivariateNormal(m, s**2*torch.eye(dim))
    prior, var = gauss(torch.zeros(dim), 1.), sigma**2/(1+sigma**2)
    mean = y/(1+sigma**2)
    posterior, q = gauss(mean, var**.5), gauss(mean+.1, 1.2*var**.5)
    log_z = gauss(torch.zeros(dim), (1+sigma**2)**.5).log_prob(y).item()
    log_r = lambda x: Normal(x, sigma).log_prob(y).sum(-1)
    log_w = lambda x: log_r(x) + prior.log_prob(x) - q.log_prob(x)
    low, high = evidence(log_w(q.sample((n,)))), eubo(log_w(posterior.sample((n,))))
    x = prior.sample((n,))
    weighted = resampled_eubo(log_w(x), log_r(x))
    above = log_z + kl_divergence(posterior, q).item()
    assert abs(low['elbo'] - (log_z - kl_divergence(q, posterior).item())) < 3.5*low['elbo_se']
    assert abs(high[0] - above) < 3.5*high[1]
    assert abs(weighted['eubo'] - above) < 4*weighted['eubo_se']
    assert abs(low['iw'] - log_z) < 3.5*low['iw_se'] and low['elbo'] < low['iw'] < high[0]
    assert 1 < weighted['eubo_ess'] < n and low['n'] == n and low['finite'] == 1

def test_evidence_invariances():
    log_w = torch.randn(64)*3
    a, b = evidence(log_w), evidence(log_w.flip(0)+1e4)
    for k in ('elbo', 'iw'): assert abs(b[k]-a[k]-1e4) < 2e-3 # 1e4 + w was rounded in float32
    for k in ('ess', 'std', 'elbo_se', 'iw_se'): assert abs(b[k]-a[k]) < 5e-3*(1+a[k])
    assert 1 <= a['ess'] <= 64
    groups = torch.randn(3, 64)
    for f in (effective_sample_size, log_mean_exp):
        assert torch.equal(f(groups), torch.stack([f(g) for g in groups]))

@pytest.mark.parametrize('kind', [list, np.asarray, torch.tensor,
                                  lambda v: torch.tensor(v, dtype=torch.bfloat16)])
def test_sums_are_in_double_precision_whatever_comes(kind):
    e = evidence(kind([1., 2., 4.]))
    assert e['elbo'] == pytest.approx(7/3, abs=1e-12)
    assert e['iw'] == pytest.approx(math.log((math.e + math.e**2 + math.e**4)/3), abs=1e-12)

def test_what_one_path_cannot_tell_is_none_not_nan():
    one = evidence([2.5])
    assert one['elbo'] == one['iw'] == 2.5 and one['ess'] == pytest.approx(1)
    assert [one[k] for k in ('elbo_se', 'iw_se', 'std')] == [None]*3
    assert standard_error([1.]) is None and elbo([1.])[1] is None and eubo([1.])[1] is None
    bound = resampled_eubo([1.5], [0.])
    assert (bound['eubo'], bound['eubo_se'], bound['eubo_ess']) == (1.5, None, 1)
    samples, numbers = evaluate(plane().posterior([]), [[.6]], 1)
    assert len(samples) == 1 and numbers['pixel_std'] is numbers['diversity'] is None
    assert not any(v is not None and math.isnan(v) for v in numbers.values())

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_diverged_weights_give_nan_not_an_error(bad):
    e = evidence([0., bad, 1., 2.])
    assert e['finite'] == .75 and e['n'] == 4
    assert all(math.isnan(e[k]) for k in ('elbo', 'elbo_se', 'iw', 'iw_se', 'ess', 'std'))
    assert all(map(math.isnan, resampled_eubo([0., bad], [0., 0.]).values()))
    assert all(map(math.isnan, resampled_eubo([0., 1.], [0., bad]).values()))
    assert math.isnan(evidence([bad])['elbo_se'])

# ---- samples

def test_residual_and_mean_error_are_per_sample():
    torch.manual_seed(0)
    y, x = torch.randn(1, 1, 8, 8), torch.randn(5, 1, 8, 8)
    whole = residual_chi2(y, x, .3)
    assert torch.equal(whole, torch.cat([residual_chi2(y, v[None], .3) for v in x]))
    assert torch.allclose(residual_chi2(y, x, torch.full((1, 1, 8, 8), .3)), whole)
    assert torch.allclose(residual_chi2(y, y, .3), torch.zeros(1).double())
    truth, shift = torch.randn(1, 8, 8), torch.tensor([1., 1.])[:, None, None, None]
    assert posterior_mean_error(truth + shift, truth).item() == pytest.approx(1, abs=1e-6)
    around = torch.stack([truth-1, truth+1])
    assert posterior_mean_error(around, truth[None]).item() == pytest.approx(0, abs=1e-6)

def test_diversity_counts_every_pair_once():
    x = torch.tensor([0., 1., 5.]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    largest = lambda a, b: (a-b).abs().amax((1, 2, 3))
    assert diversity(x).item() == pytest.approx(10/3)
    assert diversity(x, largest, chunk=np.int64(2)).item() == pytest.approx(10/3)
    assert diversity(torch.zeros(5, 2)) == 0

def test_one_broken_sample_makes_a_number_nan():
    x = torch.randn(6, 2)
    x[3, 0] = math.nan
    y = torch.zeros(1, 2)
    assert diversity(x).isnan() and posterior_mean_error(x, y).isnan()
    assert residual_chi2(y, x, 1.).isnan().tolist() == [i == 3 for i in range(6)]
    scores = score_samples(plane(), x, [[.6]], truth=y)
    known = {'truth_log_r'}
    assert all(math.isnan(v) for k, v in scores.items() if k not in known), scores

def test_scores_are_their_parts():
    torch.manual_seed(0)
    problem, y = plane(), torch.tensor([[.6]])
    x, truth = torch.randn(7, 2), torch.tensor([[.3, -.2]])
    apart = lambda a, b: a[:, 0]-b[:, 0]
    found = score_samples(problem, x, y, truth, apart, chunk=3)
    log_r = problem.log_likelihood(x, y)
    assert found['e_log_r'] == pytest.approx(log_r.mean().item(), rel=1e-6)
    chi2 = ((.6-x[:, :1])/.1).square().mean().item()
    assert found['chi2'] == pytest.approx(chi2, rel=1e-5)
    assert found['lpips'] == pytest.approx((x[:, 0]-.3).mean().item(), abs=1e-6)
    assert found['error'] == pytest.approx((x-truth).square().mean().sqrt().item(), rel=1e-6)
    again = score_samples(problem, x.double().numpy(), [[.6]], truth[0].tolist(), apart, 3)
    assert found == again
    tilted = Tilted(problem.prior, lambda x: -x.square().sum(1))
    free = score_samples(tilted, x, tilted.no_measurement)
    assert 'chi2' not in free
    assert free['e_log_r'] == pytest.approx(-x.square().sum(1).mean().item(), rel=1e-6)

def test_evaluate_finds_the_recursions_bound_in_any_chunks():
    problem, y = plane(10, mean=(0., 0.)), torch.tensor([[.6]])
    exact = ExactChain(problem, y)
    posterior = problem.posterior([BestDrift(exact)])
    torch.manual_seed(0)
    samples, numbers = evaluate(posterior, y, 1500, chunk=400)
    assert samples.shape == (1500, 2) and numbers['n'] == 1500 and numbers['calls'] == 15_000
    assert abs(numbers['elbo'] - exact.best_elbo) < 3.5*numbers['elbo_se']
    assert numbers['elbo'] < exact.log_evidence

def test_the_bill_is_what_stands_between_fit_and_bound():
    problem, y = plane(10), torch.tensor([[.6]])
    posterior = problem.posterior([CLA()])
    torch.manual_seed(0)
    ratios, nats = bill_of_nats(posterior, y, 64)
    assert ratios.shape == nats.shape == (10,) and (ratios.diff() < 0).all()
    torch.manual_seed(0)
    tau = posterior.simulate(y, 64)
    assert nats[-1].item() == pytest.approx(posterior.log_ratio(tau).mean().item(), rel=1e-4)
    assert bill_of_nats(problem.posterior([]), y, 4)[1].abs().max() == 0

def test_reweighted_copies_in_proportion():
    torch.manual_seed(0)
    x, log_w = torch.arange(4.)[:, None], torch.tensor([0., -math.inf, math.log(2.), 0.])
    counts = sum(torch.bincount(reweighted(x, log_w)[:, 0].long(), minlength=4)
                 for _ in range(2000))/2000
    assert torch.allclose(counts, torch.tensor([1., 0., 2., 1.]), atol=.1)
    x[0] = math.nan
    assert reweighted(x, log_w).isnan().any()

# ---- bad input: one line that names the value

y, free = torch.tensor([[.6]]), torch.zeros(4, 2)
def best(): return plane().posterior([])
def score(*args, **kw): return score_samples(plane(), *args, **kw)
bad = [
    (lambda: elbo([]), ValueError, 'at least one value'),
    (lambda: elbo(torch.tensor(1.)), ValueError, 'at least one value'),
    (lambda: standard_error(torch.zeros(3, 0)), ValueError, r'got shape \(3, 0\)'),
    (lambda: evidence(torch.zeros(2, 3)), ValueError, r'got \(2, 3\)'),
    (lambda: resampled_eubo(torch.zeros(3), torch.zeros(4)), ValueError, r'\(3,\) and \(4,\)'),
    (lambda: residual_chi2(y, torch.zeros(2, 1), 0.), ValueError, 'noise_std must be positive'),
    (lambda: residual_chi2(y, torch.zeros(2, 1), math.nan), ValueError, 'got nan'),
    (lambda: residual_chi2(torch.zeros(3, 4), free, 1.), ValueError, r'got \(3, 4\)'),
    (lambda: residual_chi2(torch.zeros(4), torch.zeros(4), 1.), ValueError, 'y must be'),
    (lambda: posterior_mean_error(torch.zeros(4), 0.), ValueError, 'samples must be'),
    (lambda: posterior_mean_error(torch.zeros(0, 4), 0.), ValueError, r'got \(0, 4\)'),
    (lambda: posterior_mean_error(free, torch.zeros(3)), ValueError, r'got \(3,\)'),
    (lambda: diversity(torch.zeros(1, 3, 8, 8)), ValueError, r'two samples .* \(1, 3, 8, 8\)'),
    (lambda: diversity(free, chunk=0), ValueError, 'chunk must be .* got 0'),
    (lambda: score(torch.zeros(0, 2), y), ValueError, r'one at least, got \(0, 2\)'),
    (lambda: score(torch.zeros(4, 3), y), ValueError, r'\(n, 2\), .* \(4, 3\)'),
    (lambda: score(free, [[.6], [.7]]), ValueError, 'got 2: call it for each'),
    (lambda: score(free, [.6]), ValueError, 'y has shape'),
    (lambda: score(free, [[math.nan]]), ValueError, 'non-finite'),
    (lambda: score(free, y, truth=torch.zeros(3)), ValueError, 'truth must have'),
    (lambda: score(free, y, chunk=1.5), ValueError, 'chunk must be .* got 1.5'),
    (lambda: evaluate(best(), y, 0), ValueError, 'n must be a positive whole number, got 0'),
    (lambda: evaluate(best(), y, 2.5), ValueError, 'got 2.5'),
    (lambda: evaluate(best(), [[.6], [.7]], 4), ValueError, 'got 2: call it for each'),
    (lambda: evaluate(best(), y, 4, chunk=-1), ValueError, 'chunk must be .* got -1'),
    (lambda: bill_of_nats(best(), y, 0), ValueError, 'n must be .* got 0'),
    (lambda: reweighted(free, torch.zeros(3)), ValueError, r'got \(4, 2\) and \(3,\)'),
    (lambda: reweighted(free, [0., math.nan, 0., math.inf]), FloatingPointError, '2 of 4'),
    (lambda: reweighted(free, [-math.inf]*4), FloatingPointError, 'no weight is left'),
]

@pytest.mark.parametrize('call, error, text', bad)
def test_bad_input_gets_one_clear_line(call, error, text):
    with pytest.raises(error, match=text) as e: call()
    assert '\n' not in str(e.value)

# ---- both bounds

def test_sandwich_is_what_its_parts_say():
    problem = plane(8)
    torch.manual_seed(0)
    tau, q = joint_paths(problem, 40), problem.posterior([CLA()])
    torch.manual_seed(1)
    found = sandwich(q, tau, 3, chunk=17)
    torch.manual_seed(1)
    joint, own = paired_log_weights(q, tau, 3, chunk=17)
    each = joint.double() - own.double().mean(1)
    assert found['gap'] == pytest.approx(found['eubo'] - found['elbo'])
    assert found['gap_se'] == pytest.approx((each.std()/40**.5).item())
    assert found['iw'] == pytest.approx((own.double().logsumexp(1) - math.log(3)).mean().item())
    assert found['elbo'] < found['iw'] < found['eubo'] and 1 <= found['ess'] <= 3
    assert (found['measurements'], found['n']) == (40, 3)

def test_sandwich_of_a_broken_sampler_is_nan():
    class Broken(CLA):
        def forward(self, step): return torch.full_like(step.x, math.nan)
    problem = plane(4)
    found = sandwich(problem.posterior([Broken()]), joint_paths(problem, 3), 2)
    assert all(math.isnan(found[k]) for k in ('eubo', 'elbo', 'iw', 'gap', 'gap_se'))
    assert (found['measurements'], found['n']) == (3, 2)
    with pytest.raises(ValueError, match='no measurement'):
        sandwich(problem.posterior([]), problem.prior.simulate(2))


@pytest.mark.parametrize('units, hint', [(lambda y: (y + 1)*127.5, True), (lambda y: y, False),
    (lambda y: (y + 1)/2, False)], ids=['bytes', 'its own', 'half'])
def test_a_measurement_in_other_units_is_hinted_at(units, hint):
    problem = plane(4)
    torch.manual_seed(0)
    posterior, y = problem.posterior([]), units(torch.tensor([[.9]]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        evaluate(posterior, y, 64)
    assert any('in the same units?' in str(w.message) for w in said) == hint

def test_calls_are_those_that_the_network_gets():
    "A guide that asks it once more counts, and so does a posterior that stands for a prior"
    torch.manual_seed(0)
    problem = plane(steps=4)
    y = problem.likelihood(problem.prior.sample(1)).sample()
    given = InverseProblem(problem.posterior([CLA()]).given(y), problem.likelihood)
    for posterior, each in ((problem.posterior([CLA()]), 1), (problem.posterior([DPS()]), 2),
                            (given.posterior([CLA()]), 1)):
        assert evaluate(posterior, y, 5, chunk=2)[1]['calls'] == 5*4*each

"Tempered particles against posteriors that are known, and against torch's own arithmetic"
import math
import pytest, torch
from torch.distributions import MultivariateNormal, Normal
from rtb_nb.beds import sixteen, two_modes
from rtb_nb.tempered import next_temperature, tempered

def of(problem, y):
    return lambda x: problem.likelihood.log_prob(x, y.double().expand(len(x), -1))

def gaussian(problem, y):
    "Posterior mean and covariance, and the evidence, from the joint Gaussian of x and y"
    d, A = problem.prior.denoiser, problem.operator.matrix().double()
    S = A @ d.cov @ A.T + problem.noise_std**2*torch.eye(len(A))
    gain = torch.linalg.solve(S, A @ d.cov).T
    miss = (y.double() - d.mean @ A.T)[0]
    log_z = MultivariateNormal(0*miss, S).log_prob(miss).item()
    return d.mean + gain @ miss, d.cov - gain @ A @ d.cov, log_z

def seeds(run, n=6):
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        found.append(run())
    return found

def close(values, exact):
    v = torch.stack([torch.as_tensor(u, dtype=torch.float64) for u in values])
    se = (v.var(0).mean()/len(v))**.5 # pooled over coordinates
    assert ((v.mean(0) - exact).abs() < 4*se).all(), (v.mean(0), se, exact)

def test_sixteen_numbers():
    problem = sixteen()
    torch.manual_seed(3)
    y, d = problem.simulate(1)[1], problem.prior.denoiser
    prior = MultivariateNormal(d.mean, d.cov)
    mean, cov, log_z = gaussian(problem, y)
    found = seeds(lambda: tempered(prior.log_prob, of(problem, y), lambda n: prior.sample((n,)),
                                   500))
    close([z for _, z, _ in found], log_z)
    close([x.mean(0) for x, *_ in found], mean)
    close([x.var(0).mean() for x, *_ in found], cov.diagonal().mean())
    assert found[0][0].dtype == torch.float64

def test_two_modes():
    bed = two_modes()
    prior, exact = bed.problem.prior.denoiser.distribution(), bed.exact.posterior()
    found = seeds(lambda: tempered(prior.log_prob, of(bed.problem, bed.y),
                                   lambda n: prior.sample((n,)), 800))
    def share(x): return (torch.cdist(x, bed.modes.double()).argmin(1) == 0).double().mean()
    torch.manual_seed(0)
    close([z for _, z, _ in found], float(bed.exact.log_evidence))
    close([share(x) for x, *_ in found], share(exact.sample((200_000,))))
    close([x.mean(0) for x, *_ in found], exact.mean)

def bent(x): return Normal(1., .1).log_prob(x.flatten(1)[:, 0]**2) # roots of one
def flat(x): return Normal(0., 1.).log_prob(x).flatten(1).sum(1)
def drawn(n): return torch.randn(n, 2, 1)

def test_a_nonlinear_measurement_by_quadrature():
    u = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    log_p = Normal(0., 1.).log_prob(u) + bent(u[:, None])
    log_z = (log_p.exp().sum()*(u[1] - u[0])).log().item()
    found = seeds(lambda: tempered(flat, bent, drawn, 800))
    close([z for _, z, _ in found], log_z)
    close([(x[:, 0, 0] > 0).double().mean() for x, *_ in found], .5)
    second = (log_p.softmax(0)*u**2).sum()
    close([x[:, 0, 0].square().mean() for x, *_ in found], second)
    close([x[:, 1].var() for x, *_ in found], 1.)

def test_no_likelihood_is_one_step():
    torch.manual_seed(0)
    x, log_z, log = tempered(flat, lambda x: 0*x.flatten(1)[:, 0], drawn, 50)
    assert log_z == 0 and len(log) == 1 and log[0]['beta'] == 1 and x.shape == (50, 2, 1)

def test_the_share_in_effect():
    torch.manual_seed(0)
    log_r = -torch.randn(1000, dtype=torch.float64).square()*50
    for keep in (.3, .9):
        w = (next_temperature(log_r, .2, keep) - .2)*log_r
        share = w.exp().sum()**2/w.exp().square().sum()/len(w)
        assert share.item() == pytest.approx(keep, abs=1e-6)
    assert next_temperature(log_r*1e-6, .2) == 1

def test_temperatures_rise_and_moves_are_accepted():
    torch.manual_seed(0)
    _, log_z, log = tempered(flat, bent, drawn, 400, last=4)
    betas = [h['beta'] for h in log]
    assert betas == sorted(set(betas)) and betas[-1] == 1 and log[-1]['log_z'] == log_z
    assert all(h['ess'] == pytest.approx(200, abs=2) for h in log[:-1])
    assert all(.4 < h['acceptance'] <= 1 and math.isfinite(h['size']) for h in log)

def test_a_seed_gives_the_same_bits():
    (a, za, _), (b, zb, _) = [seeds(lambda: tempered(flat, bent, drawn, 60), 1)[0]
                              for _ in range(2)]
    assert torch.equal(a, b) and za == zb

@pytest.mark.parametrize('options, said', [
    (dict(n=1), 'n must be'), (dict(n=2.5), 'n must be'), (dict(keep=1.), 'keep'),
    (dict(keep=0), 'keep'), (dict(moves=0), 'moves'), (dict(leaps='many'), 'leaps'),
    (dict(last=-1), 'last'),
    (dict(size=0.), 'size'), (dict(length=-1), 'length'), (dict(aim=1.), 'aim')])
def test_what_it_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        tempered(flat, bent, drawn, **dict(n=8) | options)

def test_densities_of_another_shape_or_without_a_value():
    with pytest.raises(ValueError, match='log_prior must answer one number'):
        tempered(lambda x: flat(x).sum(), bent, drawn, 8)
    with pytest.raises(ValueError, match='log_likelihood must answer one number'):
        tempered(flat, lambda x: x, drawn, 8)
    with pytest.raises(FloatingPointError, match='8 of 8 particles'):
        tempered(flat, lambda x: bent(x)*math.nan, drawn, 8)

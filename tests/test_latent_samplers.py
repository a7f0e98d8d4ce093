"PSLD and ReSample where the decoder does nothing, and what they refuse"
import math
import pytest, torch
from torch import nn
from rtb_nb.beds import ddpm_times, scalar
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.latent import load_autoencoder, load_mixture
from rtb_nb.latent_samplers import *
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.nonlinear import Compose, FourierMagnitude
from rtb_nb.operators import Mask
from rtb_nb.samplers import dps, law
from rtb_nb.schedule import Cosine

class Nothing(nn.Module):
    "An encoder, or a decoder, that does nothing"
    in_shape = out_shape = (1, 2, 2)
    def forward(self, x): return x

MASK, ONE = Mask(torch.tensor([[[1., 0.], [1., 1.]]])), torch.tensor([[1.]])

def problem(op, std=.1):
    cov = torch.eye(4)/2 + .3
    prior = Diffusion(GaussianDenoiser(torch.zeros(1, 2, 2), cov, Cosine(.5)), (1, 2, 2))
    return InverseProblem(prior, Likelihood(op, std))

def measured(p):
    torch.manual_seed(0)
    return p.simulate(1)[1]

def seeded(run):
    torch.manual_seed(1)
    return run()

@pytest.mark.parametrize('scale, glue', [(.3, 0.), (.2, .1), (.1, .4)])
def test_psld_is_dps_where_the_decoder_does_nothing(scale, glue):
    "The gluing residual is minus A^T (y - A z), whose norm for a mask is the residual's own"
    latent, plain = problem(Compose(MASK, Nothing())), problem(MASK)
    y = measured(plain)
    ours = seeded(lambda: psld(latent, y, 4, encode=Nothing(), scale=scale, glue=glue,
                               steps=15))
    theirs = seeded(lambda: dps(plain, y, 4, scale=scale+glue, steps=15))
    assert torch.allclose(ours.x, theirs.x, atol=1e-4)
    assert ours.calls == theirs.calls == 60 and ours.gradients == theirs.gradients

def test_an_encoder_that_is_wrong_is_noticed():
    latent = problem(Compose(MASK, Nothing()))
    y, wrong = measured(latent), lambda x: x + 1
    a, b = (seeded(lambda: psld(latent, y, 4, encode=e, scale=.2, glue=.3, steps=15)).x
            for e in (Nothing(), wrong))
    assert (b.mean() - a.mean()).abs() > .05

def halfway(residual, v): return v/2 + .5 # towards the measurement of 1, affine

def recursion(K, every, gamma, first):
    "ReSample on N(0, 4) measured as 1, moment by moment, with `halfway` for a solution"
    p = scalar()
    t = torch.cat([ddpm_times(K+1), torch.zeros(1, dtype=torch.float64)])
    a, s = p.prior.denoiser.schedule(t[:-1])
    gain = lambda i: a[i]*4/(4*a[i]**2 + s[i]**2)
    mean, var = 0., s[0].item()**2
    for i in range(K-1):
        keep = s[i+1]/s[i]
        c = a[i+1]*gain(i) + keep*(1 - a[i]*gain(i))
        done = (i+1)/(K-1)
        if done < first or (K-2-i) % every: mean, var = c*mean, c**2*var
        else:
            step = s[i]**2 - (a[i]/a[i+1]*s[i+1])**2
            s2, v = gamma*step*s[i+1]**2/s[i]**2, s[i+1]**2
            slope = (s2*a[i+1]*gain(i)/2 + v*c)/(s2 + v)
            mean = slope*mean + s2*a[i+1]*.5/(s2 + v)
            var = slope**2*var + s2*v/(s2 + v)
    last = gain(K-1)/2
    return float(last*mean + .5), float(last**2*var)

@pytest.mark.parametrize('every, gamma, first', [(1, 40., 0.), (5, 40., .3), (3, 4., .5)])
def test_resample_moment_by_moment(every, gamma, first):
    torch.set_default_dtype(torch.float64)
    try:
        found = law(resample_latent, scalar(), ONE.double(), 80, solve=halfway, every=every,
                    gamma=gamma, first=first, times=ddpm_times(31))
    finally: torch.set_default_dtype(torch.float32)
    assert found == pytest.approx(recursion(30, every, gamma, first), rel=1e-6)

def test_resample_has_no_width_of_its_own():
    "Solved to the end it is the measurement; rested at the noise it is narrower than exact"
    def moments(until):
        torch.manual_seed(0)
        x = resample_latent(scalar(), ONE, 1000, solve=closer(60, .1, until)).x
        return x.mean().item(), x.var().item()
    (m, v), (_, zero) = moments(1.), moments(0.)
    assert zero < 1e-3 and m == pytest.approx(16/17, abs=.05) and v < .6*4/17

def test_each_sample_rests_by_itself():
    solve = closer(200, .02, 1.)
    v = torch.tensor([[0.], [.9], [3.]])
    found = solve(lambda u: (u - 1)/.5, v)
    assert found[1] == .9 and abs(found[0].item() - .5) < .03 and abs(found[2] - 1.5) < .03
    assert torch.allclose(solve(lambda u: (u - 1)/.5, v[:1]), found[:1], atol=1e-6)

@pytest.fixture(scope='module')
def digits():
    model = load_autoencoder()
    seen = torch.zeros(1, 32, 32)
    seen[:, :16] = 1
    op = Compose(Mask(seen), model.decoder)
    return model, InverseProblem(load_mixture(steps=8), Likelihood(op, .5))

def test_images_then_codes(digits):
    model, p = digits
    y, seen = measured(p), []
    def encode(x):
        seen.append(tuple(x.shape))
        return model.encode(x)[0]
    run = lambda: resample_latent(p, y, 3, encode=encode, steps=20, latent=.7, every=2)
    found, again = seeded(run), seeded(run)
    assert torch.equal(found.x, again.x) and found.x.shape == (3, 16)
    assert seen and set(seen) == {(3, 1, 32, 32)}
    assert found.calls == 60 and found.gradients == 0
    miss = (y - p.operator(found.x)).square().mean()/.5**2
    assert miss < 1.1 # it ends on a solution

def quiet(x): return 0*x

@pytest.mark.parametrize('name', ['psld', 'resample_latent'])
def test_no_sample_depends_on_the_others(digits, name):
    model, p = digits
    y, encode = measured(p), lambda x: model.encode(x)[0]
    def same(x): # a fixed noise for each sample, whatever the batch
        return torch.linspace(-1, 1, x[0].numel()).expand_as(x.flatten(1)).reshape(x.shape)
    run = dict(psld=psld, resample_latent=resample_latent)[name]
    one, many = (run(p, y, n, encode=encode, steps=8, noise=same).x for n in (1, 4))
    assert torch.allclose(one, many[:1], atol=1e-4)

@pytest.mark.parametrize('run, said', [
    (lambda p, y: psld(problem(MASK), y, 2, encode=quiet), 'Compose'),
    (lambda p, y: resample_latent(problem(MASK), y, 2, encode=quiet), 'Compose'),
    (lambda p, y: psld(p, y, 2, encode=quiet, scale=0), 'scale'),
    (lambda p, y: psld(p, y, 2, encode=quiet, glue=-1), 'glue'),
    (lambda p, y: psld(p, y, 0, encode=quiet), 'n must'),
    (lambda p, y: resample_latent(p, y, 2, every=0), 'every'),
    (lambda p, y: resample_latent(p, y, 2, gamma=0), 'gamma'),
    (lambda p, y: resample_latent(p, y, 2, first=2), 'first'),
    (lambda p, y: resample_latent(p, y, 2, latent=-.1), 'latent'),
    (lambda p, y: resample_latent(p, y, 2, steps=2), 'steps'),
    (lambda p, y: closer(0), 'steps'), (lambda p, y: closer(lr=0), 'lr'),
    (lambda p, y: closer(until=-1), 'until')])
def test_what_they_refuse(run, said):
    p = problem(Compose(MASK, Nothing()))
    with pytest.raises(ValueError, match=said): run(p, measured(p))

def test_psld_needs_an_operator_that_can_be_undone():
    p = problem(Compose(FourierMagnitude((1, 2, 2)), Nothing()))
    with pytest.raises(ValueError, match='no pinv'):
        psld(p, measured(p), 2, encode=quiet)
    assert math.isfinite(resample_latent(p, measured(p), 2, steps=4).x.sum())

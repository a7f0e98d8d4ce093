"Inputs that once gave a silent wrong number, or an error that named something else"
import math
import pytest, torch
from test_core import plane
from rtb_nb.amortise import Bank, Family, gap
from rtb_nb.beds import hole, small_lens
from rtb_nb.calibration import interval_coverage
from rtb_nb.denoise import EpsDenoiser, GaussianDenoiser, MixtureDenoiser, gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.distances import score_modes
from rtb_nb.exact import ExactChain, ExactPosterior
from rtb_nb.experiment import tune
from rtb_nb.families import LensFamily
from rtb_nb.latent import Decoder
from rtb_nb.likelihood import Tilted
from rtb_nb.lensing import gaussian_kernel
from rtb_nb.maps import show_maps
from rtb_nb.objective import RTB, VarGrad
from rtb_nb.particles import fps
from rtb_nb.samplers import dps, levels_at
from rtb_nb.schedule import Cosine
from rtb_nb.show import show_hist, show_samples
from rtb_nb.sources import photometry, vary_sources
from rtb_nb.tempered import next_temperature, tempered
from rtb_nb.train import Trainer

mixture = MixtureDenoiser(torch.randn(3, 2), .3, schedule=Cosine())
grey = torch.zeros(1, 16, 16)

def bare_paths():
    problem = plane(8)
    posterior = problem.posterior([])
    tau = posterior.simulate(torch.ones(1, 1), 3)
    tau.x0_hat = None
    return posterior.step_log_ratio(tau, [1])

def of_a_lens():
    problem = small_lens(3, 8)
    return ExactPosterior(ExactChain(problem, problem.simulate(1)[1]))

refusals = {
    'paths without guesses': (bare_paths, 'give posterior.with_guesses(tau)'),
    'one path by its number': (lambda: plane(8).prior.simulate(2)[0], 'use tau[i:i+1]'),
    'exact chain of images': (of_a_lens, 'a chain of vectors (D,), got events of shape'),
    'gap of one path each': (lambda: gap(torch.zeros(5), torch.zeros(1, 5)), '(5,) and (1, 5)'),
    'prior draws too few': (lambda: tempered(lambda x: x[:, 0], lambda x: x[:, 0],
        lambda n: torch.randn(n//4, 2), 40), 'draw_prior(40) must answer 40 draws'),
    'temperature': (lambda: next_temperature(torch.zeros(4), 2.), 'beta must lie in [0, 1]'),
    'log r of a nan': (lambda: next_temperature(torch.tensor([0., math.nan]), .5),
        'got (2,), 1 of them nan'),
    'a brightness above the range': (lambda: vary_sources(torch.zeros(1, 1, 8, 8),
        peak=(.2, 1.5)), 'peak must lie in (0, 1], got 1.5'),
    'a range that falls': (lambda: LensFamily(psf=(.2, .1)), 'psf must rise, got (0.2, 0.1)'),
    'log r of a column': (lambda: next_temperature(torch.zeros(4, 1), .5),
        'got (4, 1), 0 of them nan'),
    'events of a mixture': (lambda: mixture(torch.zeros(4, 1, 2), torch.tensor(.5)),
        'this mixture is over events (2,), got (1, 2)'),
    'events of a Gaussian': (lambda: GaussianDenoiser(torch.zeros(2), torch.eye(2), Cosine())(
        torch.zeros(4, 3), torch.tensor(.5)), 'of 2 numbers each, got (4, 3)'),
    'a class as a schedule': (lambda: GaussianDenoiser(torch.zeros(2), torch.eye(2), Cosine),
        'needs a schedule'),
    'a field too small': (lambda: gaussian_field(8, 1., 4., Cosine()), 'too long for a torus'),
    'a hole too small': (lambda: hole(size=16), 'correlated over four pixels'),
    'sides of a decoder': (lambda: Decoder((16,), (1, 30, 30)), 'divisible by 8'),
    'photometry of colours': (lambda: photometry(torch.zeros(1, 3, 8, 8)), 'grey images'),
    'a number for a range': (lambda: vary_sources(torch.zeros(1, 1, 8, 8), peak=.5),
        'peak must be a range (low, high), got 0.5'),
    'another distribution': (lambda: interval_coverage(torch.randn(40, 1),
        torch.distributions.Normal(torch.zeros(2), 1.)), 'must have batch shape (1,)'),
    'kernel without width': (lambda: gaussian_kernel(-.1, .05), 'std must be zero or a pos'),
    'a number for a family': (lambda: LensFamily(psf=.1), 'psf must be a range'),
    'a lens beyond round': (lambda: LensFamily(q=(.5, 1.5)), 'q must lie in (0, 1], got 1.5'),
    'levels out of range': (lambda: levels_at(plane(8).prior, [2., .5]), 'within [0, 1]'),
    'halving of a sign': (lambda: tune([-1., 1.], lambda v: 2. - v, halvings=2), 'logarithm'),
    'maps of one sample': (lambda: show_maps(torch.zeros(1, 1, 8, 8)), 'two at least'),
    'five images, three measurements': (lambda: plane(8).log_likelihood(torch.zeros(5, 2),
        torch.zeros(3, 1)), '5 images and 3 measurements'),
}
kinds = {
    'one likelihood as a family': (lambda: Family(plane(8).likelihood), 'got one: [it]'),
    'log Z as a number': (lambda: RTB(-3.), 'log_z must be VarGrad()'),
    'log Z as a class': (lambda: RTB(VarGrad), 'log_z must be VarGrad()'),
    'a bank of a problem': (lambda: Bank.of(plane(8), 4), 'a bank is of a prior'),
    'a posterior for a problem': (lambda: dps(plane(8).posterior([]), torch.ones(1, 1), 2),
        'give posterior.problem'),
    'a prior for a problem': (lambda: fps(plane(8).prior, torch.ones(1, 1), 2),
        'give InverseProblem(prior, likelihood)'),
    'a class as the spacing': (lambda: Diffusion(plane(8).prior.denoiser, (2,), spacing=Cosine),
        'spacing must be a function of time'),
    'a measurement of a tilted prior': (lambda: Tilted(plane(8).prior, lambda x: x[:, 0])
        .likelihood(torch.zeros(1, 2)), 'use prior.simulate'),
    'unnamed samples': (lambda: show_samples(torch.zeros(4, 2)), 'samples are named'),
    'unnamed values': (lambda: show_hist(torch.zeros(4)), 'show_hist(learned=x)'),
}

@pytest.mark.parametrize('name', refusals)
def test_a_wrong_value_is_named(name):
    fn, words = refusals[name]
    with pytest.raises((ValueError, TypeError)) as e: fn()
    assert words in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('name', kinds)
def test_a_wrong_kind_is_named(name):
    fn, words = kinds[name]
    with pytest.raises(TypeError) as e: fn()
    assert words in str(e.value)

def test_a_broken_sample_breaks_every_score_of_modes():
    sets, means = torch.randn(2, 20, 2), torch.zeros(1, 2)
    x = torch.randn(60, 2)
    x[50] = math.nan
    found = score_modes(x, sets, means, torch.ones(1))
    assert all(math.isnan(found[k]) for k in ('sw', 'modes'))


def test_a_network_takes_a_plain_time():
    denoiser = EpsDenoiser(lambda x, t: x*t.reshape(-1, 1), Cosine())
    assert denoiser(torch.ones(3, 2), .5).shape == (3, 2)


def test_a_problem_is_no_posterior():
    assert not hasattr(plane(8), 'problem')
    with pytest.raises(AttributeError, match='use problem.posterior'): Trainer(plane(8), None)

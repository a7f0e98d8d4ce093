"Training-free samplers: known answers, independence of the batch, costs, bad input"
import math
import numpy as np
import pytest
import torch
from options import COV, MEAN, SHAPE, bent_problem, linear_problem, measured, sampler_options
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.exact import ExactChain
from rtb_nb.guidance import DPS
from rtb_nb.imaging import motion_kernel
from rtb_nb.inner import adam_fit, daps, exact_draw, langevin, mgdm
from rtb_nb.likelihood import InverseProblem, Likelihood, Tilted
from rtb_nb.photons import PhotonNoise
from rtb_nb.operators import Matrix
from rtb_nb.nonlinear import Compose, FourierMagnitude, NonlinearBlur
from rtb_nb.particles import Tangent, fps, observe, resampled, twisted
from rtb_nb.samplers import (CLEAN, CallCounter, Level, Samples, ancestral, bridge, chance,
    cla, cla_ve, ddrm, dps, ladder, law, max_ratio, pigdm)
from rtb_nb.schedule import VE, Cosine, Linear

shape, cov, mean, f64 = SHAPE, COV, MEAN, torch.float64
problem, bent = linear_problem(), bent_problem()
prior, y = problem.prior, measured(problem)

def with_options(f, **options): return lambda *args, **kw: f(*args, **{**options, **kw})

samplers = dict(dps=dps, plug_in=with_options(dps, scale=None), pigdm=pigdm, cla=cla,
    cla_ve=with_options(cla_ve, low=.05, high=20.), ddrm=ddrm,
    fps=fps, fps_smc=with_options(fps, particles=4),
    daps=with_options(daps, inner=langevin(3, 1e-3)),
    daps_exact=with_options(daps, inner=exact_draw), mgdm=with_options(mgdm, down=3),
    twisted=lambda problem, y, n, steps=None, **kw: twisted(problem, y, n, particles=4, **kw))
linear_only = {'pigdm', 'cla', 'cla_ve', 'ddrm', 'daps_exact'}
cases = [(n, problem) for n in samplers] + [(n, bent) for n in samplers if n not in linear_only]


class Given:
    "The noise of `total` samples, of which only `rows` are asked for"
    def __init__(self, total, rows):
        self.total, self.rows = total, rows
        self.gen = torch.Generator().manual_seed(0)
    def __call__(self, x):
        if not x.ndim: return torch.randn((), generator=self.gen)
        each = len(x)//len(self.rows)
        noise = torch.randn(self.total, each, *x.shape[1:], generator=self.gen)
        return noise[self.rows].flatten(0, 1).to(x)


@pytest.mark.parametrize('name,problem', cases,
    ids=[f'{n}-{type(p.operator).__name__}' for n, p in cases])
def test_no_sample_depends_on_its_neighbours(name, problem):
    ys = y + torch.arange(4.)[:, None]/10
    def draw(rows):
        return samplers[name](problem, ys[rows], len(rows), steps=12, noise=Given(4, rows)).x
    together = draw([0, 1, 2, 3])
    assert together.shape == (4, *shape) and together.isfinite().all()
    alone = torch.cat([draw([i]) for i in range(4)])
    scale = max(1., together.abs().max())  # few plug-in steps explode
    assert (together - alone).abs().max() < 1e-5*scale


@pytest.mark.parametrize('schedule', [Cosine(.5), Linear(), VE(.01, 50.)],
    ids=['cosine', 'linear', 've'])
@pytest.mark.parametrize('name', samplers)
def test_every_schedule(name, schedule):
    torch.manual_seed(0)
    found = samplers[name](linear_problem(schedule), y, 16, steps=40).x
    assert found.isfinite().all() and (found.abs().max() < 10 or name in ('dps', 'plug_in'))


def exact(problem):
    A, inverse, var = problem.operator.matrix(), cov.double().inverse(), problem.noise_std**2
    S = torch.linalg.inv(inverse + A.T @ A/var)
    return S @ (inverse @ mean.double() + A.T @ y[0].double()/var), S.diagonal()


def test_daps_with_exact_draws_is_right_where_it_sees_and_twice_too_wide_where_it_does_not():
    m, v = exact(problem)
    torch.manual_seed(0)
    x = daps(problem, y, 2000, inner=exact_draw, low=.02, end=.005).x.flatten(1).double()
    ratio, seen = x.var(0)/v, [0, 2, 3]
    assert ((x.mean(0) - m)/v.sqrt()).abs().max() < .2
    assert (ratio[seen] - 1).abs().max() < .15 and 1.5 < ratio[1] < 2.1


def test_twisted_finds_the_chains_posterior_and_evidence():
    known = ExactChain(problem, y)
    torch.manual_seed(0)
    found = twisted(problem, y, 1500, particles=64)
    x, post = found.x.flatten(1).double(), known.posterior()
    assert ((x.mean(0) - post.mean)/(post.variance/1500).sqrt()).abs().max() < 4
    assert (x.var(0)/post.variance - 1).abs().max() < 4*math.sqrt(2/1500)
    z = (found.log_z.double() - known.log_evidence).exp()
    assert abs(z.mean() - 1) < 4*z.std()/1500**.5 and found.log_z.shape == (1500,)


def test_twisted_is_exact_beyond_linear_operators():
    torch.manual_seed(0)
    x = prior.sample(200000)
    w = bent.log_likelihood(x, y.expand(len(x), 3)).double().softmax(0)
    flat = x.flatten(1).double()
    m = w @ flat
    sd = (w @ (flat - m)**2).sqrt()
    found = twisted(bent, y, 1500, particles=16).x.flatten(1).double().mean(0)
    ess = 1/(w**2).sum()
    assert ((found - m)/sd).abs().max() < 4*(1/1500 + 1/ess)**.5


def test_the_extension_of_fps_changes_nothing_where_the_operator_is_linear():
    A = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    op = Compose(Matrix(A), Matrix(torch.eye(4), in_shape=shape))
    linear = InverseProblem(prior, Likelihood(op, .1))
    hidden = InverseProblem(prior, Likelihood(Compose(lambda x: x, op), .1))
    torch.manual_seed(0)
    mine, theirs = (fps(p, y, 3000, c=.5).x.flatten(1) for p in (hidden, linear))
    assert (mine.mean(0) - theirs.mean(0)).abs().max() < .05
    assert (mine.std(0)/theirs.std(0) - 1).abs().max() < .1


@pytest.mark.parametrize('rows', [2, 4, 6])
def test_tangent_is_the_operator_where_it_is_linear(rows):
    A = torch.randn(rows, 4, dtype=f64)
    op, x = Matrix(A, offset=torch.arange(float(rows))), torch.randn(5, 4, dtype=f64)
    t, v = Tangent(op, x), torch.randn(5, rows, dtype=f64)
    other = torch.randn(5, 4, dtype=f64)
    pairs = ((t(other), op(other)), (t.adjoint(v), op.adjoint(v)),
        (t.gram_solve(v, .7, .2), op.gram_solve(v, .7, .2)))
    for mine, theirs in pairs: assert torch.allclose(mine, theirs, atol=1e-10)
    wide = Tangent(lambda x: torch.cat([op(x), op(2*x)], 1), x)
    assert wide.log_det(.7, .2).shape == (5,)


def test_log_det_is_right_up_to_what_all_share():
    A = torch.randn(6, 2, dtype=f64)
    t = Tangent(lambda x: (x @ A.T).sin(), torch.randn(3, 2, dtype=f64))
    whole = torch.logdet(.7*t.J @ t.J.mT + .2*torch.eye(6, dtype=f64))
    assert (t.log_det(.7, .2) - whole).diff().abs().max() < 1e-9


@pytest.mark.parametrize('operator', [FourierMagnitude((3, 6, 6)),
                                      NonlinearBlur(motion_kernel(3, seed=0), (3, 6, 6))])
def test_tangent_colour_by_colour_is_that_of_the_whole_image(operator):
    x = torch.rand(2, 3, 6, 6, dtype=f64) - .5
    short, whole = Tangent(operator, x), Tangent(lambda x: operator(x), x)
    assert len(short.J) == 3*len(whole.J)
    y, other = operator(x) + .1, torch.randn_like(x)
    pairs = ((short(other), whole(other)), (short.adjoint(y), whole.adjoint(y)),
        (short.gram_solve(y, .7, .2), whole.gram_solve(y, .7, .2)))
    for mine, theirs in pairs: assert torch.allclose(mine, theirs, atol=1e-10)
    assert (short.log_det(.7, .2) - whole.log_det(.7, .2)).diff().abs() < 1e-9


def test_observe_draws_from_the_product():
    A, n = torch.tensor([[1., .5]], dtype=f64), 40000
    torch.manual_seed(0)
    target, x = torch.full((n, 1), .7, dtype=f64), torch.ones(n, 2, dtype=f64)
    x = observe(Matrix(A), target, x, .5, .1, torch.randn_like)
    S = torch.linalg.inv(torch.eye(2, dtype=f64)/.5 + A.T @ A/.1)
    m = S @ (torch.ones(2, dtype=f64)/.5 + A[0]*.7/.1)
    assert (x.mean(0) - m).abs().max() < .02 and (x.T.cov() - S).abs().max() < .02


def test_systematic_resampling_gives_each_particle_its_share():
    w = torch.tensor([.5, .25, .25, 0.]).log()
    for _ in range(20):
        i = resampled(w[None], torch.randn_like)[0]
        assert torch.bincount(i, minlength=4).tolist() == [2, 1, 1, 0]


def test_bridge_keeps_the_joint_law():
    a, b, c = Level(.9, .2, .8), Level(.5, .6, .5), Level(.3, .8, .3)
    up, down, std = bridge(a, b, c)
    span = a.alpha/c.alpha
    noise = up**2*(a.sigma**2 - (span*c.sigma)**2) + std**2
    assert up*span + down == pytest.approx(b.alpha/c.alpha)
    assert noise == pytest.approx(b.sigma**2 - (b.alpha/c.alpha*c.sigma)**2)


@pytest.mark.parametrize('order', [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_bridges_lead_from_noisy_to_clean(order):
    noisy, mid, clean = Level(.9, .2, .8), Level(.5, .6, .5), Level(.3, .8, .3)
    levels = [(noisy, mid, clean)[i] for i in order]
    with pytest.raises(ValueError, match='from noisy to clean, got noise-to-signal'):
        bridge(*levels)


def test_costs():
    assert fps(problem, y, 3, particles=4, steps=12).calls == 3*4*12
    assert fps(problem, y, 8, particles=4, keep=4, steps=12).calls == 2*4*12
    found = dps(problem, y, 3, steps=12)
    assert (found.calls, found.gradients) == (3*12, 3*11)
    found = mgdm(problem, y, 2, fit=adam_fit(5, .01), steps=12, down=1)
    assert (found.calls, found.gradients) == (2*(1 + 10*6), 2*50)
    found = twisted(problem, y, 2, particles=3)
    assert (found.calls, found.gradients) == (2*3*12, 2*3*12)
    assert daps(problem, y, 2, steps=7, ode=3).calls == 2*7*3


def test_leftover_samples_of_a_filter_are_dropped():
    assert fps(problem, y, 5, particles=4, keep=4).x.shape == (5, *shape)


@pytest.mark.parametrize('name', samplers)
def test_progress_is_shown(name, capfd):
    samplers[name](problem, y, 1, steps=12, progress=True)
    assert '100%' in capfd.readouterr().err


def test_double_precision_follows_the_prior():
    torch.set_default_dtype(f64)
    try: assert all(f(problem, y, 1, steps=12).x.dtype == f64 for f in samplers.values())
    finally: torch.set_default_dtype(torch.float32)


def test_loudest_level_is_the_priors_own():
    quiet = Diffusion(GaussianDenoiser(mean, cov, VE(.01, 20.)), (4,))
    assert max_ratio(prior, .1, 100.) == 100.
    assert max_ratio(quiet, .1, 100.) == pytest.approx(20.)
    assert ladder(prior, 3)[-1] is CLEAN and len(ladder(prior, 3)) == 4



least = sampler_options()

@pytest.mark.parametrize('f,options,problem', least,
    ids=[f'{f.__name__}-{" ".join(o) or "defaults"}-{i}' for i, (f, o, _) in enumerate(least)])
def test_every_option_at_its_least_gives_samples_that_hear_the_measurement(f, options, problem):
    def draw(y):
        torch.manual_seed(0)
        return f(problem, y, 3, **options).x
    y = measured(problem)
    x, moved = draw(y), draw(y + .5)
    assert x.shape == (3, *shape) and x.isfinite().all()
    assert (x - moved).abs().max() > 1e-4


kinds = {'double': y.double(), 'numpy': y.numpy(), 'numpy double': y.numpy().astype(np.float64),
    'list': y.tolist(), 'other layout': y.repeat(2, 1).T.contiguous().T[:1],
    'big-endian': y.numpy().astype('>f4'), 'reversed view': y.numpy()[:, ::-1][:, ::-1]}

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('name', samplers)
def test_a_measurement_may_be_numbers_of_any_kind(name, kind):
    def draw(y):
        torch.manual_seed(0)
        return samplers[name](problem, y, 2, steps=12).x
    assert torch.equal(draw(kinds[kind]), draw(y))


@pytest.mark.parametrize('number', [np.int64(4), np.int32(4), torch.tensor(4)], ids=str)
def test_whole_numbers_of_any_kind(number):
    assert dps(problem, y, number, steps=number, scale=np.float32(.5)).x.shape == (4, *shape)
    found = fps(problem, y, number, particles=number, keep=number, c=torch.tensor(.5),
        steps=number)
    assert found.x.shape == (4, *shape)
    assert mgdm(problem, y, 2, gibbs=number, down=number, fit=adam_fit(number, np.float64(.1)),
        steps=number).x.isfinite().all()
    assert daps(problem, y, 2, steps=number, ode=number, rho=np.int64(7)).x.isfinite().all()


@pytest.mark.parametrize('name', samplers)
def test_inference_mode_changes_nothing(name):
    def draw(y):
        torch.manual_seed(0)
        return samplers[name](problem, y, 2, steps=12)
    plain = draw(y)
    with torch.inference_mode(): inside, own = draw(y), draw(y + torch.zeros(1))
    assert torch.equal(plain.x, inside.x) and torch.equal(plain.x, own.x)
    assert (plain.calls, plain.gradients) == (inside.calls, inside.gradients)


@pytest.mark.parametrize('name', samplers)
def test_no_gradient_is_kept(name):
    found = samplers[name](problem, y.clone().requires_grad_(), 2, steps=12)
    assert not found.x.requires_grad


def test_call_counter_counts_images_and_gradients_while_it_lasts():
    net = torch.nn.Linear(2, 2).requires_grad_(False)
    with CallCounter(net) as outer, CallCounter(net) as inner:
        net(torch.zeros(3, 2)), net(torch.zeros(4, 2, requires_grad=True))
    net(torch.zeros(100, 2))
    assert (outer.images, outer.gradients) == (inner.images, inner.gradients) == (7, 4)


def test_call_counter_lets_go_after_an_error():
    net = torch.nn.Identity()
    with pytest.raises(RuntimeError), CallCounter(net): raise RuntimeError
    assert not net._forward_hooks


def test_a_counter_sees_what_a_sampler_reports():
    with CallCounter(prior.denoiser) as counter: found = dps(problem, y, 3, steps=12)
    assert (counter.images, counter.gradients) == (found.calls, found.gradients) == (36, 33)


@pytest.mark.parametrize('name', samplers)
def test_a_posterior_is_no_prior_for_a_sampler(name):
    posterior = problem.posterior([]).given(y)
    with pytest.raises(ValueError, match='needs a prior with a denoiser') as e:
        samplers[name](InverseProblem(posterior, problem.likelihood), y, 2, steps=12)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('f', [with_options(dps, scale=None), with_options(mgdm, down=3),
    with_options(daps, inner=langevin(30, 5e-3))], ids=['dps', 'mgdm', 'daps'])
def test_what_needs_no_operator_samples_a_tilted_prior(f):
    tilted = Tilted(prior, lambda x: -(x.flatten(1) - 1.).square().sum(1)/2/.2**2)
    torch.manual_seed(0)
    x = f(tilted, tilted.no_measurement, 50, steps=40).x
    assert x.isfinite().all() and x.mean() > mean.mean() + .3


def test_chance_gives_the_errors_of_mean_and_variance():
    torch.manual_seed(0)
    m, m_se, v, v_se = chance(2*torch.randn(40000, dtype=f64))
    assert m_se == pytest.approx(2/200, rel=.05) and v_se == pytest.approx(4*2**.5/200, rel=.05)
    assert abs(m) < 4*m_se and abs(v - 4) < 4*v_se


narrow = dict(low=.05, high=20.)
tilted = Tilted(prior, lambda x: -x.flatten(1).square().sum(1))
photons = InverseProblem(prior, Likelihood(problem.operator, noise=PhotonNoise(100.)))
counts, label = torch.zeros(1, 3), tilted.no_measurement

bad_input = {
    'none': (lambda: dps(problem, y, 0), 'n must be a positive whole number, got 0'),
    'half a sample': (lambda: fps(problem, y, 1.5),
        'n must be a positive whole number, got 1.5'),
    'true': (lambda: dps(problem, y, True), 'n must be a positive whole number, got True'),
    'text': (lambda: daps(problem, y, '4'), "n must be a positive whole number, got '4'"),
    'y shape': (lambda: dps(problem, y[:, :2], 4), 'y has shape (1, 2), expected (M, 3)'),
    'y alone': (lambda: dps(problem, y[0], 4), 'add a batch dimension, y[None]'),
    'y number': (lambda: fps(problem, 1., 4), 'y has shape (), expected (M, 3)'),
    'y nothing': (lambda: mgdm(problem, None, 4),
        'a measurement is a tensor, an array or a list'),
    'y text': (lambda: ddrm(problem, 'y', 4), 'a measurement is a tensor, an array or a list'),
    'y complex': (lambda: cla(problem, y*1j, 4), 'a measurement is real'),
    'y ragged': (lambda: cla(problem, [[1., 2.], [3.]], 4),
        'a measurement is a tensor, an array or a list'),
    'y shape, bent': (lambda: twisted(bent, y[:, :2], 4),
        'y has shape (1, 2), expected (M, 3)'),
    'y count': (lambda: daps(problem, y.expand(3, 3), 4), 'one for each of the 4 paths'),
    'y nan': (lambda: mgdm(problem, y*math.nan, 4), '3 non-finite values'),
    'y infinite': (lambda: twisted(problem, y*math.inf, 4), '3 non-finite values'),
    'no steps': (lambda: ancestral(problem, y, 4, None, steps=0),
        'steps must be a whole number of at least 3, got 0'),
    'half a step': (lambda: ddrm(problem, y, 4, steps=2.5),
        'steps must be a whole number of at least 3, got 2.5'),
    'one step': (lambda: dps(problem, y, 4, steps=1), 'the last only denoises'),
    'two steps': (lambda: pigdm(problem, y, 4, steps=2), 'of at least 3, got 2'),
    'one step, filter': (lambda: fps(problem, y, 4, steps=1), 'of at least 3, got 1'),
    'one level': (lambda: daps(problem, y, 4, steps=1), 'of at least 2, got 1'),
    'times for steps': (lambda: dps(problem, y, 4, steps=torch.tensor([.9, .5, .1])),
        'steps must be a whole number of at least 3'),
    'overshoot': (lambda: cla_ve(problem, y, 4, steps=10, **narrow), 'fewer overshoot'),
    'times up': (lambda: cla(problem, y, 4, times=[.1, .5, .9]), 'noise first, got [0.1'),
    'times beyond': (lambda: cla(problem, y, 4, times=[2., .9, .1]), 'within [0, 1]'),
    'times nan': (lambda: cla(problem, y, 4, times=[1., math.nan, .1]), 'within [0, 1]'),
    'times without signal': (lambda: ddrm(problem, y, 4, times=[1., .5, .1]),
        'there is none at t = 1: begin times later'),
    'no times': (lambda: fps(problem, y, 4, times=[]), 'got shape (0,)'),
    'one time': (lambda: mgdm(problem, y, 4, times=[.5]),
        'at least three levels, got shape (1,)'),
    'scale': (lambda: dps(problem, y, 4, scale=0), 'scale must be a positive number, got 0'),
    'scale text': (lambda: dps(problem, y, 4, scale='.5'),
        "scale must be a positive number, got '.5'"),
    'scale, tilted': (lambda: dps(tilted, label, 4), 'pass scale=None'),
    'variance': (lambda: pigdm(problem, y, 4, variance=-1.),
        'variance must be a positive number, got -1.0'),
    'pigdm': (lambda: pigdm(bent, y, 4),
        'needs a linear operator, with adjoint and gram_solve; Compose has no adjoint'),
    'cla': (lambda: cla(bent, y, 4), 'needs a linear operator'),
    'cla_ve': (lambda: cla_ve(bent, y, 4), 'needs a linear operator'),
    'ddrm': (lambda: ddrm(bent, y, 4), 'needs a linear operator'),
    'cla, tilted': (lambda: cla(tilted, label, 4), 'a tilted prior has no adjoint'),
    'fps, tilted': (lambda: fps(tilted, label, 4), 'a tilted prior has no noise'),
    'twisted, tilted': (lambda: twisted(tilted, label, 4), 'a tilted prior has none'),
    'photons': (lambda: pigdm(photons, counts, 4), 'needs Gaussian noise'),
    'exact draw': (lambda: daps(bent, y, 4, inner=exact_draw), 'needs a linear operator'),
    'c': (lambda: fps(problem, y, 4, c=0), 'c must lie in (0, 1], got 0'),
    'particles': (lambda: fps(problem, y, 4, particles=0),
        'particles must be a positive whole number, got 0'),
    'no keep': (lambda: fps(problem, y, 4, particles=4, keep=0),
        'keep must be a positive whole number, got 0'),
    'keep': (lambda: twisted(problem, y, 4, particles=4, keep=8),
        'keep = 8 asks for more than the 4 particles'),
    'eta': (lambda: ddrm(problem, y, 4, eta=1.5), 'eta must lie in [0, 1], got 1.5'),
    'eta_b': (lambda: ddrm(problem, y, 4, eta_b=-1.), 'eta_b must lie in (0, 1], got -1.0'),
    'deaf': (lambda: ddrm(problem, y, 4, eta_b=0.), 'eta_b must lie in (0, 1], got 0.0'),
    'rate': (lambda: langevin(lr=0.), 'lr must be a positive number, got 0.0'),
    'langevin steps': (lambda: langevin(0), 'steps must be a positive whole number, got 0'),
    'range': (lambda: cla_ve(problem, y, 4, low=5., high=2.),
        'low = 5.0 must lie below the loudest level, 2'),
    'low': (lambda: cla_ve(problem, y, 4, low=0.), 'low must be a positive number, got 0.0'),
    'anneal': (lambda: daps(problem, y, 4, low=200.),
        'low = 200.0 must lie below the loudest level, 100'),
    'ode': (lambda: daps(problem, y, 4, ode=0), 'ode must be a positive whole number, got 0'),
    'ode end': (lambda: daps(problem, y, 4, end=.5), 'end must lie in (0, 0.1), got 0.5'),
    'rho': (lambda: daps(problem, y, 4, rho=0), 'rho must be a positive number, got 0'),
    'adam steps': (lambda: adam_fit(-1), 'steps must be a whole number of at least 0, got -1'),
    'adam rate': (lambda: adam_fit(3, -1.), 'lr must be a positive number, got -1.0'),
    'sweeps': (lambda: mgdm(problem, y, 4, gibbs=0),
        'gibbs must be a positive whole number, got 0'),
    'nonlinear filter': (lambda: fps(photons, counts, 4), 'needs Gaussian noise'),
    'down': (lambda: mgdm(problem, y, 4, down=0),
        'down must be a positive whole number, got 0'),
    'short walk': (lambda: mgdm(problem, y, 4, steps=2), 'of at least 3, got 2'),
    'draws': (lambda: law(dps, problem, y, 2, steps=3), '3 draws, only 2 were allowed'),
}


@pytest.mark.parametrize('case', bad_input)
def test_bad_input_is_one_clear_line(case):
    call, words = bad_input[case]
    with pytest.raises((ValueError, TypeError)) as e: call()
    assert words in str(e.value) and '\n' not in str(e.value)

def test_samples_of_a_posterior_are_counted():
    problem = linear_problem()
    y, q = measured(problem), problem.posterior([DPS(.1)])
    torch.manual_seed(0)
    found = Samples.of(q, y, 3)
    torch.manual_seed(0)
    assert torch.equal(found.x, q.sample(y, 3))
    assert (found.calls, found.gradients) == (2*3*q.steps, 3*q.steps)

"Training-free samplers: known answers, independence of the batch, costs, and one clear line for each bad input"
import math
import pytest
import torch
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.likelihood import ExactChain, InverseProblem, Likelihood
from rtb_nb.operators import Compose, Mask, Matrix
from rtb_nb.samplers import (CLEAN, Level, Tangent, adam_fit, ancestral, bridge, cla, cla_ve, daps, ddrm, dps, exact_draw, fps, ladder,
    langevin, loudest, mgdm, observe, pigdm, resampled, twisted)
from rtb_nb.schedule import VE, Cosine, Linear

shape, f64 = (1, 2, 2), torch.float64
cov = torch.eye(4)/4 + .1
mean = torch.tensor([.1, -.2, .3, 0.])
prior = Diffusion(GaussianDenoiser(mean.reshape(shape), cov, Cosine(.5)), shape, steps=12, last_noise=.05)
problem = InverseProblem(prior, Likelihood(Mask(torch.tensor([[[1, 0], [1, 1]]])), .1))
bent = InverseProblem(prior, Likelihood(Compose(torch.sin, problem.operator), .1))
y = torch.tensor([[.9, .2, .3]])

samplers = dict(dps=dps, plug_in=lambda *a, **kw: dps(*a, scale=None, **kw), pigdm=pigdm, cla=cla,
    cla_ve=lambda *a, **kw: cla_ve(*a, low=.05, high=20., **kw),
    fps=fps, fps_smc=lambda *a, **kw: fps(*a, particles=4, **kw), ddrm=ddrm, daps=lambda *a, **kw: daps(*a, inner=langevin(3, 1e-3), **kw),
    daps_exact=lambda *a, **kw: daps(*a, inner=exact_draw, **kw), mgdm=lambda *a, **kw: mgdm(*a, down=3, **kw),
    twisted=lambda problem, y, n, steps=None, **kw: twisted(problem, y, n, particles=4, **kw))
linear_only = {'pigdm', 'cla', 'cla_ve', 'ddrm', 'daps_exact'}
cases = [(n, problem) for n in samplers] + [(n, bent) for n in samplers if n not in linear_only]


class Given:
    "The noise of `total` samples, of which only `rows` are asked for"
    def __init__(self, total, rows): self.total, self.rows, self.gen = total, rows, torch.Generator().manual_seed(0)
    def __call__(self, x):
        if not x.ndim: return torch.randn((), generator=self.gen)
        return torch.randn(self.total, len(x)//len(self.rows), *x.shape[1:], generator=self.gen)[self.rows].flatten(0, 1).to(x)


@pytest.mark.parametrize('name,problem', cases, ids=[f'{n}-{type(p.operator).__name__}' for n, p in cases])
def test_no_sample_depends_on_its_neighbours(name, problem):
    ys = y + torch.arange(4.)[:, None]/10
    draw = lambda rows: samplers[name](problem, ys[rows], len(rows), steps=12, noise=Given(4, rows)).x
    together = draw([0, 1, 2, 3])
    assert together.shape == (4, *shape) and together.isfinite().all()
    alone = torch.cat([draw([i]) for i in range(4)])
    assert (together - alone).abs().max() < 1e-5*max(1., together.abs().max())  # few plug-in steps explode


@pytest.mark.parametrize('schedule', [Cosine(.5), Linear(), VE(.01, 50.)], ids=['cosine', 'linear', 've'])
@pytest.mark.parametrize('name', samplers)
def test_every_schedule(name, schedule):
    p = InverseProblem(Diffusion(GaussianDenoiser(mean.reshape(shape), cov, schedule), shape, steps=12, last_noise=.05), problem.likelihood)
    torch.manual_seed(0)
    found = samplers[name](p, y, 16, steps=40).x
    assert found.isfinite().all() and (found.abs().max() < 10 or name in ('dps', 'plug_in'))


def exact(problem):
    A = problem.operator.matrix()
    S = torch.linalg.inv(cov.double().inverse() + A.T @ A/problem.noise_std**2)
    return S @ (cov.double().inverse() @ mean.double() + A.T @ y[0].double()/problem.noise_std**2), S.diagonal()


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
    w = bent.log_reward(x, y.expand(len(x), 3)).double().softmax(0)
    flat = x.flatten(1).double()
    m = w @ flat
    sd = (w @ (flat - m)**2).sqrt()
    found = twisted(bent, y, 1500, particles=16).x.flatten(1).double().mean(0)
    ess = 1/(w**2).sum()
    assert ((found - m)/sd).abs().max() < 4*(1/1500 + 1/ess)**.5


def test_the_extension_of_fps_changes_nothing_where_the_operator_is_linear():
    A = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    linear = InverseProblem(prior, Likelihood(Compose(Matrix(A), Matrix(torch.eye(4), in_shape=shape)), .1))
    hidden = InverseProblem(prior, Likelihood(Compose(lambda x: x, linear.operator), .1))
    torch.manual_seed(0)
    mine, theirs = (fps(p, y, 3000, c=.5).x.flatten(1) for p in (hidden, linear))
    assert (mine.mean(0) - theirs.mean(0)).abs().max() < .05 and (mine.std(0)/theirs.std(0) - 1).abs().max() < .1


@pytest.mark.parametrize('rows', [2, 4, 6])
def test_tangent_is_the_operator_where_it_is_linear(rows):
    A = torch.randn(rows, 4, dtype=f64)
    op, x = Matrix(A, offset=torch.arange(float(rows))), torch.randn(5, 4, dtype=f64)
    t, v = Tangent(op, x), torch.randn(5, rows, dtype=f64)
    other = torch.randn(5, 4, dtype=f64)
    for mine, theirs in ((t(other), op(other)), (t.adjoint(v), op.adjoint(v)), (t.gram_solve(v, .7, .2), op.gram_solve(v, .7, .2))):
        assert torch.allclose(mine, theirs, atol=1e-10)
    wide = Tangent(lambda x: torch.cat([op(x), op(2*x)], 1), x)
    assert wide.log_det(.7, .2).shape == (5,)


def test_log_det_is_right_up_to_what_all_share():
    A = torch.randn(6, 2, dtype=f64)
    t = Tangent(lambda x: (x @ A.T).sin(), torch.randn(3, 2, dtype=f64))
    whole = torch.logdet(.7*t.J @ t.J.mT + .2*torch.eye(6, dtype=f64))
    assert torch.allclose((t.log_det(.7, .2) - whole).diff(), torch.zeros(2, dtype=f64), atol=1e-9)


def test_observe_draws_from_the_product():
    A, n = torch.tensor([[1., .5]], dtype=f64), 40000
    torch.manual_seed(0)
    x = observe(Matrix(A), torch.full((n, 1), .7, dtype=f64), torch.ones(n, 2, dtype=f64), .5, .1, torch.randn_like)
    S = torch.linalg.inv(torch.eye(2, dtype=f64)/.5 + A.T @ A/.1)
    m = S @ (torch.ones(2, dtype=f64)/.5 + A[0]*.7/.1)
    assert (x.mean(0) - m).abs().max() < .02 and (x.T.cov() - S).abs().max() < .02


def test_systematic_resampling_gives_each_particle_its_share():
    w = torch.tensor([.5, .25, .25, 0.]).log()
    for _ in range(20): assert torch.bincount(resampled(w[None], torch.randn_like)[0], minlength=4).tolist() == [2, 1, 1, 0]


def test_bridge_keeps_the_joint_law():
    a, b, c = Level(.9, .2, .8), Level(.5, .6, .5), Level(.3, .8, .3)
    up, down, std = bridge(a, b, c)
    span = a.alpha/c.alpha
    noise = up**2*(a.sigma**2 - (span*c.sigma)**2) + std**2
    assert up*span + down == pytest.approx(b.alpha/c.alpha)
    assert noise == pytest.approx(b.sigma**2 - (b.alpha/c.alpha*c.sigma)**2)


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


def test_leftover_samples_of_a_filter_are_dropped(): assert fps(problem, y, 5, particles=4, keep=4).x.shape == (5, *shape)


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
    assert loudest(prior, .1, 100.) == 100. and loudest(quiet, .1, 100.) == pytest.approx(20.)
    assert ladder(prior, 3)[-1] is CLEAN and len(ladder(prior, 3)) == 4


bad_input = {
    'none': (lambda: dps(problem, y, 0), 'n must be a positive whole number, got 0'),
    'half a sample': (lambda: fps(problem, y, 1.5), 'n must be a positive whole number, got 1.5'),
    'y shape': (lambda: dps(problem, y[:, :2], 4), 'y has shape (4, 2), expected (B, 3)'),
    'y count': (lambda: daps(problem, y.expand(3, 3), 4), 'one for each of the 4 paths'),
    'y nan': (lambda: mgdm(problem, y*math.nan, 4), '3 non-finite values'),
    'no steps': (lambda: ancestral(problem, y, 4, None, steps=0), 'steps must be a positive whole number, got 0'),
    'half a step': (lambda: ddrm(problem, y, 4, steps=2.5), 'steps must be a positive whole number, got 2.5'),
    'times up': (lambda: cla(problem, y, 4, steps=torch.tensor([.1, .9])), 'noise first, got [0.1'),
    'times beyond': (lambda: cla(problem, y, 4, steps=torch.tensor([2., .9])), 'within [0, 1]'),
    'no times': (lambda: fps(problem, y, 4, steps=torch.ones(0)), 'got []'),
    'scale': (lambda: dps(problem, y, 4, scale=0), 'scale must be a positive number, got 0'),
    'variance': (lambda: pigdm(problem, y, 4, variance=-1.), 'variance must be a positive number, got -1.0'),
    'pigdm': (lambda: pigdm(bent, y, 4), 'needs a linear operator, with adjoint and gram_solve; Compose has no adjoint'),
    'cla': (lambda: cla(bent, y, 4), 'needs a linear operator'),
    'cla_ve': (lambda: cla_ve(bent, y, 4), 'needs a linear operator'),
    'ddrm': (lambda: ddrm(bent, y, 4), 'needs a linear operator'),
    'exact draw': (lambda: daps(bent, y, 4, inner=exact_draw), 'needs a linear operator'),
    'c': (lambda: fps(problem, y, 4, c=0), 'c must lie in (0, 1], got 0'),
    'particles': (lambda: fps(problem, y, 4, particles=0), 'particles must be a positive whole number, got 0'),
    'keep': (lambda: twisted(problem, y, 4, particles=4, keep=8), 'keep = 8 asks for more than the 4 particles'),
    'eta': (lambda: ddrm(problem, y, 4, eta=1.5), 'eta must lie in [0, 1], got 1.5'),
    'eta_b': (lambda: ddrm(problem, y, 4, eta_b=-1.), 'eta_b must lie in [0, 1], got -1.0'),
    'rate': (lambda: langevin(lr=0.), 'lr must be a positive number, got 0.0'),
    'langevin steps': (lambda: langevin(0), 'steps must be a positive whole number, got 0'),
    'range': (lambda: cla_ve(problem, y, 4, low=5., high=2.), 'low = 5.0 must lie below the loudest level, 2'),
    'anneal': (lambda: daps(problem, y, 4, low=200.), 'low = 200.0 must lie below the loudest level, 100'),
    'ode': (lambda: daps(problem, y, 4, ode=0), 'ode must be a positive whole number, got 0'),
    'adam steps': (lambda: adam_fit(0), 'steps must be a positive whole number, got 0'),
    'adam rate': (lambda: adam_fit(3, -1.), 'lr must be a positive number, got -1.0'),
    'sweeps': (lambda: mgdm(problem, y, 4, gibbs=0), 'gibbs must be a positive whole number, got 0'),
    'down': (lambda: mgdm(problem, y, 4, down=0), 'down must be a positive whole number, got 0'),
    'short walk': (lambda: mgdm(problem, y, 4, steps=2), 'at least three levels, got steps = 2'),
}


@pytest.mark.parametrize('case', bad_input)
def test_bad_input_is_one_clear_line(case):
    call, words = bad_input[case]
    with pytest.raises(ValueError) as e: call()
    assert words in str(e.value) and '\n' not in str(e.value)

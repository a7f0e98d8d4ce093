"Operators that differ per sample: each member against the plain operator of its own"
from functools import cache
from pathlib import Path

import numpy as np
import pytest, torch
from torch.distributions import Laplace, MultivariateNormal

from rtb_nb.amortise import (Bank, Family, Joint, MaximumLikelihood, joint_paths,
                             paired_log_weights)
from rtb_nb.behaviours import FromPrior, Mixture, OnPolicy
from rtb_nb.denoise import gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.evidence import evaluate, sandwich
from rtb_nb.exact import ExactChain
from rtb_nb.gradient import PathTrainer, path_form
from rtb_nb.guidance import (CLA, DPS, GaussianMatching, LikelihoodGradient, MomentMatching,
                             PiGDM, ProximalMatching, likelihood_slope)
from rtb_nb.hybrids import DPSCLA, DPSScore, gram_diagonal, guess_misfit
from rtb_nb.imaging import (Blur, block_average, bicubic, box_mask, gaussian_blur,
                            motion_kernel)
from rtb_nb.inner import adam_fit, daps, langevin, mgdm
from rtb_nb.likelihood import InverseProblem, Likelihood, residual_chi2
from rtb_nb.photons import PhotonNoise
from rtb_nb.matching import PixelMatching, weighted_solve
from rtb_nb.nonlinear import Compose
from rtb_nb.operators import Identity, Mask, Matrix, adjoint_error
from rtb_nb.per_sample import (BlockAverages, Blurs, Masks, as_picture, half_images,
                               load_kernels, random_boxes, random_kernels, random_pixels)
from rtb_nb.samplers import cla, ddrm, dps, pigdm
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import source_view
from rtb_nb.train import Trainer, image_drifts
from test_errors import wobbly

SHAPE = 1, 8, 8
STD = .1
FACTORS = 1, 2, 4

@pytest.fixture(autouse=True)
def double():
    "Everything in double precision: what differs is then a mistake, and no rounding"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

def uneven(n, k=3, l=4):
    v = torch.rand(n, k, l, generator=torch.Generator().manual_seed(1)) + .05
    return v/v.sum((1, 2), keepdim=True)

def kind(name, shape=SHAPE):
    "The operators of one kind, and the plain operator of each member"
    if name == 'masks':
        draw = torch.Generator().manual_seed(2)
        share = torch.tensor([.2, .5, .9]).reshape(3, 1, 1, 1)
        seen = torch.rand(3, *shape, generator=draw) < share
        return Masks(seen), [Mask(m) for m in seen]
    if name == 'tiles': return BlockAverages(FACTORS, shape), [block_average(shape, f)
                                                               for f in FACTORS]
    return Blurs(uneven(3), shape), [Blur(k, shape) for k in uneven(3)]

KINDS = 'masks', 'tiles', 'blurs'

@pytest.fixture(params=KINDS)
def both(request): return kind(request.param)

def to_plain(op, y, j):
    "Measurements of member j as the plain operator gives them"
    if isinstance(op, Masks): return y[:, op.seen[j]]
    if isinstance(op, BlockAverages): return y[..., :8//FACTORS[j], :8//FACTORS[j]]
    return y

def members(k): return [slice(j*k, (j+1)*k) for j in range(3)]

def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

# ---- the operators

@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('shape', [SHAPE, (3, 8, 4)])
def test_each_member_is_the_plain_operator(name, shape):
    ops, plain = kind(name, shape)
    x, v = torch.randn(6, *shape), torch.randn(6, *shape)
    y, (a, b) = ops(x), torch.rand(2, 6) + .1
    back, solved, best = ops.adjoint(v), ops.gram_solve(y, a, b), ops.pinv(y)
    assert len(ops) == 3 and adjoint_error(ops) < 1e-12
    for j, (op, at) in enumerate(zip(plain, members(2))):
        def own(v):
            if name == 'tiles': return v[..., :shape[1]//FACTORS[j], :shape[2]//FACTORS[j]]
            return to_plain(ops, v, j)
        close(own(y[at]), op(x[at]))
        assert y[at].abs().sum() - own(y[at]).abs().sum() < 1e-12 # and nothing beside it
        close(back[at], op.adjoint(own(v[at])))
        close(own(solved[at]), op.gram_solve(op(x[at]), a[at], b[at]))
        size = best[at].abs().max()
        close(best[at]/size, op.pinv(op(x[at]))/size, 1e-6)
        close(ops.column_power(y)[at], op.column_power(y).expand_as(x[at]))
        close(own(ops.row_power(y)[at])[:1], gram_diagonal(op, x, op(x[at])))
        close(gram_diagonal(ops, x, y)[at], ops.row_power(y)[at])

def test_single_and_half_precision_and_what_is_cast_once(both):
    ops, _ = both
    x = torch.randn(3, *SHAPE)
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, .05)):
        y = ops(x.to(dtype))
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), ops(x), rtol=tol, atol=tol)
        solved = ops.gram_solve(y, .3, .1)
        assert solved.dtype == torch.float32
        torch.testing.assert_close(solved.double(), ops.gram_solve(ops(x), .3, .1), rtol=1e-3,
                                   atol=1 if dtype == torch.bfloat16 else 1e-4)
    once = len(ops.casts)
    ops(x.float())
    assert len(ops.casts) == once

def test_some_of_the_members(both):
    ops, _ = both
    x = torch.randn(3, *SHAPE)
    y = ops(x)
    for i in (slice(1, 3), [2, 0], torch.tensor([1]), torch.tensor([True, False, True])):
        part = ops[i]
        assert type(part) is type(ops) and len(part) == len(torch.arange(3)[i])
        close(part(x[i]), y[i])
        close(part.gram_solve(y[i], .3, .1), ops.gram_solve(y, .3, .1)[i])

def test_gradients(both):
    ops, _ = both
    x = torch.randn(3, *SHAPE, requires_grad=True)
    slope, = torch.autograd.grad(ops(x).square().sum()/2, x)
    close(slope, ops.adjoint(ops(x)))
    v = torch.randn(3, *SHAPE, requires_grad=True)
    solved, = torch.autograd.grad((ops.gram_solve(v, .3, .1)*x.detach()).sum(), v)
    close(solved, ops.gram_solve(x.detach(), .3, .1)) # symmetric
    small = type(ops)(uneven(2), (1, 2, 3)) if isinstance(ops, Blurs) else ops
    u = torch.randn(len(small), *small.in_shape, requires_grad=True)
    if small is not ops: assert torch.autograd.gradgradcheck(lambda x: small(x)**2, u)

def test_a_solve_with_an_error_per_pixel(both):
    ops, plain = both
    r2, v = torch.rand(6, *SHAPE) + .1, torch.randn(6, *SHAPE)
    v = ops(v)
    found = weighted_solve(ops, v, r2, .05, 500, 1e-12)
    for j, (op, at) in enumerate(zip(plain, members(2))):
        own = weighted_solve(op, to_plain(ops, v[at], j), r2[at], .05, 500, 1e-12)
        close(to_plain(ops, found[at], j), own, 1e-6)

# ---- the likelihood

def problems(both, noise_std=STD, steps=6):
    "A problem with operators per sample, and one for each member"
    ops, plain = both
    prior = Diffusion(gaussian_field(8, .4, 2., Cosine(.1)), SHAPE, steps, .02)
    one = lambda op: InverseProblem(prior, Likelihood(op, noise_std))
    return one(ops), [one(op) for op in plain]

def dense(op, x, noise=STD):
    "The distribution of y, from the operator's matrix alone"
    A = op.matrix()
    return MultivariateNormal(A @ x.flatten(), noise**2*torch.eye(len(A)))

def test_log_prob_is_the_dense_gaussian_of_what_is_seen(both):
    whole, _ = problems(both)
    x, y = whole.simulate(6)
    log_r = whole.log_likelihood(x, y)
    for j, (op, at) in enumerate(zip(both[1], members(2))):
        for i in range(at.start, at.stop):
            wanted = dense(op, x[i]).log_prob(to_plain(both[0], y[i:i+1], j).flatten())
            close(log_r[i], wanted, 1e-8)
    moved = whole.likelihood(x).rsample()
    assert moved.shape == y.shape and whole.likelihood(x).mean.shape == y.shape

def test_what_is_not_seen_is_zero_and_the_noise_is_right():
    ops = Masks([[[[1., 0.]]], [[[0., 1.]]]])
    q = Likelihood(ops, STD)(torch.ones(40000, 1, 1, 2))
    y = q.sample()
    assert not y[:20000, ..., 1].any() and not y[20000:, ..., 0].any()
    seen = y[:20000, ..., 0]
    assert abs(seen.mean() - 1) < .005 and abs(seen.std() - STD) < .005
    close(q.variance[0].flatten(), torch.tensor([STD**2, 0.]))

def test_other_noise():
    ops, x = random_pixels(4, SHAPE, (.3, .6)), torch.rand(8, *SHAPE)
    heavy = Likelihood(ops, noise=lambda mean: Laplace(mean, .2))
    y = heavy(x).sample()
    each = torch.where(heavy.seen(y), Laplace(x, .2).log_prob(y), 0.)
    close(heavy.log_prob(x, y), each.flatten(1).sum(1))
    photons = Likelihood(ops, noise=PhotonNoise(7.)) # zero is no whole number of them
    y = photons(x).sample()
    assert photons.take(y, SHAPE, x).shape == y.shape
    assert photons.log_prob(x, y).isfinite().all()
    whole = Likelihood(ops, noise=lambda mean: MultivariateNormal(mean, torch.eye(8)))
    with pytest.raises(ValueError, match='independent entry by entry'): whole(x)

def test_residuals_count_what_is_seen(both):
    whole, each = problems(both)
    x, y = whole.simulate(6)
    mean = whole.operator(x+.1)
    found = residual_chi2(y, mean, STD, whole.likelihood.seen(mean))
    close(found, whole.chi2(x+.1, y))
    step = whole.posterior([]).step(x, 2, y, x+.1)
    misfit = guess_misfit(step)
    for j, (one, at) in enumerate(zip(each, members(2))):
        own = to_plain(both[0], y[at], j)
        close(found[at], residual_chi2(own, one.operator(x[at]+.1), STD))
        close(misfit[at], guess_misfit(one.posterior([]).step(x[at], 2, own, x[at]+.1)))

# ---- drifts, samplers, training

DRIFTS = dict(matching=lambda p: MomentMatching(.1), pixels=lambda p: PixelMatching(
        wobbly(p).double(), tolerance=1e-10), dps=lambda p: DPS(), cla=lambda p: CLA(),
    pigdm=lambda p: PiGDM(.2), score=lambda p: DPSScore(), both=lambda p: DPSCLA(),
    slope=lambda p: LikelihoodGradient(), climb=lambda p: ProximalMatching(.1, sweeps=3))

@pytest.mark.parametrize('drift', DRIFTS)
def test_drifts_are_those_of_each_member_whatever_the_batch(both, drift):
    whole, each = problems(both)
    drift = DRIFTS[drift](whole.prior)
    x, y = torch.randn(6, *SHAPE), whole.simulate(6)[1]
    for k in (0, 4):
        with torch.no_grad(): u = whole.posterior([drift]).drift(x, k, y)
        for j, (one, at) in enumerate(zip(each, members(2))):
            with torch.no_grad():
                own = one.posterior([drift]).drift(x[at], k, to_plain(both[0], y[at], j))
            size = own.abs().max().clamp(min=1.)
            close(u[at]/size, own/size, 1e-5)

@pytest.mark.parametrize('feature', [source_view, likelihood_slope])
def test_features(both, feature):
    whole, each = problems(both)
    x, y = torch.randn(6, *SHAPE), whole.simulate(6)[1]
    step = lambda p, x, y: p.posterior([]).step(x, 3, y, p.prior.denoise(x, 3))
    seen = feature(step(whole, x, y))
    for j, (one, at) in enumerate(zip(each, members(2))):
        close(seen[at], feature(step(one, x[at], to_plain(both[0], y[at], j))))

class Same:
    "Noise that each sample of six draws alike, whoever else is drawn for"
    def __init__(self, at): self.at, self.calls = at, 0
    def __call__(self, like):
        self.calls += 1
        draw = torch.Generator().manual_seed(self.calls)
        v = torch.randn(6, *like.shape[1:], generator=draw)
        return v[self.at] if like.ndim else v[0]

SAMPLERS = dict(dps=(dps, {}), pigdm=(pigdm, dict(variance=.2)), cla=(cla, {}),
    daps=(daps, dict(steps=4, inner=langevin(5))),
    mgdm=(mgdm, dict(fit=adam_fit(3), down=2)))

@pytest.mark.parametrize('name', SAMPLERS)
def test_samplers_with_the_same_noise(both, name):
    whole, each = problems(both)
    sampler, options = SAMPLERS[name]
    options = dict(steps=12) | options
    y = whole.simulate(6)[1]
    x = sampler(whole, y, 6, noise=Same(slice(None)), **options).x
    for j, (one, at) in enumerate(zip(each, members(2))):
        own = to_plain(both[0], y[at], j)
        found = sampler(one, own, 2, noise=Same(at), **options).x
        size = found.abs().max().clamp(min=1.)
        close(x[at]/size, found/size, 1e-5)

def test_paths_are_scored_with_their_own_operator_however_they_are_cut(both):
    whole, each = problems(both)
    guide = MomentMatching(.1)
    q, y = whole.posterior([guide]), whole.simulate(6)[1]
    tau = q.simulate(y, 6)
    ratio = q.log_ratio(tau)
    close(q.log_ratio(tau, chunk=1), ratio)
    joint, own = paired_log_weights(q, joint_paths(whole, 6), 2, chunk=3)
    assert joint.shape == (6,) and own.shape == (6, 2) and own.min() > joint.min() - 200
    for j, (one, at) in enumerate(zip(each, members(2))):
        part = tau[at]
        part.y = to_plain(both[0], y[at], j)
        p = one.posterior([guide])
        close(ratio[at], p.log_ratio(part), 1e-7)
        close(q.log_weight(tau)[at], p.log_weight(part), 1e-7)
    close(path_form(q.requires_grad_(), tau, chunk=2), q.log_weight(tau), 1e-7)

@pytest.mark.parametrize('name', KINDS)
def test_importance_weights_find_each_members_evidence(name):
    whole, each = problems(kind(name), noise_std=1., steps=20)
    y, n = whole.simulate(3)[1], 2000
    q = whole.posterior([MomentMatching()])
    log_w = q.draw(y.repeat_interleave(n, 0), 3*n)[2].reshape(3, n)
    found = log_w.logsumexp(1) - np.log(n)
    for j, one in enumerate(each):
        exact = ExactChain(one, to_plain(whole.operator, y[j:j+1], j))
        assert abs(found[j] - exact.log_evidence) < .1
        assert log_w[j].mean() < exact.log_evidence

@cache
def untrained(steps=3):
    torch.manual_seed(0)
    prior = Diffusion(gaussian_field(8, .4, 2., Cosine(.1)), SHAPE, steps, .02)
    return InverseProblem(prior, Likelihood(random_boxes(3, SHAPE), STD))

def learned(problem): return problem.posterior(image_drifts(problem, MomentMatching(.1)))

def test_training_and_bounds():
    problem = untrained()
    y, q = problem.simulate(3)[1], learned(problem)
    source = Mixture(OnPolicy(q, 2), FromPrior(q, 1))
    tau = source(y)
    assert torch.equal(tau.y, y.repeat_interleave(3, 0)) # each operator's paths side by side
    for behaviour in (OnPolicy(q, 2), source, Joint(q, Bank.of(problem.prior, 6), 2, 3)):
        trainer = Trainer(q, behaviour)
        trainer.fit(y, 2, log=str)
        assert not trainer.skipped
    PathTrainer(q, OnPolicy(q, 2)).fit(y, 1, log=str)
    bounds = sandwich(q, joint_paths(problem, 6), 2)
    assert bounds['eubo'] > bounds['elbo']
    alone = InverseProblem(problem.prior, Likelihood(problem.operator[1:2], STD))
    x, numbers = evaluate(q.under(alone), y[1:2], 5, chunk=2)
    assert len(x) == 5 and numbers['n'] == 5 and 0 < numbers['chi2'] < 100

def test_joint_paths_keep_their_operator():
    problem = untrained()
    q = learned(problem)
    tau = Joint(q, Bank.of(problem.prior, 6), 2, 3)()
    seen = problem.likelihood.seen(tau.y)
    assert len(tau) == 9 and not tau.y[~seen].any()
    assert problem.log_likelihood(tau.x0, tau.y)[2::3].min() > 0 # the joint one ends each trio

def test_a_fresh_batch_of_operators_every_time():
    problem = untrained()
    fresh = Family(lambda: Likelihood(half_images(4, SHAPE), STD))
    family = InverseProblem(problem.prior, fresh)
    q = learned(family)
    MaximumLikelihood(q, Bank.of(problem.prior, 6), pairs=8).fit(None, 2, log=str)

# ---- pictures and families

def test_as_picture():
    x = torch.randn(3, *SHAPE)
    for name in KINDS:
        ops, plain = kind(name)
        y = ops(x)
        shown = as_picture(ops, y)
        for j, op in enumerate(plain): close(shown[j], as_picture(op, op(x[j:j+1]))[0])
        assert torch.equal(shown, y) == (name != 'tiles')
    blur = gaussian_blur(SHAPE, 1., 3)
    assert torch.equal(as_picture(blur, blur(x)), blur(x))
    assert torch.equal(as_picture(Identity(SHAPE), x), x)
    for op in (bicubic(SHAPE, 2), Matrix(torch.randn(5, 64), SHAPE), box_mask(SHAPE, 3)):
        assert torch.equal(as_picture(op, op(x)), op.pinv(op(x)))

def test_boxes():
    op = random_boxes(500, (2, 20, 30), (.4, .6))
    hole = ~op.seen
    assert torch.equal(hole[:, 0], hole[:, 1])
    rows, cols = hole[:, 0].any(2), hole[:, 0].any(1)
    h, w = rows.sum(1), cols.sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), h*w) # rectangles without gaps
    assert set(h.tolist()) == set(range(8, 13)) and set(w.tolist()) == set(range(12, 19))
    assert abs(torch.corrcoef(torch.stack([h, w]).double())[0, 1]) < .15
    assert rows[:, 0].any() and rows[:, -1].any() and cols[:, 0].any() and cols[:, -1].any()
    torch.manual_seed(5)
    a = random_boxes(9, SHAPE).seen
    torch.manual_seed(5)
    assert torch.equal(a, random_boxes(9, SHAPE).seen)

def test_halves_and_pixels():
    op = half_images(400, (1, 5, 6))
    kinds, counts = torch.unique(op.seen, dim=0, return_counts=True)
    assert len(kinds) == 4 and counts.min() > 60
    assert sorted(kinds.flatten(1).sum(1).tolist()) == [15, 15, 18, 18] # a whole row is left
    op = random_pixels(300, (3, 10, 10), (.08, .1))
    n = op.seen.flatten(2).sum(2)
    assert torch.equal(n[:, 0], n[:, 2]) and set(n[:, 0].tolist()) == {8, 9, 10}
    share = op.seen[:, 0].double().mean(0)
    assert share.min() > .03 and share.max() < .17 # everywhere alike

def test_kernels(tmp_path):
    kernels = random_kernels(3, 7, .9)
    torch.manual_seed(0)
    assert torch.equal(kernels, random_kernels(3, 7, .9)) and kernels.shape == (3, 7, 7)
    close(kernels.sum((1, 2)), torch.ones(3))
    seed = torch.Generator().manual_seed(0)
    drawn = torch.randint(2**31, (3,), generator=seed).tolist()
    assert torch.equal(kernels[1], motion_kernel(7, .9, drawn[1]))
    path = tmp_path/'kernels.npz'
    np.savez(path, a0=np.full((3, 3), 2.), a1=np.eye(5), b=np.ones((1, 2)))
    found = load_kernels(path)
    assert found.shape == (3, 5, 5) and found.dtype == torch.float64
    close(found[0, 1:4, 1:4], torch.full((3, 3), 1/9))
    close(found.sum((1, 2)), torch.ones(3))
    assert load_kernels(path, 'b').shape == (1, 1, 2)
    Blurs(found, SHAPE)(torch.randn(3, *SHAPE))

def test_measured_kernels_where_they_are():
    path = Path(__file__).parents[1]/'shared'/'data'/'kernels.npz'
    if not path.exists(): pytest.skip('no measured kernels here')
    assert load_kernels(path).shape == (20, 27, 27)
    assert load_kernels(path, 'kair').shape == (12, 25, 25)

# ---- refusals

ops = Masks(torch.ones(3, *SHAPE))
small = Blurs(torch.full((2, 2, 2), .25), SHAPE)
three = InverseProblem(Diffusion(gaussian_field(8, .4, 2., Cosine(.1)), SHAPE, 3, .02),
                       Likelihood(ops, STD))

def gone(name='gone.npz'): return load_kernels(Path('/nowhere')/name)

@pytest.mark.parametrize('wrong, error, said', [
    (lambda: ops(torch.zeros(4, *SHAPE)), ValueError, 'a batch of 4 does not go round 3'),
    (lambda: ops.gram_solve(torch.zeros(2, *SHAPE), 1., 1.), ValueError, 'batch of 2 does not'),
    (lambda: ops.gram_eig(), ValueError, 'Masks holds 3 operators and so no one matrix'),
    (lambda: small.matrix(), ValueError, 'Blurs holds 2 operators'),
    (lambda: ops[1], IndexError, 'gives no batch of members: use a slice'),
    (lambda: ops[[3]], IndexError, 'no such members of 3'),
    (lambda: ops[[]], IndexError, 'gives no batch of members'),
    (lambda: Masks(torch.full((2, *SHAPE), .5)), ValueError, 'hold only 0 and 1, got 0.5'),
    (lambda: Masks(torch.zeros(2, *SHAPE)), ValueError, r'masks \[0, 1\] observe none'),
    (lambda: Masks(torch.ones(2, 1, 4, 4), SHAPE), ValueError, 'cannot be expanded'),
    (lambda: Masks(torch.ones(4)), ValueError, r'must be \(B, C, H, W\)'),
    (lambda: Blurs(torch.ones(3, 3), SHAPE), ValueError, r'kernels must be \(B, k, l\)'),
    (lambda: Blurs(torch.ones(2, 3, 3), SHAPE), ValueError, '2 of 2 kernels do not sum to 1'),
    (lambda: Blurs(torch.full((1, 2, 2), torch.nan), SHAPE), ValueError, 'not finite'),
    (lambda: BlockAverages([2, 3], SHAPE), ValueError, r'divide 8 x 8, got \[2.0, 3.0\]'),
    (lambda: BlockAverages(2, SHAPE), ValueError, r'whole numbers \(B,\)'),
    (lambda: ops.gram_solve(torch.zeros(3, *SHAPE), 0., 0.), ValueError, 'singular: give b'),
    (lambda: small.gram_solve(torch.zeros(2, *SHAPE), 1., -1.), ValueError, 'not be negative'),
    (lambda: Compose(small, small), TypeError, 'takes one operator, and Blurs holds 2'),
    (lambda: three.posterior([]).simulate(torch.zeros(1, *SHAPE), 6), ValueError,
     '1 measurements do not go round 3 operators'),
    (lambda: dps(three, torch.zeros(1, *SHAPE), 6), ValueError, 'do not go round 3 operators'),
    (lambda: ddrm(three, torch.zeros(3, *SHAPE), 3), ValueError, 'no one matrix'),
    (lambda: three.posterior([GaussianMatching()]).simulate(torch.zeros(3, *SHAPE), 3),
     ValueError, 'no one matrix'),
    (lambda: Likelihood(half_images(2, SHAPE), STD).take(torch.ones(2, *SHAPE), SHAPE,
        torch.zeros(())), ValueError, 'y holds 64 numbers where nothing is seen, such as 1'),
    (lambda: as_picture(torch.sin, torch.zeros(1)), ValueError, 'as_picture needs a linear'),
    (lambda: random_boxes(2, SHAPE, (.4, 1.2)), ValueError, r'must lie in \(0, 1\), got 1.2'),
    (lambda: random_boxes(2, SHAPE, (.6, .4)), ValueError, r'must rise, got \(0.6, 0.4\)'),
    (lambda: random_pixels(2, SHAPE, .1), ValueError, r'must be a range .* got 0.1'),
    (lambda: half_images(0, SHAPE), ValueError, 'n must be'),
    (lambda: random_kernels(2, 5, 3.), ValueError, 'intensity must lie in'),
    (gone, ValueError, 'put an .npz of kernels'),
    (lambda: load_kernels(__file__), ValueError, 'is no .npz of kernels'),
])
def test_refusals(wrong, error, said):
    with pytest.raises(error, match=said): wrong()

def test_a_file_without_such_kernels(tmp_path):
    np.savez(tmp_path/'k.npz', flat=np.ones(3), dark=np.zeros((2, 2)))
    for start in ('flat', 'dark', 'other'):
        with pytest.raises(ValueError, match=f'must hold kernels.*start with {start!r}'):
            load_kernels(tmp_path/'k.npz', start)

def test_a_readers_own_operator_may_have_something_called_seen():
    class Holes(torch.nn.Module):
        seen = torch.tensor([[True, False], [True, True]])
        def forward(self, x): return x*self.seen
    likelihood = Likelihood(Holes(), .1)
    x = torch.zeros(3, 2, 2)
    assert likelihood.seen(x) is None and likelihood.log_prob(x, x).shape == (3,)

"Moment matching with an error per pixel: solves, known answers, gradients, refusals"
import pytest, torch
from torch import nn

from rtb_nb.beds import plane, small_lens
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.errors import PixelError
from rtb_nb.guidance import GaussianMatching, Gate, MomentMatching, ProximalMatching
from rtb_nb.imaging import Blur, bicubic, block_average, box_mask, motion_kernel, random_mask
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.matching import PixelMatching, PixelProximal, weighted_solve
from rtb_nb.nonlinear import Compose
from rtb_nb.operators import Identity, Matrix
from rtb_nb.schedule import Cosine
from test_errors import wobbly
from test_gradient import check_adjoint

SHAPE = 1, 12, 12
OPERATORS = dict(hole=lambda: box_mask(SHAPE, 6), lost=lambda: random_mask(SHAPE, .7),
    all=lambda: Identity(SHAPE), smaller=lambda: block_average(SHAPE, 3),
    cubic=lambda: bicubic(SHAPE, 3), blur=lambda: Blur(motion_kernel(5, seed=0), SHAPE),
    lens=lambda: Lens(12),
    row=lambda: Compose(box_mask(SHAPE, 4), Blur(motion_kernel(5, seed=0), SHAPE)))

@pytest.fixture(params=OPERATORS)
def operator(request):
    torch.manual_seed(0)
    return OPERATORS[request.param]()

def drawn(op, n=3, dtype=torch.float64):
    "Variances over three orders, and a residual"
    r2 = (2*torch.randn(n, *op.in_shape, dtype=dtype)).exp()/10
    return r2, torch.randn(n, *op.out_shape, dtype=dtype)

def dense(op, v, r2, b):
    A = op.matrix()
    S = A*r2.flatten(1)[:, None].double() @ A.T + b*torch.eye(len(A), dtype=torch.float64)
    return torch.linalg.solve(S, v.double().flatten(1)[..., None]).reshape(v.shape)

def test_solve_is_the_dense_one(operator):
    r2, v = drawn(operator)
    found = weighted_solve(operator, v, r2, .05**2, 3000, 1e-10)
    torch.testing.assert_close(found, dense(operator, v, r2, .05**2), rtol=1e-5, atol=1e-5)

def test_solve_in_single_precision_at_its_defaults(operator):
    r2, v = drawn(operator, dtype=torch.float32)
    exact = dense(operator, v, r2, .05).float()
    assert (weighted_solve(operator, v, r2, .05)-exact).norm() < 1e-3*exact.norm()

def test_each_sample_stops_by_itself():
    op = Lens(12)
    r2, v = drawn(op, 4)
    v[1], v[2] = 0., 1e-6*v[2] # solved at once; as far as the others, in its own units
    together = weighted_solve(op, v, r2, .05**2)
    for i in range(4):
        apart = weighted_solve(op, v[i:i+1], r2[i:i+1], .05**2)
        torch.testing.assert_close(together[i:i+1], apart, rtol=1e-10, atol=0.)
    assert not together[1].any()

def test_gradients_in_the_residual_and_the_error(operator):
    op = operator if operator.sizes[1] < 100 else Matrix(torch.randn(4, 6))
    r2, v = drawn(op, 2)
    solve = lambda v, r2: weighted_solve(op, v, r2, .3, 500, 1e-12)
    assert torch.autograd.gradcheck(solve, (v.requires_grad_(), r2.requires_grad_()))

def test_gradients_through_a_mask_and_a_lens():
    for op in (box_mask((1, 4, 4), 2), Lens(8)):
        r2, v = drawn(op, 1)
        v, r2, g = v.requires_grad_(), r2.requires_grad_(), torch.randn_like(v)
        solved = weighted_solve(op, v, r2, .1, 500, 1e-12)
        found = torch.autograd.grad((solved*g).sum(), (v, r2))
        wanted = torch.autograd.grad((dense(op, v, r2, .1)*g).sum(), (v, r2))
        for a, b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

# ---- the drift

class Exact(nn.Module):
    "The error of a Gaussian with independent pixels, in the place of a network"
    def __init__(self, denoiser):
        super().__init__()
        self.mean = denoiser
    def forward(self, x, x0_hat, t):
        a, s = (c.reshape(-1, 1) for c in self.mean.schedule(t.double()))
        c = self.mean.cov.diagonal()
        return (s**2*c/(a**2*c + s**2)).to(x).expand_as(x)

def test_exact_for_a_gaussian_of_unequal_pixels():
    torch.manual_seed(0)
    cov = torch.diag(torch.tensor([1., .3, .1, .03, .01, .003]))
    prior = Diffusion(GaussianDenoiser(torch.full((6,), .3), cov, Cosine(.5)), (6,), 10)
    problem = InverseProblem(prior, Likelihood(Matrix(torch.randn(3, 6)/2), .1))
    y, x = problem.simulate(4)[1], torch.randn(4, 6)
    guide = PixelMatching(Exact(prior.denoiser), floor=0., tolerance=1e-7)
    for k in (0, 5, 9):
        step = problem.posterior([]).step(x, k, y, prior.denoise(x, k))
        wanted = GaussianMatching().move(step)
        torch.testing.assert_close(guide.move(step), wanted, rtol=1e-3, atol=1e-5)
        white = MomentMatching().move(step)
        assert (white-wanted).norm() > .1*wanted.norm() # which one error for all does not reach

@pytest.fixture
def lens(): torch.manual_seed(0); return small_lens(steps=4)

def test_untrained_is_moment_matching(lens):
    y = lens.simulate(3)[1]
    plain, pixel = (lens.posterior([guide]) for guide in
        (MomentMatching(), PixelMatching(PixelError(lens.prior).requires_grad_(False))))
    tau = plain.simulate(y, 3)
    torch.testing.assert_close(pixel.log_ratio(tau), plain.log_ratio(tau), rtol=1e-3, atol=.05)

def test_floor_is_in_mean_errors(lens):
    error = wobbly(lens.prior)
    y, x = lens.simulate(2)[1], torch.randn(2, *lens.prior.shape)
    step = lens.posterior([]).step(x, 2, y, lens.prior.denoise(x, 2))
    own = step.error_of_end()
    free, held = (step.pixel_error_of_end(error, floor) for floor in (0., 1.))
    assert (free < own).any() and (free > own).any()
    torch.testing.assert_close(held, torch.maximum(free, own))
    torch.testing.assert_close(PixelMatching(error).error(step), held)

def test_nothing_depends_on_the_batch(lens):
    posterior = lens.posterior([PixelMatching(wobbly(lens.prior))])
    y = lens.simulate(5)[1]
    with torch.no_grad():
        tau = posterior.simulate(y, 5)
        whole = posterior.log_ratio(tau)
        parts = torch.cat([posterior.log_ratio(tau[i:i+1]) for i in range(5)])
        x, log_r, log_w = posterior.draw(y, 5)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=.02)
    assert log_w.isfinite().all()

def test_proximal_climbs_to_the_same_place(lens):
    error, op = wobbly(lens.prior), lens.operator
    lens = InverseProblem(lens.prior, Likelihood(op, .1)) # more noise: less far to climb
    y, x = lens.simulate(2)[1], torch.randn(2, *lens.prior.shape)
    step = lens.posterior([]).step(x, 2, y, lens.prior.denoise(x, 2))
    slope = torch.linalg.matrix_norm(op.matrix(), 2).item()**2
    climb = PixelProximal(error, stretch=slope, sweeps=1000).move(step)
    solved = PixelMatching(error, sweeps=500, tolerance=1e-6).move(step)
    assert (climb-solved).norm() < 1e-2*solved.norm()
    plain = ProximalMatching(None, slope, 1000).move(step)
    assert (plain-solved).norm() > 5e-2*solved.norm()

@pytest.mark.parametrize('guide', [lambda e: PixelMatching(e, tolerance=1e-7),
    lambda e: PixelProximal(e, sweeps=3)], ids=['matching', 'proximal'])
def test_path_form_is_the_gradient_of_the_whole_graph(guide):
    torch.manual_seed(0)
    problem = plane(steps=6)
    posterior = problem.posterior([Gate(guide(wobbly(problem.prior, .3)), value=.5)])
    check_adjoint(posterior, atol=1e-4, rtol=1e-5)

def test_the_drift_has_the_slope_of_finite_differences(lens):
    error = wobbly(lens.prior).double()
    guide = PixelMatching(error, sweeps=500, tolerance=1e-12)
    y = lens.simulate(2)[1].double()
    x, x0_hat, dx = torch.randn(3, 2, *lens.prior.shape, dtype=torch.float64)
    step = lambda x: lens.posterior([]).step(x, 2, y, x0_hat + x.square()/9)
    x.requires_grad_()
    v = torch.randn_like(x)
    slope = (torch.autograd.grad((guide(step(x))*v).sum(), x)[0]*dx).sum()
    up, down = ((guide(step(x.detach() + e*dx))*v).sum() for e in (1e-5, -1e-5))
    assert slope.item() == pytest.approx(((up-down)/2e-5).item(), rel=1e-5)

def test_refusals(lens):
    error, y = wobbly(lens.prior), lens.simulate(1)[1]
    bent = InverseProblem(lens.prior, Likelihood(torch.sin, .1))
    with pytest.raises(ValueError, match='PixelMatching needs a linear operator'):
        bent.posterior([PixelMatching(error)]).sample(torch.zeros(1, *lens.prior.shape), 1)
    assert bent.posterior([PixelProximal(error)]).sample(
        torch.zeros(1, *lens.prior.shape), 1).isfinite().all()
    twice = InverseProblem(lens.posterior([]).given(y), lens.likelihood)
    with pytest.raises(ValueError, match='needs the denoiser of the prior'):
        twice.posterior([PixelMatching(error)]).sample(y, 1)
    for option, value in dict(floor=-1., sweeps=0, tolerance=0.).items():
        with pytest.raises(ValueError, match=f'{option} must'):
            PixelMatching(error, **{option: value})

"Matching by the Jacobian: known answers, gradients, batches, refusals, what a step costs"
import copy, pickle

import pytest, torch

from options import bent_problem, linear_problem, measured
from rtb_nb.beds import plane, sixteen, small_lens, two_modes
from rtb_nb.behaviours import OnPolicy
from rtb_nb.denoise import Denoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.drifts import NetDrift
from rtb_nb.guidance import Gate, GaussianMatching, GuideShift, MomentMatching
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.photons import PhotonNoise
from rtb_nb.matching import _conjugate_gradients
from rtb_nb.mmps import MMPS, SubspaceMatching, _asked
from rtb_nb.networks import VectorNet
from rtb_nb.nonlinear import Compose
from rtb_nb.operators import Identity, Matrix
from rtb_nb.samplers import CallCounter
from rtb_nb.schedule import VE
from rtb_nb.train import Trainer
from test_gradient import check_adjoint

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def step_of(problem, k, n=3):
    y, x = problem.simulate(n)[1], problem.prior.simulate(n).x[k]
    return problem.posterior([]).step(x, k, y, problem.prior.denoise(x, k))

def guides(): return [MMPS(), SubspaceMatching(2)]

BEDS = dict(plane=plane, sixteen=sixteen, lens=lambda: small_lens(steps=6))

@pytest.mark.parametrize('bed', BEDS)
def test_exact_for_a_gaussian_at_every_level(bed):
    problem = BEDS[bed]()
    guide, told = MMPS(300, 1e-6, loudest=1e3), GaussianMatching()
    for k in range(problem.prior.steps):
        step = step_of(problem, k)
        assert (guide(step) - told(step)).norm() < 1e-4*told(step).norm()
    white = MomentMatching()
    assert (white(step) - told(step)).norm() > 1e-3*told(step).norm() # which others are not

def test_a_slope_is_not_asked_for_above_the_loudest_level():
    problem, told = sixteen(), GaussianMatching()
    step = step_of(problem, 0)
    assert step.alpha == 0
    off = [((MMPS(30, loudest=c)(step) - told(step)).norm()/told(step).norm()).item()
           for c in (3., 10., 100.)]
    assert off[0] > off[1] > off[2] and off[0] < .1 and off[2] < 1e-4
    quiet = step_of(problem, 15)
    assert torch.equal(MMPS(loudest=5.)(quiet), MMPS(loudest=1e3)(quiet))

def test_exploding_noise_has_the_same_answer():
    problem = plane(schedule=VE(.01, 20.))
    for k in (0, 5, 19):
        step = step_of(problem, k)
        torch.testing.assert_close(MMPS(loudest=1e3)(step), GaussianMatching()(step),
                                   rtol=1e-3, atol=1e-4)

def dense(step):
    "The move of each sample, from whole Jacobians of denoiser and operator"
    out, op = [], step.likelihood.operator
    for i in range(len(step.x)):
        def jacobian(f, v): return torch.autograd.functional.jacobian(f, v[i:i+1])
        square = lambda J, m, n: J.reshape(m, n).double()
        guess, n, m = step.guess_of_end(), step.x[0].numel(), step.y[0].numel()
        J = square(jacobian(lambda v: step.denoiser(v, step.t), step.x), n, n)
        H = square(jacobian(op, guess), m, n)
        s2, a, end = step.sigma.double()**2, step.alpha.double(), step.end**2
        share = 1 - a**2*end/s2
        R = share**2*s2/a*J + end*share*torch.eye(n)
        S = H @ R @ H.T + step.likelihood.noise_std**2*torch.eye(m)
        residual = (step.y - op(guess))[i].flatten().double()
        out.append((R @ H.T @ torch.linalg.solve(S, residual)).reshape(step.x[0].shape))
    return torch.stack(out).float()

@pytest.mark.parametrize('make', [linear_problem, bent_problem])
def test_any_operator_by_its_own_slope(make):
    for k in (2, 6, 11):
        step = step_of(make(), k)
        torch.testing.assert_close(MMPS(30, 1e-6).move(step), dense(step), rtol=1e-3, atol=1e-4)

def test_a_mixture_is_matched_by_its_own_covariance():
    problem = two_modes().problem
    step = step_of(problem, 10)
    torch.testing.assert_close(MMPS(5, 1e-6).move(step), dense(step), rtol=1e-3, atol=1e-4)
    own = MomentMatching().move(step)
    assert (own - dense(step)).norm() > .1*own.norm()

# ---- the solver

def test_sweeps_end_where_the_matrix_is_not_positive():
    S = torch.tensor([[[2., 0.], [0., 1.]], [[2., 0.], [0., -1.]]]).double()
    times = lambda v: (S @ v[..., None])[..., 0]
    v = torch.tensor([[1., 1.], [1., 1.5]]).double()
    found = _conjugate_gradients(times, v, 30, 1e-12)
    torch.testing.assert_close(found[0], torch.tensor([.5, 1.]).double())
    assert not found[1].any() # its first direction has a bend of 2 - 2.25
    last = _conjugate_gradients(times, v.flip(0), 30, 1e-12)
    assert last.isfinite().all()

class Twisted(Denoiser):
    "A network's fault: a slope that is no covariance, for it turns the plane"
    def __init__(self, turn, schedule):
        super().__init__(schedule)
        self.register_buffer('turn', turn)
    def forward(self, x, t): return x @ self.turn.T

def test_a_slope_that_is_no_covariance_moves_nothing_out_of_proportion():
    turn = torch.tensor([[-.5, 1.], [-1., .5]])
    prior = Diffusion(Twisted(turn, VE(.01, 5.)), (2,), 8, error=lambda t: 0*t + 1.)
    problem = InverseProblem(prior, Likelihood(Identity(2), .1))
    step = step_of(problem, 3)
    bounded = SubspaceMatching(2, variance=1.).move(step)
    residual = step.y - step.guess_of_end()
    assert (bounded.norm(dim=1) <= 1.01*residual.norm(dim=1)).all() # A = 1: at most all of it
    assert (MMPS(2).move(step).norm(dim=1) > 1.01*residual.norm(dim=1)).any()

# ---- questions

def test_with_all_directions_it_is_the_exact_guide():
    problem = plane()
    for k in (0, 7, 19):
        step = step_of(problem, k)
        guide = SubspaceMatching(2, sweeps=100, tolerance=1e-6, loudest=1e3)
        torch.testing.assert_close(guide(step), GaussianMatching()(step), rtol=1e-3, atol=1e-4)

def test_directions_are_orthonormal_and_used_up_ones_are_zero():
    M = torch.randn(3, 6, 6).double()
    M, A = M @ M.mT, torch.randn(2, 6).double()
    R = lambda v: (M @ v[..., None])[..., 0]
    there, back = lambda v: v @ A.T, lambda v: v @ A
    pull = torch.randn(3, 6).double()
    pull[1] = 0.
    Q, T = _asked(R, there, back, pull, 8)
    rank = (Q.norm(dim=2) > 0).sum(1)
    assert rank[1] == 0 and (rank[[0, 2]] <= 6).all() and (rank[[0, 2]] >= 4).all()
    for q, t, m, r in zip(Q, T, M, rank):
        own = q[q.norm(dim=1) > 0]
        torch.testing.assert_close(own @ own.T, torch.eye(int(r)).double())
        torch.testing.assert_close(t, q @ m @ q.T)

def test_what_was_not_asked_about_errs_as_in_moment_matching():
    "With a denoiser whose slope is its white error, questions change nothing"
    class White(Denoiser):
        def forward(self, x, t):
            a, s = self.schedule(t)
            return x*(a*.25/(a**2*.25 + s**2)).to(x)
        def error(self, t):
            a, s = self.schedule(t)
            return s**2*.25/(a**2*.25 + s**2)
    prior = Diffusion(White(VE(.01, 5.)), (6,), 8)
    problem = InverseProblem(prior, Likelihood(Matrix(torch.randn(3, 6)), .1))
    step = step_of(problem, 4)
    for guide in (SubspaceMatching(1), SubspaceMatching(3, variance=.25)):
        plain = MomentMatching(guide.variance)
        guide.tolerance = 1e-6
        torch.testing.assert_close(guide(step), plain(step), rtol=1e-3, atol=1e-4)

# ---- as a drift

@pytest.mark.parametrize('make', [linear_problem, bent_problem])
@pytest.mark.parametrize('guide', guides(), ids=['mmps', 'subspace'])
def test_nothing_depends_on_the_batch_or_its_levels(make, guide):
    problem = make()
    y = measured(problem) + torch.randn(4, 3)/3
    x, ks = torch.randn(4, 1, 2, 2), torch.tensor([0, 3, 3, 11])
    posterior = problem.posterior([guide])
    alone = torch.cat([posterior.drift(x[i:i+1], int(k), y[i:i+1]) for i, k in enumerate(ks)])
    torch.testing.assert_close(posterior.drift(x, ks, y), alone, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('bent', [False, True])
def test_path_form_is_the_gradient_of_the_whole_graph(bent):
    problem = plane(steps=6)
    if bent: problem = InverseProblem(problem.prior, Likelihood(
        Compose(torch.sin, problem.operator), .1))
    drifts = [Gate(MMPS(), value=.5), Gate(SubspaceMatching(1), value=.2)]
    check_adjoint(problem.posterior(drifts), atol=1e-3, rtol=1e-4)

@pytest.mark.parametrize('make', [linear_problem, bent_problem])
def test_along_a_path_it_has_the_slope_of_finite_differences(make):
    torch.set_default_dtype(torch.float64)
    try:
        problem, guide = make(), MMPS(3, 1e-12)
        y, x = measured(problem).expand(3, -1), torch.randn(3, 1, 2, 2)
        v, dx = torch.randn_like(x), 1e-6*torch.randn_like(x)
        def value(x): return (problem.posterior([guide]).drift(x, 6, y)*v).flatten(1).sum(1)
        x.requires_grad_()
        u = problem.posterior([guide]).drift(x, 6, y, problem.prior.guess(x, 6))
        slope, = torch.autograd.grad((u*v).sum(), x)
        with torch.no_grad(): seen = value(x + dx) - value(x - dx)
        torch.testing.assert_close(2*(slope*dx).flatten(1).sum(1), seen, rtol=1e-5, atol=1e-11)
    finally: torch.set_default_dtype(torch.float32)

def test_a_gate_learns_how_much_of_it_to_take():
    problem = plane(steps=6)
    y = torch.tensor([[.9]])
    net = NetDrift(VectorNet(6, 2, width=16), GuideShift(MMPS(1)))
    posterior = problem.posterior([net, Gate(MMPS(), value=.3)])
    before = posterior.draw(y, 500)[2].mean()
    Trainer(posterior, OnPolicy(posterior, 32)).fit(y, 30, log=str)
    assert posterior.draw(y, 500)[2].mean() > before + .5
    assert (posterior.drifts[1].value > .3).any()

def test_what_a_step_costs():
    problem = sixteen(steps=10)
    y, net = problem.simulate(1)[1], problem.prior.denoiser
    for guide, backward in ((MMPS(1), 2), (MMPS(3), 4), (SubspaceMatching(5), 5)):
        pulled = []
        def watch(net, args, x0):
            if x0.requires_grad: x0.register_hook(lambda g: pulled.append(1))
        hook = net.register_forward_hook(watch)
        with CallCounter(net) as calls: problem.posterior([guide]).sample(y, 1)
        hook.remove()
        assert (calls.images, calls.gradients, len(pulled)) == (20, 10, 10*backward)

def test_copies_answer_the_same_and_refusals_name_the_value():
    step = step_of(bent_problem(), 5)
    for guide in guides():
        for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
            assert torch.equal(twin(step), guide(step))
        assert not guide(step).requires_grad
        with torch.inference_mode(), pytest.raises(RuntimeError, match='needs gradients'):
            guide(step)
    for option, value in dict(sweeps=0, tolerance=0., loudest=-1.).items():
        with pytest.raises(ValueError, match=option): MMPS(**{option: value})
    for option, value in dict(asks=0, variance=0.).items():
        with pytest.raises(ValueError, match=option): SubspaceMatching(**{option: value})
    counted = Likelihood(Identity((1, 2, 2)), noise=PhotonNoise(100.))
    step = step_of(InverseProblem(linear_problem().prior, counted), 5)
    with pytest.raises(ValueError, match='needs Gaussian noise'): MMPS()(step)
    problem = linear_problem()
    y = measured(problem)
    twice = InverseProblem(problem.posterior([]).given(y), problem.likelihood)
    with pytest.raises(ValueError, match='needs the denoiser of the prior'):
        twice.posterior([MMPS()]).sample(y, 1)

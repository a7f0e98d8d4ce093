"Hybrids: scores with known answers, gates, and lists of drifts in both forms of the gradient"
import copy, math, pickle

import pytest, torch
from torch import nn

from options import bent_problem, linear_problem, measured
from rtb_nb.beds import plane, sixteen
from rtb_nb.behaviours import OnPolicy
from rtb_nb.denoise import Denoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.drifts import NetDrift
from rtb_nb.gradient import PathTrainer
from rtb_nb.guidance import CLA, Gate, measurement_feature
from rtb_nb.hybrids import DPSCLA, DPSScore, PaperGate, gram_diagonal, guess_misfit
from rtb_nb.imaging import gaussian_blur, motion_kernel, random_mask
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.photons import PhotonNoise
from rtb_nb.networks import VectorNet
from rtb_nb.nonlinear import Compose, FourierMagnitude, NonlinearBlur
from rtb_nb.operators import Identity, Matrix
from rtb_nb.schedule import VE
from rtb_nb.train import Trainer
from test_gradient import check_adjoint

SHAPE = (1, 12, 12)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def step_of(problem, k, n=3):
    x, y = torch.randn(n, *problem.prior.shape), problem.simulate(n)[1]
    return problem.posterior([]).step(x, k, y, problem.prior.denoise(x, k))

@pytest.mark.parametrize('k', [1, 4, 9])
@pytest.mark.parametrize('drift', [DPSScore(math.inf), DPSCLA(math.inf)])
def test_scores_of_a_gaussian_have_their_closed_form(drift, k):
    problem = sixteen(steps=10)
    step, A = step_of(problem, k), problem.operator.matrix()
    a, s, C = step.alpha.double(), step.sigma.double(), problem.prior.denoiser.cov.double()
    G = a*C @ torch.linalg.inv(a**2*C + s**2*torch.eye(16)) # of the denoiser; symmetric
    width = torch.full((6,), .2**2).double()
    if isinstance(drift, DPSCLA): width += s**2*A.square().sum(1)
    guess = problem.prior.denoiser.mean.double()
    guess = guess + (step.x.double() - a*guess) @ G.T
    closed = ((step.y.double() - guess@A.T)/width) @ A @ G
    assert (drift.score(step) - closed).norm() < 1e-5*closed.norm()
    torch.testing.assert_close(drift(step), step.std*drift.score(step))

class Echo(Denoiser):
    def forward(self, x, t): return x

def test_dps_cla_without_a_denoiser_is_cla():
    prior = Diffusion(Echo(VE(.01, 5.)), SHAPE, 10, error=lambda t: 0*t + 1.)
    problem = InverseProblem(prior, Likelihood(Identity(SHAPE), .1))
    for k in (0, 5, 9):
        step = step_of(problem, k)
        torch.testing.assert_close(DPSCLA(math.inf)(step), CLA()(step), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('operator', [
    random_mask(SHAPE), gaussian_blur(SHAPE, 1., 5), Matrix(torch.randn(5, 144), SHAPE),
    FourierMagnitude(SHAPE), NonlinearBlur(motion_kernel(5, seed=0), SHAPE)])
def test_diagonal_is_that_of_the_whole_jacobian(operator):
    x = torch.rand(2, *SHAPE)
    y = operator(x)
    whole = [torch.autograd.functional.jacobian(operator, x[i:i+1]).reshape(y[0].numel(), -1)
             for i in range(2)]
    exact = torch.stack([J.square().sum(1) for J in whole]).reshape(y.shape)
    found = gram_diagonal(operator, x, y, probes=144).expand_as(y)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    rough = gram_diagonal(operator, x, y, probes=16).expand_as(y)
    assert torch.equal(rough, gram_diagonal(operator, x, y, probes=16).expand_as(y))
    assert (rough/exact - 1).square().mean().sqrt() < .5

def test_each_operator_has_its_own_diagonal_in_each_precision():
    x, y = torch.randn(1, 4), torch.zeros(1, 2)
    ops = [Matrix(s*torch.ones(2, 4)) for s in (1., 2.)]
    assert [gram_diagonal(op, x, y)[0, 0].item() for op in ops*2] == [4., 16.]*2
    assert gram_diagonal(ops[0], x, y.double()).dtype == torch.float64

@pytest.mark.parametrize('make', [linear_problem, bent_problem])
@pytest.mark.parametrize('drift', [DPSScore(), DPSCLA()])
def test_no_sample_looks_at_its_neighbours(make, drift):
    problem = make()
    y = measured(problem).expand(4, -1)
    x, ks = torch.randn(4, 1, 2, 2), torch.tensor([0, 3, 3, 11])
    posterior = problem.posterior([drift])
    alone = torch.cat([posterior.drift(x[i:i+1], int(k), y[:1]) for i, k in enumerate(ks)])
    torch.testing.assert_close(posterior.drift(x, ks, y), alone, rtol=1e-4, atol=1e-4)

def test_clip_bounds_the_score_and_what_is_no_number_is_zero():
    step = step_of(sixteen(steps=10), 9)
    score = DPSScore(math.inf).score(step)
    assert score.abs().max() > 3
    torch.testing.assert_close(DPSScore(3.)(step), step.std*score.clamp(-3, 3))
    root = InverseProblem(sixteen(steps=10).prior, Likelihood(torch.sqrt, .1))
    x = -torch.ones(2, 16)
    step = root.posterior([]).step(x, 9, torch.ones(2, 16), root.prior.denoise(x, 9))
    for drift in (DPSScore(), DPSCLA()):
        assert drift(step).isfinite().all() and not drift(step).requires_grad
    for clip in (0, -1., 'a'):
        with pytest.raises(ValueError, match='clip must be a positive number'): DPSScore(clip)

def test_dps_takes_any_noise_and_dps_cla_gaussian_noise():
    counted = Likelihood(Identity((1, 2, 2)), noise=PhotonNoise(100.))
    problem = InverseProblem(linear_problem().prior, counted)
    step = step_of(problem, 5)
    assert DPSScore()(step).abs().max() > 0
    with pytest.raises(ValueError, match='needs Gaussian noise'): DPSCLA()(step)

def test_the_paper_gate_starts_at_a_hundredth_and_sees_time_and_feature():
    problem = sixteen(steps=10)
    early, late = step_of(problem, 1), step_of(problem, 9)
    gate = PaperGate(DPSScore())
    for step in (early, late): torch.testing.assert_close(gate(step), .01*DPSScore()(step))
    nn.init.normal_(gate.net[-1].weight)
    assert gate.gate(early).std(0) < 1e-6 and abs(gate.gate(early) - gate.gate(late))[0] > 1e-3
    seeing = PaperGate(DPSScore(), guess_misfit, inputs=1)
    nn.init.normal_(seeing.net[-1].weight)
    assert seeing.gate(early).std(0) > 1e-4
    residual = (early.y - problem.operator(early.x0_hat))/.2
    expected = residual.square().mean(1).log1p()
    torch.testing.assert_close(guess_misfit(early)[:, 0], expected)

@pytest.mark.parametrize('feature, inputs', [(guess_misfit, 0), (None, 1)])
def test_a_feature_says_how_many_numbers_it_has(feature, inputs):
    with pytest.raises(ValueError, match='go together'): PaperGate(DPSScore(), feature, inputs)

HYBRIDS = {'paper, DPS': lambda: [PaperGate(DPSScore(), value=.3)],
           'paper, DPS+CLA': lambda: [PaperGate(DPSCLA(), guess_misfit, 1, value=.3)],
           'ours': lambda: [Gate(DPSCLA(), value=.3), Gate(DPSScore(), value=.1)]}

def hybrid(name, bent=False):
    "A network, and gates none of whose weights are zero, in the plane"
    problem = plane(steps=6)
    if bent: problem = InverseProblem(problem.prior, Likelihood(
        Compose(torch.sin, problem.operator), .1))
    net = VectorNet(5, 2, width=16)
    drifts = [NetDrift(net, measurement_feature), *HYBRIDS[name]()] if not bent else (
        HYBRIDS[name]())
    nn.init.normal_(net.last.weight, std=.3)
    for d in drifts:
        if isinstance(d, PaperGate): nn.init.normal_(d.net[-1].weight, std=.1)
    return problem.posterior(drifts)

Y = torch.tensor([[.9]])

@pytest.mark.parametrize('bent', [False, True])
@pytest.mark.parametrize('name', HYBRIDS)
def test_path_form_is_the_gradient_of_the_whole_graph(name, bent):
    check_adjoint(hybrid(name, bent), atol=1e-3, rtol=1e-4)

@pytest.mark.parametrize('drift', [DPSScore(math.inf), DPSCLA(math.inf)])
@pytest.mark.parametrize('make', [linear_problem, bent_problem])
def test_along_a_path_the_drift_is_differentiated_with_its_width(drift, make):
    "Against finite differences in double precision, which see all that x changes"
    torch.set_default_dtype(torch.float64)
    try:
        problem = make()
        y, x = measured(problem).expand(3, -1), torch.randn(3, 1, 2, 2)
        v = torch.randn_like(x)
        def value(x): return (problem.posterior([drift]).drift(x, 6, y)*v).flatten(1).sum(1)
        x.requires_grad_()
        x0_hat = problem.prior.guess(x, 6)
        u = problem.posterior([drift]).drift(x, 6, y, x0_hat)
        slope, = torch.autograd.grad((u*v).sum(), x)
        dx = 1e-6*torch.randn_like(x)
        with torch.no_grad(): seen = value(x + dx) - value(x - dx)
        told = 2*(slope*dx).flatten(1).sum(1)
        torch.testing.assert_close(told, seen, rtol=1e-5, atol=1e-12)
    finally: torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('kind', [Trainer, PathTrainer])
@pytest.mark.parametrize('name', HYBRIDS)
def test_both_trainers_teach_a_hybrid_and_resume_to_the_bit(kind, name, tmp_path):
    def one(file):
        torch.manual_seed(0)
        posterior = hybrid(name)
        path = tmp_path/f'{file}.safetensors'
        return kind(posterior, OnPolicy(posterior, 8), path=path).resume()
    whole = one('whole').fit(Y, 4, every=2, log=str)
    one('parts').fit(Y, 2, every=2, log=str)
    again = one('parts').fit(Y, 4, every=2, log=str)
    for p, q in zip(whole.learned, again.learned): assert torch.equal(p, q)
    torch.manual_seed(0)
    start = hybrid(name).drifts.state_dict()
    moved = {k.split('.')[0] for k, v in again.posterior.drifts.state_dict().items()
             if not torch.equal(v, start[k])}
    assert moved == {str(i) for i in range(len(whole.posterior.drifts))}

def test_copies_answer_the_same():
    step = step_of(bent_problem(), 5)
    for drift in (DPSScore(), DPSCLA(), PaperGate(DPSCLA(), guess_misfit, 1)):
        for twin in (copy.deepcopy(drift), pickle.loads(pickle.dumps(drift))):
            assert torch.equal(twin(step), drift(step))

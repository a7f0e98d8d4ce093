"A second look against closed forms, and gates against least squares"
import pytest, torch
from rtb_nb.amortise import Bank, Family, gap, joint_paths, pair_log_ratio, paired_log_weights
from rtb_nb.correlated import CovarianceMatching
from rtb_nb.covariance import Covariance
from rtb_nb.denoise import gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.drifts import NetDrift
from rtb_nb.errors import PixelError
from rtb_nb.gradient import path_form
from rtb_nb.guidance import Gate, GaussianMatching, MomentMatching
from rtb_nb.imaging import box_mask, gaussian_blur
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.narrowed import Narrowed
from rtb_nb.networks import PatchTransformer
from rtb_nb.per_sample import random_boxes
from rtb_nb.posterior import Drift
from rtb_nb.scales import ScaledMatching
from rtb_nb.schedule import Cosine
from rtb_nb.second_look import SecondLook
from rtb_nb.shipped import fit_gates

shape = 1, 8, 8

def field(steps=6, correlated=False):
    "A Gaussian field, and its own covariance"
    denoiser = gaussian_field(8, .5, 1.5, Cosine(.5))
    vectors, values = denoiser.vectors, denoiser.values
    whole = Covariance(vectors[:, 1:], values[1:], values[0], shape)
    prior = Diffusion(denoiser, shape, steps, covariance=whole if correlated else None)
    return prior, whole

def stepped(problem, tau, k):
    prior = problem.prior
    return problem.posterior([]).step(tau.x[k], k, tau.y, prior.denoise(tau.x[k], k))

class Bent(torch.nn.Module):
    "A field's denoiser that answers too much: its data are not Gaussian"
    def __init__(self, denoiser):
        super().__init__()
        self.inner, self.schedule = denoiser, denoiser.schedule
        self.data_variance = denoiser.data_variance
        self.calls = 0
    def error(self, t): return self.inner.error(t)
    def forward(self, x, t):
        self.calls += len(x)
        guess = self.inner(x, t)
        return guess + .2*guess.tanh()

def bent_problem(noise=.1):
    prior, whole = field()
    bent = Diffusion(Bent(prior.denoiser), shape, 6)
    return InverseProblem(bent, Likelihood(gaussian_blur(shape, 1., 5), noise)), whole

@pytest.mark.parametrize('correlated', [False, True])
@pytest.mark.parametrize('operator', [lambda: gaussian_blur(shape, 1., 5),
                                      lambda: box_mask(shape, 4),
                                      lambda: random_boxes(4, shape, (.2, .5))])
@pytest.mark.parametrize('share', [.01, .5])
def test_gaussian_data_have_nothing_to_add(correlated, operator, share):
    torch.manual_seed(0)
    prior, whole = field(correlated=correlated)
    problem = InverseProblem(prior, Likelihood(operator(), .1))
    tau = joint_paths(problem, 8)
    for guide in (CovarianceMatching(whole),
                  ScaledMatching(whole, PixelError(prior), sweeps=200, tolerance=1e-7)):
        for k in range(prior.steps):
            step = stepped(problem, tau, k)
            assert SecondLook(guide, share)(step).abs().max() < 1e-3*step.of(guide).abs().max()

def test_pull_is_the_weighed_residual():
    torch.manual_seed(0)
    prior, whole = field()
    problem = InverseProblem(prior, Likelihood(gaussian_blur(shape, 1., 5), .1))
    tau, A = joint_paths(problem, 3), problem.operator.matrix().double()
    for guide in (CovarianceMatching(whole),
                  ScaledMatching(whole, PixelError(prior), sweeps=200, tolerance=1e-8)):
        step = stepped(problem, tau, 3)
        C = guide.error(step)
        dense = C.times(torch.eye(64, dtype=torch.float64).reshape(64, *shape)).flatten(1)
        M = A @ dense @ A.T + .01*torch.eye(len(A)).double()
        left = (step.y - problem.operator(step.guess_of_end())).flatten(1).double()
        exact = (torch.linalg.solve(M, left.T).T @ A).reshape(3, *shape)
        found = guide.pull(step, guide.move(step)).double()
        assert (found - exact).abs().max() < 1e-3*exact.abs().max()

def test_pull_undoes_scales():
    torch.manual_seed(0)
    prior, whole = field()
    problem = InverseProblem(prior, Likelihood(gaussian_blur(shape, 1., 5), .1))
    tau, guide = joint_paths(problem, 3), ScaledMatching(whole, PixelError(prior))
    s = torch.rand(3, *shape) + .5
    guide.scales = lambda step, C: s
    step, v = stepped(problem, tau, 2), torch.randn(3, *shape)
    moved = s*guide.error(step).times(s*v)
    assert torch.allclose(guide.pull(step, moved), v, atol=1e-3)

def test_each_level_and_sample_by_itself():
    torch.manual_seed(0)
    problem, whole = bent_problem()
    tau, look = joint_paths(problem, 4), SecondLook(CovarianceMatching(whole))
    posterior = problem.posterior([])
    ks = torch.tensor([0, 2, 3, 5])
    x = tau.x[ks, torch.arange(4)]
    step = posterior.step(x, ks, tau.y, problem.prior.denoise(x, ks))
    together = look(step)
    for i, k in enumerate(ks.tolist()):
        alone = posterior.step(x[i:i+1], k, tau.y[i:i+1], problem.prior.denoise(x[i:i+1], k))
        assert torch.allclose(look(alone), together[i:i+1], atol=2e-5)
    assert together.abs().max() > 1e-2

def test_more_is_shown_for_a_larger_share():
    torch.manual_seed(0)
    problem, whole = bent_problem()
    tau, guide = joint_paths(problem, 4), CovarianceMatching(whole)
    step = stepped(problem, tau, 2)
    g, more = (SecondLook(guide, share).precision(step) for share in (.1, .3))
    assert torch.allclose(more, 3*g)
    assert g > 0
    x, t, _ = SecondLook(guide, .1).hint(step)
    assert t.shape == (4,) and (t < step.t).all()
    assert x.dtype == step.x.dtype

def test_one_more_call_of_the_network():
    torch.manual_seed(0)
    problem, whole = bent_problem()
    guide, calls = CovarianceMatching(whole), []
    y = joint_paths(problem, 1).y
    for drifts in ([guide], [guide, Gate(SecondLook(guide))]):
        problem.prior.denoiser.calls = 0
        problem.posterior(drifts).sample(y, 5)
        calls.append(problem.prior.denoiser.calls)
    assert calls == [5*6, 2*5*6]

def test_bounds_hold_with_it():
    torch.manual_seed(0)
    problem, whole = bent_problem()
    guide = CovarianceMatching(whole)
    tau = joint_paths(problem, 64)
    for value in (-.5, .5):
        drifts = [guide, Gate(SecondLook(guide), value=value)]
        mean, error = gap(*paired_log_weights(problem.posterior(drifts), tau, 4))
        assert mean > -3*error

def test_the_path_form_reaches_through_the_second_call():
    torch.manual_seed(0)
    problem, whole = bent_problem()
    guide = CovarianceMatching(whole)
    gate = Gate(SecondLook(guide), knots=2, value=.3)
    y = joint_paths(problem, 1).y
    def elbo(value):
        gate.value.data.fill_(value)
        posterior = problem.posterior([guide, gate])
        torch.manual_seed(1)
        tau = posterior.simulate(y, 64)
        gate.value.grad = None
        log_w = path_form(posterior, tau, 1., 256)
        return log_w.mean().item(), -gate.value.grad.sum().item()
    (low, _), (_, slope), (high, _) = (elbo(.3 + d) for d in (-.01, 0., .01))
    assert slope == pytest.approx((high - low)/.02, rel=.05, abs=.02)

def test_refusals():
    prior, whole = field()
    for odd in (MomentMatching(), whole, None):
        with pytest.raises(TypeError, match='give a CovarianceMatching or a ScaledMatching'):
            SecondLook(odd)
    with pytest.raises(ValueError, match='share'): SecondLook(CovarianceMatching(whole), 0)
    look = SecondLook(CovarianceMatching(whole))
    problem = InverseProblem(prior, Likelihood(gaussian_blur(shape, 1., 5), .1))
    tau = joint_paths(problem, 2)
    with pytest.raises(ValueError, match='SecondLook needs a measurement'):
        look(problem.posterior([]).step(tau.x[0], 0, None, tau.x0))
    again = problem.posterior([]).given(tau.y[:1])
    chained = InverseProblem(again, problem.likelihood).posterior([look])
    with pytest.raises(ValueError, match='needs the denoiser of the prior'):
        chained.sample(tau.y[:1], 2)


# %% Gates
def gated(correlated=False, narrowed=False, noise=.1):
    prior, whole = field(8, correlated)
    problem = InverseProblem(prior, Likelihood(box_mask(shape, 4), noise))
    guide = CovarianceMatching(whole)
    gate = Gate(guide, value=.3)
    return problem, gate, [gate] + ([Narrowed(guide)] if narrowed else [])

def at_levels(gate, chain):
    knots = len(gate.value) - 1
    q = chain.t[:-1]*knots
    i = q.floor().long().clamp(max=knots - 1)
    return torch.lerp(gate.value[i], gate.value[i+1], (q - i).to(gate.value)).detach()

@pytest.mark.parametrize('correlated, narrowed', [(False, False), (True, False), (True, True)])
def test_gates_find_the_exact_drift(correlated, narrowed):
    torch.manual_seed(0)
    problem, gate, drifts = gated(correlated, narrowed)
    fit_gates(problem.posterior(drifts), Bank.of(problem.prior, 1000), 60, 256)
    found = at_levels(gate, problem.prior.chain)
    assert (found - 1)[2:].abs().max() < .1
    assert (found - 1).abs().max() < .4

def test_gates_are_least_squares():
    torch.manual_seed(0)
    problem, gate, drifts = gated()
    bank = Bank.of(problem.prior, 200)
    posterior = problem.posterior(drifts)
    before = gate.value.detach().clone()
    torch.manual_seed(1)
    fit_gates(posterior, bank, 3, 64)
    assert not torch.equal(gate.value, before)
    torch.manual_seed(1)
    pairs = [bank.pairs(problem.likelihood, 64) for _ in range(3)]
    held = (gate.value - before).square().sum()/2
    loss = held - sum(pair_log_ratio(posterior, p).sum() for p in pairs)
    slope, = torch.autograd.grad(loss, gate.value)
    assert slope.abs().max() < 2e-2

def test_only_gates_move_and_the_rest_counts():
    torch.manual_seed(0)
    problem, gate, _ = gated()
    guide = gate.drift
    net = NetDrift(PatchTransformer(8, 2, 1, width=16, depth=1))
    weights = [p.clone() for p in net.parameters()]
    posterior = problem.posterior([guide, gate, net]) # the guide whole, and as much of it again
    assert fit_gates(posterior, Bank.of(problem.prior, 500), 30, 256) is posterior
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), weights))
    assert at_levels(gate, problem.prior.chain)[2:].abs().max() < .1

def test_knots_that_no_level_asks_for_stay():
    torch.manual_seed(0)
    problem, gate, drifts = gated()
    fit_gates(problem.posterior(drifts), Bank.of(problem.prior, 50), 2, 32)
    knots = len(gate.value) - 1
    asked = {i for t in problem.prior.chain.t[:-1].tolist()
             for i in (int(t*knots), min(int(t*knots) + 1, knots))}
    silent = [i for i in range(knots + 1) if i not in asked]
    assert silent and all(gate.value[i].item() == pytest.approx(.3, abs=1e-6) for i in silent)

class Aside(Drift):
    "The same push everywhere, of no use"
    def forward(self, step): return torch.ones_like(step.x)

def test_gates_of_a_family_and_seeds():
    problem, _, _ = gated()
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        family = Family([Likelihood(problem.operator, s) for s in (.05, .2)])
        gates = Gate(GaussianMatching(), value=.5), Gate(Aside(), knots=5, value=.5)
        shared = InverseProblem(problem.prior, family)
        fit_gates(shared.posterior(list(gates)), Bank.of(problem.prior, 300), 20, 128)
        values.append(torch.cat([g.value.detach() for g in gates]))
    assert torch.equal(*values)
    assert (at_levels(gates[0], problem.prior.chain)[2:] - 1).abs().max() < .2
    assert at_levels(gates[1], problem.prior.chain).abs().max() < .1

def test_gates_refuse():
    problem, gate, drifts = gated()
    bank = Bank.of(problem.prior, 4)
    with pytest.raises(ValueError, match='there is no gate to fit'):
        fit_gates(problem.posterior([gate.drift]), bank)
    with pytest.raises(ValueError, match='batches'):
        fit_gates(problem.posterior(drifts), bank, 0)
    other = Diffusion(gaussian_field(8, .7, 1.5, Cosine(.5)), shape, 8)
    with pytest.raises(ValueError, match='another prior'):
        fit_gates(problem.posterior(drifts), Bank.of(other, 4))

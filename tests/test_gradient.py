"The path form of the gradient: equal to one graph of all steps, whatever drifts there are"
import subprocess, sys

import pytest, torch
from torch import nn

from rtb_nb.amortise import (Bank, Family, Fresh, bridge_log_ratio, gap, joint_paths,
    paired_log_weights)
from rtb_nb.beds import plane
from rtb_nb.behaviours import FromPrior, OnPolicy
from rtb_nb.drifts import NetDrift
from rtb_nb.gradient import GapTrainer, PathTrainer, path_form
from rtb_nb.guidance import (CLA, DPS, Gate, GaussianMatching, GuideShift, LikelihoodGradient,
    MomentMatching, PiGDM, ProximalMatching, likelihood_slope, measurement_feature)
from rtb_nb.likelihood import Likelihood
from rtb_nb.networks import VectorNet
from rtb_nb.objective import Adaptive
from rtb_nb.operators import Matrix

Y = torch.tensor([[.9]])

def net(inputs):
    made = VectorNet(inputs, 2, width=16)
    nn.init.normal_(made.last.weight, std=.3)
    return made

def seeing(*features): return NetDrift(net(4 + 2*len(features)), *features)

DRIFTS = dict(
    matching=lambda: [Gate(MomentMatching(), value=.5), seeing(GuideShift(MomentMatching()))],
    exact=lambda: [Gate(GaussianMatching(), value=.5), seeing()],
    convolved=lambda: [Gate(CLA(), value=.5), seeing(GuideShift(CLA()))],
    pigdm=lambda: [Gate(PiGDM(.25), value=.5), seeing()],
    dps=lambda: [Gate(DPS(.1)), seeing(likelihood_slope)],
    bare=lambda: [Gate(LikelihoodGradient(), value=.01), seeing(likelihood_slope)],
    proximal=lambda: [Gate(ProximalMatching(sweeps=3), value=.5), seeing()],
    plain=lambda: [NetDrift(net(5), measurement_feature)])

def gradient(posterior):
    learned = [p for p in posterior.drifts.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in learned])
    posterior.drifts.zero_grad()
    return found

def whole_graph(posterior, tau):
    "Log-weights with one graph of all steps, the noise held still"
    with torch.no_grad():
        kernels = [posterior.kernel(tau.x[k], k, tau.y).base_dist for k in range(tau.steps)]
        eps = [(tau.x[k+1] - q.mean)/q.stddev for k, q in enumerate(kernels)]
    x, log_ratio = tau.xT.clone().requires_grad_(), 0.
    for k in range(tau.steps):
        x0_hat = posterior.prior.guess(x, k)
        u, s = posterior.drift(x, k, tau.y, x0_hat), posterior.chain.at('std', k, x)
        log_ratio = log_ratio + (u*(eps[k] + u/2)).sum(1)
        x = posterior.mean(x, k, x0_hat) + s*(u + eps[k])
    return posterior.problem.log_likelihood(x, tau.y) - log_ratio

@pytest.fixture
def posterior(request):
    torch.manual_seed(0)
    return plane(steps=6).posterior(DRIFTS[request.param]())

def check_adjoint(posterior, **close): # how close log-weights must be
    "The path form's gradient and log-weights against those of one graph of all steps"
    tau = posterior.simulate(Y, 32)
    log_w = whole_graph(posterior, tau)
    (-log_w.mean()).backward()
    whole = gradient(posterior)
    torch.testing.assert_close(path_form(posterior, tau), log_w.detach(), **close)
    adjoint = gradient(posterior)
    assert (adjoint-whole).norm() < 1e-4*whole.norm()
    torch.testing.assert_close(posterior.log_weight(tau).detach(), log_w.detach(), **close)

@pytest.mark.parametrize('posterior', DRIFTS, indirect=True)
def test_adjoint_is_the_gradient_of_the_whole_graph(posterior):
    check_adjoint(posterior, atol=1e-4, rtol=1e-5)

@pytest.mark.parametrize('posterior', ['matching'], indirect=True)
def test_batch_in_parts_and_a_tempered_likelihood(posterior):
    tau = posterior.simulate(Y, 32)
    whole, one = path_form(posterior, tau, beta=.3), gradient(posterior)
    parts, other = path_form(posterior, tau, beta=.3, chunk=7), gradient(posterior)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    scored = posterior.log_weight(tau, .3).detach()
    torch.testing.assert_close(whole, scored, atol=1e-4, rtol=1e-5)

@pytest.mark.parametrize('posterior', ['plain'], indirect=True)
def test_inference_mode_is_refused(posterior):
    tau = posterior.simulate(Y, 4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match='path form needs gradients'):
        path_form(posterior, tau)

@pytest.mark.parametrize('posterior', ['matching'], indirect=True)
def test_trainer_learns_counts_and_resumes(posterior, tmp_path):
    drifts = posterior.drifts.state_dict()
    start = {k: v.clone() for k, v in drifts.items()}
    def one(name):
        posterior.drifts.load_state_dict(start)
        return PathTrainer(posterior, OnPolicy(posterior, 8), path=tmp_path/name)
    whole = one('whole')
    torch.manual_seed(3)
    whole.fit(Y, 4, every=2, log=str)
    end = {k: v.clone() for k, v in drifts.items()}
    assert whole.calls == 4*2*6*8 and any(not torch.equal(end[k], start[k]) for k in start)
    first = one('parts')
    torch.manual_seed(3)
    first.fit(Y, 2, every=2, log=str)
    second = one('parts').resume().fit(Y, 4, every=2, log=str)
    assert second.history == whole.history
    for k, v in posterior.drifts.state_dict().items(): assert torch.equal(v, end[k])

@pytest.mark.parametrize('posterior', ['plain'], indirect=True)
@pytest.mark.parametrize('behaviour, options', [
    (lambda p: FromPrior(p, 4), {}), (lambda p: OnPolicy(p, 4, noise=.1), {}),
    (lambda p: OnPolicy(p, 4), dict(updates=2)), (lambda p: OnPolicy(p, 4), dict(fraction=.5)),
    (lambda p: OnPolicy(p, 4), dict(beta=Adaptive())),
    (lambda p: Fresh(FromPrior(p, 4), torch.zeros(3, 2)), {})])
def test_what_the_path_form_cannot_do_is_refused(posterior, behaviour, options):
    with pytest.raises(ValueError, match='path form'):
        PathTrainer(posterior, behaviour(posterior), **options)

def amortised(problem=None):
    torch.manual_seed(0)
    problem = problem or plane(steps=6)
    return problem.posterior([NetDrift(net(5), measurement_feature)])

def test_the_gap_has_both_gradients():
    "That of own paths by the path form, and that of the bank's pairs"
    posterior = amortised()
    bank = Bank.of(posterior.prior, 30)
    trainer = GapTrainer(posterior, bank, n=2, measurements=3, pairs=16)
    torch.manual_seed(1)
    tau = trainer.behaviour()
    assert len(tau) == 6 and len(tau.y.unique()) == 3
    torch.manual_seed(2)
    trainer.add_gradient(tau)
    both = gradient(posterior)
    path_form(posterior, tau)
    lower = gradient(posterior)
    torch.manual_seed(2)
    pairs = bank.pairs(posterior.likelihood, 16)
    (-posterior.steps*bridge_log_ratio(posterior, pairs).mean()).backward()
    upper = gradient(posterior)
    torch.testing.assert_close(both, lower + upper, atol=1e-5, rtol=1e-4)
    assert lower.norm() > 0 and upper.norm() > 0

def test_the_gap_closes_counts_and_resumes(tmp_path):
    torch.manual_seed(0)
    problem = plane(steps=6)
    bank, held_out = Bank.of(problem.prior, 200), joint_paths(problem, 100)
    def one(name): return GapTrainer(amortised(problem), bank, path=tmp_path/name)
    before = gap(*paired_log_weights(amortised(problem), held_out, 2))[0]
    whole = one('whole')
    torch.manual_seed(3)
    whole.fit(None, 40, every=20, log=str)
    assert whole.calls == 40*2*6*8
    assert gap(*paired_log_weights(whole.averaged, held_out, 2))[0] < .7*before
    plain = dict(every=20, anneal=0., log=str)
    whole, first = one('again'), one('parts')
    torch.manual_seed(3)
    whole.fit(None, 40, **plain)
    torch.manual_seed(3)
    first.fit(None, 20, **plain)
    second = one('parts').resume().fit(None, 40, **plain)
    assert second.history == whole.history and len(whole.history) == 40
    for p, q in zip(second.learned, whole.learned): assert torch.equal(p, q)

def test_the_gap_moves_on_to_another_member_of_a_family():
    torch.manual_seed(0)
    members = [Likelihood(Matrix([[1., 0.]]), .1), Likelihood(Matrix([[0., 1.]]), .2)]
    flat, family = plane(steps=6), Family(members)
    posterior = amortised(type(flat)(flat.prior, family))
    trainer, seen = GapTrainer(posterior, Bank.of(flat.prior, 10), measurements=1), set()
    for _ in range(12):
        trainer.iterate(None)
        seen.add(family.noise_std)
    assert seen == {.1, .2}

def test_the_gap_refuses_a_foreign_bank_and_a_single_path():
    posterior = amortised()
    with pytest.raises(ValueError, match='another prior'):
        GapTrainer(posterior, Bank.of(plane(steps=6).prior, 4))
    with pytest.raises(ValueError, match='n must be'):
        GapTrainer(posterior, Bank.of(posterior.prior, 4), n=1)

MEASURED = '''
import resource, torch
from rtb_nb.behaviours import OnPolicy
from rtb_nb.beds import small_lens
from rtb_nb.gradient import PathTrainer
from rtb_nb.guidance import MomentMatching
from rtb_nb.train import image_drifts
torch.manual_seed(0)
problem = small_lens({steps})
q = problem.posterior(image_drifts(problem, MomentMatching(.1), width=16, depth=1))
PathTrainer(q, OnPolicy(q, 4)).fit(problem.simulate(1)[1], 1, log=str)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''

def test_memory_does_not_grow_with_the_steps():
    "Beyond the paths themselves: the peak of a process with 200 steps over one with 25"
    peaks = [int(subprocess.run([sys.executable, '-c', MEASURED.format(steps=K)], check=True,
                                capture_output=True, text=True).stdout) for K in (25, 200)]
    assert peaks[1] < 1.15*peaks[0], peaks

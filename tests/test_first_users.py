"What an astronomer and a researcher ran into on their first day"
import math, warnings
from types import SimpleNamespace
import numpy as np
import pytest, torch
from torch import nn
from torch.distributions import Categorical
from test_core import plane
from rtb_nb.amortise import Bank, Family, MaximumLikelihood
from rtb_nb.behaviours import OnPolicy
from rtb_nb.checkpoints import fingerprint
from rtb_nb.denoise import EpsDenoiser, GaussianDenoiser, X0Denoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.drifts import NetDrift
from rtb_nb.evidence import evaluate
from rtb_nb.exact import BestDrift, ExactChain
from rtb_nb.exposures import even_noise
from rtb_nb.guidance import DPS, Gate, LikelihoodGradient, MomentMatching, ProximalMatching
from rtb_nb.lensing import load_observation
from rtb_nb.likelihood import InverseProblem, Likelihood, Tilted, residual_chi2
from rtb_nb.networks import VectorNet
from rtb_nb.objective import RTB
from rtb_nb.operators import Identity, LinearOperator, Matrix, adjoint_error
from rtb_nb.photons import PhotonNoise
from rtb_nb.posterior import Drift
from rtb_nb.schedule import Cosine, Tabulated
from rtb_nb.train import Trainer, image_drifts, vector_drifts

together = torch.tensor([[1., .95], [.95, 1.]])/4
exact = GaussianDenoiser(torch.zeros(2), together, Cosine(.5))
def noise_in(x, t): # what `exact` would have predicted
    a, s = (v[:, None] for v in exact.schedule(t))
    return (x - a*exact(x, t))/s
def white(shape=(1, 8, 8), steps=6):
    D = math.prod(shape)
    denoiser = GaussianDenoiser(torch.zeros(shape), torch.eye(D)/4, Cosine())
    return Diffusion(denoiser, shape, steps)

# A network

class Careless(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.drop = VectorNet(2, 2), nn.Dropout(.5)
    def forward(self, x, t): return self.drop(self.net(x, t) + x)

def test_a_prior_forgets_no_dropout():
    prior = Diffusion(X0Denoiser(Careless(), Cosine()).calibrate(torch.randn(64, 2)), (2,), 5)
    prior.train()
    posterior = InverseProblem(prior, Likelihood(Identity(2), .1)).posterior([]).train()
    assert not any(m.training for m in posterior.prior.denoiser.modules())
    tau = prior.simulate(4)
    assert torch.equal(prior.log_prob(tau), prior.log_prob(tau))

def test_nor_does_an_operator():
    likelihood = Likelihood(nn.Sequential(nn.Linear(2, 3), nn.Dropout(.5)), .1)
    x, y = torch.ones(4, 2), torch.zeros(4, 3)
    assert torch.equal(likelihood.log_prob(x, y), likelihood.log_prob(x, y))
    plain = InverseProblem(plane().prior, likelihood).posterior([])
    assert not plain.draw(y, 4)[1].requires_grad
    reward = nn.Sequential(nn.Linear(2, 8), nn.Dropout(.5), nn.Flatten(0))
    tilted = Tilted(plane().prior, reward)
    for whole in (plain, plain.problem, tilted, Family([likelihood])): whole.train()
    assert torch.equal(likelihood.log_prob(x, y), likelihood.log_prob(x, y))
    assert not any(m.training for m in [*likelihood.modules(), *tilted.likelihood.modules()])

def test_a_network_is_told_a_time_for_each_image():
    "The embedding of an ordinary DDPM indexes it, and looks whole timesteps up"
    table = torch.randn(1000, 2)
    net = lambda x, t: x + table[(999*t).long()][:, None].sum(1)
    assert EpsDenoiser(net, Cosine())(torch.zeros(3, 2), torch.tensor(.5)).shape == (3, 2)

@pytest.mark.parametrize('net, got', [
    (lambda x, t: x[:, :1], 'got shape (5, 1)'), (lambda x, t: x.sum(1), 'got shape (5,)'),
    (lambda x, t: SimpleNamespace(sample=x), 'got SimpleNamespace'),
    (lambda x, t: (x,), 'got tuple')])
def test_a_network_of_another_shape_is_named(net, got):
    with pytest.raises(ValueError) as e: X0Denoiser(net, Cosine())(torch.zeros(5, 3), .5)
    assert got in str(e.value) and '.sample' in str(e.value)

@pytest.mark.parametrize('net, schedule', [
    (lambda x, t: noise_in(x, t/999), Cosine(.5)), (noise_in, Cosine(3.))])
def test_a_wrong_time_or_schedule_is_seen(net, schedule):
    torch.manual_seed(0)
    x0 = torch.randn(500, 2) @ torch.linalg.cholesky(together).T
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        EpsDenoiser(noise_in, Cosine(.5)).calibrate(x0)
    with pytest.warns(UserWarning, match='is the schedule that of its training'):
        EpsDenoiser(net, schedule).calibrate(x0)

def test_a_table_of_another_kind_and_whole_numbers():
    betas = torch.linspace(1e-4, .02, 1000)
    with pytest.raises(ValueError, match='is it 1 - beta'): Tabulated(1 - betas)
    with pytest.raises(TypeError, match='torch.uint8'):
        EpsDenoiser(noise_in, Cosine()).calibrate(torch.zeros(4, 2, dtype=torch.uint8))

# An operator

class Visibilities(LinearOperator):
    "A Fourier transform at some frequencies, real and imaginary parts; no transpose of its own"
    def __init__(self, at):
        super().__init__((1, 8, 8), (2*len(at),))
        self.at = at
    def linear(self, x):
        v = torch.fft.rfft2(x.unflatten(1, (8, 8)), norm='ortho').flatten(1)[:, self.at]
        return torch.view_as_real(v).flatten(1)

def test_a_linear_function_has_its_transpose_for_nothing():
    op = Visibilities(torch.tensor([0, 3, 7, 11, 20]))
    assert adjoint_error(op) < 1e-12
    problem = InverseProblem(white(), Likelihood(op, .1))
    y = problem.simulate(1)[1]
    assert evaluate(problem.posterior([MomentMatching(.25)]), y, 8)[1]['finite'] == 1
    free = Trainer(problem.posterior([Gate(MomentMatching(.25))]), lambda y: None).posterior
    assert free.step_log_ratio(free.simulate(y, 2), [0, 3]).requires_grad

@pytest.mark.parametrize('op, got', [
    (lambda x: torch.fft.rfft2(x).flatten(1), 'torch.complex64'), (lambda x: x.long(), 'int64'),
    (lambda x: x.numpy(), 'ndarray'), (lambda x: [x], 'list')])
def test_an_operator_answers_real_floats(op, got):
    with pytest.raises(TypeError) as e: Likelihood(op, .1)(torch.zeros(2, 1, 8, 8))
    assert got in str(e.value) and 'view_as_real' in str(e.value)

def test_chi2_loses_no_imaginary_part():
    with pytest.raises(TypeError, match='view_as_real'):
        residual_chi2(torch.ones(1, 3), torch.ones(2, 3)*1j, .1)

def test_a_class_is_no_measurement():
    chosen = Likelihood(lambda x: x.flatten(1)[:, :10], noise=lambda m: Categorical(logits=m))
    with pytest.raises(ValueError, match='for a class use Tilted'):
        chosen(torch.zeros(2, 1, 8, 8))

measured = Likelihood(Identity((1, 8, 8)), .1)
def taken(y): return measured.measurement(y, white())

@pytest.mark.parametrize('y, kind, words', [
    (np.ma.masked_array(np.zeros((1, 1, 8, 8)), np.eye(8)[None, None]), TypeError,
     'a mask would be lost, of 8 values'),
    (torch.zeros(8, 8), ValueError, 'y[None, None]'),
    (torch.zeros(1, 1, 8, 8).index_fill(3, torch.tensor([2]), math.nan), ValueError,
     'the first at [0, 0, 0, 2]')])
def test_a_measurement_is_taken_in_whole(y, kind, words):
    with pytest.raises(kind) as e: taken(y)
    assert words in str(e.value)

def test_a_hidden_pixel_may_hold_anything():
    y, noise = torch.zeros(1, 1, 8, 8), torch.full((1, 8, 8), .1)
    y[0, 0, 2, 3], noise[0, 2, 3] = math.nan, math.inf
    op, seen, std = even_noise(Identity((1, 8, 8)), y, noise)
    taken = Likelihood(op, std).measurement(seen, white())
    assert taken.isfinite().all() and std == pytest.approx(.1)
    with pytest.raises(TypeError, match='divide a function and y by the map'):
        even_noise(lambda x: x, y, noise)

def test_an_image_needs_no_file():
    image = np.zeros((16, 16))
    image[6:10, 6:10] = 5
    seen = load_observation(image + .01*np.random.default_rng(0).normal(size=(16, 16)), .05)
    assert seen.y.shape == (1, 1, 16, 16) and seen.y.max() > .7

@pytest.mark.parametrize('drift', [DPS(1.), LikelihoodGradient(), ProximalMatching()])
def test_a_gradient_that_is_zero_everywhere_is_said(drift):
    problem = InverseProblem(white(), Likelihood(lambda x: (x*4).round()/4, .1))
    problem.prior.denoiser.calibrate(torch.randn(64, 1, 8, 8)/2)
    with pytest.warns(UserWarning, match='moves nothing: the gradient is zero everywhere'):
        problem.posterior([drift]).sample(torch.ones(1, 1, 8, 8), 2)

@pytest.mark.parametrize('stretch, says', [(1., True), (400., False)])
def test_a_climb_that_runs_away_is_said(stretch, says):
    "An operator whitened by its noise has a large slope: 20 squared here"
    problem = InverseProblem(white(), Likelihood(lambda x: 20*x, 1.))
    y = problem.simulate(1)[1]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        problem.posterior([ProximalMatching(.25, stretch)]).sample(y, 2)
    said = [str(w.message) for w in found if 'climbs away' in str(w.message)]
    assert bool(said) == says
    if says: assert 300 < float(said[0].split('about ')[1].split(' ')[0]) < 500

# Photons

def test_photons_of_the_sky_are_added():
    noise = PhotonNoise(100, background=50.)
    mean = noise(torch.linspace(-1, 1, 5)[:, None]).mean[:, 0]
    assert torch.allclose((mean + 1)/noise.unit, torch.tensor([50., 75, 100, 125, 150]))

def test_counts_become_a_measurement():
    noise = PhotonNoise(20, background=3.)
    counts = torch.tensor([[0, 3, 15, 40]])
    assert torch.allclose(noise.measured(counts), -1 + .1*counts)
    with pytest.raises(ValueError, match='noise.measured'): noise.check(torch.tensor([[40.]]))
    for odd in ([[1.5]], [[-2]], [[math.nan]]):
        with pytest.raises(ValueError, match='whole photons'): noise.measured(odd)

def test_exposure_may_differ_between_pixels():
    torch.manual_seed(0)
    exposure, sky = 20 + 100*torch.rand(1, 4, 4), 1 + torch.rand(1, 4, 4)
    noise, x = PhotonNoise(exposure, dark=0., background=sky), torch.rand(6, 1, 4, 4)
    like = Likelihood(Identity((1, 4, 4)), noise=noise)
    y = noise.measured(torch.poisson(x*exposure + sky))
    each = [PhotonNoise(e.item(), dark=0., background=b.item())(v).log_prob(u).sum()
            for i in range(6) for v, u, e, b in zip(*(w.flatten() for w in (
                x[i], y[i], exposure, sky)))]
    found = like(x).log_prob(like.take(y, (1, 4, 4), torch.zeros(())))
    assert torch.allclose(found, torch.stack(each).view(6, 16).sum(1), atol=1e-2)
    assert 'photons=a map (1, 4, 4) of' in repr(noise)
    with pytest.raises(ValueError, match='no whole count'): noise.check(y + .3*noise.unit)
    with pytest.raises(ValueError, match='times the photons'): noise.check(12 + y)
    for call in (noise, noise.check, noise.measured):
        with pytest.raises(ValueError, match=r'photons is a map of shape \(1, 4, 4\)'):
            call(torch.ones(2, 1, 3, 4))
    assert torch.equal(noise.measured(torch.ones(1, 4, 4).int()), noise.unit)
    assert torch.equal(PhotonNoise(torch.tensor(4.))(x).mean, PhotonNoise(4.)(x).mean)
    assert fingerprint(n=noise) == fingerprint(n=PhotonNoise(exposure, 0., 1., sky))
    assert fingerprint(n=noise) != fingerprint(n=PhotonNoise(exposure + 1, 0., 1., sky))

@pytest.mark.parametrize('odd', [dict(photons=torch.tensor([1., 0.])),
    dict(photons=3., background=torch.tensor([1., math.nan])),
    dict(photons=torch.tensor([math.inf, 1.]))])
def test_maps_of_photons_are_positive(odd):
    with pytest.raises(ValueError, match='must be positive everywhere, the least is'):
        PhotonNoise(**odd)

def test_counts_have_a_chi2():
    torch.manual_seed(0)
    problem = InverseProblem(white(), Likelihood(Identity((1, 8, 8)), noise=PhotonNoise(40)))
    x = torch.rand(400, 1, 8, 8) - .5
    y = problem.likelihood(x).sample()
    assert problem.chi2(x, y).mean().item() == pytest.approx(1, abs=.03)
    problem.prior.denoiser.calibrate(torch.randn(64, 1, 8, 8)/2)
    assert evaluate(problem.posterior([LikelihoodGradient()]), y[:1], 4)[1]['chi2'] > 0

# A trainer

class Own(RTB):
    "An objective with a parameter of its own"
    def __init__(self): super().__init__(); self.shift = nn.Parameter(torch.zeros(()))
    def residual(self, log_w, y=None, branch=None):
        return super().residual(log_w, y, branch) + self.shift

def trainer(objective=None, drift=None, **options):
    problem = plane(8)
    posterior = problem.posterior([drift or Gate(MomentMatching(.25), value=.1)])
    return Trainer(posterior, OnPolicy(posterior, 8), objective, **options)

def test_an_objective_of_ones_own_learns():
    t = trainer(Own()).fit(torch.ones(1, 1), 5, log=str)
    assert t.objective.shift != 0

class Other(RTB): pass

@pytest.mark.parametrize('changed', [dict(objective=Other()),
                                     dict(drift=Gate(LikelihoodGradient(), value=.1))])
def test_a_file_of_another_run_is_refused_when_it_is_read(tmp_path, changed):
    path = tmp_path/'run.pt'
    trainer(path=path).fit(torch.ones(1, 1), 3, log=str)
    assert trainer(path=path).resume().step == 3
    with pytest.raises(ValueError, match='was trained with another'):
        trainer(path=path, **changed).resume()

def test_a_run_that_is_not_there(tmp_path):
    assert trainer(path=tmp_path/'run.pt').resume().step == 0
    with pytest.raises(FileNotFoundError, match='no run at'):
        trainer(path=tmp_path/'run.pt').resume(missing_ok=False)

class Narrow(Drift):
    def forward(self, step): return step.x.sum(1)

class Column(nn.Module):
    def forward(self, log_w, y, branch=None): return log_w.mean().expand(len(log_w), 1)

class Many(RTB):
    def forward(self, log_w, y=None, branch=None): return super().residual(log_w, y, branch)

@pytest.mark.parametrize('make, words', [
    (lambda: plane(8).posterior([Narrow()]).sample(torch.ones(1, 1), 2), 'the drift Narrow'),
    (lambda: trainer(RTB(Column())).fit(torch.ones(1, 1), 2), 'one number per path, (8,), got'),
    (lambda: trainer(Many()).fit(torch.ones(1, 1), 2), 'must answer one number, the mean'),
    (lambda: trainer(lambda log_w, y: 0.), 'objective is an RTB'),
    (lambda: Trainer(trainer().posterior, lambda y: y).fit(torch.ones(1, 1), 2),
     'a behaviour answers Trajectories')])
def test_a_part_of_ones_own_that_does_not_fit(make, words):
    with pytest.raises((ValueError, TypeError)) as e: make()
    assert words in str(e.value)

def test_a_black_box_on_vectors():
    black_box = lambda x: torch.from_numpy(-(x.detach().numpy()**2).sum(1))
    problem = Tilted(plane(8).prior, black_box)
    posterior = problem.posterior(vector_drifts(problem, feature=None, width=16))
    Trainer(posterior, OnPolicy(posterior, 8)).fit(problem.no_measurement, 3, log=str)
    with pytest.raises(ValueError, match='feature=None'):
        problem.posterior(vector_drifts(problem)).draw(problem.no_measurement, 2)

def test_a_black_box_on_images():
    problem = Tilted(white(), lambda x: torch.from_numpy(-(x.numpy()**2).sum((1, 2, 3))))
    drifts = image_drifts(problem, feature=lambda step: step.x, width=16, depth=1)[1:]
    posterior = problem.posterior(drifts)
    Trainer(posterior, OnPolicy(posterior, 4)).fit(problem.no_measurement, 2, log=str)

def test_a_run_that_ends_worse_says_so():
    torch.manual_seed(0)
    said = []
    problem = plane(8)
    exact = BestDrift(ExactChain(problem, torch.ones(1, 1)))
    posterior = problem.posterior([exact, NetDrift(VectorNet(4, 2, width=16))])
    wild = torch.optim.Adam(posterior.drifts.parameters(), lr=.3)
    t = Trainer(posterior, OnPolicy(posterior, 64), opt=wild, guard=None, clip=math.inf)
    t.fit(torch.ones(1, 1), 16, warmup=16, anneal=0, log=said.append)
    assert 'it began better than it ends' in said[-1]

def test_maximum_likelihood_brings_its_own_measurements():
    problem = plane(8)
    q = problem.posterior([Gate(MomentMatching(.25))])
    with pytest.raises(ValueError, match='fit\\(None'):
        MaximumLikelihood(q, Bank.of(problem.prior, 8)).fit(torch.ones(1, 1), 2, log=str)

def test_a_level_of_noise_alone_is_no_dead_gradient():
    "An exact guess there does not depend on the noise, and DPS has nothing to follow"
    problem = plane(steps=4)
    y = problem.likelihood(problem.prior.sample(1)).sample()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        x = problem.posterior([DPS()]).sample(y, 4)
    assert x.isfinite().all()

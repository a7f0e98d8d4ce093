"The core's promises, for all chapters: clear refusals, reproducible runs, nothing lost"
import copy, math, pickle

import numpy as np, pytest, torch
from rtb_nb.beds import plane as plane_of
from rtb_nb.behaviours import Mixture, OnPolicy
from rtb_nb.checkpoints import load_tensors, save_tensors
from rtb_nb.correlated import CovarianceMatching
from rtb_nb.denoise import EpsDenoiser, MixtureDenoiser, VDenoiser
from rtb_nb.diffusion import Diffusion, Trajectories, gaussian
from rtb_nb.posterior import Posterior
from rtb_nb.drifts import NetDrift
from rtb_nb.exact import ExactChain, ExactMixture
from rtb_nb.guidance import (CLA, DPS, Gate, GaussianMatching, GuideShift, LikelihoodGradient,
    MomentMatching, PiGDM, ProximalMatching, likelihood_slope)
from rtb_nb.likelihood import InverseProblem, Likelihood, Tilted
from rtb_nb.photons import PhotonNoise
from rtb_nb.networks import VectorNet
from rtb_nb.nonlinear import FourierMagnitude
from rtb_nb.objective import RTB, ScalarLogZ, VarGrad
from rtb_nb.operators import Identity, Mask, Matrix
from rtb_nb.priors import load_prior
from rtb_nb.replay import Buffer, Replay
from rtb_nb.schedule import Cosine
from rtb_nb.train import (Diverged, Guard, Trainer, image_drifts, path_gradient,
    vector_drifts)

Y = torch.tensor([[.9]])

def plane(steps=10, noise_std=.1): return plane_of(steps, noise_std)

def learned(problem): return problem.posterior([NetDrift(VectorNet(4, 2, width=16))])

def trainer(seed=0, noise_std=.1, steps=10, **kw):
    "A trainer with every part that has a state: replay, log Z, averages"
    torch.manual_seed(seed)
    posterior = learned(plane(steps, noise_std))
    buffer = Buffer(64, (2,), (1,))
    behaviour = Mixture(OnPolicy(posterior, 12, buffer), Replay(posterior, buffer, 4, d=3))
    return Trainer(posterior, behaviour, RTB(ScalarLogZ(-1.)), updates=2, **kw)

def corrupt(tmp_path):
    path = tmp_path/'bad.safetensors'
    path.write_bytes(b'not a checkpoint')
    return path

def guided(*drifts, operator=None, noise=.1):
    "Two samples of the plane under these drifts"
    operator = operator or Matrix(torch.tensor([[1., 0.]]))
    likelihood = Likelihood(operator, noise if isinstance(noise, float) else None,
        None if isinstance(noise, float) else noise)
    problem = InverseProblem(plane().prior, likelihood)
    return problem.posterior(list(drifts)).sample(torch.ones(1, *problem.y_shape), 2)

def nested(): return plane().posterior([GaussianMatching()]).given(Y)

def mixture_prior():
    modes = MixtureDenoiser(torch.zeros(2, 2), .1, schedule=Cosine())
    return Diffusion(modes, (2,), error=lambda t: t)

def bare(prior=None): # a problem whose operator knows nothing of itself
    return InverseProblem(prior or plane().prior, Likelihood(torch.sin, .1))

def blind(): # a prior whose guess has no gradient
    class Blind(type(plane().prior.denoiser)):
        def forward(self, x, t): return super().forward(x, t).detach()
    problem = plane()
    problem.prior.denoiser.__class__ = Blind
    return problem

def bare_of(operator): return InverseProblem(plane().prior, Likelihood(operator, .1))

def counted(y):
    return Likelihood(Identity(1), noise=PhotonNoise(5)).take(y, (1,), torch.zeros(()))

def tilted(log_r): return Tilted(plane().prior, log_r)

def laplace(mean): return torch.distributions.Laplace(mean, 1.)

def after(drift): # a second measurement, of a posterior
    return InverseProblem(nested(), plane().likelihood).posterior([drift]).sample(Y, 2)

def nowhere(x): return x[:, 0]*math.nan
def too_many(x): return x

refusals = {
    'uncalibrated': (lambda _: Diffusion(VDenoiser(VectorNet(2, 2), Cosine()), (2,)),
        ValueError, 'calibrate'),
    'eps from pure noise': (lambda _: Diffusion(EpsDenoiser(VectorNet(2, 2), Cosine()), (2,),
        error=lambda t: t), ValueError, 'pass a start below 1'),
    'no paths': (lambda _: plane().prior.simulate(0),
        ValueError, 'number of paths must be a positive whole number, got 0'),
    'half a path': (lambda _: plane().prior.sample(2.5), ValueError, 'got 2.5'),
    'orders mixed up': (lambda _: plane().posterior([]).simulate(4, Y),
        ValueError, 'y comes first, then the number'),
    'y batch': (lambda _: plane().posterior([]).simulate(torch.zeros(3, 1), 4),
        ValueError, 'each of the 4 paths'),
    'y not finite': (lambda _: plane().posterior([]).simulate([[math.nan]], 4),
        ValueError, '1 non-finite values'),
    'y shape': (lambda _: plane().posterior([]).simulate(torch.zeros(1, 2), 4),
        ValueError, 'y has shape (1, 2), expected (M, 1)'),
    'y without a batch': (lambda _: plane().posterior([]).draw([.9], 4),
        ValueError, 'add a batch dimension'),
    'y of words': (lambda _: plane().measurement(['bright']), TypeError, 'got list of <U6'),
    'y ragged': (lambda _: plane().measurement([[.9], [.1, .2]]),
        TypeError, 'got list of object'),
    'y a dict': (lambda _: plane().measurement({'y': 1.}),
        TypeError, 'a measurement is a tensor, an array or a list'),
    'y complex': (lambda _: plane().measurement(torch.ones(1, 1)*1j),
        TypeError, 'a measurement is real'),
    'y of a bare callable': (lambda _: bare().measurement(torch.zeros(1, 3)),
        ValueError, 'expected (M, 2)'),
    'row of a magnitude': (lambda _: InverseProblem(load_prior('galaxies-32', 2), Likelihood(
        FourierMagnitude((1, 32, 32)), .1)).measurement(torch.zeros(1, 48, 48)),
        ValueError, 'expected (M, 1, 48, 48)'),
    'y in a likelihood': (
        lambda _: plane().log_likelihood(torch.zeros(2, 2), torch.zeros(1, 3)),
        ValueError, 'expected (M, 1)'),
    'y to train on': (lambda _: trainer().fit(torch.zeros(1, 2), 2),
        ValueError, 'y has shape (1, 2)'),
    'y of a closed form': (lambda _: ExactChain(plane(), torch.zeros(2, 1)),
        ValueError, 'one measurement (1, ...), got 2'),
    'y of a given posterior': (lambda _: plane().posterior([]).given(torch.zeros(1, 4)),
        ValueError, 'y has shape (1, 4)'),
    'two measurements given': (lambda _: plane().posterior([]).given(torch.zeros(2, 1)),
        ValueError, 'each of the 1 paths'),
    'half a photon': (lambda _: counted([[-.8]]),
        ValueError, 'no whole count of photons, such as -0.8'),
    'negative count': (lambda _: counted([[-1.4]]),
        ValueError, 'no whole count of photons, such as -1.4'),
    'photons': (lambda _: PhotonNoise(0),
        ValueError, 'photons must be a positive number, got 0'),
    'dark over bright': (lambda _: PhotonNoise(5, dark=2.),
        ValueError, 'dark must lie below bright, got 2.0 and 1.0'),
    'no background': (lambda _: PhotonNoise(5, background=0),
        ValueError, 'background must be a positive number'),
    'noised shape': (lambda _: plane().prior.noised(torch.zeros(4, 3)),
        ValueError, 'events of shape (2,), got (3,)'),
    'noise_std': (lambda _: Likelihood(Matrix(torch.eye(2)), 0),
        ValueError, 'noise_std must be a positive number, got 0'),
    'noise_std of words': (lambda _: Likelihood(Matrix(torch.eye(2)), 'loud'),
        ValueError, "got 'loud'"),
    'no noise': (lambda _: Likelihood(Matrix(torch.eye(2))),
        ValueError, 'noise_std must be a positive number, got None'),
    'two noises': (lambda _: Likelihood(Matrix(torch.eye(2)), .1, PhotonNoise(5)),
        ValueError, 'not both'),
    'noise no function': (lambda _: Likelihood(Matrix(torch.eye(2)), noise=3),
        TypeError, 'got int'),
    'no operator': (lambda _: Likelihood(None, .1), TypeError, 'an operator is a callable'),
    'a map of noise': (lambda _: Likelihood(Matrix(torch.eye(2)), torch.ones(1, 2)),
        ValueError, 'one number, got shape (1, 2): for a map of noise'),
    'one answer for all': (lambda _: bare_of(lambda x: x.mean(0, keepdim=True)).simulate(3),
        ValueError, 'answers 3 images with shape (1, 2): it must answer (B, ...)'),
    'a number for each': (lambda _: bare_of(lambda x: x.sum(1)).measurement(torch.ones(2)),
        ValueError, 'x.sum(1, keepdim=True)'),
    'an image for y': (lambda _: plane().measurement(torch.zeros(1, 2)),
        ValueError, 'the shape of an image, which problem.operator(image) measures'),
    'an operator for a likelihood': (
        lambda _: InverseProblem(plane().prior, Matrix(torch.eye(2))),
        TypeError, 'and a Likelihood(operator, noise_std), got Diffusion and Matrix'),
    'a name for a prior': (lambda _: InverseProblem('mnist-32', plane().likelihood),
        TypeError, 'got str and Likelihood'),
    'a drift for drifts': (lambda _: plane().posterior(CLA()),
        TypeError, 'a list of drifts, such as [MomentMatching()], got CLA'),
    'a denoiser without a gradient': (lambda _: blind().posterior([DPS()]).sample(Y, 2),
        ValueError, 'the denoiser lets no gradient through'),
    'a class for a drift': (lambda _: plane().posterior([CLA]),
        TypeError, 'such as [MomentMatching()], got CLA'),
    'half a sample': (lambda _: plane().posterior([]).sample(Y, 2.),
        ValueError, 'n must be a positive whole number, got 2.0'),
    'a class in a gate': (lambda _: Gate(CLA), TypeError, 'such as MomentMatching(), got'),
    'a function for a denoiser': (lambda _: Diffusion(lambda x, t: x, (2,)),
        TypeError, 'wrap a net, EpsDenoiser(net, Cosine()).calibrate(x0)'),
    'a number for a shape': (lambda _: Diffusion(plane().prior.denoiser, 2),
        TypeError, 'such as (1, 32, 32), got 2'),
    'a name for a covariance': (lambda _: CovarianceMatching('sources-32'),
        TypeError, "load_covariance('sources-32')"),
    'no gradient': (
        lambda _: guided(LikelihoodGradient(), operator=lambda x: x.detach().round()),
        ValueError, 'the operator lets no gradient through'),
    'no gradient for DPS': (lambda _: guided(DPS(), operator=lambda x: x.detach().round()),
        ValueError, 'the operator lets no gradient through'),
    'a rate for an optimiser': (lambda _: trainer(opt=1e-3),
        TypeError, 'such as gentle_optimiser(posterior, 1e-3), got 0.001'),
    'images for vectors': (lambda _: vector_drifts(InverseProblem(load_prior('mnist-32', 2),
        Likelihood(torch.sin, .1))), ValueError, 'events (D,) and y (m,), got (1, 32, 32)'),
    'vectors for images': (lambda _: image_drifts(plane()),
        ValueError, 'shape must be (C, H, W), got (2,)'),
    'no measurement': (lambda _: plane().posterior([]).log_weight(plane().prior.simulate(2)),
        ValueError, 'carry no measurement'),
    'no likelihood': (lambda _: Posterior(plane().prior, []).problem,
        ValueError, 'problem.posterior(drifts)'),
    'posterior for a prior': (
        lambda _: InverseProblem(plane().posterior([]), plane().likelihood),
        TypeError, 'posterior.given(y)'),
    'under another shape': (
        lambda _: plane().posterior([]).under(bare(load_prior('galaxies-32', 2))),
        ValueError, 'events of shape (2,)'),
    'paths of another chain': (
        lambda _: plane(5).posterior([]).log_ratio(plane(8).prior.simulate(2)),
        ValueError, 'these paths have 8 steps, the posterior 5'),
    'a longer chain scored': (lambda _: plane(5).prior.log_prob(plane(8).prior.simulate(2)),
        ValueError, '8 steps, the chain 5'),
    'nonlinear': (lambda _: guided(CLA(), operator=torch.sin),
        ValueError, 'CLA needs a linear operator'),
    'nonlinear matching': (lambda _: guided(MomentMatching(1.), operator=torch.sin),
        ValueError, 'MomentMatching needs a linear'),
    'other noise guides': (lambda _: guided(CLA(), noise=laplace),
        ValueError, 'needs Gaussian noise'),
    'pixel variance': (lambda _: MomentMatching(0), ValueError, "the prior's pixel variance"),
    'guidance without y': (lambda _: Posterior(plane().prior, [CLA()]).sample(None, 2),
        ValueError, 'CLA needs a measurement'),
    'gate knots': (lambda _: Gate(CLA(), knots=1),
        ValueError, 'knots must be a whole number of at least 2, got 1'),
    'exact needs Gaussian': (
        lambda _: ExactChain(InverseProblem(mixture_prior(), plane().likelihood), Y),
        ValueError, 'needs a GaussianDenoiser prior, got MixtureDenoiser'),
    'exact needs a matrix': (lambda _: ExactChain(bare(), Y),
        ValueError, 'linear operator with a matrix'),
    'no exact paths': (lambda _: ExactChain(plane(), Y).paths(0), ValueError, 'got 0'),
    'dead zone over bound': (lambda _: RTB(dead_zone=2., bound=1.),
        ValueError, 'bound must exceed the dead zone 2.0, got 1.0'),
    'lonely path': (lambda _: VarGrad()(torch.zeros(3), torch.tensor([[0.], [0.], [1.]])),
        ValueError, 'at least two paths'),
    'mixture needs mixture': (lambda _: ExactMixture(plane(), Y),
        ValueError, 'needs a MixtureDenoiser prior, got GaussianDenoiser'),
    'tilt shape': (
        lambda _: tilted(too_many).log_likelihood(torch.zeros(3, 2), torch.zeros(1, 0)),
        ValueError, 'one number per sample (3,), got (3, 2)'),
    'tilt simulates': (lambda _: tilted(too_many).simulate(2),
        TypeError, 'use prior.sample'),
    'tilt measured': (lambda _: tilted(too_many).posterior([]).sample(Y, 2),
        ValueError, 'use problem.no_measurement'),
    'tilt noise': (lambda _: tilted(too_many).noise_std,
        ValueError, 'has no noise'),
    'DPS scale': (lambda _: DPS(0), ValueError, 'scale must be a positive number, got 0'),
    'PiGDM variance': (lambda _: PiGDM(-1),
        ValueError, 'variance must be a positive number, got -1'),
    'gradient clip': (lambda _: LikelihoodGradient(clip=0),
        ValueError, 'clip must be a positive number'),
    'matching needs Gaussian': (lambda _: GaussianMatching(torch.nn.Identity()),
        ValueError, 'needs a GaussianDenoiser, got Identity'),
    'log Z from nothing': (
        lambda _: ScalarLogZ.of(tilted(nowhere).posterior([]), torch.zeros(1, 0), 4),
        ValueError, 'none of 4 paths'),
    'nothing to train': (lambda _: Trainer(plane().posterior([]), None),
        ValueError, 'nothing to train'),
    'fraction': (lambda _: trainer(fraction=0),
        ValueError, 'fraction must lie in (0, 1], got 0'),
    'clip': (lambda _: trainer(clip=0), ValueError, 'clip must be a positive'),
    'decay': (lambda _: trainer(decay=1.), ValueError, 'decay must lie in [0, 1), got 1.0'),
    'iterations': (lambda _: trainer().fit(Y, 0),
        ValueError, 'iterations must be a positive whole number, got 0'),
    'warmup': (lambda _: trainer().fit(Y, 2, warmup=-1), ValueError, 'warmup must be'),
    'anneal': (lambda _: trainer().fit(Y, 2, anneal=2),
        ValueError, 'anneal must lie in [0, 1], got 2'),
    'every': (lambda _: trainer().fit(Y, 2, every=0),
        ValueError, 'every must be a positive whole number, got 0'),
    'no checkpoint': (lambda d: trainer().load(d/'none.safetensors'),
        FileNotFoundError, 'there is no file'),
    'bad checkpoint': (lambda d: trainer().load(corrupt(d)),
        ValueError, 'is not a safetensors file'),
    'proximal stretch': (lambda _: ProximalMatching(1., 0),
        ValueError, 'stretch must be a positive number, got 0'),
    'proximal sweeps': (lambda _: ProximalMatching(1., sweeps=0),
        ValueError, 'sweeps must be a positive whole number, got 0'),
    'moments of a posterior': (lambda _: after(MomentMatching()),
        ValueError, 'needs the denoiser of the prior'),
    'slope of a posterior': (lambda _: after(NetDrift(VectorNet(6, 2), likelihood_slope)),
        ValueError, 'a posterior has none'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name, tmp_path):
    call, error, message = refusals[name]
    with pytest.raises(error) as caught: call(tmp_path)
    assert message in str(caught.value), str(caught.value)
    assert '\n' not in str(caught.value)
    left = [p for p in tmp_path.iterdir() if p.name != 'bad.safetensors']
    assert not left, 'something was left behind'

def test_gradients_are_refused_in_inference_mode_and_made_without_grad():
    with torch.no_grad(): assert guided(DPS()).shape == (2, 2)
    with torch.no_grad(): assert trainer().fit(Y, 1, log=str).step == 1
    with torch.inference_mode():
        assert guided(MomentMatching()).shape == (2, 2)
        for call in (lambda: guided(DPS()), lambda: guided(LikelihoodGradient()),
                     lambda: trainer().fit(Y, 1)):
            with pytest.raises(RuntimeError, match='use torch.no_grad'): call()

KINDS = [np.array([[.9]]), [[.9]], np.array([[.9, 0.]])[:, ::-1][:, 1:],
    np.array([[.9]], dtype='>f4'), torch.tensor([[.9]], dtype=torch.float64),
    torch.tensor([[.9]], requires_grad=True)]

@pytest.mark.parametrize('y', KINDS, ids=str)
def test_a_measurement_is_taken_as_it_comes(y):
    "float64, numpy, lists, memory layouts, byte orders: the same samples to the bit"
    posterior = plane().posterior([MomentMatching()])
    samples = []
    for v in (Y, y):
        torch.manual_seed(0)
        samples.append(posterior.sample(v, 3))
    assert torch.equal(*samples)
    assert trainer().fit(y, 2, log=str).history == trainer().fit(Y, 2, log=str).history

def test_two_measurements_in_a_row_are_both_at_once():
    "A posterior as a prior keeps its drift: in simulating, scoring, RTB and evidence"
    prior, rows = plane().prior, torch.tensor([[1., 0.], [.5, 1.]])
    measure = lambda prior, i: InverseProblem(prior, Likelihood(Matrix(rows[i]), .3))
    first = measure(prior, [0]).posterior([GaussianMatching()])
    later = measure(first.given([[.9]]), [1])
    torch.manual_seed(0)
    bare = first.simulate([[.9]], 50)
    torch.manual_seed(0)
    again = first.given([[.9]]).simulate(50)
    torch.testing.assert_close(bare.x, again.x, rtol=1e-5, atol=1e-5)
    tau = later.posterior([]).simulate([[-.1]], 50)
    both = Trajectories(tau.x, torch.tensor([[.9, -.1]]).expand(50, 2))
    alone = Trajectories(tau.x, torch.tensor([[.9]]).expand(50, 1))
    row = later.posterior([]).log_weight(tau) + first.log_weight(alone)
    joint = measure(prior, [0, 1])
    whole = joint.log_likelihood(tau.x0, both.y) - first.log_ratio(alone)
    torch.testing.assert_close(row, whole, rtol=1e-4, atol=1e-3)
    start = later.posterior([NetDrift(VectorNet(4, 2))])
    fitted = Trainer(start, OnPolicy(start, 8)).fit([[-.1]], 2, log=str)
    assert math.isfinite(fitted.history[-1]['elbo'])

def test_half_precision_stays_in_the_network():
    "The chain's numbers and the sums over pixels are those of the prior in single precision"
    whole, half = load_prior('galaxies-32', 8), load_prior('galaxies-32', 8).to(torch.bfloat16)
    assert half.chain.std.dtype == torch.float64
    assert torch.equal(whole.chain.std, half.chain.std)
    torch.manual_seed(0)
    tau = whole.simulate(4)
    assert half.dtype == half.start((2, 1, 32, 32)).sample().dtype == torch.float32
    assert half.denoise(tau.x[3], 3).dtype == torch.float32
    assert (half.denoise(tau.x[3], 3) - whole.denoise(tau.x[3], 3)).abs().mean() < .01
    single, lossy = whole.log_prob(tau), half.log_prob(tau)
    assert lossy.dtype == torch.float32 and (single - lossy).abs().max() < 5

def test_images_need_not_be_square():
    size = (1, 8, 16)
    net = torch.nn.Conv2d(1, 1, 1)
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x, t): return self.net(x)
    denoiser = VDenoiser(Net(), Cosine()).calibrate(torch.randn(8, *size)/4)
    seen = Likelihood(Mask(torch.rand(size) > .5), .1)
    problem = InverseProblem(Diffusion(denoiser, size, 3), seen)
    posterior = problem.posterior(image_drifts(problem, MomentMatching(.1), width=16, depth=1))
    fitted = Trainer(posterior, OnPolicy(posterior, 4)).fit(problem.simulate(1)[1], 2, log=str)
    assert fitted.averaged.sample(problem.simulate(1)[1], 2).shape == (2, *size)

def test_a_posterior_can_be_pickled_and_copied():
    guide = MomentMatching()
    posterior = plane().posterior([Gate(guide), NetDrift(VectorNet(6, 2), GuideShift(guide))])
    torch.manual_seed(0)
    tau = posterior.simulate(Y, 3)
    for twin in (pickle.loads(pickle.dumps(posterior)), copy.deepcopy(posterior)):
        again = twin.log_ratio(Trajectories(tau.x, tau.y))
        torch.testing.assert_close(again, posterior.log_ratio(tau))
        assert twin.drifts[0].drift is twin.drifts[1].features[0].drift

def test_drifts_go_where_the_problem_goes():
    "One drift, another operator, noise or chain: what it reads is the step's"
    drift = MomentMatching()
    see = lambda mask: InverseProblem(plane().prior, Likelihood(Mask(mask), .1))
    left, right = see([1, 0]), see([0, 1])
    moved = left.posterior([drift]).under(right)
    assert moved.drifts[0] is drift
    torch.manual_seed(0)
    a = moved.sample(Y, 200)
    torch.manual_seed(0)
    assert torch.equal(a, right.posterior([MomentMatching()]).sample(Y, 200))
    longer = left.posterior([drift]).under(plane(30))
    assert longer.steps == 30 and longer.sample(Y, 2).shape == (2, 2)

def weights(t):
    parts = *t.posterior.drifts.parameters(), *t.average.parameters(), *t.objective.parameters()
    return [p.detach().clone() for p in parts]

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

def test_same_seed_same_bits():
    a, b, c = (weights(trainer(seed).fit(Y, 4, log=str)) for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)

def test_resumed_equals_unbroken(tmp_path):
    whole = trainer().fit(Y, 6, log=str)
    halves = []
    for cut in (2, 4):
        part = trainer(path=tmp_path/f'{cut}.safetensors')
        with pytest.raises(KeyboardInterrupt): part.fit(Y, 6, every=cut, log=interrupt)
        resumed = trainer(seed=7)
        resumed.load(tmp_path/f'{cut}.safetensors')
        assert resumed.step == cut
        halves.append(resumed.fit(Y, 6, log=str))
    for r in halves:
        assert same(weights(whole), weights(r))
        assert r.history == whole.history

def interrupt(line): raise KeyboardInterrupt

def test_a_checkpoint_knows_what_it_belongs_to(tmp_path):
    path, said = tmp_path/'run.safetensors', []
    trainer(path=path).fit(Y, 4, log=str)
    trainer(path=path).resume().fit(Y, 4, log=said.append)
    assert len(said) == 1 and 'has 4 iterations already: nothing to do' in said[0]
    others = {'another y': dict(y=-Y), 'another noise': dict(noise_std=.2),
              'another chain': dict(steps=12)}
    for message, change in others.items():
        y = change.pop('y', Y)
        with pytest.raises(ValueError, match=message):
            trainer(path=path, **change).resume().fit(y, 8, log=str)
    other = InverseProblem(plane().prior, Likelihood(Matrix(torch.tensor([[0., 1.]])), .1))
    posterior, mine = learned(other), trainer(path=path)
    mine.posterior, mine.problem = posterior, other
    with pytest.raises(ValueError, match='another operator'): mine.resume().fit(Y, 8, log=str)
    with pytest.raises(ValueError, match='another y'):
        trainer().fit(Y, 2, log=str).fit(2*Y, 4, log=str)
    assert trainer(path=path).resume().step == 4, 'a refusal leaves the file as it is'

def test_a_checkpoint_of_another_tilt_is_refused(tmp_path):
    path = tmp_path/'run.safetensors'
    def run(log_r, steps):
        p = tilted(log_r)
        q = p.posterior([NetDrift(VectorNet(4, 2, width=8))])
        Trainer(q, OnPolicy(q, 4), path=path).resume().fit(p.no_measurement, steps, log=str)
    run(lambda x: x[:, 0], 2)
    run(lambda x: x[:, 0], 4)
    with pytest.raises(ValueError, match='another operator'): run(lambda x: x[:, 1], 6)

def test_a_checkpoint_of_another_network_is_one_line(tmp_path):
    trainer(path=tmp_path/'run.safetensors').fit(Y, 2, log=str)
    wide = plane().posterior([NetDrift(VectorNet(4, 2, width=32))])
    with pytest.raises(ValueError) as caught:
        Trainer(wide, OnPolicy(wide, 8)).load(tmp_path/'run.safetensors')
    assert '\n' not in str(caught.value) and 'does not fit' in str(caught.value)

def test_paths_of_another_chain_are_not_trained_on():
    t = trainer()
    t.behaviour = OnPolicy(learned(plane(8)), 8)
    with pytest.raises(ValueError, match='gives paths of 8 steps, the posterior has 10'):
        t.fit(Y, 2)

def test_no_warmup():
    assert trainer().fit(Y, 2, warmup=0, log=str).step == 2

def test_a_failed_write_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path/'state.safetensors'
    save_tensors(path, {'a': torch.ones(2)}, {'step': 1})
    with pytest.raises(Exception): save_tensors(path, {'a': 'no tensor'}, {'step': 2})
    with pytest.raises(TypeError): save_tensors(path, {'a': torch.ones(2)}, {'step': object()})
    assert load_tensors(path)[1] == {'step': 1}

BROKEN = [(None, '20 batches in a row were not finite', 20),
          (Guard(limit=3), '4 returns to a good state', 4)]

@pytest.mark.parametrize('guard, message, skipped', BROKEN)
def test_nonfinite_batches_are_skipped_and_counted(guard, message, skipped, tmp_path):
    t = trainer(guard=guard, path=tmp_path/'run.safetensors')
    class Broken(torch.nn.Module):
        def forward(self, y):
            tau = t.posterior.simulate(y, 8)
            tau.x[3, 0] = math.nan
            return tau
    before = weights(t)
    t.behaviour = Broken()
    with pytest.raises(Diverged, match=message): t.fit(Y, 30, log=str)
    assert t.skipped == skipped and same(before, weights(t))
    assert len(t.events) == (skipped if guard else 0)

def test_batch_size_does_not_matter():
    posterior = plane().posterior([MomentMatching(.25)])
    torch.manual_seed(0)
    tau = posterior.simulate(torch.randn(9, 1), 9)
    whole = posterior.log_weight(tau)
    single = torch.cat([posterior.log_weight(tau[i:i+1]) for i in range(9)])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)

def test_chunked_gradient_is_the_full_one():
    problem = plane()
    torch.manual_seed(0)
    posterior = learned(problem)
    for p in posterior.drifts.parameters(): torch.nn.init.normal_(p, std=.2)
    tau = posterior.simulate(Y, 16)
    log_r, grads = problem.log_likelihood(tau.x0, tau.y), []
    for chunk in (16, 48, 10**6):
        posterior.drifts.zero_grad()
        path_gradient(posterior, RTB(), tau, log_r, chunk=chunk)
        grads.append(torch.cat([p.grad.flatten() for p in posterior.drifts.parameters()]))
    posterior.drifts.zero_grad()
    RTB()(posterior.log_weight(tau), tau.y).backward()
    full = torch.cat([p.grad.flatten() for p in posterior.drifts.parameters()])
    for g in grads: assert (g-full).norm() < 1e-5*full.norm()

def test_log_prob_agrees_with_torch_distributions():
    mean, std, x = torch.randn(3, 2, 4, 4), .3, torch.randn(3, 2, 4, 4)
    cov = .09*torch.eye(32).double()
    q = torch.distributions.MultivariateNormal(mean.flatten(1).double(), cov)
    reference = q.log_prob(x.flatten(1).double())
    found = gaussian(mean, std).log_prob(x).double()
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-4)

def physics(sigma):
    "What deepinv would call a Physics with Gaussian noise, without deepinv"
    class GaussianNoise: pass
    class Physics(torch.nn.Module):
        def A(self, x): return 2*x
    Physics.__module__ = 'deepinv.physics'
    made, noise = Physics(), GaussianNoise()
    noise.sigma = torch.tensor(sigma)
    made.noise_model, made.sensor_model = noise, torch.nn.Identity()
    return made

def test_a_physics_brings_its_noise():
    assert Likelihood(physics(.2)).noise_std == .2
    assert Likelihood(physics(.2), .2).noise_std == .2
    with pytest.raises(ValueError, match='noise of 0.2 of its own, got noise_std 0.1'):
        Likelihood(physics(.2), .1)

@pytest.mark.parametrize('form', [list, tuple, iter, torch.nn.ModuleList])
def test_drifts_come_as_any_sequence(form):
    drifts = [GaussianMatching(), NetDrift(VectorNet(4, 2, width=16))]
    assert list(plane().posterior(form(drifts)).drifts) == drifts

"The core's promises, checked once for all chapters: clear refusals, reproducible runs, nothing lost"
import math
import numpy as np, pytest, torch
from rtb_nb.data import load_labels, load_mnist, to_signed
from rtb_nb.denoise import EpsDenoiser, GaussianDenoiser, MixtureDenoiser, VDenoiser, gaussian_field
from rtb_nb.diffusion import Diffusion, Drift, Drifted, Trajectories, gaussian
from rtb_nb.experiment import fan_out
from rtb_nb.explore import Buffer, Mixture, OnPolicy, Replay, resimulate
from rtb_nb.guidance import CLA, DPS, Gate, GaussianMatching, MomentMatching, PiGDM, ProximalMatching
from rtb_nb.likelihood import ExactChain, ExactMixture, InverseProblem, Likelihood, PhotonNoise, Tilted
from rtb_nb.metrics import interval_coverage, judge, mode_weights, train_classifier
from rtb_nb.networks import NetDrift, PatchTransformer, UNet, VectorNet, load_tensors, save_tensors
from rtb_nb.objective import RTB, ScalarLogZ, VarGrad
from rtb_nb.operators import Matrix
from rtb_nb.priors import load_prior, train_prior
from rtb_nb.schedule import VE, Bridge, Cosine, Table, levels
from rtb_nb.train import Diverged, Guard, Trainer, path_gradient

Y = torch.tensor([[.9]])

def plane(steps=10, noise_std=.1):
    prior = Diffusion(GaussianDenoiser(torch.tensor([.3, -.2]), torch.tensor([[1., .8], [.8, 1.]])/4, Cosine(.5)), (2,), steps, last_noise=.05)
    return InverseProblem(prior, Likelihood(Matrix(torch.tensor([[1., 0.]])), noise_std))

def learned(problem): return Drifted(problem.prior, [NetDrift(VectorNet(4, 2, width=16))])

def trainer(seed=0, **kw):
    "A trainer with every part that has a state: replay, log Z, averages"
    torch.manual_seed(seed)
    problem = plane()
    posterior = learned(problem)
    buffer = Buffer(64, (2,), (1,))
    behaviour = Mixture(OnPolicy(posterior, 12, buffer), Replay(posterior, buffer, 4, d=3))
    return Trainer(problem, posterior, behaviour, RTB(ScalarLogZ(-1.)), updates=2, **kw)

def unlabelled(tmp_path):
    np.savez(tmp_path/'few.npz', train=np.zeros((2, 28, 28), np.uint8))
    return tmp_path/'few.npz'

def corrupt(tmp_path):
    path = tmp_path/'bad.safetensors'
    path.write_bytes(b'not a checkpoint')
    return path

refusals = {
    'no steps': (lambda _: levels(Cosine(), 0), ValueError, 'steps must be a positive whole number, got 0'),
    'fractional steps': (lambda _: levels(Cosine(), 2.5), ValueError, 'got 2.5'),
    'clean end': (lambda _: levels(Cosine(), 4, last_noise=0), ValueError, 'last_noise must lie in (0, 1), got 0'),
    'late start': (lambda _: levels(Cosine(), 4, start=1.5), ValueError, 'start must be a time in (0, 1], got 1.5'),
    'end before start': (lambda _: levels(Cosine(), 4, start=.01), ValueError, 'not before the start'),
    'negative scale': (lambda _: Cosine(-1), ValueError, 'scale must be positive, got -1'),
    'VE upside down': (lambda _: VE(1., .1), ValueError, 'sigma_min < sigma_max, got 1.0 and 0.1'),
    'table grows': (lambda _: Table(torch.tensor([.1, .5])), ValueError, 'must decrease within (0, 1)'),
    'cov shape': (lambda _: GaussianDenoiser(torch.zeros(2), torch.eye(3), Cosine()), ValueError, 'cov must be (2, 2)'),
    'cov indefinite': (lambda _: GaussianDenoiser(torch.zeros(2), torch.diag(torch.tensor([1., -1.])), Cosine()), ValueError, 'smallest eigenvalue is -1'),
    'mixture weights': (lambda _: MixtureDenoiser(torch.zeros(3, 2), .1, torch.ones(2), Cosine()), ValueError, '3 non-negative numbers'),
    'mixture std': (lambda _: MixtureDenoiser(torch.zeros(3, 2), 0., schedule=Cosine()), ValueError, 'std must be positive, got 0'),
    'uncalibrated': (lambda _: Diffusion(VDenoiser(VectorNet(2, 2), Cosine()), (2,)), ValueError, 'call calibrate(x0)'),
    'eps from pure noise': (lambda _: Diffusion(EpsDenoiser(VectorNet(2, 2), Cosine()), (2,), error=lambda t: t), ValueError, 'pass start below 1'),
    'no paths': (lambda _: plane().prior.simulate(0), ValueError, 'number of paths must be positive, got 0'),
    'y batch': (lambda _: plane().prior.simulate(4, torch.zeros(3, 1)), ValueError, 'each of the 4 paths'),
    'y not finite': (lambda _: plane().prior.simulate(4, torch.tensor([[math.nan]])), ValueError, '1 non-finite values'),
    'noised shape': (lambda _: plane().prior.noised(torch.zeros(4, 3)), ValueError, 'events of shape (2,), got (3,)'),
    'noise_std': (lambda _: Likelihood(Matrix(torch.eye(2)), 0), ValueError, 'noise_std must be a positive finite number'),
    'no measurement': (lambda _: plane().log_likelihood(plane().prior.simulate(2)), ValueError, 'carry no measurement'),
    'nonlinear': (lambda _: CLA(Likelihood(torch.sin, .1)), ValueError, 'CLA needs a linear operator'),
    'pixel variance': (lambda _: MomentMatching(plane().likelihood, 0), ValueError, 'variance must be positive'),
    'guidance without y': (lambda _: Drifted(plane().prior, [CLA(plane().likelihood)]).simulate(2), ValueError, 'CLA needs a measurement'),
    'gate knots': (lambda _: Gate(CLA(plane().likelihood), knots=1), ValueError, 'at least two knots, got 1'),
    'exact needs Gaussian': (lambda _: ExactChain(InverseProblem(Diffusion(MixtureDenoiser(torch.zeros(2, 2), .1, schedule=Cosine()), (2,), error=lambda t: t),
        plane().likelihood), Y), ValueError, 'needs a GaussianDenoiser prior, got MixtureDenoiser'),
    'dead zone over bound': (lambda _: RTB(dead_zone=2., bound=1.), ValueError, 'bound must exceed the dead zone 2.0, got 1.0'),
    'lonely path': (lambda _: VarGrad()(torch.zeros(3), torch.tensor([[0.], [0.], [1.]])), ValueError, 'at least two paths'),
    'bridge': (lambda _: Bridge(0), ValueError, 'std must be positive, got 0'),
    'field': (lambda _: gaussian_field(8, .4, -1, Cosine()), ValueError, 'length > 0, got 8, 0.4 and -1'),
    'mixture needs mixture': (lambda _: ExactMixture(plane(), Y), ValueError, 'needs a MixtureDenoiser prior, got GaussianDenoiser'),
    'tilt shape': (lambda _: Tilted(plane().prior, lambda x: x).log_reward(torch.zeros(3, 2), None), ValueError, 'one number a sample (3,), got (3, 2)'),
    'tilt simulates': (lambda _: Tilted(plane().prior, lambda x: x).simulate(2), TypeError, 'use prior.sample'),
    'DPS scale': (lambda _: DPS(plane().likelihood, plane().prior.denoiser, 0), ValueError, 'scale must be positive, got 0'),
    'PiGDM variance': (lambda _: PiGDM(plane().likelihood, plane().prior.denoiser, -1), ValueError, 'variance must be positive'),
    'matching needs Gaussian': (lambda _: GaussianMatching(plane().likelihood, torch.nn.Identity()), ValueError, 'needs a GaussianDenoiser, got Identity'),
    'log Z from nothing': (lambda _: ScalarLogZ.of(Tilted(plane().prior, lambda x: x[:, 0]*math.nan), Drifted(plane().prior, []), Tilted.nothing, 4), ValueError, 'none of 4 paths'),
    'modes': (lambda _: mode_weights(torch.zeros(4, 2), torch.zeros(3, 3)), ValueError, 'got (4, 2) and (3, 3)'),
    'coverage': (lambda _: interval_coverage(torch.zeros(4, 2), None, 1.), ValueError, 'level must lie in (0, 1), got 1.0'),
    'nothing to train': (lambda _: Trainer(plane(), Drifted(plane().prior, []), None), ValueError, 'nothing to train'),
    'fraction': (lambda _: trainer(fraction=0), ValueError, 'fraction must lie in (0, 1], got 0'),
    'clip': (lambda _: trainer(clip=0), ValueError, 'clip must be a positive'),
    'iterations': (lambda _: trainer().fit(Y, 0), ValueError, 'iterations must be positive, got 0'),
    'empty buffer': (lambda _: Buffer(4, (2,), (1,)).draw(Y), ValueError, 'replay buffer is empty'),
    'backtrack too far': (lambda _: resimulate(learned(plane()), plane().prior.simulate(2), 11), ValueError, 'cannot walk the last 11 steps of a path of 10'),
    'patch size': (lambda _: PatchTransformer(30), ValueError, 'image size 30 is not a multiple of the patch 4'),
    'odd U-Net': (lambda _: UNet(30), ValueError, 'image size 30 cannot be halved'),
    'wrong image': (lambda _: UNet(32)(torch.zeros(1, 3, 32, 32), torch.zeros(1)), ValueError, 'images of shape (1, 32, 32), got (3, 32, 32)'),
    'no checkpoint': (lambda d: trainer().load(d/'none.safetensors'), FileNotFoundError, 'there is no file'),
    'bad checkpoint': (lambda d: trainer().load(corrupt(d)), ValueError, 'is not a safetensors file'),
    'unknown prior': (lambda _: load_prior('nebulae'), ValueError, "unknown prior 'nebulae'"),
    'missing prior file': (lambda d: load_prior(d/'p.safetensors'), FileNotFoundError, 'there is no prior file'),
    'proximal stretch': (lambda _: ProximalMatching(plane().likelihood, 1., 0), ValueError, 'stretch must be positive, got 0'),
    'proximal sweeps': (lambda _: ProximalMatching(plane().likelihood, 1., sweeps=0), ValueError, 'sweeps must be a positive whole number, got 0'),
    'proximal without Gaussian noise': (lambda _: ProximalMatching(Likelihood(torch.sin, noise=PhotonNoise(9.)), 1.), ValueError, 'needs Gaussian noise'),
    'no samples': (lambda _: judge(plane(), torch.zeros(0, 2), Y), ValueError, 'at least one sample, got none'),
    'labels': (lambda _: train_classifier(torch.zeros(4, 1, 8, 8), torch.zeros(3)), ValueError, 'needs its label, got (4, 1, 8, 8) and (3,)'),
    'one kind': (lambda _: train_classifier(torch.zeros(4, 1, 8, 8), torch.zeros(4).long()), ValueError, 'name two kinds or more, got 0 to 0'),
    'stack of what': (lambda _: to_signed(np.zeros((2, 8, 8, 4))), ValueError, '(N, H, W) or (N, H, W, 3), got shape (2, 8, 8, 4)'),
    'digits nowhere': (lambda d: load_mnist(path=d), FileNotFoundError, 'give path='),
    'digits split': (lambda _: load_mnist('valid'), ValueError, "split is 'train' or 'test', got 'valid'"),
    'digits without labels': (lambda d: load_labels('MNIST', path=unlabelled(d)), ValueError, "no array 'train_labels': it holds train"),
    'fan of what': (lambda d: fan_out(d/'none.ipynb', [{}], d), FileNotFoundError, 'there is no notebook'),
    'no workers': (lambda d: fan_out(__file__, [{}], d, workers=0), ValueError, 'workers must be a positive whole number, got 0'),
    'no data': (lambda _: train_prior(None, torch.zeros(0, 2), torch.zeros(1, 2)), ValueError, 'got 0 and 1'),
    'nan data': (lambda _: train_prior(None, torch.full((2, 2), math.nan), torch.zeros(1, 2)), ValueError, 'non-finite values'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name, tmp_path):
    call, error, message = refusals[name]
    with pytest.raises(error) as caught: call(tmp_path)
    assert message in str(caught.value), str(caught.value)
    assert '\n' not in str(caught.value)

def weights(t): return [p.detach().clone() for p in (*t.posterior.drifts.parameters(), *t.average.parameters(), *t.objective.parameters())]
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

def test_a_failed_write_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path/'state.safetensors'
    save_tensors(path, {'a': torch.ones(2)}, {'step': 1})
    with pytest.raises(Exception): save_tensors(path, {'a': 'no tensor'}, {'step': 2})
    with pytest.raises(TypeError): save_tensors(path, {'a': torch.ones(2)}, {'step': object()})
    assert load_tensors(path)[1] == {'step': 1}

@pytest.mark.parametrize('guard, message, skipped', [(None, '20 batches in a row were not finite', 20), (Guard(limit=3), '4 returns to a good state', 4)])
def test_nonfinite_batches_are_skipped_and_counted(guard, message, skipped, tmp_path):
    t = trainer(guard=guard, path=tmp_path/'run.safetensors')
    class Broken(torch.nn.Module):
        def forward(self, y):
            tau = t.posterior.simulate(8, y)
            tau.x[3, 0] = math.nan
            return tau
    before = weights(t)
    t.behaviour = Broken()
    with pytest.raises(Diverged, match=message): t.fit(Y, 30, log=str)
    assert t.skipped == skipped and same(before, weights(t))
    assert len(t.events) == (skipped if guard else 0)

def test_batch_size_does_not_matter():
    problem = plane()
    posterior = Drifted(problem.prior, [MomentMatching(problem.likelihood, .25)])
    torch.manual_seed(0)
    tau = posterior.simulate(9, torch.randn(9, 1))
    whole = problem.log_weight(tau, posterior)
    single = torch.cat([problem.log_weight(tau[i:i+1], posterior) for i in range(9)])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)

def test_chunked_gradient_is_the_full_one():
    problem = plane()
    torch.manual_seed(0)
    posterior = learned(problem)
    for p in posterior.drifts.parameters(): torch.nn.init.normal_(p, std=.2)
    tau = posterior.simulate(16, Y)
    grads = []
    for chunk in (16, 48, 10**6):
        posterior.drifts.zero_grad()
        path_gradient(problem, posterior, RTB(), tau, problem.log_likelihood(tau), chunk=chunk)
        grads.append(torch.cat([p.grad.flatten() for p in posterior.drifts.parameters()]))
    posterior.drifts.zero_grad()
    RTB()(problem.log_weight(tau, posterior), tau.y).backward()
    full = torch.cat([p.grad.flatten() for p in posterior.drifts.parameters()])
    for g in grads: assert (g-full).norm() < 1e-5*full.norm()

def test_log_prob_agrees_with_torch_distributions():
    mean, std, x = torch.randn(3, 2, 4, 4), .3, torch.randn(3, 2, 4, 4)
    reference = torch.distributions.MultivariateNormal(mean.flatten(1).double(), .09*torch.eye(32).double()).log_prob(x.flatten(1).double())
    torch.testing.assert_close(gaussian(mean, std).log_prob(x).double(), reference, rtol=1e-5, atol=1e-4)

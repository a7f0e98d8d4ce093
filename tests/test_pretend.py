"The library on a pretend accelerator: training, samplers' options, every experiment and bench"
import copy
from functools import cache

import papermill, pytest, torch

from options import bent_problem, linear_problem, measured, sampler_options
from pretend import Away, pretend_device, run_notebook
from project import NBS, benchmarks, experiments, name, notebooks
from rtb_nb.amortise import (Bank, Family, Joint, MaximumLikelihood, joint_paths,
                              paired_log_weights)
from rtb_nb.beds import small_lens, two_modes
from rtb_nb.behaviours import FromPrior, Mixture, OnPolicy
from rtb_nb.components import load_covariance, save_covariance
from rtb_nb.covariance import Covariance
from rtb_nb.diffusion import Diffusion
from rtb_nb.errors import PixelError, load_error, save_error, train_error
from rtb_nb.evidence import evaluate, sandwich
from rtb_nb.families import LensBank, LensBatches, LensFamily
from rtb_nb.gradient import GapTrainer, PathTrainer
from rtb_nb.guidance import Gate, MomentMatching
from rtb_nb.hybrids import DPSCLA, DPSScore, PaperGate, guess_misfit
from rtb_nb.lavps import (image_amortiser, lavps, load_amortiser, save_amortiser,
                          train_amortiser)
from rtb_nb.latent import (Autoencoder, class_shares, classify, fit_mixture,
    load_autoencoder, load_mixture, save_autoencoder, save_mixture, train_autoencoder)
from rtb_nb.latent_samplers import psld, resample_latent
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.matching import PixelMatching, PixelProximal
from rtb_nb.mmps import MMPS, SubspaceMatching
from rtb_nb.networks import PatchTransformer
from rtb_nb.nonlinear import Compose
from rtb_nb.objective import RTB, ScalarLogZ
from rtb_nb.operators import Identity, Mask
from rtb_nb.photons import PhotonNoise
from rtb_nb.per_sample import BlockAverages, Blurs, as_picture, random_boxes, random_kernels
from rtb_nb.replay import Buffer, Replay
from rtb_nb.samplers import cla
from rtb_nb.scales import ScaledMatching
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import (family_drifts, fit_gates, gentle_optimiser, load_posterior,
                            save_posterior)
from rtb_nb.supervised import (ConditionalDenoiser, ddim, load_supervised, save_supervised,
                               train_supervised)
from rtb_nb.tempered import tempered
from rtb_nb.train import Trainer, image_drifts
from test_experiments import SMALLEST, label, parameters

# torch takes `meta` for empty, and warns that loading a state would do nothing: here it does
pytestmark = pytest.mark.filterwarnings('ignore:.*which is a no-op')

# ---- the pretence

@pytest.fixture
def device():
    with pretend_device(): yield 'meta'

def test_values_are_kept_and_draws_are_those_of_the_cpu(device):
    x = torch.arange(6.).reshape(2, 3).to(device)
    assert isinstance(x, Away) and x.device.type == 'meta'
    assert x.t().sum(0).tolist() == [3., 12.]
    assert torch.tensor([1., 2.], device=device).sum().item() == 3
    assert f'{x.mean():.2f}' == '2.50' and bool(x.sum() > 0) and float(x.max()) == 5
    assert torch.equal(x.cpu()[1], torch.tensor([3., 4., 5.])) and not isinstance(x.cpu(), Away)
    torch.manual_seed(0)
    drawn = torch.randn(3, device=device)
    torch.manual_seed(0)
    assert torch.equal(drawn.cpu(), torch.randn(3))
    assert torch.randn_like(x).device == x.new_zeros(2).device == x.device

def test_what_a_gpu_allows(device):
    x, here = torch.arange(4., device=device), torch.arange(4.)
    assert (x + torch.tensor(1.)).tolist() == [1., 2., 3., 4.] # a scalar of the CPU
    assert x[torch.tensor([0, 2])].tolist() == [0., 2.] and x[here > 1].tolist() == [2., 3.]
    x[torch.tensor([0])] = 7.
    assert x.tolist() == [7., 1., 2., 3.] and here.copy_(x).tolist() == x.tolist()
    assert x.copy_(here + 1).tolist() == [8., 2., 3., 4.]
    view = x[1:]
    view.mul_(2)
    assert x.tolist() == [8., 4., 6., 8.] and here[0] == 7

@pytest.mark.parametrize('mixed', [
    lambda x, here: x + here,
    lambda x, here: here*x[:1],
    lambda x, here: here.add_(x),
    lambda x, here: torch.cat([x, here]),
    lambda x, here: torch.stack([x, here]),
    lambda x, here: x @ here,
    lambda x, here: torch.where(here > 0, x, x),
    lambda x, here: here[torch.tensor([0], device='meta')],
    lambda x, here: x.gather(0, here.long()),
    lambda x, here: x.index_put_((here.long(),), here),
    lambda x, here: torch.nn.Linear(4, 1)(x),
    lambda x, here: torch.eye(4).to_sparse() @ x[:, None],
    lambda x, here: torch.distributions.Normal(here, 1.).log_prob(x),
])
def test_two_devices_in_one_operation_are_refused(mixed, device):
    with pytest.raises(RuntimeError, match='wants its tensors on one device'):
        mixed(torch.arange(4., device=device), torch.arange(4.))

def test_gradients_modules_copies_and_optimisers(device):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    twin, x = copy.deepcopy(net).to(device), torch.randn(8, 3)
    for f, v in (net, x), (twin, x.to(device)):
        opt = torch.optim.Adam(f.parameters(), lr=.1)
        for _ in range(3):
            opt.zero_grad()
            f(v).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(f.parameters(), 1.)
            opt.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert isinstance(q, Away) and torch.equal(p, q.cpu())
    assert all(isinstance(p, Away) for p in copy.deepcopy(twin).parameters())
    fresh = torch.nn.Linear(3, 4).to(device)
    fresh.load_state_dict(net[0].state_dict())
    assert torch.equal(fresh.weight.cpu(), net[0].weight)
    sparse = torch.eye(3).to_sparse().to(device)
    v = torch.ones(3, 1, device=device, requires_grad=True)
    (2*sparse @ v).sum().backward()
    assert v.grad.tolist() == [[2.], [2.], [2.]]

# ---- the library on it

def trainer(device, path):
    "Two sources of paths, a buffer, a learned log Z, averages and a checkpoint"
    torch.manual_seed(0)
    problem = small_lens(steps=3).to(device)
    y = problem.simulate(1)[1]
    guide = MomentMatching(problem.prior.denoiser.data_variance.item())
    posterior = problem.posterior(image_drifts(problem, guide)).to(device)
    buffer = Buffer(16, posterior.shape, y.shape[1:], device=device)
    behaviour = Mixture(OnPolicy(posterior, 4, buffer), Replay(posterior, buffer, 2, d=1))
    return y, Trainer(posterior, behaviour, RTB(ScalarLogZ(0.)), path=path)

def test_training_goes_on_from_its_checkpoint(device, tmp_path):
    y, whole = trainer(device, tmp_path/'whole.safetensors')
    whole.fit(y, 4, every=2, log=str)
    y, first = trainer(device, tmp_path/'parts.safetensors')
    first.fit(y, 2, every=2, log=str)
    y, second = trainer(device, tmp_path/'parts.safetensors')
    second.resume().fit(y, 4, every=2, log=str)
    assert [h['elbo'] for h in second.history] == [h['elbo'] for h in whole.history]
    for p, q in zip(second.learned, whole.learned): assert torch.equal(p.cpu(), q.cpu())
    x, numbers = evaluate(second.averaged, y, 4)
    assert isinstance(x, Away) and numbers['n'] == 4

def test_amortised_training_and_the_path_form(device):
    torch.manual_seed(0)
    problem = small_lens(steps=3).to(device)
    posterior = problem.posterior(image_drifts(problem, MomentMatching())).to(device)
    bank = Bank.of(problem.prior, 6)
    MaximumLikelihood(posterior, bank, pairs=8).fit(None, 2, log=str)
    Trainer(posterior, Joint(posterior, bank, 2, 2)).fit(None, 2, log=str)
    PathTrainer(posterior, OnPolicy(posterior, 2)).fit(problem.simulate(1)[1], 2, log=str)
    GapTrainer(posterior, bank, 2, measurements=2, pairs=8).fit(None, 2, log=str)
    joint, own = paired_log_weights(posterior, bank.measured_paths(problem.likelihood, 3), 2)
    assert isinstance(joint, Away) and own.shape == (3, 2)

def test_posterior_of_a_family_from_its_file(device, tmp_path):
    torch.manual_seed(0)
    prior = small_lens(steps=3).prior.to(device)
    recipe = dict(guide=dict(name='MomentMatching', variance=.1), width=16, depth=1)
    family = InverseProblem(prior, Family(LensBank(LensFamily(16), 2))).to(device)
    q = family.posterior(family_drifts(family, **recipe)).to(device)
    bank, path = Bank.of(prior, 4), tmp_path/'a.posterior.safetensors'
    MaximumLikelihood(q, bank, pairs=4, opt=gentle_optimiser(q)).fit(None, 2, log=str)
    save_posterior(q, path, recipe, {})
    problem = InverseProblem(prior, Likelihood(Lens(16), .05)).to(device)
    tau = joint_paths(problem, 2)
    assert isinstance(tau.y, Away)
    assert sandwich(load_posterior(path, problem), tau, 2)['n'] == 2

def test_an_error_per_pixel_and_matching_with_it(device, tmp_path):
    torch.manual_seed(0)
    problem = small_lens(steps=3).to(device)
    x = problem.prior.sample(8)
    error, _ = train_error(problem.prior, x.cpu(), x[:4].cpu(), steps=2, batch=4, log=str,
                           path=tmp_path/'run.safetensors')
    save_error(error, tmp_path/'lens.error.safetensors')
    error, y = load_error(tmp_path/'lens.safetensors', problem.prior), problem.simulate(1)[1]
    covariance = Covariance.of(torch.randn(40, 1, 16, 16), 8).to(device)
    for guide in (PixelMatching(error), PixelProximal(error, sweeps=2),
                  ScaledMatching(covariance, error)):
        posterior = problem.posterior(image_drifts(problem, guide)).to(device)
        PathTrainer(posterior, OnPolicy(posterior, 2)).fit(y, 2, log=str)
        x0, _, log_w = posterior.draw(y, 2)
        assert isinstance(x0, Away) and log_w.isfinite().all()

def test_correlated_steps_behind_lenses_that_differ(device, tmp_path):
    torch.manual_seed(0)
    white, covariance = small_lens(steps=3).prior, Covariance.of(torch.randn(40, 1, 16, 16), 8)
    save_covariance(covariance, tmp_path/'a.covariance.safetensors')
    covariance = load_covariance(tmp_path/'a.covariance.safetensors') # rounded
    prior = Diffusion(white.denoiser, white.shape, 3, covariance=covariance).to(device)
    lenses = LensBatches(LensBank(LensFamily(16), 2), 2)
    family = InverseProblem(prior, Family(lenses)).to(device)
    recipe = dict(width=16, depth=1, narrowed=True, second=.06, along=[8], guide=dict(
        name='CovarianceMatching', covariance=str(tmp_path/'a.covariance.safetensors')))
    q = family.posterior(family_drifts(family, **recipe)).to(device)
    bank = Bank.of(prior, 4)
    fit_gates(q, bank, 2, 4)
    MaximumLikelihood(q, bank, pairs=4, opt=gentle_optimiser(q)).fit(None, 2, log=str)
    GapTrainer(q, bank, 2, measurements=2, pairs=4).fit(None, 2, log=str)
    one = InverseProblem(prior, Likelihood(Lens(16), .05)).to(device)
    x = q.under(one).sample(one.simulate(1)[1], 2)
    assert isinstance(x, Away) and x.isfinite().all()

@pytest.mark.parametrize('make', [linear_problem, bent_problem])
def test_hybrids(make, device):
    torch.manual_seed(0)
    problem = make(steps=4).to(device)
    y = measured(problem)
    drifts = [Gate(DPSScore(), value=.01), PaperGate(DPSCLA(), guess_misfit, 1)]
    posterior = problem.posterior(drifts).to(device)
    Trainer(posterior, OnPolicy(posterior, 2)).fit(y, 2, log=str)
    PathTrainer(posterior, OnPolicy(posterior, 2)).fit(y, 2, log=str)
    x = posterior.sample(y, 3)
    assert isinstance(x, Away) and x.isfinite().all()

@pytest.mark.parametrize('make', [
    lambda: random_boxes(2, (1, 8, 8)), lambda: BlockAverages([2, 4], (1, 8, 8)),
    lambda: Blurs(random_kernels(2, 3), (1, 8, 8))], ids=['masks', 'tiles', 'blurs'])
def test_operators_that_differ_per_sample(make, device):
    torch.manual_seed(0)
    prior = small_lens(steps=3, size=8).prior
    problem = InverseProblem(prior, Likelihood(make(), .1)).to(device)
    y, op = problem.simulate(2)[1], problem.operator
    pixels = PixelMatching(PixelError(problem.prior).to(device).requires_grad_(False))
    drifts = family_drifts(problem, dict(name='MomentMatching'), width=16, depth=1)
    q = problem.posterior([*drifts, Gate(pixels), Gate(DPSCLA(), value=.01)])
    Trainer(q.to(device), Mixture(OnPolicy(q, 2), FromPrior(q, 1))).fit(y, 2, log=str)
    x = q.sample(y, 2)
    parts = as_picture(op, y), op.pinv(y), op[1:](x[1:]), cla(problem, y, 2, steps=3).x
    for v in (x, y, *parts): assert isinstance(v, Away) and v.isfinite().all()
    assert sandwich(q, joint_paths(problem, 4), 2)['measurements'] == 4

def test_amortised_fits_their_file_and_their_sampler(device, tmp_path):
    torch.manual_seed(0)
    prior, small = small_lens(steps=3, size=8).prior.to(device), dict(width=16, depth=1)
    def draw(n): return Likelihood(random_boxes(n, (1, 8, 8)), .1).to(device)
    x, path = torch.randn(6, 1, 8, 8), tmp_path/'a.amortiser.safetensors'
    net, _ = train_amortiser(image_amortiser(prior, **small), prior, x, x, draw, steps=2,
                             batch=2, every=1, path=tmp_path/'run.safetensors', log=str)
    save_amortiser(net, path, prior, small, {})
    problem = InverseProblem(prior, draw(1))
    y, again = problem.simulate(1)[1], load_amortiser(path, prior)
    for inside, best in ((0, False), (1, True)):
        found = lavps(problem, y, 2, again, inside=inside, outside=1, best=best, steps=4)
        assert isinstance(found.x, Away) and found.x.isfinite().all() and found.amortised

def test_maps_of_photons_follow_the_measurement(device):
    torch.manual_seed(0)
    noise = PhotonNoise(50 + torch.rand(1, 8, 8), background=1 + torch.rand(1, 8, 8))
    prior = small_lens(steps=3, size=8).prior
    problem = InverseProblem(prior, Likelihood(Identity((1, 8, 8)), noise=noise)).to(device)
    y = noise.measured(torch.poisson(20 + 50*torch.rand(1, 1, 8, 8)).to(device))
    q = problem.posterior(image_drifts(problem, width=16, depth=1)[:1]).to(device)
    x, log_r, log_w = q.draw(y, 2)
    assert isinstance(x, Away) and (log_r + log_w).isfinite().all()
    assert problem.chi2(x, y).isfinite().all() and problem.simulate(1)[1].device == y.device

def test_supervised_training_its_file_and_its_sampler(device, tmp_path):
    torch.manual_seed(0)
    prior = small_lens(steps=3, size=8).prior.to(device)
    problem = InverseProblem(prior, Likelihood(Mask(torch.eye(8)[None]), .1)).to(device)
    net = dict(name='PatchTransformer', size=8, in_channels=2, width=16, depth=1)
    made = PatchTransformer(**{k: v for k, v in net.items() if k != 'name'})
    denoiser = ConditionalDenoiser(made, Cosine(.5)).to(device)
    def draw(n): return Likelihood(Mask(torch.rand(1, 8, 8) < .5), .1) # made on the CPU
    def picture(operator, y): return operator.pinv(y)
    x, path = torch.randn(6, 1, 8, 8), tmp_path/'run.safetensors'
    for _ in range(2): # the second time it takes up a finished run
        learned, _ = train_supervised(denoiser, x, x, draw, picture, steps=2, batch=2, every=1,
            path=path, log=str)
    path = tmp_path/'a.supervised.safetensors'
    save_supervised(learned, path, net, picture, {})
    again, y = load_supervised(path, picture, device), problem.simulate(1)[1]
    for eta in (0., 1.):
        found = ddim(problem, y, 3, again, picture=picture, steps=3, eta=eta).x
        assert isinstance(found, Away) and found.isfinite().all()

@pytest.mark.parametrize('make', [linear_problem, bent_problem])
def test_matching_by_the_jacobian(make, device):
    torch.manual_seed(0)
    problem = make(steps=4).to(device)
    y = measured(problem)
    posterior = problem.posterior([Gate(MMPS()), SubspaceMatching(2)]).to(device)
    PathTrainer(posterior, OnPolicy(posterior, 2)).fit(y, 2, log=str)
    x = posterior.sample(y, 3)
    assert isinstance(x, Away) and x.isfinite().all()

def test_a_latent_space_its_files_and_its_samplers(device, tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(12, 1, 8, 8), tmp_path/'run.safetensors'
    for _ in range(2): # the second time it takes up a finished run
        model, _ = train_autoencoder(Autoencoder((1, 8, 8), (3,), 4).to(device), x, x, steps=2,
            batch=2, every=1, path=path, log=str)
    codes, labels = model.codes(x.to(device)), torch.arange(12) % 2
    mixture, _ = fit_mixture(codes, 2, steps=2)
    shares = class_shares(mixture, codes, labels, 2)
    save_autoencoder(model, tmp_path/'a.autoencoder.safetensors', {})
    save_mixture(mixture, tmp_path/'a.mixture.safetensors', {}, shares)
    model = load_autoencoder(tmp_path/'a.autoencoder.safetensors', device)
    prior = load_mixture(tmp_path/'a.mixture.safetensors', 6, device=device)
    op = Compose(Mask(torch.eye(8)[None]), model.decoder)
    problem = InverseProblem(prior, Likelihood(op, .1)).to(device)
    y, encode = problem.simulate(1)[1], lambda x: model.encode(x)[0]
    for f in (psld, resample_latent):
        found = f(problem, y, 3, encode=encode, steps=6).x
        assert isinstance(found, Away) and found.isfinite().all()
    assert classify(prior.denoiser, prior.shares, found).shape == (3,)

def test_tempered_particles(device):
    torch.manual_seed(0)
    bed = two_modes()
    problem, q = bed.to(device).problem, bed.problem.prior.denoiser.distribution()
    def log_r(x): return problem.likelihood.log_prob(x, bed.y.to(x).expand(len(x), -1))
    x, log_z, log = tempered(q.log_prob, log_r, lambda n: q.sample((n,)), 20)
    assert isinstance(x, Away) and x.isfinite().all() and log[-1]['beta'] == 1

OPTIONS = sampler_options()

IDS = [f'{sampler.__name__}-{i}' for i, (sampler, *_) in enumerate(OPTIONS)]

@pytest.mark.parametrize('i', range(len(OPTIONS)), ids=IDS)
def test_every_option_of_every_sampler(i, device):
    sampler, options, problem = OPTIONS[i]
    torch.manual_seed(0)
    problem = copy.deepcopy(problem).to(device)
    x = sampler(problem, measured(problem), 4, **options).x
    assert x.device.type == device and x.isfinite().all()

# ---- its experiments, benches and tutorials

@cache
def declared(notebook): return set(papermill.inspect_notebook(notebook))

SEPARATE = {'bench_rtb'} # measures the memory and the time of processes of their own
TUTORIALS = [p for p in notebooks() if p.is_relative_to(NBS/'tutorials')]
PLACED = [p for p in experiments() + benchmarks() + TUTORIALS if 'device' in declared(p)]
LESS = dict( # rows that between them make every move of the longer ones
    exp_conditional=dict(methods=['guidance', 'RTB+DPS']),
    exp_codes=dict(methods=['PSLD', 'DAPS', 'and the gap']),
    exp_consistency=dict(methods='refined on each'),
    exp_latent=dict(methods=['PSLD', 'DAPS', 'RTB', 'amortised, refined']),
    exp_lavps=dict(methods=['LAVPS', 'DAPS']),
    exp_lensing=dict(methods=['CLA', 'and both']),
    exp_ood=dict(shifts=['half images', 'noise doubled']))
RUNS = [(p, values | LESS.get(name(p), {})) for p in PLACED
        for values in SMALLEST.get(name(p), [{}])[:1 if name(p) in LESS else None]]

def test_every_experiment_and_bench_takes_a_device():
    assert {name(p) for p in experiments() + benchmarks() if p not in PLACED} <= SEPARATE

@pytest.mark.parametrize('notebook, values', RUNS, ids=map(label, RUNS))
def test_notebook(notebook, values, tmp_path, monkeypatch):
    if name(notebook) == 'bench_peers':
        for library in ('deepinv', 'azula'): pytest.importorskip(library)
    given = parameters(notebook, values, tmp_path) | dict(device='meta')
    monkeypatch.chdir(tmp_path)
    run_notebook(notebook, **given)

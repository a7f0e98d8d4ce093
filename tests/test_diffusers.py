"A model of diffusers keeps its table, means and variances as a prior; mistakes are one line"
import json
import numpy as np, pytest, torch

pytest.importorskip('diffusers')
from diffusers import (DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler,
    PNDMScheduler, UNet2DModel)
from diffusers.schedulers import scheduling_ddpm
from project import experiments, name
from rtb_nb.amortise import Bank, MaximumLikelihood
from rtb_nb.behaviours import OnPolicy
from rtb_nb.denoise import VDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.posterior import Drift, Posterior
from rtb_nb.drifts import LoRA
from rtb_nb.guidance import DPS, PiGDM, measurement_feature
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.operators import Mask
from rtb_nb.pretrained import Clipped, from_diffusers, pretrained_denoiser, respaced
from rtb_nb.schedule import Cosine
from rtb_nb.train import Trainer

def network(**config):
    torch.manual_seed(0)
    config = dict(sample_size=16, in_channels=1, out_channels=1, block_out_channels=(32, 64),
        layers_per_block=1, norm_num_groups=8,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D')) | config
    return UNet2DModel(**config).eval()

@pytest.fixture(scope='module')
def unet(): return network()

@torch.no_grad()
def compare(prior, scheduler, net, monkeypatch, count=8):
    "Errors of means, over their size, and stds: `scheduler.step` has its noise set to 0 and 1"
    torch.manual_seed(1)
    errors = []
    some = torch.linspace(0, prior.steps-2, min(count, prior.steps-1)).round().long().unique()
    for k in some.tolist():
        i, x = scheduler.timesteps[k], torch.randn(2, *prior.shape)
        answer, ends = net(x, i).sample, []
        for fill in (torch.zeros, torch.ones):
            monkeypatch.setattr(scheduling_ddpm, 'randn_tensor',
                lambda shape, dtype=None, **_: fill(shape, dtype=dtype))
            ends.append(scheduler.step(answer, i, x).prev_sample.double())
        q, size = prior.kernel(x, k).base_dist, max(1, ends[0].abs().max().item())
        errors.append(((q.mean-ends[0]).abs().max()/size,
                       (q.stddev-(ends[1]-ends[0])).abs().max()/size))
    return torch.tensor(errors).max(0).values.tolist()

CASES = [dict(), dict(prediction_type='v_prediction'), dict(prediction_type='sample'),
    dict(clip_sample=False),
    dict(variance_type='fixed_large'), dict(variance_type='fixed_small_log'),
    dict(timestep_spacing='trailing'),
    dict(timestep_spacing='linspace', clip_sample_range=2.),
    dict(beta_schedule='squaredcos_cap_v2', timestep_spacing='trailing',
         prediction_type='v_prediction'),
    dict(beta_schedule='scaled_linear', variance_type='fixed_large'),
    dict(prediction_type='v_prediction', rescale_betas_zero_snr=True,
         timestep_spacing='trailing', clip_sample=False),
    dict(steps_offset=1, timestep_spacing='leading'),
    dict(num_train_timesteps=200, variance_type='fixed_large', prediction_type='v_prediction')]

def words(case): return ' '.join(map(str, case.values())) or 'as it comes'

@pytest.mark.parametrize('steps', [10, 60, 'all'])
@pytest.mark.parametrize('case', CASES, ids=words)
def test_steps_are_those_of_diffusers(unet, case, steps, monkeypatch):
    if case.get('steps_offset') and steps == 'all':
        pytest.skip('an offset leads outside the table')
    scheduler = DDPMScheduler(**case)
    steps = len(scheduler.betas) if steps == 'all' else steps
    prior = from_diffusers(unet, scheduler, steps=steps)
    assert scheduler.num_inference_steps is None, 'what was passed must not be changed'
    scheduler.set_timesteps(steps)
    i = scheduler.timesteps[:prior.steps]
    table = scheduler.alphas_cumprod[i].double()
    torch.testing.assert_close(prior.chain.alpha[:-1]**2, table, rtol=0, atol=1e-6)
    torch.testing.assert_close(prior.chain.sigma[:-1]**2, 1-table, rtol=0, atol=1e-6)
    if steps == len(scheduler.betas): # single precision loses beta to 1e-4: compare in double
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.one = scheduler.one.double()
    mean, std = compare(prior, scheduler, unet, monkeypatch)
    assert mean < 1e-5 and std < 1e-5, (mean, std)

def test_the_table_between_timesteps(unet):
    scheduler = DDPMScheduler()
    t, table = torch.arange(1000).double()/999, scheduler.alphas_cumprod.double()
    alpha, sigma = pretrained_denoiser(unet, scheduler).schedule(t)
    torch.testing.assert_close(alpha**2, table, rtol=0, atol=1e-6)

def test_the_end_is_a_visible_noise(unet):
    "Timesteps next to or below last_noise give way to one level of that noise"
    prior = from_diffusers(unet, DDPMScheduler(), steps=1000, last_noise=.02)
    chain = prior.chain
    assert prior.steps < 1000 and (chain.alpha[-1], chain.sigma[-1]) == (1, .02)
    assert chain.std[-1] > .4*.02
    assert (chain.sigma/chain.alpha)[:-1].min() > .022 and chain.std.min() > .005
    assert from_diffusers(unet, DDPMScheduler(), steps=50, last_noise=.005).steps == 50
    torch.manual_seed(0)
    tau = from_diffusers(unet, DDPMScheduler(), steps=10).simulate(2)
    assert tau.x0.shape == (2, 1, 16, 16) and torch.isfinite(tau.x).all()

def test_unmeasured_error_is_fixed_large_and_calibration_replaces_it(unet):
    scheduler = DDPMScheduler(clip_sample=False)
    prior = from_diffusers(unet, scheduler, variance_type='fixed_large', steps=20)
    again = Diffusion(prior.denoiser, prior.shape, 20, .02)
    torch.testing.assert_close(again.chain.std[:-1], again.chain.b[:-1], rtol=1e-9, atol=0)
    prior.denoiser.calibrate(torch.rand(4, 1, 16, 16)*2-1, times=3)
    measured = Diffusion(prior.denoiser, prior.shape, 20, .02)
    assert not torch.allclose(measured.chain.std, again.chain.std)

def test_clipping_keeps_the_gradient(unet):
    prior = from_diffusers(unet, DDPMScheduler(), steps=10)
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    guess = prior.denoiser(x, prior.chain.t[0].float())
    assert guess.abs().max() <= 1 and (guess.abs() == 1).any()
    assert torch.autograd.grad(guess.sum(), x)[0].abs().min() > 0

def test_posteriors_can_be_built_on_it(unet):
    "The log-ratio of a drifted chain is the difference of its two path densities"
    class Push(Drift):
        def forward(self, step): return .1*step.x0_hat.sin() + .02
    torch.manual_seed(0)
    prior = from_diffusers(unet, DDPMScheduler(), steps=10, variance_type='fixed_large')
    posterior = Posterior(prior, [Push()])
    tau = posterior.simulate(None, 4)
    difference = posterior.log_prob(tau) - posterior.prior.log_prob(tau)
    torch.testing.assert_close(posterior.log_ratio(tau), difference, rtol=0, atol=.02)
    assert difference.abs().min() > .1

def test_adapters_of_its_layers_learn_every_measurement(unet):
    "LoRA on a diffusers network that sees y: from the prior, by pairs and by own paths"
    torch.manual_seed(0)
    prior = from_diffusers(unet, DDPMScheduler(), steps=4, variance_type='fixed_large')
    problem = InverseProblem(prior, Likelihood(Mask(torch.ones(1, 16, 16)), .5))
    lora = LoRA(prior.denoiser, measurement_feature, channels=1, rank=2)
    assert any('to_q' in n for n in lora.A) and any('to_out' in n for n in lora.A)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor(.5)
    posterior, before = problem.posterior([lora]), prior.denoiser(x, t)
    tau = posterior.simulate(problem.simulate(2)[1], 2)
    torch.testing.assert_close(posterior.log_ratio(tau), torch.zeros(2), rtol=0, atol=1e-2)
    first = [p.detach().clone() for p in lora.parameters()]
    MaximumLikelihood(posterior, Bank.of(prior, 8), 8).fit(None, 3, log=str)
    Trainer(posterior, OnPolicy(posterior, 4)).fit(problem.simulate(1)[1], 2, log=str)
    moved = [not torch.equal(a, b) for a, b in zip(first, lora.parameters())]
    assert sum(moved) > .9*len(moved)
    assert torch.equal(prior.denoiser(x, t), before)

def test_times_may_differ_within_a_batch(unet):
    prior = from_diffusers(unet, DDPMScheduler(), steps=10)
    x, k = torch.randn(3, 1, 16, 16), torch.tensor([0, 4, 8])
    apart = torch.cat([prior.denoise(x[i:i+1], k[i]) for i in range(3)])
    torch.testing.assert_close(prior.denoise(x, k), apart, rtol=0, atol=1e-4)

def test_guidance_is_finite_from_the_noisiest_start(unet):
    "What predicts v may start at no signal at all, and a guess is guided there, too"
    prior = from_diffusers(unet, DDPMScheduler(prediction_type='v_prediction'), steps=10,
        rescale_betas_zero_snr=True, timestep_spacing='trailing')
    assert prior.chain.alpha[0] < 1e-6
    problem = InverseProblem(prior, Likelihood(Mask(torch.ones(1, 16, 16)), .1))
    y = torch.zeros(1, *problem.y_shape)
    torch.manual_seed(0)
    for drift in (DPS(), PiGDM(.25)):
        posterior = problem.posterior([drift])
        x = torch.randn(2, *prior.shape)
        assert posterior.drift(x, 0, y.expand(2, *y.shape[1:])).abs().max() < 1e3

@pytest.mark.parametrize('kind', [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize('saved_first', [False, True])
def test_schedulers_of_another_class_keep_their_own_options(unet, kind, saved_first, tmp_path):
    "PNDM never clips; DDIM clips unless told otherwise; spacing, offset and table are theirs"
    own = dict(beta_schedule='scaled_linear', timestep_spacing='trailing', steps_offset=0)
    scheduler = kind(**own)
    if saved_first:
        unet.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
        prior = from_diffusers(tmp_path, steps=10)
    else: prior = from_diffusers(unet, scheduler, steps=10)
    assert isinstance(prior.denoiser, Clipped) == (kind is DDIMScheduler)
    assert prior.card['scheduler']['clip_sample'] == (kind is DDIMScheduler)
    assert prior.card['scheduler']['timestep_spacing'] == 'trailing'
    i = torch.arange(999, -1, -100)[:prior.steps]
    table = scheduler.alphas_cumprod[i].double()
    torch.testing.assert_close(prior.chain.alpha[:-1]**2, table, rtol=0, atol=1e-6)
    wide = from_diffusers(unet, scheduler, steps=10, clip_sample=True, clip_sample_range=3.)
    assert wide.denoiser.limit == 3.

def test_a_pipeline_is_its_network_and_scheduler(unet):
    scheduler = DDPMScheduler(variance_type='fixed_large')
    prior = from_diffusers(DDPMPipeline(unet, scheduler), steps=np.int64(10))
    reference = from_diffusers(unet, scheduler, steps=10)
    assert torch.equal(prior.chain.std, reference.chain.std)
    assert prior.card['source'] == 'DDPMPipeline'

def test_weights_of_half_precision(unet):
    "The guess is off by a rounding, timesteps and chain are not"
    full = from_diffusers(unet, DDPMScheduler(clip_sample=False), steps=50)
    half = from_diffusers(network().bfloat16(), DDPMScheduler(clip_sample=False), steps=50)
    assert torch.equal(half.chain.std, full.chain.std) and half.dtype == torch.float32
    x = torch.randn(2, 1, 16, 16)
    seen = []
    half.denoiser.net.unet.register_forward_pre_hook(lambda net, args: seen.append(args[1]))
    off = half.denoise(x, 40) - full.denoise(x, 40)
    assert off.dtype == torch.float32 and off.square().mean().sqrt() < .02
    assert seen[0].item() == 180

@pytest.mark.parametrize('layout', ['pipeline', 'flat', 'network alone', 'ddim'])
def test_folders(unet, tmp_path, layout):
    scheduler = DDPMScheduler(variance_type='fixed_large', prediction_type='v_prediction')
    if layout == 'pipeline': DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    else: unet.save_pretrained(tmp_path)
    if layout == 'flat': scheduler.save_pretrained(tmp_path)
    if layout == 'ddim':
        DDIMScheduler(prediction_type='v_prediction').save_pretrained(tmp_path/'scheduler')
    passed = [scheduler]*(layout == 'network alone')
    state = torch.get_rng_state()
    prior = from_diffusers(tmp_path, *passed, steps=10, variance_type='fixed_large')
    assert torch.equal(torch.get_rng_state(), state)
    reference = from_diffusers(unet, scheduler, steps=10)
    x = torch.randn(2, 1, 16, 16)
    for k in (0, 5):
        a, b = (p.kernel(x, k).base_dist.mean for p in (prior, reference))
        assert torch.equal(a, b)
    assert torch.equal(prior.chain.std, reference.chain.std)
    json.dumps(prior.card)
    assert prior.card['scheduler']['prediction_type'] == 'v_prediction'
    assert prior.card['parameters'] == unet.num_parameters()

def test_a_name_is_fetched_from_the_hub(unet, tmp_path, monkeypatch):
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    there = {'someone/some-model': str(tmp_path)}
    monkeypatch.setattr(DDPMPipeline, 'download', classmethod(lambda cls, name: there[name]))
    assert from_diffusers('someone/some-model', steps=10).shape == (1, 16, 16)

def offline(monkeypatch):
    "The hub as it looks from a machine without a network"
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

def saved(net, folder):
    net.save_pretrained(folder)
    return folder

def renamed(net, folder, name):
    net.save_pretrained(folder)
    path = folder/'config.json'
    path.write_text(path.read_text().replace('UNet2DModel', name))
    return folder

def loaded(net): return from_diffusers(net, DDPMScheduler())
def ddpm(**config): return lambda net, d: from_diffusers(net, DDPMScheduler(**config))
def changed(**settings): return lambda net, d: from_diffusers(net, DDPMScheduler(), **settings)
def other(**config): return lambda net, d: from_diffusers(network(**config), DDPMScheduler())

REFUSALS = {
    'prediction type': (ValueError, "unknown prediction_type 'flow'",
        changed(prediction_type='flow')),
    'learned variance': (ValueError, "variance_type 'learned_range' is no fixed one",
        ddpm(variance_type='learned_range')),
    'variance type': (ValueError, "variance_type 'tiny' is no fixed one",
        changed(variance_type='tiny')),
    'thresholding': (ValueError, 'thresholding=False', ddpm(thresholding=True)),
    'spacing': (ValueError, 'odd', changed(timestep_spacing='odd')),
    'setting': (TypeError, "no setting 'variance'", changed(variance='fixed_large')),
    'scheduler missing': (TypeError, 'needs the scheduler of the network',
        lambda net, d: from_diffusers(net)),
    'scheduler kind': (ValueError, 'EulerDiscreteScheduler is none of DDPM',
        lambda net, d: from_diffusers(net, EulerDiscreteScheduler())),
    'saved scheduler kind': (ValueError, 'EulerDiscreteScheduler is none of DDPM',
        lambda net, d: (EulerDiscreteScheduler().save_pretrained(d),
                        from_diffusers(saved(net, d)))),
    'no scheduler in folder': (FileNotFoundError, 'no scheduler_config.json: pass',
        lambda net, d: from_diffusers(saved(net, d))),
    'empty folder': (FileNotFoundError, 'no config.json', lambda net, d: from_diffusers(d)),
    'missing folder': (FileNotFoundError, 'there is no folder',
        lambda net, d: from_diffusers(d/'missing')),
    'missing relative folder': (FileNotFoundError, 'there is no folder models',
        lambda net, d: from_diffusers('models')),
    'class-conditional model': (ValueError, 'this network also wants a class',
        lambda net, d: from_diffusers(network(num_class_embeds=10), DDPMScheduler())),
    'class-conditional folder': (ValueError, 'this network also wants a class',
        lambda net, d: from_diffusers(saved(network(class_embed_type='timestep'), d),
                                      DDPMScheduler())),
    'half a time': (TypeError, 'times must be of single precision, got torch.bfloat16',
        lambda net, d: from_diffusers(net, DDPMScheduler()).denoiser(
            torch.zeros(1, 1, 16, 16), torch.tensor(.5).bfloat16())),
    'limit': (ValueError, 'limit must be a positive number, got 0',
        lambda net, d: from_diffusers(net, DDPMScheduler(clip_sample_range=0))),
    'hub not reachable': (ConnectionError,
        'no folder someone/absent here, and it cannot be fetched',
        lambda net, d: from_diffusers('someone/absent')),
    'conditional model': (ValueError, 'holds a UNet2DConditionModel: only',
        lambda net, d: from_diffusers(renamed(net, d, 'UNet2DConditionModel'))),
    'no model': (TypeError, 'unconditional UNet2DModel, got Linear',
        lambda net, d: from_diffusers(torch.nn.Linear(1, 1), DDPMScheduler())),
    'steps': (ValueError, 'steps must be a whole number from 1 to 1000, got 2000',
        changed(steps=2000)),
    'half a step': (ValueError, 'from 1 to 1000, got 2.5', changed(steps=2.5)),
    'one step': (ValueError, 'no timestep is noisier than last_noise 0.02', changed(steps=1)),
    'last noise': (ValueError, 'last_noise must lie in (0, 1), got 0', changed(last_noise=0)),
    'pure noise': (ValueError, 'EpsDenoiser cannot start at alpha = 4.9e-05',
        ddpm(beta_schedule='squaredcos_cap_v2', timestep_spacing='trailing',
             clip_sample=False)),
    'pure noise, clipped': (ValueError, 'Clipped cannot start at alpha = 4.9e-05',
        ddpm(beta_schedule='squaredcos_cap_v2', timestep_spacing='trailing')),
    'no signal, clipped': (ValueError, 'Clipped cannot start at alpha = 1e-15',
        ddpm(rescale_betas_zero_snr=True, timestep_spacing='trailing')),
    'shape': (ValueError, 'sides that are multiples of 2, got shape (1, 15, 16)',
        changed(shape=(1, 15, 16))),
    'channels of shape': (ValueError, 'images of 1 channels', changed(shape=(3, 16, 16))),
    'no size': (ValueError, 'names no sample_size: pass shape', other(sample_size=None)),
    'two answers': (ValueError, 'gives 2 channels for images of 1', other(out_channels=2)),
    'image': (ValueError, 'takes images (B, 1, H, W), got shape (2, 3, 16, 16)',
        lambda net, d: loaded(net).denoise(torch.zeros(2, 3, 16, 16), 0)),
    'timesteps': (ValueError,
        'timesteps must fall, from at most 999 to at least 0, got 2 from 0 to 1000',
        lambda net, d: respaced(loaded(net).denoiser, (1, 16, 16), [0, 1000])),
    'no timesteps': (ValueError, 'timesteps must be a list of entries',
        lambda net, d: respaced(loaded(net).denoiser, (1, 16, 16), [])),
    'no table': (TypeError, 'needs a denoiser of a Tabulated schedule, got Cosine',
        lambda net, d: respaced(VDenoiser(net, Cosine()), (1, 16, 16), [1])),
}

@pytest.mark.parametrize('name', REFUSALS)
def test_refusals_are_one_clear_line(name, unet, tmp_path, monkeypatch):
    kind, words, fn = REFUSALS[name]
    offline(monkeypatch)
    with pytest.raises(kind) as e: fn(unet, tmp_path)
    assert words in str(e.value) and '\n' not in str(e.value)

def test_pictures_of_ones_own_with_a_prior_of_diffusers(tmp_path):
    from PIL import Image
    from skimage.data import astronaut, camera, cat, coffee, coins, rocket
    from test_experiments import execute
    photographs = tmp_path/'photographs'
    photographs.mkdir()
    for im in (astronaut, camera, cat, coffee, coins, rocket):
        Image.fromarray(im()).save(photographs/f'{im.__name__}.png')
    net = network(sample_size=32, in_channels=3, out_channels=3)
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path/'ddpm')
    results = tmp_path/'results'
    notebook = next(p for p in experiments() if name(p) == 'exp_lavps')
    execute(notebook, tmp_path/'out.ipynb', parameters=dict(budget='smoke', out=str(results),
        pictures=str(photographs), diffusers=str(tmp_path/'ddpm')))
    found = [json.loads(v) for v in (results/'lavps.jsonl').read_text().splitlines()]
    rows = {r['params'].get('row') for r in found if r['params'].get('split') == 'test'}
    assert rows == {'LAVPS', 'MGDM', 'MGDM, library', 'DPS', 'guidance'}
    assert {r['params']['dataset'] for r in found} == {'own'}
    assert not [r['error'] for r in found if r['error']]

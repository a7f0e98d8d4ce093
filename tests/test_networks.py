"Networks of any size and precision; learned drifts: the prior's bits, copies, clear refusals"
import copy, pickle

import numpy as np, pytest, torch
from rtb_nb.behaviours import OnPolicy
from rtb_nb.checkpoints import flat_state, load_state, load_tensors, save_tensors
from rtb_nb.denoise import GaussianDenoiser, VDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.posterior import Posterior
from rtb_nb.drifts import EvidenceNet, FineTuned, LoRA, NetDrift
from rtb_nb.guidance import Gate, GuideShift, MomentMatching, measurement_feature
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.networks import PatchTransformer, TimeEmbedding, UNet, VectorNet, in_bfloat16
from rtb_nb.objective import RTB
from rtb_nb.operators import Mask
from rtb_nb.schedule import Cosine
from rtb_nb.train import Trainer, path_gradient

nets = {'UNet': lambda **kw: UNet(8, widths=(8, 16), **kw),
        'PatchTransformer': lambda **kw: PatchTransformer(8, width=16, depth=1, stem=4, **kw)}
forms = {'FineTuned': FineTuned,
         'LoRA': lambda d: LoRA(d, rank=2),
         'LoRA everywhere': lambda d: LoRA(d, rank=2, layers=lambda name, layer: True),
         'FineTuned that sees y': lambda d: FineTuned(d, measurement_feature, channels=1),
         'LoRA that sees y': lambda d: LoRA(d, measurement_feature, channels=1, rank=2)}
both = pytest.mark.parametrize('form', forms)

def inpainting(net='UNet', seed=0):
    "A prior whose random network has no zero weight, in the memory layout of shipped priors"
    torch.manual_seed(seed)
    denoiser = VDenoiser(shaken(nets[net](), .1), Cosine(.35))
    denoiser.to(memory_format=torch.channels_last)
    prior = Diffusion(denoiser, (1, 8, 8), steps=4, last_noise=.1, error=lambda t: .1*t)
    mask = torch.ones(1, 8, 8)
    mask[:, 2:6, 2:6] = 0
    return InverseProblem(prior, Likelihood(Mask(mask), .3))

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
def shaken(module, size=.05):
    for p in module.parameters(): p.data += size*torch.randn_like(p)
    return module

@both
@pytest.mark.parametrize('net', nets)
def test_an_untrained_form_is_the_prior_to_the_bit(form, net):
    problem = inpainting(net)
    prior, posterior = problem.prior, problem.posterior([forms[form](problem.prior.denoiser)])
    y, paths = torch.zeros(1, *problem.y_shape), []
    for draw in (prior.simulate, lambda n: posterior.simulate(y, n)):
        torch.manual_seed(1)
        paths.append(draw(3))
    if 'sees' in form: torch.testing.assert_close(paths[0].x, paths[1].x, rtol=0, atol=1e-4)
    else: assert torch.equal(paths[0].x, paths[1].x)
    torch.testing.assert_close(posterior.log_ratio(paths[1]), torch.zeros(3), rtol=0, atol=1e-3)

@both
def test_the_prior_is_never_touched(form):
    problem = inpainting()
    before = copy.deepcopy(problem.prior.state_dict())
    posterior = problem.posterior([shaken(forms[form](problem.prior.denoiser))])
    tau = posterior.simulate(torch.zeros(1, *problem.y_shape), 4)
    path_gradient(posterior, RTB(), tau, problem.log_likelihood(tau.x0, tau.y))
    assert all(torch.equal(v, problem.prior.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in problem.prior.parameters())
    learned = [p for p in posterior.drifts.parameters() if p.numel()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)

@both
def test_chunked_gradient_is_the_full_one(form):
    problem = inpainting()
    posterior = problem.posterior([shaken(forms[form](problem.prior.denoiser))])
    y = problem.likelihood(torch.zeros(1, 1, 8, 8)).sample()
    tau = posterior.simulate(y, 6)
    log_r = problem.log_likelihood(tau.x0, tau.y)
    def gradient(fill):
        posterior.drifts.zero_grad()
        fill()
        return torch.cat([p.grad.flatten() for p in posterior.drifts.parameters()])
    full = gradient(lambda: RTB()(posterior.log_weight(tau), tau.y).backward())
    assert full.norm() > 0
    for chunk in (6, 12):
        chunked = gradient(lambda: path_gradient(posterior, RTB(), tau, log_r, chunk=chunk))
        assert (chunked-full).norm() < 1e-4*full.norm()

def test_lora_is_the_merged_network():
    prior = inpainting().prior
    lora, copied = shaken(LoRA(prior.denoiser, rank=3, alpha=6.)), FineTuned(prior.denoiser)
    assert lora.scale == 2.
    with torch.no_grad():
        for name, W in lora.weights().items(): copied.denoiser.get_parameter(name).copy_(W)
    x, k = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 3])
    step = Posterior(prior, []).step(x, k, None, prior.denoise(x, k))
    assert lora(step).abs().max() > .01
    torch.testing.assert_close(lora(step), copied(step), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('net', nets)
def test_channels_beside_are_those_of_a_wider_convolution(net):
    problem = inpainting(net)
    prior = problem.prior
    drift = FineTuned(prior.denoiser, lambda s: s.x.square(), lambda s: s.x, channels=2)
    torch.nn.init.normal_(drift.beside.net.weight, std=.2)
    x, k = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 3])
    step = Posterior(prior, []).step(x, k, None, prior.denoise(x, k))
    wide, old = copy.deepcopy(prior.denoiser), prior.denoiser.net.stem
    stem = torch.nn.Conv2d(3, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        stem.weight.copy_(torch.cat([old.weight, drift.beside.net.weight], 1))
        stem.bias.copy_(old.bias)
    wide.net.stem, wide.net.in_channels = stem, 3
    guess = step.x0_hat + drift(step)*step.std/step.c0
    a, s = (v.reshape(-1, 1, 1, 1) for v in prior.denoiser.schedule(step.t))
    seen = torch.cat([x, x.square(), x], 1)
    torch.testing.assert_close(guess, a*x - s*wide.net(seen, step.t), rtol=1e-4, atol=1e-4)
    assert drift(step).abs().max() > .01
    assert not drift.denoiser.net.stem._forward_hooks

def test_lora_holds_its_adapters_alone():
    prior = inpainting().prior
    lora = LoRA(prior.denoiser, rank=2)
    assert all(k[:2] in ('A.', 'B.') for k in lora.state_dict())
    count = lambda tensors: sum(p.numel() for p in tensors)
    learned = count(lora.parameters())
    assert learned == count(lora.state_dict().values()) < count(prior.parameters())/2
    assert not any(p is q for p in lora.parameters() for q in prior.parameters())
    assert all(len(A) <= 2 for A in lora.A.values())
    assert lora.A['net/head/2'].shape[0] == 1 # one channel out: rank 1 is all there is

def test_lora_takes_the_layers_it_is_told():
    prior = inpainting().prior
    lora = LoRA(prior.denoiser, layers=lambda name, layer: name.endswith('qkv'))
    assert list(lora.weights()) == ['net.attention.qkv.weight']

@both
def test_copies_are_independent_and_share_what_they_should(form):
    prior = inpainting().prior
    drift = forms[form](prior.denoiser)
    twin = copy.deepcopy(drift)
    before = [p.detach().clone() for p in drift.parameters()]
    shaken(twin)
    assert same(before, drift.parameters()) and not same(drift.parameters(), twin.parameters())
    assert (twin.denoiser is drift.denoiser) == isinstance(drift, LoRA)
    whole = copy.deepcopy(Posterior(prior, [drift]))
    assert (whole.drifts[0].denoiser is whole.prior.denoiser) == isinstance(drift, LoRA)

@both
def test_state_survives_a_file(form, tmp_path):
    prior = inpainting().prior
    a, b = shaken(forms[form](prior.denoiser)), forms[form](prior.denoiser)
    save_tensors(tmp_path/'drift.safetensors', flat_state(a.state_dict(), 'drift.')[0])
    load_state(b, load_tensors(tmp_path/'drift.safetensors')[0], 'drift.')
    assert same(a.parameters(), b.parameters())

def test_adapters_of_other_layers_are_refused():
    prior = inpainting().prior
    other = LoRA(prior.denoiser, rank=2, layers=lambda name, layer: name.endswith('proj'))
    with pytest.raises(ValueError, match='not fit this LoRA: A.net/attention/qkv is not there'):
        load_state(LoRA(prior.denoiser, rank=2), flat_state(other.state_dict())[0])

def trainer(form, seed=0, **kw):
    problem = inpainting()
    torch.manual_seed(seed)
    drifts = [Gate(MomentMatching(.1)), forms[form](problem.prior.denoiser)]
    posterior = problem.posterior(drifts)
    return Trainer(posterior, OnPolicy(posterior, 4), **kw)

@both
def test_the_trainer_knows_the_rates_of_large_networks(form):
    t = trainer(form)
    rates = {id(p): g['lr'] for g in t.opt.param_groups for p in g['params']}
    seen = {rates[id(p)] for p in t.posterior.drifts[1].parameters()}
    assert seen == {1e-4 if 'FineTuned' in form else 1e-3}

def interrupt(line): raise KeyboardInterrupt

@both
def test_training_resumes_to_the_bit(form, tmp_path):
    y = inpainting().likelihood(torch.zeros(1, 1, 8, 8)).sample()
    whole = trainer(form).fit(y, 4, log=str)
    start = [p.detach().clone() for p in trainer(form).posterior.drifts.parameters()]
    assert not same(start, whole.posterior.drifts.parameters())
    part = trainer(form, path=tmp_path/'run.safetensors')
    with pytest.raises(KeyboardInterrupt): part.fit(y, 4, every=2, log=interrupt)
    resumed = trainer(form, seed=7).load(tmp_path/'run.safetensors').fit(y, 4, log=str)
    drifts, prior = resumed.posterior.drifts, resumed.posterior.prior
    assert same(whole.posterior.drifts.parameters(), drifts.parameters())
    assert same(whole.average.parameters(), resumed.average.parameters())
    assert whole.history == resumed.history
    assert same(inpainting().prior.denoiser.parameters(), prior.denoiser.parameters())

def test_evidence_net_answers_each_measurement_by_itself():
    torch.manual_seed(0)
    for shape in ((3,), (1, 8, 8), (2, 5, 7), (4, 6)):
        net, y = EvidenceNet(shape, width=16, value=-3., scale=10.), torch.randn(5, *shape)
        assert net(y).tolist() == [-3.]*5
        shaken(net)
        torch.testing.assert_close(net(y)[2:3], net(y[2:3]), rtol=1e-4, atol=1e-4)
        assert net(y).std() > 0

# ---- features, copies and pickles

def guided(problem):
    "A gated guide, and a network that sees it and the measurement"
    guide = MomentMatching(.1)
    net = nets['PatchTransformer'](in_channels=4)
    drift = NetDrift(net, GuideShift(guide), measurement_feature)
    return problem.posterior([Gate(guide), drift])

@pytest.mark.parametrize('way', [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@pytest.mark.parametrize('form', ['NetDrift', *list(forms)[:2]])
def test_a_trained_posterior_can_be_copied_and_pickled(form, way):
    problem = inpainting()
    posterior = guided(problem)
    if form != 'NetDrift': posterior = problem.posterior([forms[form](problem.prior.denoiser)])
    shaken(posterior.drifts)
    y, again = torch.randn(1, *problem.y_shape), way(posterior)
    paths = []
    for p in (posterior, again):
        torch.manual_seed(1)
        paths.append(p.simulate(y, 2).x)
    assert torch.equal(*paths)

def test_copied_drifts_share_the_guide_that_they_shared():
    gate, net = copy.deepcopy(guided(inpainting()).drifts)
    assert gate.drift is net.features[0].drift

# ---- sizes and precision

def turned(net):
    "The same transformer for images on their side"
    other = PatchTransformer(net.size[::-1], width=16, depth=1, stem=4)
    weights = net.state_dict()
    for name, w in weights.items():
        if w.ndim == 4: weights[name] = w.transpose(2, 3)
    grid = weights['position'].unflatten(1, net.tokens)
    weights['position'] = grid.transpose(1, 2).flatten(1, 2)
    for name in ('unembed.weight', 'unembed.bias'):
        patch = weights[name].unflatten(0, (4, 4, 4)) # channel, row, column
        weights[name] = patch.transpose(1, 2).flatten(0, 2)
    other.load_state_dict(weights)
    return other

def test_a_wide_image_is_a_tall_one_on_its_side():
    torch.manual_seed(0)
    wide = shaken(PatchTransformer((8, 20), width=16, depth=1, stem=4), .1)
    x, t = torch.randn(2, 1, 8, 20), torch.tensor(.4)
    torch.testing.assert_close(turned(wide)(x.mT, t).mT, wide(x, t), rtol=1e-4, atol=1e-5)

def test_weights_of_a_square_u_net_serve_a_wide_one():
    torch.manual_seed(0)
    square, wide = UNet(16, widths=(8,), heads=2), UNet([16, 24], widths=(8,), heads=2)
    wide.load_state_dict(shaken(square, .1).state_dict())
    x, t = torch.randn(1, 1, 16, 24), torch.tensor(.4)
    assert wide(x, t).shape == x.shape and square.size == (16, 16)

@pytest.mark.parametrize('net', nets)
def test_weights_in_half_precision_take_and_give_single(net):
    "Images, times and answers keep their digits; only the weights are rounded"
    torch.manual_seed(0)
    full = shaken(nets[net](), .1)
    half = copy.deepcopy(full).bfloat16()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([.1, .2, .21, .9])
    a, b = full(x, t), half(x, t)
    assert b.dtype == torch.float32 and (a-b).square().mean() < 1e-3*a.square().mean()
    half.float()
    assert torch.equal(half.time.freq.value, full.time.freq.value) # moved, never rounded

def test_times_of_a_half_network_are_told_apart():
    torch.manual_seed(0)
    full = TimeEmbedding(32)
    half = copy.deepcopy(full).half()
    t = 1 - torch.arange(4)/1000
    steps = [net(t, 4).float().diff(dim=0).norm(dim=1) for net in (full, half)]
    assert torch.allclose(*steps, rtol=.3)

def test_mixed_precision_keeps_the_caller_s_types():
    torch.manual_seed(0)
    net = shaken(nets['UNet'](), .1)
    x, t = torch.randn(2, 1, 8, 8, requires_grad=True), torch.tensor(.4)
    wrapped = in_bfloat16(net)
    assert in_bfloat16(wrapped) is wrapped and wrapped(x, t).dtype == torch.float32
    wrapped(x, t).sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())

def test_whole_numbers_of_any_type():
    width, patch = torch.tensor(16), np.int32(4)
    net = PatchTransformer(np.int64(8), patch=patch, width=width, stem=4, depth=1)
    assert net(torch.zeros(1, 1, 8, 8), torch.tensor(.5)).shape == (1, 1, 8, 8)

def test_a_rank_is_no_feature():
    with pytest.raises(TypeError, match='a feature is a function of a step, got 4'):
        LoRA(unet(), 4)

def test_drifts_made_in_inference_mode_can_be_trained():
    problem = inpainting()
    with torch.inference_mode():
        made = [forms[f](problem.prior.denoiser) for f in ('FineTuned', 'LoRA')]
    for drift in made:
        posterior = problem.posterior([shaken(drift)])
        tau = posterior.simulate(torch.zeros(1, *problem.y_shape), 2)
        posterior.log_ratio(tau).sum().backward()
        assert all(p.grad is not None for p in drift.parameters() if p.numel())

# ---- refusals

def unet(): return VDenoiser(UNet(8, widths=(8, 16)), Cosine())
def wrong_image():
    step = Posterior(inpainting().prior, []).step(
        torch.zeros(2, 1, 4, 4), 0, None, torch.zeros(2, 1, 4, 4))
    return LoRA(unet())(step)

refusals = {
    'rank 0': (lambda: LoRA(unet(), rank=0), 'rank must be a positive whole number, got 0'),
    'half a rank': (lambda: LoRA(unet(), rank=1.5), 'rank must be a positive whole number'),
    'alpha': (lambda: LoRA(unet(), alpha=-1), 'alpha must be a positive number, got -1'),
    'nothing to adapt': (lambda: LoRA(VDenoiser(VectorNet(2, 2), Cosine())),
        'LoRA finds no layer of VDenoiser to adapt'),
    'nothing chosen': (lambda: LoRA(unet(), layers=lambda name, layer: False),
        'must choose some Linear or Conv2d'),
    'nothing to fine-tune': (
        lambda: FineTuned(GaussianDenoiser(torch.zeros(2), torch.eye(2), Cosine())),
        'GaussianDenoiser has no parameters to fine-tune'),
    'features of a vector': (lambda: FineTuned(
        VDenoiser(VectorNet(2, 2), Cosine()), measurement_feature, channels=1),
        'VDenoiser has no convolution to show features to: use a NetDrift'),
    'features without channels': (lambda: LoRA(unet(), measurement_feature),
        'channels must be a positive whole number, got 0'),
    'wrong image': (wrong_image, 'images of shape (1, 8, 8), got (1, 4, 4)'),
    'no shape': (lambda: EvidenceNet(()), 'y_shape must be the shape of one measurement'),
    'a number for a shape': (lambda: EvidenceNet(3), 'such as (1, 32, 32), got 3'),
    'evidence of nan': (lambda: EvidenceNet((3,), value=float('nan')),
        'value must be a finite number, got nan'),
    'wrong measurement': (lambda: EvidenceNet((3,))(torch.zeros(2, 4)),
        'measurements of shape (3,), got (4,)'),
    'half a size': (lambda: UNet(8.5), 'size must be a positive whole number, got 8.5'),
    'three sides': (lambda: PatchTransformer((8, 8, 8)),
        'a number or (height, width), got (8, 8, 8)'),
    'patch': (lambda: PatchTransformer((32, 30)),
        'image size 32 x 30 is not a multiple of the patch 4'),
    'halvings': (lambda: UNet((32, 30)), 'image size 32 x 30 cannot be halved 2 times'),
    'widths': (lambda: UNet(8, widths=(8, 12)), 'widths must be multiples of 8, got (8, 12)'),
    'no widths': (lambda: UNet(8, widths=()), 'widths must be multiples of 8, got ()'),
    'heads': (lambda: UNet(8, widths=(8, 16), heads=3), 'last width 16 is not a multiple'),
    'frequencies': (lambda: VectorNet(2, 2, frequencies=(-1,)),
        'frequencies must be a positive'),
    'vector width': (lambda: VectorNet(2, 2, width=0),
        'width must be a positive whole number'),
    'feature': (lambda: NetDrift(VectorNet(2, 2), 'y'),
        "a feature is a function of a step, got 'y'"),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name):
    call, message = refusals[name]
    with pytest.raises((TypeError, ValueError)) as caught: call()
    assert message in str(caught.value) and '\n' not in str(caught.value), str(caught.value)

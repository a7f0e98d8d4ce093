"Fine-tuned copies and adapters: the prior's bits, independent copies, lossless checkpoints, and clear refusals"
import copy

import pytest, torch
from torch import nn
from rtb_nb.denoise import GaussianDenoiser, VDenoiser
from rtb_nb.diffusion import Diffusion, Drifted
from rtb_nb.explore import OnPolicy
from rtb_nb.guidance import Gate, MomentMatching
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.networks import (EvidenceNet, FineTuned, LoRA, PatchTransformer, UNet, VectorNet, flat_state, load_state, load_tensors,
    save_tensors)
from rtb_nb.objective import RTB
from rtb_nb.operators import Mask
from rtb_nb.schedule import Cosine
from rtb_nb.train import Trainer, path_gradient

nets = {'UNet': lambda: UNet(8, widths=(8, 16)), 'PatchTransformer': lambda: PatchTransformer(8, width=16, depth=1, stem=4)}
forms = {'FineTuned': FineTuned,
         'LoRA': lambda d: LoRA(d, rank=2), 'LoRA everywhere': lambda d: LoRA(d, rank=2, layers=lambda name, layer: True)}
both = pytest.mark.parametrize('form', forms)

def inpainting(net='UNet', seed=0):
    "A prior whose random network has no zero weight, in the memory layout of shipped priors"
    torch.manual_seed(seed)
    net = nets[net]()
    for p in net.parameters(): p.data += .1*torch.randn_like(p)
    denoiser = VDenoiser(net, Cosine(.35)).to(memory_format=torch.channels_last)
    prior = Diffusion(denoiser, (1, 8, 8), steps=4, last_noise=.1, error=lambda t: .1*t)
    mask = torch.ones(1, 8, 8)
    mask[:, 2:6, 2:6] = 0
    return InverseProblem(prior, Likelihood(Mask(mask), .3))

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
def shaken(drift):
    for p in drift.parameters(): p.data += .05*torch.randn_like(p)
    return drift

@both
@pytest.mark.parametrize('net', nets)
def test_an_untrained_form_is_the_prior_to_the_bit(form, net):
    prior = inpainting(net).prior
    posterior = Drifted(prior, [forms[form](prior.denoiser)])
    paths = []
    for p in (prior, posterior):
        torch.manual_seed(1)
        paths.append(p.simulate(3))
    assert torch.equal(paths[0].x, paths[1].x)
    torch.testing.assert_close(posterior.log_ratio(paths[1]), torch.zeros(3), rtol=0, atol=1e-3)

@both
def test_the_prior_is_never_touched(form):
    problem = inpainting()
    before = copy.deepcopy(problem.prior.state_dict())
    posterior = Drifted(problem.prior, [shaken(forms[form](problem.prior.denoiser))])
    tau = posterior.simulate(4, torch.zeros(1, *problem.operator(torch.zeros(1, 1, 8, 8)).shape[1:]))
    path_gradient(problem, posterior, RTB(), problem.prior.with_guesses(tau), problem.log_likelihood(tau))
    assert all(torch.equal(v, problem.prior.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in problem.prior.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.drifts.parameters() if p.numel())

@both
def test_chunked_gradient_is_the_full_one(form):
    problem = inpainting()
    posterior = Drifted(problem.prior, [shaken(forms[form](problem.prior.denoiser))])
    y = problem.likelihood(torch.zeros(1, 1, 8, 8)).sample()
    tau = problem.prior.with_guesses(posterior.simulate(6, y))
    def gradient(fill):
        posterior.drifts.zero_grad()
        fill()
        return torch.cat([p.grad.flatten() for p in posterior.drifts.parameters()])
    full = gradient(lambda: RTB()(problem.log_weight(tau, posterior), tau.y).backward())
    assert full.norm() > 0
    for chunk in (6, 12):
        chunked = gradient(lambda: path_gradient(problem, posterior, RTB(), tau, problem.log_likelihood(tau), chunk=chunk))
        assert (chunked-full).norm() < 1e-4*full.norm()

def test_lora_is_the_merged_network():
    prior = inpainting().prior
    lora, copied = shaken(LoRA(prior.denoiser, rank=3, alpha=6.)), FineTuned(prior.denoiser)
    assert lora.scale == 2.
    with torch.no_grad():
        for name, W in lora.weights().items(): copied.denoiser.get_parameter(name).copy_(W)
    x = torch.randn(5, 1, 8, 8)
    step = Drifted(prior, []).step(x, torch.tensor([0, 1, 2, 3, 3]), None, prior.denoise(x, torch.tensor([0, 1, 2, 3, 3])))
    assert lora(step).abs().max() > .01
    torch.testing.assert_close(lora(step), copied(step), rtol=1e-4, atol=1e-5)

def test_lora_holds_its_adapters_alone():
    prior = inpainting().prior
    lora = LoRA(prior.denoiser, rank=2)
    assert all(k[:2] in ('A.', 'B.') for k in lora.state_dict())
    count = lambda tensors: sum(p.numel() for p in tensors)
    assert count(lora.parameters()) == count(lora.state_dict().values()) < count(prior.parameters())/2
    assert not any(p is q for p in lora.parameters() for q in prior.parameters())
    assert all(len(A) <= 2 for A in lora.A.values()) and lora.A['net/head/2'].shape[0] == 1  # one channel out: rank 1 is all there is

def test_lora_takes_the_layers_it_is_told():
    prior = inpainting().prior
    assert list(LoRA(prior.denoiser, layers=lambda name, layer: name.endswith('qkv')).weights()) == ['net.attention.qkv.weight']

@both
def test_copies_are_independent_and_share_what_they_should(form):
    prior = inpainting().prior
    drift = forms[form](prior.denoiser)
    twin = copy.deepcopy(drift)
    before = [p.detach().clone() for p in drift.parameters()]
    shaken(twin)
    assert same(before, drift.parameters()) and not same(drift.parameters(), twin.parameters())
    assert (twin.denoiser is drift.denoiser) == isinstance(drift, LoRA)
    whole = copy.deepcopy(Drifted(prior, [drift]))
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
    with pytest.raises(RuntimeError, match='net/attention/qkv'): load_state(LoRA(prior.denoiser, rank=2), flat_state(other.state_dict())[0])

def trainer(form, seed=0, **kw):
    problem = inpainting()
    torch.manual_seed(seed)
    posterior = Drifted(problem.prior, [Gate(MomentMatching(problem.likelihood, .1)), forms[form](problem.prior.denoiser)])
    return Trainer(problem, posterior, OnPolicy(posterior, 4), **kw)

@both
def test_the_trainer_knows_the_rates_of_large_networks(form):
    t = trainer(form)
    rates = {id(p): g['lr'] for g in t.opt.param_groups for p in g['params']}
    assert {rates[id(p)] for p in t.posterior.drifts[1].parameters()} == {1e-4 if form == 'FineTuned' else 1e-3}

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
    assert same(whole.posterior.drifts.parameters(), resumed.posterior.drifts.parameters())
    assert same(whole.average.parameters(), resumed.average.parameters()) and whole.history == resumed.history
    assert same(inpainting().prior.denoiser.parameters(), resumed.posterior.prior.denoiser.parameters())

def test_evidence_net_answers_each_measurement_by_itself():
    torch.manual_seed(0)
    for shape in ((3,), (1, 8, 8), (2, 5, 7), (4, 6)):
        net, y = EvidenceNet(shape, width=16, value=-3., scale=10.), torch.randn(5, *shape)
        assert net(y).tolist() == [-3.]*5
        shaken(net)
        torch.testing.assert_close(net(y)[2:3], net(y[2:3]), rtol=1e-4, atol=1e-4)
        assert net(y).std() > 0

unet = lambda: VDenoiser(UNet(8, widths=(8, 16)), Cosine())
refusals = {
    'rank 0': (lambda: LoRA(unet(), rank=0), 'rank must be a positive whole number, got 0'),
    'half a rank': (lambda: LoRA(unet(), rank=1.5), 'rank must be a positive whole number, got 1.5'),
    'alpha': (lambda: LoRA(unet(), alpha=-1), 'alpha must be positive, got -1'),
    'nothing to adapt': (lambda: LoRA(VDenoiser(VectorNet(2, 2), Cosine())), 'LoRA finds no layer of VDenoiser to adapt'),
    'nothing chosen': (lambda: LoRA(unet(), layers=lambda name, layer: False), 'must choose some Linear or Conv2d'),
    'nothing to fine-tune': (lambda: FineTuned(GaussianDenoiser(torch.zeros(2), torch.eye(2), Cosine())),
        'GaussianDenoiser has no parameters to fine-tune'),
    'wrong image': (lambda: LoRA(unet())(Drifted(inpainting().prior, []).step(torch.zeros(2, 1, 4, 4), 0, None, torch.zeros(2, 1, 4, 4))),
        'images of shape (1, 8, 8), got (1, 4, 4)'),
    'no shape': (lambda: EvidenceNet(()), 'y_shape must be the shape of one measurement'),
    'wrong measurement': (lambda: EvidenceNet((3,))(torch.zeros(2, 4)), 'measurements of shape (3,), got (4,)'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name):
    call, message = refusals[name]
    with pytest.raises(ValueError) as caught: call()
    assert message in str(caught.value) and '\n' not in str(caught.value), str(caught.value)

"Trainings that know what they are of, and files of priors that give back what was written"
import copy, json, math

import pytest, torch
from rtb_nb.denoise import EpsDenoiser, GaussianDenoiser, VDenoiser, X0Denoiser
from rtb_nb.networks import PatchTransformer, UNet, VectorNet
from rtb_nb.priors import (held_out_loss, learning_rate, load_prior, save_prior, shipped_priors,
    train_prior)
from rtb_nb.schedule import VE, Bridge, Cosine, Linear, Tabulated

torch.manual_seed(0)
POINTS = torch.randn(64, 2)/2
NET = dict(name='VectorNet', in_dim=2, out_dim=2, width=8)
def small(schedule=None, kind=VDenoiser, **kw):
    "A small network of random weights"
    torch.manual_seed(1)
    net = VectorNet(2, 2, **dict(width=8) | kw)
    for p in net.parameters(): p.data += .1*torch.randn_like(p)
    return kind(net, schedule or Cosine(.5))

def train(path=None, data=POINTS, held_out=POINTS[:8], denoiser=None, log=str, **kw):
    "A training of seconds"
    kw = dict(steps=4, batch=8, every=2) | kw
    return train_prior(denoiser or small(), data, held_out, path=path, log=log, **kw)

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

# ---- training

CHANGES = {
    'data': dict(data=POINTS + .1), 'held_out': dict(held_out=POINTS[:9]),
    'network': dict(denoiser=small(frequencies=(1.,))),
    'schedule': dict(denoiser=small(Linear())), 'settings': dict(batch=9),
}
MORE = dict(kind=('network', dict(denoiser=small(kind=EpsDenoiser))),
    rate=('settings', dict(lr=.1)), seed=('settings', dict(seed=1)))

@pytest.mark.parametrize('part', [*CHANGES, *MORE])
def test_a_checkpoint_of_another_training_is_refused(part, tmp_path):
    named, change = MORE[part] if part in MORE else (part, CHANGES[part])
    train(tmp_path/'a')
    before = (tmp_path/'a').read_bytes()
    with pytest.raises(ValueError) as e: train(tmp_path/'a', **change)
    assert f'a was trained with another {named}: give another' in str(e.value)
    assert (tmp_path/'a').read_bytes() == before

def test_a_finished_run_says_so_and_a_longer_one_goes_on(tmp_path):
    said = []
    first, history = train(tmp_path/'a')
    again, same_history = train(tmp_path/'a', log=said.append)
    assert same(first, again) and history == same_history
    assert len(said) == 1 and said[0].startswith('step 4: ') and 'is finished' in said[0]
    longer, history = train(tmp_path/'a', steps=6)
    assert [h[0] for h in history] == [2, 4, 6] and not same(first, longer)

def test_a_file_from_before_fingerprints_is_refused(tmp_path):
    from rtb_nb.checkpoints import load_tensors, save_tensors
    train(tmp_path/'a')
    tensors, meta = load_tensors(tmp_path/'a')
    del meta['belongs']
    save_tensors(tmp_path/'a', tensors, meta)
    with pytest.raises(ValueError, match='does not say what it was trained for'):
        train(tmp_path/'a')

def test_a_checkpoint_goes_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train('~/a.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors']

def test_gradients_where_there_were_none():
    with torch.no_grad(): a, _ = train()
    assert same(a, train()[0])
    denoiser = small()
    with torch.inference_mode(), pytest.raises(RuntimeError) as e: train(denoiser=denoiser)
    assert 'train_prior needs gradients' in str(e.value) and '\n' not in str(e.value)
    with torch.inference_mode(): denoiser = small()
    with pytest.raises(RuntimeError, match='made in torch.inference_mode') as e:
        train(denoiser=denoiser)

def test_a_prior_loaded_in_inference_mode_can_guide(tmp_path):
    with torch.inference_mode(): prior = load_prior('mnist-32', steps=2)
    x = torch.zeros(1, 1, 32, 32, requires_grad=True)
    prior.denoiser(x, torch.tensor(.5)).sum().backward()
    assert x.grad.isfinite().all()

def test_the_held_out_loss_is_summed_in_double_precision():
    x = POINTS[:8].repeat(1000, 1)
    loss = held_out_loss(small(), x, draws=1)
    assert loss != torch.tensor(loss).item() # more digits than single precision has

def test_a_half_network_has_the_loss_of_the_full_one():
    "Targets and sums stay in single precision, where half would be off by a percent"
    full = small()
    half = copy.deepcopy(full).bfloat16()
    assert math.isclose(held_out_loss(full, POINTS), held_out_loss(half, POINTS), rel_tol=3e-3)

def test_learning_rates():
    assert learning_rate(0, 10, 1., warmup=0) == 1.
    assert learning_rate(0, 10, 1., warmup=2) == .5
    assert learning_rate(10, 10, 1.) < 1e-12

# ---- files

SCHEDULES = {'Cosine': Cosine(.3), 'Linear': Linear(.2, 15.), 'VE': VE(.02, 30.),
             'Bridge': Bridge(.7),
             'Tabulated': Tabulated((1 - torch.linspace(1e-4, .02, 100).double()).cumprod(0))}

@pytest.mark.parametrize('kind', [VDenoiser, EpsDenoiser, X0Denoiser])
@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_comes_back(name, kind, tmp_path):
    schedule = SCHEDULES[name]
    denoiser, path = small(schedule, kind), tmp_path/'a.safetensors'
    save_prior(denoiser, path, (2,), NET, dict(data='points'), POINTS)
    prior = load_prior(path, steps=4, start=.9)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(prior.denoiser.schedule(t), schedule(t)))
    assert torch.equal(prior.denoiser(POINTS, t[50].float()), denoiser(POINTS, t[50].float()))
    assert torch.equal(prior.denoiser.error(t[10:90]), denoiser.error(t[10:90]))
    assert json.loads((tmp_path/'a.json').read_text()) == prior.card

@pytest.mark.parametrize('net', ['UNet', 'PatchTransformer'])
def test_priors_of_images_that_are_not_square(net, tmp_path):
    args = dict(size=(8, 12)) | dict(UNet=dict(widths=[8, 16]),
        PatchTransformer=dict(width=16, depth=1, stem=4))[net]
    torch.manual_seed(0)
    made = dict(UNet=UNet, PatchTransformer=PatchTransformer)[net](**args)
    x, path = torch.randn(4, 1, 8, 12), tmp_path/'a.safetensors'
    save_prior(VDenoiser(made, Cosine()), path, (1, 8, 12), dict(name=net, **args), {}, x)
    assert load_prior(path, steps=2).sample(2).shape == (2, 1, 8, 12)

def test_weights_beyond_half_precision_are_kept(tmp_path):
    denoiser = small()
    denoiser.net.last.bias.data[:] = torch.tensor([1e5, -2e38])
    save_prior(denoiser, tmp_path/'a.safetensors', (2,), NET, {}, POINTS)
    kept = load_prior(tmp_path/'a.safetensors', 2).denoiser.net.last.bias
    assert kept.tolist() == torch.tensor([1e5, -2e38]).tolist()

def test_two_names_have_two_cards(tmp_path):
    for name in ('a.b', 'a.c'):
        save_prior(small(), tmp_path/f'{name}.safetensors', (2,), NET, dict(data=name), POINTS)
    assert {p.name for p in tmp_path.iterdir()} == {'a.b.safetensors', 'a.b.json',
                                                    'a.c.safetensors', 'a.c.json'}

def test_half_precision_is_the_network_s_alone():
    full, half = (load_prior('mnist-32', 4, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert half.chain.std.dtype == half.denoiser.table_t.dtype == torch.float64
    torch.manual_seed(0)
    tau = full.simulate(2)
    assert (half.denoise(tau.x[1], 1) - tau.x0_hat[1]).square().mean().sqrt() < .02
    cast = copy.deepcopy(full).bfloat16()
    assert (cast.denoise(tau.x[1], 1) - tau.x0_hat[1]).square().mean().sqrt() < .03
    assert abs(full.log_prob(tau) - cast.log_prob(tau)).max() < 60 # of thousands of nats

@pytest.mark.parametrize('name', shipped_priors())
def test_shipped_priors_are_written_as_they_are(name, tmp_path):
    "Reading and writing a shipped prior gives its weights back to the bit"
    prior = load_prior(name, 2)
    path, card = tmp_path/'a.safetensors', prior.card
    x = torch.randn(2, *prior.shape)
    save_prior(prior.denoiser, path, prior.shape, card['net'], {}, x)
    assert same(prior.denoiser, load_prior(path, 2).denoiser)

# ---- refusals

def saved(denoiser=None, name='a.safetensors', shape=(2,), net=NET, card=None, held_out=POINTS):
    def call(d):
        try: save_prior(denoiser or small(), d/name, shape, net, card or {}, held_out)
        finally: assert not list(d.iterdir()), 'something was left behind'
    return call

def broken():
    denoiser = small()
    denoiser.net.last.bias.data[0] = math.nan
    return denoiser

def stranger(d):
    from rtb_nb.checkpoints import save_tensors
    save_tensors(d/'a.safetensors', {'x': torch.ones(1)}, {'step': 3})
    return load_prior(d/'a.safetensors')

class Mine(VectorNet): pass
bytes_ = torch.zeros(4, 2, dtype=torch.uint8)
refusals = {
    'no data': (lambda d: train(data=POINTS[:0]), 'got 0 and 8'),
    'nan data': (lambda d: train(data=POINTS*math.nan),
        'the training images hold non-finite values'),
    'nan held out': (lambda d: train(held_out=POINTS*math.nan),
        'the held-out images hold non-finite values'),
    'bytes': (lambda d: train(data=bytes_), 'must be floats, got torch.uint8: bring bytes'),
    'shapes': (lambda d: train(held_out=torch.zeros(2, 3)),
        'images to train on have shape (2,), those held out (3,)'),
    'steps': (lambda d: train(steps=0), 'steps must be a positive whole number, got 0'),
    'batch': (lambda d: train(batch=2.5), 'batch must be a positive whole number, got 2.5'),
    'every': (lambda d: train(every=0), 'every must be a positive whole number, got 0'),
    'lr': (lambda d: train(lr=-1e-3), 'lr must be a positive number, got -0.001'),
    'decay': (lambda d: train(decay=1.), 'decay must lie in [0, 1), got 1.0'),
    'dtype': (lambda d: train(dtype=torch.float16), 'torch.bfloat16, got torch.float16'),
    'nothing to train': (lambda d: train(denoiser=GaussianDenoiser(
        torch.zeros(2), torch.eye(2), Cosine())), 'GaussianDenoiser has nothing to train'),
    'warmup': (lambda d: learning_rate(0, 10, 1., warmup=-1), 'warmup must be a whole number'),
    'exact denoiser': (saved(GaussianDenoiser(torch.zeros(2), torch.eye(2), Cosine())),
        'a file cannot hold the denoiser GaussianDenoiser: it knows VDenoiser'),
    'own network': (saved(VDenoiser(Mine(2, 2), Cosine())), 'cannot hold the network Mine'),
    'own schedule': (saved(VDenoiser(VectorNet(2, 2, width=8), lambda t: (1-t, t))),
        'a file cannot hold the schedule function: it knows Cosine'),
    'another width': (saved(net=NET | dict(width=16)), 'describes another network'),
    'another argument': (saved(net=NET | dict(with_=16)), 'describes another network'),
    'another frequency': (saved(small(frequencies=(1.,)), net=NET | dict(frequencies=[2.])),
        'describes another network than the one to be written: guesses differ'),
    'name': (saved(name='a.b'), 'the name of a prior must end in .safetensors, got a.b'),
    'events': (saved(shape=(3,)), 'held_out must be events of shape (3,), got (2,)'),
    'nan weights': (saved(broken()), 'the weights hold non-finite values'),
    'card': (saved(card=dict(x=object())), 'not JSON serializable'),
    'unknown prior': (lambda d: load_prior('nebulae'), "unknown prior 'nebulae'"),
    'no file': (lambda d: load_prior(d/'a.safetensors'), 'there is no prior file'),
    'no prior': (stranger, 'holds no prior, for it has no'),
    'precision': (lambda d: load_prior('mnist-32', dtype=torch.float64), 'got torch.float64'),
    'no steps': (lambda d: load_prior('mnist-32', 0), 'steps must be a positive whole number'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name, tmp_path):
    call, message = refusals[name]
    with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught: call(tmp_path)
    assert message in str(caught.value) and '\n' not in str(caught.value), str(caught.value)

"Files come back whole, into what they fit, and know which run they are of"
import functools

import numpy as np, pytest, torch
from rtb_nb.checkpoints import (check_fingerprint, fingerprint, flat_state, load_state,
    load_tensors, save_tensors)
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.networks import UNet, VectorNet
from rtb_nb.per_sample import as_picture
from rtb_nb.schedule import Cosine, Linear
from rtb_nb.supervised import load_supervised
from project import python

def hash_of(v): return fingerprint(v=v)['v']
def double(x): return 2*x
def scaled(by):
    def scale(x): return by*x
    return scale

class Kept:
    "Something with a public value, and a private one that comes and goes"
    def __init__(self, value): self.value, self._cache = value, object()

EQUAL = {
    'numbers of any type': (.1, np.float64(.1)),
    'whole numbers': (3, torch.tensor(3).item()),
    'whole floats': (3, 3.),
    'lists and tuples': ([1, (2, 3)], (1, [2, 3])),
    'order of a dict': (dict(a=1, b=2), dict(b=2, a=1)),
    'precision of y': (torch.linspace(0, 1, 9).double(), torch.linspace(0, 1, 9)),
    'numpy': (np.arange(3), torch.arange(3)),
    'layout': (torch.eye(3).T.contiguous(), torch.eye(3).T),
    'the last digits of a sum': (torch.tensor([1., .1]).double(),
        torch.tensor([1., .1]).double()*(1 + 1e-15)),
    'private things': (Kept(1), Kept(1)),
    'functions': (double, double),
    'a closure of the same': (scaled(2), scaled(2)),
    'networks': (VectorNet(2, 2).linear, VectorNet(2, 2).linear),
    'devices': (torch.device('cpu'), torch.device('cuda')),
}
def with_keyword(n):
    def f(x, *, times=n): return times*x
    return f

def reading(n, written='lambda x: n*x'):
    "A function of a module in which `n` has this value"
    around = dict(n=n, torch=torch, __name__='here')
    exec(f'f = {written}' if 'lambda' in written else written, around)
    return around['f']

NAMED = 'def f(x): return [n*u for u in torch.unbind(x)]'

DIFFERENT = {
    'numbers': (.1, .1 + 1e-12),
    'a number and a word': (1, '1'),
    'nothing and zero': (None, 0),
    'values': (torch.ones(3), torch.ones(3)*(1 + 1e-5)),
    'shape': (torch.ones(3), torch.ones(1, 3)),
    'nan and zero': (torch.tensor([0., 1.]), torch.tensor([float('nan'), 1.])),
    'sparse': (torch.eye(3).to_sparse(), torch.diag(torch.tensor([1., 1., 2.])).to_sparse()),
    'rows': (torch.eye(3).to_sparse_csr(), torch.eye(3)[[1, 0, 2]].to_sparse_csr()),
    'objects': (Kept(1), Kept(2)),
    'functions': (double, scaled(2)),
    'closures': (scaled(2), scaled(3)),
    'lambdas': (lambda x: 2*x, lambda x: 3*x),
    'pairs in lambdas': (lambda x: double(x, (1, 2)), lambda x: double(x, (1, 3))),
    'lambdas in lambdas': (lambda x: (lambda y: 2*y), lambda x: (lambda y: 3*y)),
    'what a lambda reads': (reading(1), reading(2)),
    'what lambdas in it read': (reading(1, 'lambda x: lambda y: n*y'),
                                reading(2, 'lambda x: lambda y: n*y')),
    'what a function reads': (reading(torch.ones(2), NAMED), reading(torch.zeros(2), NAMED)),
    'keywords': (with_keyword(1), with_keyword(2)),
    'partial': (functools.partial(double, 1), functools.partial(double, 2)),
    'schedules': (Cosine(.5), Linear()),
    'numbers of a schedule': (Cosine(.5), Cosine(.4)),
    'weights': (UNet(8, widths=(8,)), UNet(8, widths=(8,))),
    'frequencies': (VectorNet(2, 2).waves, VectorNet(2, 2, frequencies=(1.,)).waves),
}

EQUAL['what a function reads'] = reading(2, NAMED), reading(2, NAMED)
EQUAL['an attribute of that name'] = (reading(1, 'lambda x: x.n'), reading(2, 'lambda x: x.n'))
EQUAL['a module that it reads'] = (reading(torch, 'lambda x: n.ones(x)'),
                                   reading(np, 'lambda x: n.ones(x)'))

@pytest.mark.parametrize('name', EQUAL)
def test_the_same_has_one_fingerprint(name):
    a, b = EQUAL[name]
    assert hash_of(a) == hash_of(b)

@pytest.mark.parametrize('name', DIFFERENT)
def test_what_differs_has_two(name):
    a, b = DIFFERENT[name]
    assert hash_of(a) != hash_of(b)

def test_what_holds_itself_has_a_fingerprint():
    loop = Kept(None)
    loop.value = loop
    assert hash_of(loop) == hash_of(loop)

PROCESS = '''
import torch
from rtb_nb.checkpoints import fingerprint
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.schedule import Cosine
cov = torch.linspace(.1, 1, 3).diag()
prior = Diffusion(GaussianDenoiser(torch.zeros(3), cov, Cosine()), (3,), 4)
print(fingerprint(prior=prior, words={'b', 'a'}, fn=torch.exp, y=torch.ones(2)))
'''

def test_shipped_pictures_are_still_theirs():
    load_supervised('mnist-box', as_picture) # a picture that reads nothing but functions

def test_every_process_says_the_same():
    "A set's order and an object's address change from process to process"
    assert python('-c', PROCESS) == python('-c', PROCESS)

def test_using_a_prior_does_not_change_it():
    denoiser = GaussianDenoiser(torch.zeros(3), torch.eye(3), Cosine())
    prior = Diffusion(denoiser, (3,), 4)
    before = hash_of(prior)
    prior.eval().sample(2)
    assert hash_of(prior) == before

def test_the_part_that_differs_is_named():
    stored = fingerprint(prior=1, y=2)
    check_fingerprint(stored, fingerprint(prior=1, y=2), 'run')
    for other, part in [(dict(prior=1, y=3), 'y'), (dict(prior=1), 'y'),
                        (dict(prior=1, y=2, noise=.1), 'noise')]:
        now = fingerprint(**other)
        with pytest.raises(ValueError) as e: check_fingerprint(stored, now, 'run')
        assert str(e.value).startswith(f'run was trained with another {part}: give another')
        assert '\n' not in str(e.value)

# ---- files

def test_a_file_is_in_the_home_folder_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_tensors('~/runs/a.safetensors', {'x': torch.ones(2)}, {'step': 1})
    assert load_tensors('~/runs/a.safetensors')[1] == {'step': 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['runs']
    assert [p.name for p in (tmp_path/'runs').iterdir()] == ['a.safetensors']

def test_nothing_is_left_of_what_cannot_be_written(tmp_path):
    for tensors, meta in [({'x': 'no tensor'}, {}), ({'x': torch.ones(1)}, {'step': object()})]:
        with pytest.raises((AttributeError, TypeError)):
            save_tensors(tmp_path/'new'/'a', tensors, meta)
    assert not list(tmp_path.iterdir())

def optimiser(kind, net, **kw):
    "An optimiser that has made a step"
    opt = kind(net.parameters(), lr=.1, **kw)
    for p in net.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    return opt

KINDS = {'Adam': (torch.optim.Adam, {}), 'AdamW': (torch.optim.AdamW, dict(weight_decay=.1)),
         'amsgrad': (torch.optim.Adam, dict(amsgrad=True)), 'SGD': (torch.optim.SGD, {}),
         'momentum': (torch.optim.SGD, dict(momentum=.9)), 'RMSprop': (torch.optim.RMSprop, {})}

@pytest.mark.parametrize('name', KINDS)
def test_optimisers_come_back(name):
    "To the bit, and without sharing tensors with what they were loaded from"
    kind, kw = KINDS[name]
    torch.manual_seed(0)
    a, b = VectorNet(2, 2, width=8), VectorNet(2, 2, width=8)
    opt_a, opt_b = optimiser(kind, a, **kw), kind(b.parameters(), lr=.1, **kw)
    load_state(b, flat_state(a.state_dict())[0])
    load_state(opt_b, flat_state(opt_a.state_dict(), 'opt.')[0], 'opt.')
    for net, opt in ((a, opt_a), (b, opt_b)):
        for p in net.parameters(): p.grad = torch.full_like(p, .5)
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def into(target, source):
    "Load the state of one thing into another"
    return lambda d: load_state(target, flat_state(source.state_dict())[0])

def corrupt(d):
    (d/'bad').write_bytes(b'not a checkpoint')
    return load_tensors(d/'bad')

adam, sgd = torch.optim.Adam, torch.optim.SGD
net, wide = VectorNet(2, 2, width=8), VectorNet(2, 2, width=16)
refusals = {
    'width': (into(net, wide),
        'does not fit this VectorNet: body.0.bias has shape (16,) there and (8,) here'),
    'depth': (into(net, VectorNet(2, 2, width=8, depth=3)), 'body.2.bias is there alone'),
    'another network': (into(net, UNet(8, widths=(8,))), 'does not fit this VectorNet'),
    'optimiser': (into(sgd(net.parameters(), momentum=.9), optimiser(adam, net)),
        "of another optimiser than this SGD: it holds ['exp_avg', 'exp_avg_sq', 'step'], not"),
    'momentum for Adam': (into(adam(net.parameters()), optimiser(sgd, net, momentum=.9)),
        'of another optimiser than this Adam'),
    'width of an optimiser': (into(adam(net.parameters()), optimiser(adam, wide)),
        'does not fit this Adam'),
    'fewer parameters': (into(adam(list(net.parameters())[:3]), optimiser(adam, net)),
        'the checkpoint has optimiser state of 14 parameters, this Adam is of 3'),
    'no file': (lambda d: load_tensors(d/'none'), 'there is no file'),
    'a folder': (lambda d: load_tensors(d), 'there is no file'),
    'no checkpoint': (corrupt, 'is not a safetensors file that rtb_nb wrote'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name, tmp_path):
    call, message = refusals[name]
    with pytest.raises((ValueError, FileNotFoundError)) as caught: call(tmp_path)
    assert message in str(caught.value) and '\n' not in str(caught.value), str(caught.value)

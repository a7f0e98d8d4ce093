"Plots, schedules and denoisers: right values, precision, and what is refused"
import copy
import math
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from rtb_nb import show
from rtb_nb.denoise import (Bookkeeping, Denoiser, EpsDenoiser, GaussianDenoiser,
                            MixtureDenoiser, VDenoiser, X0Denoiser, check_start, gaussian_field,
                            safe_alpha)
from rtb_nb.diffusion import Diffusion
from rtb_nb.schedule import (VE, Bridge, Cosine, Linear, Tabulated, check_number, check_whole,
                             levels, time_of, widest)

f64 = torch.float64
nan, inf = math.nan, math.inf
eye, zeros, centres = torch.eye(2), torch.zeros(2), torch.zeros(3, 2)


def gaussian(mean=zeros, cov=eye): return GaussianDenoiser(mean, cov, Cosine())
def mixture(means=centres, std=.1, weights=None):
    return MixtureDenoiser(means, std, weights, Cosine())
def field(size=8, std=.4, length=2.): return gaussian_field(size, std, length, Cosine())


bad_input = {
    'half a count': (lambda: check_whole('steps', 2.5),
                     'steps must be a positive whole number'),
    'bool count': (lambda: check_whole('steps', True), 'got True'),
    'tensor count': (lambda: check_whole('steps', torch.tensor(2.)), 'got tensor(2.)'),
    'text number': (lambda: check_number('scale', '1'),
                    "scale must be a positive number, got '1'"),
    'vector number': (lambda: check_number('scale', torch.ones(2)), 'got tensor([1., 1.])'),
    'scale': (lambda: Cosine(-1), 'scale must be a positive number, got -1'),
    'no rate': (lambda: Linear(beta_min=nan),
                'beta_min must be zero or a positive number, got nan'),
    'falling rate': (lambda: Linear(3., 2.), 'since noise grows with time: got 2.0 and 3.0'),
    'VE': (lambda: VE(2., 1.), 'since noise grows with time: got 1.0 and 2.0'),
    'VE zero': (lambda: VE(0.), 'sigma_min must be a positive number, got 0.0'),
    'bridge': (lambda: Bridge(inf), 'std must be a positive number, got inf'),
    'table': (lambda: Tabulated([.9, .95]), 'must decrease within (0, 1), got values from 0.9'),
    'short table': (lambda: Tabulated([.9]),
                    'a vector of at least two entries, got shape (1,)'),
    'turned round': (lambda: time_of(.5, Cosine()), 'got Cosine: the schedule comes first'),
    'no steps': (lambda: levels(Cosine(), 0), 'steps must be a positive whole number, got 0'),
    'last noise': (lambda: levels(Cosine(), 4, 1.), 'last_noise must lie in (0, 1), got 1.0'),
    'early start': (lambda: levels(Cosine(), 4, start=.01), 'choose a larger start'),
    'no schedule': (lambda: MixtureDenoiser(centres, .1),
                    'MixtureDenoiser needs a schedule, got None'),
    'schedule of text': (lambda: VDenoiser(None, 'cosine'), "needs a schedule, got 'cosine'"),
    'cov shape': (lambda: gaussian(cov=torch.eye(3)),
                  'cov must be (2, 2) for a mean of 2 entries'),
    'cov skew': (lambda: gaussian(cov=torch.tensor([[1., .5], [0., 1.]])),
                 'differs from its transpose by up to 0.5: give a covariance'),
    'cov negative': (lambda: gaussian(cov=-eye), 'its smallest eigenvalue is -1'),
    'cov nan': (lambda: gaussian(cov=eye*nan), 'cov has 4 entries that are not finite'),
    'mean inf': (lambda: gaussian(zeros + inf), 'mean has 2 entries that are not finite'),
    'field size': (lambda: field(size=1), 'size must be a whole number of at least 2, got 1'),
    'field std': (lambda: field(std=0), 'std must be a positive number, got 0'),
    'field length': (lambda: field(length=-1), 'length must be a positive number, got -1'),
    'means': (lambda: mixture(zeros), 'means must be (components, dimensions), got shape (2,)'),
    'means nan': (lambda: mixture(centres*nan), 'means has 6 entries that are not finite'),
    'mixture std': (lambda: mixture(std=0.), 'std must be positive, got 0'),
    'std nan': (lambda: mixture(std=nan), 'std has 1 entries that are not finite'),
    'two stds': (lambda: mixture(std=torch.ones(2)),
                 'std must be a number or 3, one per component'),
    'weights': (lambda: mixture(weights=[1., -1., 1.]),
                'weights must be 3 non-negative numbers'),
    'weights inf': (lambda: mixture(weights=[1., inf, 1.]),
                    'weights has 1 entries that are not'),
    'no error yet': (lambda: VDenoiser(None, Cosine()).error(zeros), 'call calibrate(x0)'),
    'one sample': (lambda: gaussian().calibrate(torch.ones(1, 2)),
                   'got 1 samples whose variance is 0'),
    'nan samples': (lambda: gaussian().calibrate(centres*nan), 'whose variance is nan'),
    'times': (lambda: gaussian().calibrate(torch.randn(9, 2), 1),
              'times must be a whole number of'),
    'no signal': (lambda: check_start(EpsDenoiser(None, Cosine()), torch.tensor(1e-9)),
                  'EpsDenoiser cannot start at alpha = 1e-09, below 0.001: pass a start'),
    'role': (lambda: show.show_hist({'a': [1., 2.]}, roles={'a': 'blue'}),
             'is no role: use one of'),
    'curve': (lambda: show.show_curves({'a': ([1], [1, 2])}), "'a' has xs of shape (1,)"),
    'points': (lambda: show.show_samples(prior=torch.zeros(4, 3)), 'select two coordinates'),
    'density': (lambda: show.show_density(lambda x: x[:, 0]*nan, (0, 1), (0, 1)),
                'give limits'),
    'colour': (lambda: show.show_density(None, (0, 1), (0, 1), role='psot'),
               "'psot' is no role"),
    'titles': (lambda: show.show_images(torch.zeros(2, 1, 8, 8), ['a']), 'one per image'),
    'channels': (lambda: show.show_images(torch.zeros(2, 4, 8, 8)), '1 or 3 channels, got 4'),
}


@pytest.mark.parametrize('name', bad_input)
def test_bad_input(name):
    call, message = bad_input[name]
    with pytest.raises((ValueError, TypeError)) as e: call()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_numbers_of_any_type():
    assert check_whole('n', np.int8(3)) == check_whole('n', torch.tensor(3)) == 3
    assert check_number('x', np.float32(.5)) == check_number('x', torch.tensor([.5])) == .5
    t = torch.linspace(0, 1, 5)
    pairs = (Cosine(np.float64(.3)), Cosine(.3)), (VE(np.int64(1), 50), VE(1., 50.))
    for one, other in pairs:
        for a, b in zip(one(t), other(t)): assert torch.equal(a, b)
    assert torch.equal(levels(Cosine(), np.int64(4))[0], levels(Cosine(), torch.tensor(4))[0])
    assert torch.equal(field(size=np.int64(8), std=np.float64(.4)).cov, field().cov)


table = Tabulated(torch.linspace(.99, .01, 50))
schedules = [Cosine(), Cosine(.2), Linear(), VE(), Bridge(), table]


@pytest.mark.parametrize('schedule', schedules, ids=lambda s: type(s).__name__)
def test_schedules_answer_half_precision_in_single(schedule):
    t = torch.tensor([.25, .5, .75])
    for half, single in zip(schedule(t.bfloat16()), schedule(t)):
        assert half.dtype == torch.float32 and torch.equal(half, single)
    assert schedule(.5)[0].shape == () and schedule(t.double())[0].dtype == f64


class Scale(nn.Module): # a network that says what it was asked in
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(.5))
    def forward(self, x, t):
        self.asked = x.dtype, t.dtype
        return self.weight*x


def exact(): return dict(
    gaussian=gaussian(torch.tensor([.1, .2]), torch.tensor([[1., .6], [.6, 1.]])/3),
    mixture=mixture(torch.tensor([[0., 1/3], [.7, 0.], [.1, .1]]), 1/7))
casts = [lambda d: d.half(), lambda d: d.to(torch.bfloat16), lambda d: d.float()]


@pytest.mark.parametrize('name', exact())
@pytest.mark.parametrize('cast', casts)
def test_a_cast_leaves_exact_denoisers_exact(name, cast):
    one = exact()[name].calibrate(torch.randn(300, 2))
    other = cast(copy.deepcopy(one))
    for a, b in zip(one.buffers(), other.buffers()): assert torch.equal(a, b) and b.dtype == f64
    x, t = torch.randn(50, 2), torch.rand(50)
    assert torch.equal(one(x, t), other(x, t)) and torch.equal(one.error(t), other.error(t))
    assert other(x.bfloat16(), t).dtype == torch.bfloat16
    assert torch.equal(one(x.bfloat16().float(), t).bfloat16(), other(x.bfloat16(), t))


@pytest.mark.parametrize('kind', [X0Denoiser, VDenoiser, EpsDenoiser])
def test_a_half_network_keeps_its_table_and_answers_in_single(kind):
    torch.manual_seed(0)
    one = kind(Scale(), Cosine(.5)).calibrate(torch.randn(300, 1, 4, 4))
    other = copy.deepcopy(one).to(torch.bfloat16)
    t = torch.linspace(.01, 1, 20)
    assert other.net.weight.dtype == torch.bfloat16
    assert other.table_ratio.dtype == f64 and torch.equal(one.error(t), other.error(t))
    assert other.error(t.bfloat16()).dtype == torch.float32
    x = torch.randn(20, 1, 4, 4)
    guess = other(x, t*.9)
    assert other.net.asked == (torch.bfloat16, torch.float32) and guess.dtype == torch.float32
    assert (guess - one(x, t*.9)).abs().max() < .05*one(x, t*.9).abs().max()


def test_a_half_prior_has_the_same_chain():
    one = Diffusion(exact()['gaussian'], (2,), 10)
    other = copy.deepcopy(one).to(torch.bfloat16)
    for a, b in zip(one.chain.buffers(), other.chain.buffers()): assert torch.equal(a, b)


def test_bookkeeping_moves_and_keeps_whole_numbers():
    m = Bookkeeping()
    m.register_buffer('a', torch.ones(2, dtype=f64)/3)
    m.register_buffer('n', torch.arange(3))
    m.register_buffer('none', None)
    m.child = nn.Linear(2, 2)
    m.half()
    assert (m.a.dtype, m.n.dtype, m.child.weight.dtype) == (f64, torch.int64, torch.float16)
    assert m.to('meta').a.device.type == 'meta' and m.none is None
    assert list(m.state_dict()) == ['a', 'n', 'child.weight', 'child.bias']


def test_autocast_leaves_exact_denoisers_alone():
    d, x, t = exact()['gaussian'], torch.randn(20, 2), torch.tensor(.4)
    with torch.autocast('cpu', torch.bfloat16): inside = d(x, t)
    assert torch.equal(inside, d(x, t))


def test_one_guard_on_alpha():
    assert safe_alpha(0.) == EpsDenoiser.min_alpha == 1e-3 and safe_alpha(.5) == .5
    assert torch.equal(safe_alpha(torch.tensor([0., .5])), torch.tensor([1e-3, .5]))
    d = EpsDenoiser(lambda x, t: x*.9, Cosine())
    x = torch.ones(1, 2, requires_grad=True)
    guess = d(x, torch.tensor(1.))
    guess.sum().backward()
    for v in (guess, x.grad): assert torch.allclose(v, torch.tensor(100.))
    with pytest.raises(ValueError, match='EpsDenoiser cannot start at alpha = 0'):
        Diffusion(d, (2,), 5, error=lambda t: t)
    assert check_start(gaussian(), 0.) is None


def test_calibrating_a_noise_network_is_finite():
    d = EpsDenoiser(lambda x, t: x, Cosine()).calibrate(torch.randn(300, 2))
    assert d.table_ratio.isfinite().all()


def test_the_measured_error_is_the_exact_one():
    torch.manual_seed(0)
    d = exact()['gaussian']
    L = torch.linalg.cholesky(d.cov)
    x0 = d.mean + torch.randn(20000, 2, dtype=f64) @ L.T
    t = torch.linspace(.05, 1, 20, dtype=f64)
    assert (Denoiser.error(d.calibrate(x0), t)/d.error(t) - 1).abs().max() < .05


def test_lists_keep_their_precision():
    d = mixture([[.1, .2], [.3, .4]], .1, [1/3, 2/3])
    assert d.stds[0] == .1 and d.means[0, 1] == .2 and widest([.1])[0] == .1
    assert d.log_weights.exp()[0] == pytest.approx(1/3, abs=1e-15)


def test_palette_and_roles():
    used = [c for c, _ in show.curve_styles(['prior', *'abcdefg'], {'b': 'exact'})]
    roles, others = show.role_colours, show.other_colours
    assert used[:4] == [roles['prior'], others[0], roles['exact'], others[1]]
    assert not set(show.other_colours) & set(show.role_colours.values())
    styles = show.curve_styles('abcdefg')
    assert len(set(styles)) == 7


def test_axes_are_labelled():
    ax = show.show_samples({'a': torch.randn(9, 2), 'b': lambda x: -x.square().sum(1)},
                           xlabel='east', ylabel='north')
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('east', 'north')
    plt.close('all')

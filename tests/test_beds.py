"The beds: known answers, the caller's random stream, and a move to another device"
import pytest
import torch

from rtb_nb.beds import (cosine_modes, ddpm_times, hidden_modes, hole, nine_modes, observed,
    plane, scalar, sixteen, small_lens, two_modes, unequal_modes)
from rtb_nb.exact import ExactChain

GAUSSIAN = dict(plane=plane, sixteen=sixteen, scalar=scalar, hole=lambda: hole(size=24),
    small_lens=lambda: small_lens(size=8))
MIXTURES = dict(two=two_modes, unequal=unequal_modes, nine=nine_modes,
    bridge=lambda: nine_modes(bridge=.8), cosine=cosine_modes, hidden=hidden_modes)

@pytest.mark.parametrize('make', GAUSSIAN.values(), ids=GAUSSIAN)
def test_gaussian_beds_have_an_exact_answer(make):
    problem = make()
    torch.manual_seed(0)
    x, y = problem.simulate(1)
    exact = ExactChain(problem, y, keep=False)
    assert exact.best_elbo < exact.log_evidence
    assert exact.posterior().mean.shape == (x.numel(),)

def test_scalar_posterior():
    exact = ExactChain(scalar(), torch.tensor([[1.]])).posterior()
    assert abs(exact.mean.item() - 16/17) < 1e-4 and abs(exact.variance.item() - 4/17) < 1e-4

def test_hole():
    seen = observed(hole(size=24))
    assert seen.shape == (1, 24, 24) and (~seen).sum() == 144 and not seen[0, 6:18, 6:18].any()

@pytest.mark.parametrize('make', MIXTURES.values(), ids=MIXTURES)
def test_mixtures_know_their_shares(make):
    torch.manual_seed(1)
    bed = make()
    at = torch.cdist(bed.ends(4000), bed.modes.double()).argmin(1)
    shares = torch.bincount(at, minlength=len(bed.modes))/4000
    assert abs(bed.exact.weights.sum() - 1) < 1e-6
    assert (shares - bed.exact.weights).abs().sum()/2 < .1

@pytest.mark.parametrize('make', [m for name, m in MIXTURES.items() if name != 'hidden'])
def test_the_callers_draws_stay(make):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make()
    assert torch.equal(torch.rand(3), expected)

@pytest.mark.parametrize('make', [two_modes, cosine_modes])
def test_beds_move_as_a_whole(make):
    bed = make().to('meta')
    tensors = [*bed.problem.buffers(), *bed.problem.parameters(), bed.y]
    assert all(t.device.type == 'meta' for t in tensors)
    assert bed.exact.weights.device.type == 'cpu' and bed.ends(2).device.type == 'cpu'

def test_a_tilt_follows_its_problem():
    "Every .to() builds its densities anew, from what has moved"
    problem = nine_modes().problem
    log_r = problem.likelihood.log_r
    before = log_r.above, log_r.below
    problem.to('cpu')
    assert log_r.above is not before[0] and log_r.below is not before[1]
    x = torch.randn(5, 2)
    above, below = (density.log_prob(x.double()) for density in before)
    assert torch.equal(log_r(x), (above - below).to(x))

BAD = {'odd dimensions': (lambda: cosine_modes(3), 'd must be even, got 3'),
    'no hole': (lambda: hole(size=2), 'size must be'),
    'grid of one': (lambda: ddpm_times(1), 'K must be')}

@pytest.mark.parametrize('make, words', BAD.values(), ids=BAD)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words): make()

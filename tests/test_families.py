"Lenses of a family: drawn inside, judged outside"
import math
import pytest, torch
from rtb_nb.exposures import even_noise
from rtb_nb.families import LensBank, LensFamily, outside, random_lens
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import Likelihood
from rtb_nb.operators import Identity

def test_drawn_lenses_are_inside():
    torch.manual_seed(0)
    bank = LensBank(LensFamily(16, noise_std=(.01, .04)), 12)
    for _ in range(20): assert outside(bank.family, bank()) == []
    radii = [lens.model['einstein_radius'] for lens in bank.lenses]
    assert max(radii) - min(radii) > .3

def test_noise_is_even_in_its_logarithm():
    torch.manual_seed(1)
    bank = LensBank(LensFamily(16, noise_std=(.01, .16)), 1)
    logs = torch.tensor([math.log(bank().noise_std) for _ in range(2000)])
    middle = math.log(.04)
    assert abs(logs.mean() - middle) < .06 and abs((logs < middle).double().mean() - .5) < .04

def test_same_seed_same_lens():
    torch.manual_seed(2)
    a = random_lens(LensFamily(16))
    torch.manual_seed(2)
    b = random_lens(LensFamily(16))
    assert a.model == b.model and a.psf == b.psf

@pytest.mark.parametrize('lens, noise, said', [
    (dict(einstein_radius=.5), .05, 'einstein_radius 0.5'), (dict(q=.3), .05, 'q 0.3'),
    (dict(centre=(.6, .6)), .05, 'centre'), (dict(shear=(.2, 0.)), .05, 'shear'),
    (dict(psf=.3), .05, 'psf 0.3'), (dict(fov=8.), .05, 'fov 8'),
    (dict(image_size=32), .05, 'image_size 32'), ({}, .5, 'noise is 0.5')])
def test_outside_says_what(lens, noise, said):
    odd = outside(LensFamily(16), Likelihood(Lens(16, **lens), noise))
    assert len(odd) == 1 and said in odd[0]

def test_a_map_of_noise_is_named_and_its_lens_looked_at():
    y, noise = torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), .05)
    noise[..., 8:] = .1
    def odd(**lens): return outside(
        LensFamily(16), Likelihood(even_noise(Lens(16, **lens), y, noise)[0], .05))
    assert odd() == ['a SparseMatrix follows the Lens, as for a map of noise']
    assert 'einstein_radius 0.8 is outside' in odd(einstein_radius=.8)[1]

def test_outside_of_another_operator():
    assert 'no Lens' in outside(LensFamily(16), Likelihood(Identity((1, 16, 16)), .05))[0]

@pytest.mark.parametrize('bad', [dict(q=(1., .5)), dict(psf=(0., .1)), dict(noise_std=(-1, 1))])
def test_bad_ranges(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): LensFamily(**bad)

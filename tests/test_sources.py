"Sources made of stamps, and the numbers that tell them apart"
import math
import pytest, torch
from rtb_nb.sources import photometry, vary_sources

def stamps(n=6, side=32):
    "Gaussian blobs of several widths, the sky at -1"
    u = torch.arange(side) - (side-1)/2
    width = torch.linspace(2, 5, n)[:, None, None]
    return 2*(-(u[:, None]**2 + u**2)/2/width**2).exp()[:, None] - 1

def test_same_seed_same_sources():
    x = stamps()
    torch.manual_seed(0)
    a = vary_sources(x)
    torch.manual_seed(0)
    assert torch.equal(a, vary_sources(x)) and not torch.equal(a, vary_sources(x))
    assert torch.equal(x, stamps())

def test_range_and_peak():
    torch.manual_seed(1)
    x = vary_sources(stamps(400), peak=(.3, .6))
    peak = photometry(x)['peak']
    assert x.min() >= -1 and .3 - 1e-6 <= peak.min() < .32 and .58 < peak.max() <= .6 + 1e-6

def test_nothing_is_varied_where_nothing_may_be():
    "Only the angle is left, and a round blob has none"
    torch.manual_seed(2)
    x = stamps(4)
    same = vary_sources(x, (1, 1), 0., (1, 1), (1, 1), companion=0.)
    shape = lambda x: {k: v for k, v in photometry(x).items() if k in ('size', 'offset')}
    for k, v in shape(x).items():
        assert torch.allclose(shape(same)[k], v, atol=.06), k

@pytest.mark.parametrize('size', [(.5, .5), (1.2, 1.2)])
def test_size_is_size(size):
    torch.manual_seed(3)
    x = stamps(1).repeat(50, 1, 1, 1)
    varied = photometry(vary_sources(x, size, 0., (1, 1), (1, 1), 0.))['size']
    assert (varied/photometry(x)['size'] - size[0]).abs().max() < .15

def test_companion_share():
    torch.manual_seed(4)
    x = stamps(1).repeat(300, 1, 1, 1)
    args = (1, 1), 0., (1, 1), (1, 1)
    without = photometry(vary_sources(x, *args, companion=0.))['flux']
    flux = photometry(vary_sources(x, *args, companion=.5))['flux']
    assert .3 < (flux > without.max()*1.001).double().mean() < .7

def test_photometry_of_a_disc():
    u = torch.linspace(-1, 1, 101, dtype=torch.float64)
    disc = ((u[:, None]**2 + (u - .2)**2) < .25).double()
    found = photometry(2*disc[None, None] - 1)
    assert abs(found['offset'].item() - .2) < 3e-3
    assert abs(found['size'].item() - .5/2**.5) < .01 # second moment of a disc: R^2/2
    assert abs(found['flux'].item() - math.pi*.25*50**2) < 30

@pytest.mark.parametrize('bad, said', [
    (dict(x=torch.zeros(2, 3, 8, 8)), 'grey stamps'), (dict(size=(0., 1.)), 'size'),
    (dict(peak=(.2, 1.5)), 'peak'), (dict(gamma=(2., 1.)), 'gamma'), (dict(shift=2.), 'shift'),
    (dict(companion=-1), 'companion')])
def test_bad_inputs(bad, said):
    with pytest.raises(ValueError, match=said): vary_sources(**(dict(x=stamps(2)) | bad))

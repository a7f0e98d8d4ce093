"Several exposures of one image: likelihood and evidence are those of one after another"
import pytest, torch
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.exact import ExactChain
from rtb_nb.exposures import (LinearStack, Stack, autocorrelation, combine_exposures,
                              even_noise, white_noise)
from rtb_nb.families import LensFamily, outside
from rtb_nb.guidance import CLA, DPS, MomentMatching
from rtb_nb.imaging import block_average, gaussian_blur
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.nonlinear import Compose, FourierMagnitude
from rtb_nb.operators import Identity, Matrix
from rtb_nb.per_sample import random_boxes
from rtb_nb.samplers import ddrm
from rtb_nb.schedule import Cosine
from rtb_nb.train import image_drifts

shape = 1, 8, 8

def small_prior():
    field = GaussianDenoiser(torch.zeros(shape), torch.eye(64)/8, Cosine())
    return Diffusion(field, shape, 12)

def two(n=1, noises=(.3, .05)):
    "A sharp and a deep exposure of n images, and the images"
    torch.manual_seed(0)
    x = torch.rand(n, *shape)
    parts = gaussian_blur(shape, .6, 5), block_average(shape, 2)
    return x, [(A, A(x) + s*torch.randn(n, *A.out_shape), s) for A, s in zip(parts, noises)]

def test_log_likelihoods_add_up_to_what_the_weights_say():
    x, exposures = two(3)
    op, y, noise_std = combine_exposures(*exposures)
    assert isinstance(op, LinearStack) and noise_std == .05
    apart = sum(Likelihood(A, s).log_prob(x, v) for A, v, s in exposures)
    each = zip(exposures, op.weights)
    scaled = sum(v[0].numel()*torch.tensor(w).log() for (_, v, _), w in each)
    torch.testing.assert_close(Likelihood(op, noise_std).log_prob(x, y), apart - scaled)
    for (_, v, _), again in zip(exposures, op.apart(y)): torch.testing.assert_close(again, v)

def exact_log_evidence(mean, cov, A, y, noise_std):
    "Of a Gaussian, in closed form"
    A = A.matrix()
    seen = torch.distributions.MultivariateNormal(
        A @ mean, A @ cov @ A.T + noise_std**2*torch.eye(len(A), dtype=A.dtype))
    return seen.log_prob(y.flatten().double()).item()

def test_evidence_is_that_of_one_exposure_after_another():
    "log p(y1, y2) = log p(y1) + log p(y2 given y1), with the posterior after y1 as the prior"
    n = 6
    torch.manual_seed(1)
    mean, root = torch.randn(n).double(), torch.randn(n, n).double()/3
    cov = root @ root.T + .1*torch.eye(n)
    first, second = Matrix(torch.randn(4, n)), Matrix(torch.randn(5, n))
    x = torch.distributions.MultivariateNormal(mean, cov).sample()
    given = (first, .2), (second, .4)
    y1, y2 = (A(x[None]) + s*torch.randn(1, *A.out_shape) for A, s in given)
    K = cov @ first.matrix().T @ torch.linalg.inv(
        first.matrix() @ cov @ first.matrix().T + .04*torch.eye(4))
    later = mean + K @ (y1[0].double() - first.matrix() @ mean), cov - K @ first.matrix() @ cov
    by_turns = (exact_log_evidence(mean, cov, first, y1, .2)
                + exact_log_evidence(*later, second, y2, .4))
    op, y, noise_std = combine_exposures((first, y1, .2), (second, y2, .4))
    # the chain's own answer, less its last noise: a hundredth here
    prior = Diffusion(GaussianDenoiser(mean.float(), cov.float(), Cosine()), (n,), 30, .01)
    found = ExactChain(InverseProblem(prior, Likelihood(op, noise_std)), y).log_evidence
    weighed = by_turns - 5*torch.tensor(.5).log().item()
    assert abs(exact_log_evidence(mean, cov, op, y, noise_std) - weighed) < 1e-6
    assert abs(float(found) - weighed) < .05

@pytest.mark.parametrize('drift', [MomentMatching(.1), CLA(), DPS(1.)], ids=repr)
def test_drifts_take_a_stack(drift):
    prior = small_prior()
    _, exposures = two()
    op, y, noise_std = combine_exposures(*exposures)
    problem = InverseProblem(prior, Likelihood(op, noise_std))
    one = InverseProblem(prior, Likelihood(*exposures[1][::2]))
    torch.manual_seed(0)
    both, deep = problem.posterior([drift]).sample(y, 64), one.posterior([drift]).sample(
        exposures[1][1], 64)
    assert both.isfinite().all()
    if not isinstance(drift, DPS): assert both.var(0).mean() < deep.var(0).mean()
    assert problem.posterior(image_drifts(problem, drift, depth=1)).sample(y, 2).shape[0] == 2

def test_spectral_samplers_take_a_stack():
    prior = small_prior()
    op, y, noise_std = combine_exposures(*two()[1])
    x = ddrm(InverseProblem(prior, Likelihood(op, noise_std)), y, 8).x
    assert ((op(x) - y)/noise_std).square().mean() < 3

def test_pixels_that_are_left_out_stay_so():
    x, (sharp, deep) = two()
    noise = torch.full((1, *shape), .3)
    noise[..., 0] = torch.inf
    op, y, noise_std = combine_exposures(even_noise(*sharp[:2], noise), deep)
    assert op.seen.sum() == 64 - 8 + 16 and (y[:, :64].view(1, 8, 8)[..., 0] == 0).all()
    likelihood = Likelihood(op, noise_std)
    seen = torch.arange(64) % 8 > 0
    columns, part = Matrix(sharp[0].matrix()[seen], shape), sharp[1].flatten(1)[:, seen]
    plain = combine_exposures((columns, part, .3), deep)
    torch.testing.assert_close(likelihood.log_prob(x, y),
                               Likelihood(plain[0], plain[2]).log_prob(x, plain[1]))

def test_bent_operators_stack_too():
    op, y, noise_std = combine_exposures(
        (FourierMagnitude(shape), torch.ones(1, 1, 12, 12), .1),
        (Identity(shape), torch.ones(1, *shape), .2))
    assert type(op) is Stack and op.out_shape == (144 + 64,) and not hasattr(op, 'adjoint')
    x = torch.rand(2, *shape, requires_grad=True)
    Likelihood(op, noise_std).log_prob(x, y).sum().backward()
    assert x.grad.isfinite().all()

def test_two_bands_of_one_lens():
    "Each exposure is held against the family that a posterior was trained on"
    family, noise = LensFamily(), .05
    lenses = Lens(psf=.06), Lens(psf=.5)
    dark = ((lens, torch.zeros(1, *lens.out_shape), noise) for lens in lenses)
    op = combine_exposures(*dark)[0]
    assert outside(family, Likelihood(Stack(lenses[0], lenses[0]), noise)) == [
        'a Stack of 2 exposures']
    assert [w for w in outside(family, Likelihood(op, noise)) if 'psf' in w] == [
        f'psf 0.5 is outside {family.psf}']

def smoothed(n, seed=0):
    "Noise that goes together, and its autocorrelation in closed form"
    torch.manual_seed(seed)
    taps = torch.tensor([.3, 1., .3], dtype=torch.float64)
    kernel = taps[:, None]*taps
    drawn = torch.nn.functional.conv2d(torch.randn(n, 1, 42, 42).double(), kernel[None, None])
    each = torch.nn.functional.conv1d(taps[None, None], taps[None, None], padding=2)[0, 0]
    return drawn, each[:, None]*each

def test_autocorrelation_is_what_the_noise_was_made_with():
    noise, exact = smoothed(200)
    found = autocorrelation(noise + 7, 2) # the sky's level does not count
    torch.testing.assert_close(found, exact, rtol=0, atol=.02)
    assert torch.equal(found, found.flip(0, 1))
    one = autocorrelation(noise[0, 0].float().numpy(), 1)
    torch.testing.assert_close(one, exact[1:4, 1:4], rtol=0, atol=.5)

@pytest.mark.parametrize('channels', [1, 2])
def test_white_noise_is_white_and_the_likelihood_the_same(channels):
    _, kernel = smoothed(1)
    image = channels, 6, 5
    A = Matrix(torch.randn(channels*30, 20), 20, image, offset=.3)
    n = channels*30
    C = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            (c, a, b), (d, e, f) = ((k//30, k % 30//5, k % 5) for k in (i, j))
            if c == d and abs(a-e) < 3 and abs(b-f) < 3: C[i, j] = kernel[a-e+2, b-f+2]
    noise = torch.distributions.MultivariateNormal(torch.zeros(n).double(), C)
    x = torch.randn(500, 20).double()
    y = A(x) + noise.sample((500,)).view(500, *image)
    for given in (kernel, C):
        op, turned, std = white_noise(A, y, given, floor=0)
        left = ((turned - op(x))/std).flatten(1)
        assert abs(left.T @ left/500 - torch.eye(n)).max() < .3
        units = torch.linalg.slogdet(op.outer.matrix())[1]
        found = Likelihood(op, std).log_prob(x, turned) + units
        torch.testing.assert_close(found, noise.log_prob((y - A(x)).flatten(1)))

def test_a_floor_makes_error_bars_wider():
    _, kernel = smoothed(1)
    op, y = Identity(shape), torch.zeros(1, *shape)
    exact, safe = (white_noise(op, y, kernel, floor=f) for f in (0., .2))
    strength = [torch.linalg.svdvals(o.outer.matrix()/s).max() for o, _, s in (exact, safe)]
    assert strength[1] < strength[0] and abs(strength[1] - (.2*kernel[2, 2])**-.5) < 1e-6

def test_correlated_noise_in_one_of_two_exposures():
    x, (sharp, deep) = two(2)
    _, kernel = smoothed(1)
    op, y, noise_std = combine_exposures(white_noise(*sharp[:2], kernel), deep)
    assert isinstance(op, LinearStack)
    assert Likelihood(op, noise_std).log_prob(x, y).isfinite().all()

def test_pixels_left_out_say_nothing_of_the_noise_of_others():
    _, kernel = smoothed(1)
    (sharp, y, _), std = two(3)[1][0], kernel[2, 2].sqrt()
    dark = torch.full(shape, std.item()).index_fill(-1, torch.tensor([0]), torch.inf)
    op, turned, found_std = white_noise(*even_noise(sharp, y, dark)[:2], kernel, floor=0)
    kept = torch.arange(64) % 8 > 0
    columns = Matrix(sharp.matrix()[kept], shape)
    full = white_noise(Identity(shape), y[:1], kernel, floor=0)[0].outer.matrix()/std
    C = torch.linalg.inv(full @ full)[kept][:, kept] # of all pixels, and of those that are seen
    plain, given, _ = white_noise(columns, y.flatten(1)[:, kept], C, floor=0)
    x = torch.rand(3, *shape)
    assert torch.equal(op.seen.flatten(), kept) and not turned.flatten(1)[:, ~kept].any()
    torch.testing.assert_close(Likelihood(op, found_std).log_prob(x, turned),
                               Likelihood(plain, found_std).log_prob(x, given))

REFUSED = {
    'nothing': (lambda A: Stack(), ValueError, 'a Stack needs operators'),
    'a function': (lambda A: Stack(A, torch.sin), TypeError, 'does not say what it measures'),
    'a decoder': (lambda A: Stack(A, Compose(Identity(2), torch.sin)), TypeError,
                  'Compose does not say'),
    'another image': (lambda A: Stack(A, Identity(3)), ValueError, r'see \(1, 8, 8\), \(3,\)'),
    'many operators': (lambda A: Stack(random_boxes(2, shape)), TypeError, 'holds 2 operators'),
    'weights': (lambda A: Stack(A, A, weights=[1.]), ValueError, '1 weights for 2 operators'),
    'a weight': (lambda A: Stack(A, weights=[0.]), ValueError, 'weights must be a positive'),
    'an exposure': (lambda A: Stack(A, A).join(torch.ones(1, *shape)), ValueError, 'give all'),
    'its shape': (lambda A: Stack(A, A).join(torch.ones(1, 64), torch.ones(1, *shape)),
                  ValueError, 'y 0 has shape'),
    'how often': (lambda A: Stack(A, A).join(torch.ones(1, *shape), torch.ones(2, *shape)),
                  ValueError, 'equally often, got 1, 2'),
    'a vector': (lambda A: Stack(A, A).apart(torch.ones(1, 3)), ValueError, 'y has shape'),
    'none': (lambda A: combine_exposures(), ValueError, 'combine_exposures needs exposures'),
    'no tuple': (lambda A: combine_exposures(A), TypeError, 'got Identity'),
    'a pair': (lambda A: combine_exposures((A, 1.)), TypeError,
               'takes .operator, y, noise_std.'),
    'a map': (lambda A: combine_exposures((A, torch.ones(1, *shape), torch.ones(shape))),
              ValueError, 'even_noise first'),
    'a bent operator': (lambda A: white_noise(FourierMagnitude(shape), A, torch.eye(3)),
                        TypeError, 'turns a linear operator, got FourierMagnitude'),
    'no measurement': (lambda A: white_noise(A, torch.ones(1, 3), torch.eye(64)), ValueError,
                       'y has shape'),
    'no covariance': (lambda A: white_noise(A, torch.ones(1, *shape), torch.eye(3)[:2]),
                      ValueError, r'must be \(64, 64\), or for images an autocorrelation'),
    'an even one': (lambda A: white_noise(A, torch.ones(1, *shape), torch.eye(4)), ValueError,
                    r'of odd sides, got \(4, 4\)'),
    'one side': (lambda A: white_noise(A, torch.ones(1, *shape), torch.ones(64, 64).triu()),
                 ValueError, 'same from either'),
    'too short': (lambda A: white_noise(A, torch.ones(1, *shape), torch.ones(3, 3)), ValueError,
                  'no noise has this covariance, of variance 1'),
    'a floor': (lambda A: white_noise(A, torch.ones(1, *shape), torch.eye(64), floor=1.),
                ValueError, 'floor must lie in'),
    'a small sky': (lambda A: autocorrelation(torch.ones(4, 4)), ValueError, 'more than 4 pix'),
    'a sky of colours': (lambda A: autocorrelation(torch.ones(1, 3, 9, 9)), ValueError,
                         r'must be \(H, W\) or \(n, 1, H, W\)'),
    'a hole in the sky': (lambda A: autocorrelation(torch.full((9, 9), torch.nan)), ValueError,
                          'cut them off'),
    'no noise': (lambda A: Stack(A, A).gram_solve(torch.ones(1, 128), 1., 0.), ValueError,
                 'singular: give b > 0')}

@pytest.mark.parametrize('name', REFUSED)
def test_refusals_name_the_remedy(name):
    ask, kind, says = REFUSED[name]
    with pytest.raises(kind, match=says): ask(Identity(shape))

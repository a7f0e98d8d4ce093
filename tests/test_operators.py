"Operators of images and their noise: independent references, gradients, determinism, bad input, deepinv"
import copy, pickle, sys
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch.distributions import Laplace, StudentT
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion, Drifted
from rtb_nb.guidance import DPS, LikelihoodGradient, MomentMatching, reward_slope
from rtb_nb.likelihood import ExactChain, InverseProblem, Likelihood, PhotonNoise
from rtb_nb.operators import (Blur, Compose, FourierMagnitude, Frozen, Identity, Mask, NonlinearBlur, Separable, adjoint_error, as_operator,
    bicubic, block_average, box_mask, gaussian_blur, mirror_index, motion_kernel, random_mask, to_deepinv)
from rtb_nb.schedule import Cosine, Linear

f64, shape = torch.float64, (3, 8, 4)
network = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(96, 7), torch.nn.BatchNorm1d(7), torch.nn.Dropout(.5), torch.nn.Tanh())
linear = dict(
    box=lambda: box_mask(shape, (3, 2), seed=1), random=lambda: random_mask(shape, .7), average=lambda: block_average(shape),
    bicubic=lambda: bicubic(shape, 2), gaussian=lambda: gaussian_blur(shape, 1.2), motion=lambda: Blur(motion_kernel(5, .9, seed=3), shape),
    separable=lambda: Separable(torch.randn(5, 8), torch.randn(3, 4), 3), small=lambda: Compose(block_average(shape, 2), gaussian_blur(shape, 1., 5)),
    masked=lambda: Compose(random_mask((3, 4, 2), .5), Compose(bicubic(shape, 2), Blur(motion_kernel(4, .5), shape))))
nonlinear = dict(
    phase=lambda: FourierMagnitude(shape), camera=lambda: NonlinearBlur(motion_kernel(5, .5), shape), network=lambda: Frozen(network()),
    decoder=lambda: Compose(random_mask((1, 2, 2), .5), Frozen(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(96, 4), torch.nn.Unflatten(1, (1, 2, 2))))))
operators = linear | nonlinear


@pytest.mark.parametrize('name', linear)
def test_linear(name):
    torch.manual_seed(0)
    op = linear[name]()
    assert adjoint_error(op) < 1e-12 and adjoint_error(op, torch.float32) < 1e-5
    A, I = op.matrix(), torch.eye(op.sizes[0], dtype=f64)
    x, v, a, b = torch.randn(3, *op.in_shape, dtype=f64), torch.randn(3, *op.out_shape, dtype=f64), torch.tensor([0., 1., 3.], dtype=f64), .1
    assert torch.allclose((op(x) - op.offset).flatten(1), x.flatten(1) @ A.T, atol=1e-12)
    for i in range(3): assert torch.allclose(op.gram_solve(v, a, b)[i].flatten(), torch.linalg.solve(a[i]*A @ A.T + b*I, v[i].flatten()), atol=1e-9)
    assert torch.allclose(op.gram_solve(v, 3., b)[2], op.gram_solve(v, a, b)[2], atol=1e-12) # one a and b for all
    values, vectors = op.gram_eig()
    assert torch.allclose(vectors*values @ vectors.T, A @ A.T, atol=1e-10)
    assert torch.allclose(op.pinv(op(x)).flatten(1), x.flatten(1) @ (torch.linalg.pinv(A, rtol=1e-6) @ A).T, atol=1e-6)
    for other in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))): assert torch.equal(other(x), op(x))


@pytest.mark.parametrize('name', operators)
def test_any_operator(name):
    "Deterministic, independent of the batch, and a likelihood with a gradient"
    torch.manual_seed(0)
    op, x = operators[name]().train(), torch.rand(5, *shape).mul(2.2).sub(1.1)
    y = op(x)
    assert torch.equal(op(x), y) and y.isfinite().all()
    for i in range(5): assert torch.allclose(op(x[i:i+1]), y[i:i+1], rtol=1e-5, atol=1e-6)
    likelihood = Likelihood(op.double(), .3)
    x = x[:2].double()
    y = likelihood(x).sample()
    assert torch.autograd.gradcheck(lambda x: likelihood(x).log_prob(y), x.requires_grad_())


def test_drawn_once():
    "The same seed draws the same operator, another seed another"
    for draw in (lambda s: random_mask(shape, .5, s).index, lambda s: box_mask((1, 64, 64), 8, s).index, lambda s: motion_kernel(9, .5, s)):
        assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_masks():
    for seed in range(20):
        hole = Mask.adjoint(m := box_mask((3, 20, 16), (6, 5), seed, margin=2), torch.ones(1, *m.out_shape))[0] == 0
        where = hole.nonzero()[:, 1:]
        assert hole.sum() == 90 and (where.min(0).values >= 2).all() and (where.max(0).values < torch.tensor([18, 14])).all()
        assert (hole == hole[0]).all() # shared by channels
    for missing in (0., .3, .92): assert len(random_mask((2, 10, 10), missing).index) == 2*(100-round(100*missing))
    seen = random_mask((3, 6, 6)).adjoint(torch.ones(1, *random_mask((3, 6, 6)).out_shape))[0]
    assert (seen == seen[0]).all()


@pytest.mark.parametrize('size', [(3, 5), (9, 9), (1, 21)], ids=str)
def test_blur_equals_scipy(size):
    torch.manual_seed(0)
    k, x = torch.rand(size, dtype=f64), torch.randn(2, 3, 8, 7, dtype=f64)
    k /= k.sum()
    expected = scipy.ndimage.convolve(x.numpy(), k.numpy()[None, None], mode='mirror')
    assert np.allclose(Blur(k, (3, 8, 7))(x), expected, atol=1e-12)


def test_gaussian_equals_scipy():
    x = torch.randn(1, 1, 32, 20, dtype=f64)
    expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), 3., mode='mirror', radius=30)
    assert np.allclose(gaussian_blur((1, 32, 20))(x)[0, 0], expected, atol=1e-10)
    assert mirror_index(1, 2, 2).tolist() == [0]*5


def test_down_sampling_equals_torch():
    x = torch.randn(2, 3, 16, 24, dtype=f64)
    assert torch.allclose(block_average((3, 16, 24))(x), F.avg_pool2d(x, 4), atol=1e-12)
    assert torch.allclose(bicubic((3, 16, 24))(x), F.interpolate(x, (4, 6), mode='bicubic', antialias=True), atol=1e-12)


@pytest.mark.parametrize('sides, oversample, out', [((256, 256), 2., (384, 384)), ((32, 32), 2., (48, 48)), ((9, 16), 1., (11, 20)), ((5, 4), 0., (5, 4))])
def test_fourier_magnitude_equals_numpy(sides, oversample, out):
    op, x = FourierMagnitude((1, *sides), oversample), torch.randn(1, 1, *sides, dtype=f64)
    pads = [((o-s)//2,)*2 for o, s in zip(out, sides)]
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(np.pad(x[0, 0].numpy(), pads)), norm='ortho'))
    assert op.out_shape == (1, *out) and np.allclose(op(x)[0, 0], np.abs(spectrum), atol=1e-10)


def test_nonlinear_blur_averages_frames():
    "y = f(mean_k f^-1(shift_k x)), away from the borders and from the dark"
    x, shifts = torch.rand(2, 1, 12, 12, dtype=f64)*1.8 - .8, [(0, 0), (1, 0), (2, 1)]
    k = torch.zeros(5, 5, dtype=f64)
    for i, j in shifts: k[2+i, 2+j] += 1/3
    frames = torch.stack([((x+1)/2).roll((i, j), (2, 3))**2.2 for i, j in shifts])
    expected = 2*frames.mean(0)**(1/2.2) - 1
    assert torch.allclose(NonlinearBlur(k, (1, 12, 12))(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-12)


def test_motion_kernels_are_kernels():
    for size, intensity in ((61, .5), (21, .9), (5, .9), (35, .3), (2, 1.), (5, 0.)):
        for seed in range(20):
            k = motion_kernel(size, intensity, seed)
            assert k.shape == (size, size) and (k >= 0).all() and abs(k.sum() - 1) < 1e-12


# noise
def gaussian_prior(): return Diffusion(GaussianDenoiser(torch.zeros(1, 2, 2), torch.eye(4)*.09, Cosine(.5)), (1, 2, 2), 12, .05)
noises = dict(photons=PhotonNoise(20.), laplace=lambda mean: Laplace(mean, .2), student=lambda mean: StudentT(3., mean, .1))


@pytest.mark.parametrize('name', noises)
def test_noise(name):
    "Simulate, reward, gradients and guidance work for any noise"
    torch.manual_seed(0)
    problem = InverseProblem(gaussian_prior(), Likelihood(Identity((1, 2, 2)), noise=noises[name]))
    x, y = problem.simulate(6)
    log_r = problem.log_reward(x, y)
    assert y.shape == x.shape and log_r.shape == (6,) and log_r.isfinite().all()
    for i in range(6): assert torch.allclose(problem.log_reward(x[i:i+1], y[i:i+1]), log_r[i], atol=1e-5)
    assert torch.autograd.gradcheck(lambda x: problem.log_reward(x, y.double()), x.double().requires_grad_())
    y = torch.full((1, 1, 2, 2), .6)
    _, plain, _ = problem.rollout(Drifted(problem.prior, []), 64, y)
    for drift in (DPS(problem.likelihood, problem.prior.denoiser, .1), LikelihoodGradient(problem.likelihood)):
        posterior = Drifted(problem.prior, [drift])
        x0, log_r, log_w = problem.rollout(posterior, 64, y)
        assert log_w.isfinite().all() and log_r.mean() > plain.mean() + 1
    tau = posterior.simulate(3, y)
    assert problem.log_weight(tau, posterior).isfinite().all()
    assert reward_slope(problem)(posterior.step(tau.x[3], 3, tau.y, tau.x0_hat[3])).isfinite().all()


def test_photons_evidence():
    "With a flat grid of means the posterior mean of the rate is Gamma's: (count + 1) photons"
    noise, u = PhotonNoise(10., dark=0., bright=1., background=1e-6), torch.linspace(0, 6, 6001, dtype=f64)[1:, None]
    weights = Likelihood(Identity(1), noise=noise)(u).log_prob(torch.full_like(u, .7)).softmax(0)
    assert abs((weights*u[:, 0]).sum() - .8) < 1e-3


# bad input
image = (1, 8, 8)
flat = torch.zeros(1, 1, 8, 8)
photons = Likelihood(Identity(image), noise=PhotonNoise(5))
bad_input = {
    'big box': (lambda: box_mask(image, 9), 'a hole of size (9, 9) with margin 0 does not fit into 8 x 8'),
    'box margin': (lambda: box_mask(image, 4, 0, margin=3), 'size (4, 4) with margin 3'),
    'half pixel': (lambda: box_mask(image, 2.5), 'size must hold positive integers, got (2.5, 2.5)'),
    'three sides': (lambda: box_mask(image, (2, 2, 2)), 'a hole of size (2, 2, 2)'),
    'whole box': (lambda: box_mask(image, 8), 'observes none'),
    'no channel': (lambda: random_mask((8, 8)), 'shape must be (C, H, W), got (8, 8)'),
    'all missing': (lambda: random_mask(image, 1.), 'missing must be a share in [0, 1), got 1.0'),
    'percent': (lambda: random_mask(image, 70), 'got 70'),
    'no seed': (lambda: random_mask(image, seed=None), 'seed must be a whole number, got None: an operator is drawn once'),
    'negative seed': (lambda: motion_kernel(seed=-1), 'got -1'),
    'factor': (lambda: block_average(image, 3), 'factor 3 does not divide the image 8 x 8: choose a divisor'),
    'zero factor': (lambda: block_average(image, 0), 'factor 0'),
    'fractional factor': (lambda: bicubic(image, 1.5), 'factor 1.5'),
    'no blur': (lambda: gaussian_blur(image, 0.), 'std must be positive, in pixels, got 0.0'),
    'even taps': (lambda: gaussian_blur(image, 1., 6), 'size must be an odd number of taps, got 6'),
    'rows': (lambda: Separable(torch.ones(3)), 'rows must be a matrix, got shape (3,)'),
    'kernel sum': (lambda: Blur(torch.ones(3, 3), image), 'kernel sums to 9, not 1: divide it by its sum'),
    'kernel nan': (lambda: Blur(torch.full((3, 3), torch.nan), image), 'kernel has 9 entries that are not finite'),
    'kernel axes': (lambda: Blur(torch.ones(3)/3, image), 'kernel must be (k, l), got shape (3,)'),
    'small kernel': (lambda: motion_kernel(1), 'at least 2, got 1'),
    'intensity': (lambda: motion_kernel(9, 1.5), 'intensity must lie in [0, 1], got 1.5'),
    'oversample': (lambda: FourierMagnitude(image, -1.), 'oversample must be zero or more, got -1.0'),
    'magnitude shape': (lambda: FourierMagnitude(image)(torch.zeros(1, 8, 8)), 'add a batch dimension'),
    'gamma': (lambda: NonlinearBlur(motion_kernel(3), image, gamma=.5), 'gamma must be 1 or more, got 0.5'),
    'knee': (lambda: NonlinearBlur(motion_kernel(3), image, knee=0), 'knee must lie in (0, 1), got 0'),
    'camera shape': (lambda: NonlinearBlur(motion_kernel(3), image)(torch.zeros(1, 3, 8, 8)), 'x has shape (1, 3, 8, 8), expected (B, 1, 8, 8)'),
    'no network': (lambda: Frozen(torch.sin), 'Frozen takes a network, got builtin'),
    'no operator': (lambda: as_operator(3.), 'an operator is a callable on batches of images, got float'),
    'misfit': (lambda: Compose(block_average(image), block_average(image)), 'inner gives (1, 2, 2) but outer takes (1, 8, 8)'),
    'neither noise': (lambda: Likelihood(Identity(image)), 'noise_std must be a positive finite number in units of the measurement, got None'),
    'both noises': (lambda: Likelihood(Identity(image), .1, PhotonNoise(5)), 'not both: got noise_std 0.1'),
    'noise value': (lambda: Likelihood(Identity(image), noise=Laplace(0., 1.)), 'noise must be a function from the mean to a distribution, got Laplace'),
    'no distribution': (lambda: Likelihood(Identity(image), noise=torch.sin)(flat), 'noise must return a torch distribution, got Tensor'),
    'one noise': (lambda: Likelihood(Identity(image), noise=lambda mean: Laplace(0., 1.))(flat), 'one distribution a sample, for a mean of shape (1, 1, 8, 8)'),
    'no photons': (lambda: PhotonNoise(0), 'photons must be a positive number, got 0'),
    'dark': (lambda: PhotonNoise(5, dark=1.), 'dark must lie below bright, got 1.0 and 1.0'),
    'background': (lambda: PhotonNoise(5, background=0.), 'background must be positive, in photons, got 0.0'),
    'needs Gaussian': (lambda: photons.noise_std, 'needs Gaussian noise with one noise_std, and the noise here is PhotonNoise(photons=5'),
    'guidance': (lambda: Drifted(gaussian_prior(), [MomentMatching(Likelihood(Identity((1, 2, 2)), noise=PhotonNoise(5)), 1.)]).simulate(1, torch.zeros(1, 1, 2, 2)), 'needs Gaussian noise'),
    'exact': (lambda: ExactChain(InverseProblem(gaussian_prior(), Likelihood(Identity((1, 2, 2)), noise=PhotonNoise(5))), torch.zeros(1, 1, 2, 2)), 'needs Gaussian noise'),
    'their noise': (lambda: to_deepinv(Identity(image), -.1), 'noise_std must be zero or more, in units of the measurement, got -0.1'),
}


@pytest.mark.parametrize('name', bad_input)
def test_bad_input(name):
    call, message = bad_input[name]
    with pytest.raises((ValueError, TypeError)) as e: call()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_without_deepinv(monkeypatch):
    monkeypatch.setitem(sys.modules, 'deepinv', None)
    with pytest.raises(ImportError, match=r"pip install 'rtb_nb\[peers\]'"): to_deepinv(Identity(image))


# deepinv, where it is installed
@pytest.fixture(scope='module')
def physics(): return pytest.importorskip('deepinv').physics


def kernel():
    k = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return k/k.sum()


theirs = dict(
    inpainting=lambda P: as_operator(P.Inpainting(image, mask=.5)), down=lambda P: as_operator(P.Downsampling(image, filter='bicubic', factor=2)),
    blur=lambda P: as_operator(P.Blur(kernel(), padding='reflect'), image), fft=lambda P: as_operator(P.BlurFFT(image, kernel())))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', theirs)
def test_physics_taken(physics, name):
    op, x = theirs[name](physics), torch.randn(2, *image)
    assert adjoint_error(op) < 1e-12 and adjoint_error(op, torch.float32) < 1e-5
    assert torch.equal(op(x), op.physics.A(x)) and torch.allclose(op(op.pinv(op(x))), op(x), atol=.05) # deepinv's own solver
    A, v = op.matrix(), torch.randn(1, *op.out_shape, dtype=f64)
    exact = torch.linalg.solve(A @ A.T + .1*torch.eye(len(A)), v.flatten())
    assert torch.allclose(op.gram_solve(v, 1., .1).flatten(), exact, atol=1e-9)
    likelihood = Likelihood(op.physics if name != 'blur' else op, .1)
    assert torch.equal(copy.deepcopy(likelihood)(x).mean, op(x)) and likelihood(x).log_prob(op(x)).shape == (2,)


def test_physics_refused(physics):
    with pytest.raises(ValueError, match=r"deepinv's Blur does not know its image's shape: use as_operator"): Likelihood(physics.Blur(kernel()), .1)
    with pytest.raises(TypeError, match='adds noise when it is called: wrap it in as_operator first'): Compose(Identity(image), physics.Denoising())


def test_offered_to_deepinv(physics):
    u = torch.rand(3, *image)
    for op in (random_mask(image), Compose(block_average(image), Blur(kernel()[0, 0], image)), Identity(image)):
        ours, y = to_deepinv(op, .1), op(2*u-1)
        assert torch.allclose(ours.A(u), y - ours.dark, atol=1e-5) and torch.allclose(ours.A(ours.A_dagger(y - ours.dark)), y - ours.dark, atol=1e-4)
        v = torch.randn_like(y)
        assert torch.allclose((ours.A(u)*v).sum(), (u*ours.A_adjoint(v)).sum(), rtol=1e-4, atol=1e-4) and ours(u).shape == y.shape
    assert torch.equal(to_deepinv(FourierMagnitude(image)).A(u), FourierMagnitude(image)(2*u-1))


def test_denoiser_offered_to_deepinv(physics):
    from rtb_nb.operators import denoiser_to_deepinv
    C, u = torch.eye(4)*.2 + .1, torch.randn(3, 1, 2, 2)
    guess = denoiser_to_deepinv(GaussianDenoiser(torch.zeros(1, 2, 2), C, Cosine(.5)))
    exact = (2*u-1).flatten(1) @ torch.linalg.solve(C + .6**2*torch.eye(4), C)
    assert torch.allclose(2*guess(u, .3) - 1, exact.reshape(u.shape), atol=1e-5)
    assert torch.allclose(guess(u, torch.full((3,), .3)), guess(u, .3))
    with pytest.raises(ValueError, match="lies beyond the denoiser's noisiest level"): denoiser_to_deepinv(GaussianDenoiser(torch.zeros(1, 2, 2), C, Linear()))(u, 1e4)

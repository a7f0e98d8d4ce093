"Operators: independent references, precision, devices, determinism, bad input, deepinv"
import copy
import pickle
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Laplace, StudentT

from rtb_nb.deepinv import as_operator, denoiser_to_deepinv, noise_of, to_deepinv
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.exact import ExactChain
from rtb_nb.exposures import Stack
from rtb_nb.guidance import DPS, LikelihoodGradient, MomentMatching
from rtb_nb.imaging import (Blur, Separable, bicubic, block_average, box_mask, gaussian_blur,
                            mirror_index, motion_kernel, random_mask)
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.photons import PhotonNoise
from rtb_nb.nonlinear import Compose, FourierMagnitude, Frozen, NonlinearBlur
from rtb_nb.operators import Identity, Mask, Matrix, SparseMatrix, adjoint_error, event_shape
from rtb_nb.schedule import Cosine, Linear

f64, halves, shape = torch.float64, (torch.float16, torch.bfloat16), (3, 8, 4)


def network():
    layers = nn.Linear(96, 7), nn.BatchNorm1d(7), nn.Dropout(.5), nn.Tanh()
    return nn.Sequential(nn.Flatten(), *layers)


def decoder(): return nn.Sequential(nn.Flatten(), nn.Linear(96, 4), nn.Unflatten(1, (1, 2, 2)))


def few(m, n): return scipy.sparse.random(m, n, .1, random_state=1)


linear = dict(
    box=lambda: box_mask(shape, (3, 2), seed=1),
    random=lambda: random_mask(shape, .7),
    identity=lambda: Identity(shape),
    average=lambda: block_average(shape),
    bicubic=lambda: bicubic(shape, 2),
    gaussian=lambda: gaussian_blur(shape, 1.2),
    motion=lambda: Blur(motion_kernel(5, .9, seed=3), shape),
    separable=lambda: Separable(torch.randn(5, 8), torch.randn(3, 4), 3),
    matrix=lambda: Matrix(torch.randn(10, 96), shape, (2, 5), offset=torch.randn(5)),
    sparse=lambda: SparseMatrix(few(50, 96), shape, offset=.1),
    small=lambda: Compose(block_average(shape, 2), gaussian_blur(shape, 1., 5)),
    masked=lambda: Compose(random_mask((3, 4, 2), .5),
                           Compose(bicubic(shape, 2), Blur(motion_kernel(4, .5), shape))),
    tall=lambda: Stack(gaussian_blur(shape, 1.2), SparseMatrix(few(50, 96), shape, offset=.1),
                       weights=[.5, 2.]),
    wide=lambda: Stack(block_average(shape, 4), Matrix(torch.randn(10, 96), shape)))
nonlinear = dict(
    phase=lambda: FourierMagnitude(shape),
    camera=lambda: NonlinearBlur(motion_kernel(5, .5), shape),
    network=lambda: Frozen(network()),
    decoder=lambda: Compose(random_mask((1, 2, 2), .5), Frozen(decoder())),
    mixed=lambda: Stack(FourierMagnitude(shape), random_mask(shape, .7), weights=[2., .1]))
operators = linear | nonlinear


@pytest.mark.parametrize('name', linear)
def test_linear(name):
    torch.manual_seed(0)
    op = linear[name]()
    assert adjoint_error(op) < 1e-12 and adjoint_error(op, torch.float32) < 1e-5
    A, I = op.matrix(), torch.eye(op.sizes[0], dtype=f64)
    x, v = torch.randn(3, *op.in_shape, dtype=f64), torch.randn(3, *op.out_shape, dtype=f64)
    a, b = torch.tensor([0., 1., 3.], dtype=f64), .1
    assert torch.allclose((op(x) - op.offset).flatten(1), x.flatten(1) @ A.T, atol=1e-12)
    solved = op.gram_solve(v, a, b)
    for i in range(3):
        exact = torch.linalg.solve(a[i]*A @ A.T + b*I, v[i].flatten())
        assert torch.allclose(solved[i].flatten(), exact, atol=1e-9)
    one = op.gram_solve(v, 3., b) # one a and b for all
    assert torch.allclose(one[2], solved[2], atol=1e-12)
    values, vectors = op.gram_eig()
    assert torch.allclose(vectors*values @ vectors.T, A @ A.T, atol=1e-10)
    projection = torch.linalg.pinv(A, rtol=1e-6) @ A
    assert torch.allclose(op.pinv(op(x)).flatten(1), x.flatten(1) @ projection.T, atol=1e-6)
    for other in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert torch.equal(other(x), op(x))
    none = op(x[:0])
    assert none.shape == (0, *op.out_shape) and op.adjoint(none).shape == (0, *shape)


def test_pinv_has_a_slope_where_singular_values_are_zero():
    for A in (torch.tensor([[2., 0.], [0., 0.]]), torch.randn(6, 2) @ torch.randn(2, 3)):
        y = torch.randn(4, len(A)).requires_grad_()
        slope, = torch.autograd.grad(Matrix(A).pinv(y).sum(), y)
        back = torch.linalg.pinv(A.double(), rtol=1e-6).sum(0).float()
        assert torch.allclose(slope, back.expand(4, -1), atol=1e-5)


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


# precision and devices
@pytest.mark.parametrize('dtype', halves, ids=str)
@pytest.mark.parametrize('name', linear)
def test_half_precision_leaves_the_operator_alone(name, dtype):
    torch.manual_seed(0)
    op = linear[name]()
    x, v = torch.randn(2, *op.in_shape), torch.randn(2, *op.out_shape)
    before = op(x), op(x.double()), op.adjoint(v), op.gram_solve(v, 1., .1), op.pinv(v)
    eig = op.gram_eig()
    op.to(dtype)
    assert op.offset.dtype == f64 and op.gram_eig()[0].equal(eig[0])
    after = op(x), op(x.double()), op.adjoint(v), op.gram_solve(v, 1., .1), op.pinv(v)
    for u, w in zip(before, after): assert torch.equal(u, w)
    x, v = x.to(dtype).requires_grad_(), v.to(dtype)
    solve = lambda u: op.gram_solve(u, 1., .1)
    for f, u in ((op, x), (op.adjoint, v), (solve, v), (op.pinv, v)):
        assert f(u).dtype == torch.float32 and torch.equal(f(u), f(u.float()))
    op(x).square().sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize('name', operators)
def test_autocast_leaves_the_operator_alone(name):
    torch.manual_seed(0)
    op = operators[name]()
    x = torch.rand(2, *shape)
    expected = op(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = op(x)
    assert y.dtype == torch.float32
    assert torch.allclose(y, expected, atol=.05 if name in ('network', 'decoder') else 0.)


@pytest.mark.parametrize('name', nonlinear)
def test_half_precision_beyond_linear_operators(name):
    torch.manual_seed(0)
    op, x = nonlinear[name](), torch.rand(2, *shape)
    expected = op(x)
    y = copy.deepcopy(op).to(torch.bfloat16)(x)
    assert y.dtype == torch.float32
    assert torch.allclose(y, expected, atol=.05 if name in ('network', 'decoder') else 0.)
    assert op(x.bfloat16()).dtype == torch.float32
    assert torch.allclose(op(x.double()).float(), expected, atol=1e-5)


def test_whole_numbers_and_truth_values_are_measured_as_numbers():
    x = torch.tensor([[1, 3]])
    assert torch.equal(Matrix([[.5, .25]])(x), torch.tensor([[1.25]]))
    assert torch.equal(Mask([1, 0])(x > 2), torch.zeros(1, 1))


@pytest.mark.parametrize('name', operators)
def test_on_an_accelerator(name):
    "An operator that stayed behind, and one that was moved with its problem"
    pretend = pytest.importorskip('pretend')
    torch.manual_seed(0)
    op, x = operators[name](), torch.rand(2, *shape)
    y = op(x)
    with pretend.pretend_device():
        away = x.to('meta').requires_grad_()
        moved = copy.deepcopy(op).to('meta')
        for f in (moved, op)[:1 if name in ('network', 'decoder') else 2]:
            seen = f(away)
            seen.square().sum().backward()
            assert seen.device.type == 'meta' and torch.allclose(seen.cpu(), y, atol=1e-6)
            assert torch.allclose(f(away.detach().double()).cpu(), op(x.double()), atol=1e-6)
            if name not in linear: continue
            v = y.to('meta')
            for solved, expected in ((f.adjoint(v), op.adjoint(y)), (f.pinv(v), op.pinv(y)),
                    (f.gram_solve(v, 1., .1), op.gram_solve(y, 1., .1)),
                    (f.gram_eig(v)[0], op.gram_eig(y)[0])):
                assert solved.device.type == 'meta' and solved.dtype == expected.dtype
                assert torch.allclose(solved.cpu(), expected, atol=1e-5)
        if name in linear:
            assert moved.offset.device.type == 'meta' and moved.offset.dtype == f64
            assert torch.allclose(moved.matrix().cpu(), op.matrix())
            assert torch.equal(moved.to('cpu')(x), y)
        problem = InverseProblem(prior(shape), Likelihood(copy.deepcopy(op), .3)).to('meta')
        assert problem.likelihood(away).log_prob(seen).device.type == 'meta'


@pytest.mark.parametrize('name', linear)
def test_doubles_stay_where_a_device_has_none(name):
    "A move to `mps` leaves the masters on the processor; their casts follow the input"
    op, where = linear[name](), SimpleNamespace(device=torch.device('mps'))
    x = torch.rand(1, *shape)
    y = op(x)
    op._apply(lambda v: where)
    assert {v.device.type for v in op.buffers()} == {'cpu'} and torch.equal(op(x), y)


@pytest.mark.parametrize('name', linear)
def test_made_in_inference_mode(name):
    with torch.inference_mode():
        op = linear[name]()
        op(torch.ones(1, *shape)), op.gram_solve(torch.ones(1, *op.out_shape), 1., 1.)
    for dtype in (torch.float32, f64):
        x = torch.ones(1, *shape, dtype=dtype, requires_grad=True)
        op.gram_solve(op(x), 1., 1.).square().sum().backward()
        assert x.grad.isfinite().all()


def test_an_operator_keeps_its_own_numbers():
    array = np.array([[1., 2.]])
    op, x = Matrix(array), torch.ones(1, 2)
    array[:] = 7.
    assert op(x).item() == 3.
    big_endian, row = np.array([[1, 2]], dtype='>f4'), torch.tensor([[1., 2.]], dtype=f64)
    for values in (big_endian, [[1, 2]], row, row.float(), row.bfloat16(), row.numpy()):
        assert Matrix(values)(x).item() == 3.


# numbers of any type
def test_numbers_of_any_type():
    four, half, two = np.int64(4), np.float32(.5), torch.tensor(2)
    same = (
        (block_average((1, 8, 8), four), block_average((1, 8, 8), 4)),
        (bicubic((1, 8, 8), torch.tensor(4)), bicubic((1, 8, 8), 4)),
        (box_mask((1, 8, 8), four, seed=two, margin=np.int8(1)), box_mask((1, 8, 8), 4, 2, 1)),
        (box_mask((1, 8, 8), (two, four)), box_mask((1, 8, 8), (2, 4))),
        (box_mask((1, 8, 8), np.array([2, 4])), box_mask((1, 8, 8), (2, 4))),
        (random_mask(np.array([1, 8, 8]), half, two), random_mask((1, 8, 8), .5, 2)),
        (random_mask(torch.Size([1, 8, 8]), torch.tensor(.5)), random_mask((1, 8, 8), .5)),
        (gaussian_blur((1, 8, 8), two, np.int32(5)), gaussian_blur((1, 8, 8), 2., 5)),
        (Separable(np.eye(8), channels=np.int64(1)), Separable(torch.eye(8))),
        (Blur(motion_kernel(four, half, two), (1, 8, 8)),
         Blur(motion_kernel(4, .5, 2), (1, 8, 8))),
        (FourierMagnitude((1, 8, 8), np.float64(1)), FourierMagnitude((1, 8, 8), 1.)),
        (NonlinearBlur(motion_kernel(3), (1, 8, 8), two, np.float32(.5)),
         NonlinearBlur(motion_kernel(3), (1, 8, 8), 2., .5)),
        (Matrix(np.eye(64), (1, np.int64(8), torch.tensor(8)), four**3),
         Matrix(np.eye(64), (1, 8, 8))))
    x = torch.rand(2, 1, 8, 8)
    for one, other in same: assert torch.equal(one(x), other(x))
    assert event_shape(np.int64(3), 'n') == event_shape(torch.tensor(3), 'n') == (3,)
    assert all(type(n) is int for n in event_shape(np.array([3, 4]), 'n'))


def test_drawn_once():
    "The same seed draws the same operator, another seed another"
    draws = (lambda s: random_mask(shape, .5, s).index, lambda s: motion_kernel(9, .5, s),
             lambda s: box_mask((1, 64, 64), 8, s).index)
    for draw in draws:
        assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_composing_draws_nothing():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Compose(block_average(shape), gaussian_blur(shape))
    assert torch.equal(torch.get_rng_state(), state)


def test_masks():
    for seed in range(20):
        m = box_mask((3, 20, 16), (6, 5), seed, margin=2)
        hole = m.adjoint(torch.ones(1, *m.out_shape))[0] == 0
        where = hole.nonzero()[:, 1:]
        assert hole.sum() == 90 and (hole == hole[0]).all() # shared by channels
        assert (where.min(0).values >= 2).all()
        assert (where.max(0).values < torch.tensor([18, 14])).all()
    for missing in (0., .3, .92):
        assert len(random_mask((2, 10, 10), missing).index) == 2*(100-round(100*missing))
    m = random_mask((3, 6, 6))
    seen = m.adjoint(torch.ones(1, *m.out_shape))[0]
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
    resized = F.interpolate(x, (4, 6), mode='bicubic', antialias=True)
    assert torch.allclose(block_average((3, 16, 24))(x), F.avg_pool2d(x, 4), atol=1e-12)
    assert torch.allclose(bicubic((3, 16, 24))(x), resized, atol=1e-12)


padded = [((256, 256), 2., (384, 384)), ((32, 32), 2., (48, 48)), ((9, 16), 1., (11, 20)),
          ((5, 4), 0., (5, 4))]


@pytest.mark.parametrize('sides, oversample, out', padded)
def test_fourier_magnitude_equals_numpy(sides, oversample, out):
    op, x = FourierMagnitude((1, *sides), oversample), torch.randn(1, 1, *sides, dtype=f64)
    wide = np.pad(x[0, 0].numpy(), [((o-s)//2,)*2 for o, s in zip(out, sides)])
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(wide), norm='ortho'))
    assert op.out_shape == (1, *out) and np.allclose(op(x)[0, 0], np.abs(spectrum), atol=1e-10)


def test_nonlinear_blur_averages_frames():
    "y = f(mean_k f^-1(shift_k x)), away from the borders and from the dark"
    x, shifts = torch.rand(2, 1, 12, 12, dtype=f64)*1.8 - .8, [(0, 0), (1, 0), (2, 1)]
    k = torch.zeros(5, 5, dtype=f64)
    for i, j in shifts: k[2+i, 2+j] += 1/3
    frames = torch.stack([((x+1)/2).roll((i, j), (2, 3))**2.2 for i, j in shifts])
    expected, y = 2*frames.mean(0)**(1/2.2) - 1, NonlinearBlur(k, (1, 12, 12))(x)
    assert torch.allclose(y[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-12)


def test_motion_kernels_are_kernels():
    for size, intensity in ((61, .5), (21, .9), (5, .9), (35, .3), (2, 1.), (5, 0.)):
        for seed in range(20):
            k = motion_kernel(size, intensity, seed)
            assert k.shape == (size, size) and (k >= 0).all() and abs(k.sum() - 1) < 1e-12


# noise
def prior(shape=(1, 2, 2)):
    n = int(np.prod(shape))
    denoiser = GaussianDenoiser(torch.zeros(shape), torch.eye(n)*.09, Cosine(.5))
    return Diffusion(denoiser, shape, 12, .05)


noises = dict(photons=PhotonNoise(20.), laplace=lambda mean: Laplace(mean, .2),
              student=lambda mean: StudentT(3., mean, .1))


@pytest.mark.parametrize('name', noises)
def test_noise(name):
    "Simulate, score, gradients and guidance work for any noise"
    torch.manual_seed(0)
    likelihood = Likelihood(Identity((1, 2, 2)), noise=noises[name])
    problem = InverseProblem(prior(), likelihood)
    x, y = problem.simulate(6)
    log_r = problem.log_likelihood(x, y)
    assert y.shape == x.shape and log_r.shape == (6,) and log_r.isfinite().all()
    for i in range(6):
        alone = problem.log_likelihood(x[i:i+1], y[i:i+1])
        assert torch.allclose(alone, log_r[i], atol=1e-5)
    score = lambda x: problem.log_likelihood(x, y.double())
    assert torch.autograd.gradcheck(score, x.double().requires_grad_())
    y = torch.full((1, 1, 2, 2), .6)
    _, plain, _ = problem.posterior([]).draw(y, 64)
    for drift in (DPS(.1), LikelihoodGradient()):
        x0, log_r, log_w = problem.posterior([drift]).draw(y, 64)
        assert log_w.isfinite().all() and log_r.mean() > plain.mean() + 1


def test_photons_evidence():
    "With a flat grid of means the posterior mean of the rate is Gamma's: (count + 1) photons"
    noise = PhotonNoise(10., dark=0., bright=1., background=1e-6)
    u = torch.linspace(0, 6, 6001, dtype=f64)[1:, None]
    log_r = Likelihood(Identity(1), noise=noise)(u).log_prob(torch.full_like(u, .7))
    assert abs((log_r.softmax(0)*u[:, 0]).sum() - .8) < 1e-3


# bad input
image = (1, 8, 8)
flat = torch.zeros(1, 1, 8, 8)
sparse = scipy.sparse.csr_array
photons = Likelihood(Identity(image), noise=PhotonNoise(5))
counted = InverseProblem(prior(), Likelihood(Identity((1, 2, 2)), noise=PhotonNoise(5)))
y0 = torch.full((1, 1, 2, 2), -1.)
bad_input = {
    'no shape': (lambda: Identity(()), 'shape must hold positive whole numbers, got ()'),
    'half a shape': (lambda: Identity((2, 1.5)),
                     'shape must be a positive whole number, got 1.5'),
    'a name for a shape': (lambda: Identity('8'),
                           "shape must be a positive whole number, got '8'"),
    'true shape': (lambda: Identity((True, 2)),
                   'shape must be a positive whole number, got True'),
    'complex image': (lambda: Identity(image)(flat*1j), 'x must hold real numbers'),
    'complex matrix': (lambda: Matrix(np.eye(2)*1j),
                       'dense array of real numbers, got ndarray'),
    'complex tensor': (lambda: Matrix(torch.eye(2)*1j),
                       'dense array of real numbers, got Tensor'),
    'ragged matrix': (lambda: Matrix([[1.], [1., 2.]]),
                      'dense array of real numbers, got list'),
    'sparse matrix': (lambda: Matrix(sparse(np.eye(2))),
                      'dense array of real numbers, got csr'),
    'torch sparse': (lambda: Matrix(torch.eye(2).to_sparse()), 'dense array of real numbers'),
    'text': (lambda: Matrix([['a']]), 'matrix must be a dense array of real numbers, got list'),
    'blind matrix': (lambda: Matrix(np.zeros((2, 3))), 'matrix holds nothing but zeros'),
    'blind sparse': (lambda: SparseMatrix(sparse((2, 3))), 'matrix holds nothing but zeros'),
    'stored zeros': (lambda: SparseMatrix(torch.zeros(2, 2).to_sparse_csr()),
                     'nothing but zeros'),
    'blind rows': (lambda: Separable(torch.zeros(2, 4)), 'rows holds nothing but zeros'),
    'blind columns': (lambda: Separable(torch.eye(2), torch.zeros(2, 2)), 'cols holds nothing'),
    'blind pair': (lambda: Compose(Mask([0, 1]), Matrix([[1., 1.], [0, 0]])),
                   'outer sees nothing'),
    'empty matrix': (lambda: Matrix(torch.zeros(0, 3)), 'matrix holds nothing but zeros'),
    'sparse nan': (lambda: SparseMatrix(sparse([[1., np.nan]])),
                   '1 entries that are not finite'),
    'complex sparse': (lambda: SparseMatrix(sparse(np.eye(2)*1j)), 'must be real and sparse'),
    'dense': (lambda: SparseMatrix(np.eye(2)), 'got ndarray: use Matrix if dense'),
    'misfit': (lambda: SparseMatrix(sparse(np.eye(2)), 3),
               'a matrix (2, 2) cannot map (3,) to (2,)'),
    'offset nan': (lambda: Matrix([[1.]], offset=torch.nan),
                   'offset has 1 entries that are not'),
    'rcond': (lambda: Matrix([[1.]]).pinv(torch.ones(1, 1), 1.),
              'rcond must lie in [0, 1), got 1.0'),
    'nan noise': (lambda: Matrix([[1.]]).gram_solve(torch.ones(1, 1), 1., torch.nan),
                  'got nan'),
    'per sample': (lambda: Identity(2).gram_solve(torch.ones(3, 2), torch.ones(2), 1.),
                   'a has shape (2,), expected a number or (3,): one per sample'),
    'nan mask': (lambda: Mask([1, torch.nan]), 'mask has 1 entries that are not finite'),
    'mask shape': (lambda: Mask([1, 0], (2, 3)),
                   'a mask of shape (2,) cannot be expanded to (2, 3)'),
    'blind mask': (lambda: Mask([0, 0]), 'the mask observes none of its entries'),
    'big box': (lambda: box_mask(image, 9),
                'a hole of size (9, 9) with margin 0 does not fit into 8 x 8'),
    'box margin': (lambda: box_mask(image, 4, 0, margin=3), 'size (4, 4) with margin 3'),
    'margin': (lambda: box_mask(image, 4, margin=-1),
               'margin must be a whole number of at least 0'),
    'half pixel': (lambda: box_mask(image, 2.5),
                   'size must be a positive whole number, got 2.5'),
    'three sides': (lambda: box_mask(image, (2, 2, 2)), 'a hole of size (2, 2, 2)'),
    'whole box': (lambda: box_mask(image, 8), 'observes none'),
    'no channel': (lambda: random_mask((8, 8)), 'shape must be (C, H, W), got (8, 8)'),
    'all missing': (lambda: random_mask(image, 1.), 'missing must lie in [0, 1), got 1.0'),
    'all rounded away': (lambda: random_mask(image, .999), 'observes none'),
    'percent': (lambda: random_mask(image, 70), 'got 70: it is the share of pixels lost'),
    'no seed': (lambda: random_mask(image, seed=None), 'got None: an operator is drawn once'),
    'negative seed': (lambda: motion_kernel(seed=-1), 'got -1'),
    'factor': (lambda: block_average(image, 3),
               'factor 3 does not divide the image 8 x 8: choose a divisor of both sides'),
    'one side': (lambda: bicubic((1, 8, 6), 4), 'factor 4 does not divide the image 8 x 6'),
    'zero factor': (lambda: block_average(image, 0),
                    'factor must be a positive whole number, got 0'),
    'fractional factor': (lambda: bicubic(image, 1.5),
                          'factor must be a positive whole number'),
    'no blur': (lambda: gaussian_blur(image, 0.), 'std must be a positive number, got 0.0'),
    'even taps': (lambda: gaussian_blur(image, 1., 6),
                  'size must be an odd number of taps, got 6'),
    'rows': (lambda: Separable(torch.ones(3)), 'rows must be a matrix (m, n), got shape (3,)'),
    'channels': (lambda: Separable(torch.ones(3, 3), channels=0),
                 'channels must be a positive'),
    'kernel sum': (lambda: Blur(torch.ones(3, 3), image), 'kernel sums to 9, not 1: divide it'),
    'kernel nan': (lambda: Blur(torch.full((3, 3), torch.nan), image),
                   'kernel has 9 entries that are not finite'),
    'kernel axes': (lambda: Blur(torch.ones(3)/3, image),
                    'kernel must be a matrix (m, n), got shape'),
    'small kernel': (lambda: motion_kernel(1), 'at least 2, got 1'),
    'intensity': (lambda: motion_kernel(9, 1.5), 'intensity must lie in [0, 1], got 1.5'),
    'oversample': (lambda: FourierMagnitude(image, -1.),
                   'oversample must be zero or a positive'),
    'magnitude shape': (lambda: FourierMagnitude(image)(flat[0]), 'add a batch dimension'),
    'gamma': (lambda: NonlinearBlur(motion_kernel(3), image, gamma=.5),
              'gamma must lie in [1, inf)'),
    'knee': (lambda: NonlinearBlur(motion_kernel(3), image, knee=0),
             'knee must lie in (0, 1), got 0'),
    'camera shape': (lambda: NonlinearBlur(motion_kernel(3), image)(torch.zeros(1, 3, 8, 8)),
                     'x has shape (1, 3, 8, 8), expected (B, 1, 8, 8)'),
    'camera array': (lambda: NonlinearBlur(motion_kernel(3), image)(np.zeros((1, 1, 8, 8))),
                     'x must be a tensor (B, 1, 8, 8), got ndarray'),
    'no network': (lambda: Frozen(torch.sin), 'Frozen takes a network, got builtin'),
    'no method': (lambda: Frozen(nn.Tanh(), 'decode'), "Tanh has no method 'decode'"),
    'complex network': (lambda: Frozen(nn.Tanh())(flat*1j), 'a measurement is a real tensor'),
    'no operator': (lambda: as_operator(3.), 'a callable on batches of images, got float'),
    'no part': (lambda: Compose(3., Identity(2)), 'Compose takes callables, got float'),
    'misfit of parts': (lambda: Compose(block_average(image), block_average(image)),
                        'inner gives (1, 2, 2) but outer takes (1, 8, 8)'),
    'misfit beyond linear': (lambda: Compose(FourierMagnitude(image), FourierMagnitude(image)),
                             'inner gives (1, 12, 12) but outer takes (1, 8, 8)'),
    'one noise': (lambda: Likelihood(Identity(image), noise=lambda mean: Laplace(0., 1.))(flat),
                  'one distribution per sample of (1, 1, 8, 8)'),
    'neither noise': (lambda: Likelihood(Identity(image)), 'noise_std'),
    'both noises': (lambda: Likelihood(Identity(image), .1, PhotonNoise(5)), 'not both'),
    'noise value': (lambda: Likelihood(Identity(image), noise=Laplace(0., 1.)),
                    'noise must be a function from the mean to a distribution, got Laplace'),
    'no distribution': (lambda: Likelihood(Identity(image), noise=torch.sin)(flat),
                        'noise must return a torch distribution, got Tensor'),
    'no photons': (lambda: PhotonNoise(0), 'photons must be a positive number, got 0'),
    'dark': (lambda: PhotonNoise(5, dark=1.), 'dark must lie below bright, got 1.0 and 1.0'),
    'background': (lambda: PhotonNoise(5, background=0.),
                   'background must be a positive number'),
    'needs Gaussian': (lambda: photons.noise_std, 'needs Gaussian noise with one noise_std'),
    'guidance': (lambda: counted.posterior([MomentMatching(1.)]).sample(y0, 1),
                 'Gaussian noise'),
    'exact': (lambda: ExactChain(counted, y0), 'Gaussian noise'),
    'their noise': (lambda: to_deepinv(Identity(image), -.1),
                    'noise_std must be zero or a positive number, got -0.1'),
    'their operator': (lambda: to_deepinv(3.), 'a callable on batches of images, got float'),
    'their denoiser': (lambda: denoiser_to_deepinv(nn.Tanh()),
                       'this takes a Denoiser, got Tanh'),
}


@pytest.mark.parametrize('name', bad_input)
def test_bad_input(name):
    call, message = bad_input[name]
    with pytest.raises((ValueError, TypeError)) as e: call()
    assert message in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('f', [torch.sin, lambda x: x[:, :1]])
def test_composition_beyond_linear_has_no_adjoint(f):
    op = Compose(f, Identity(image))
    for name in ('adjoint', 'gram_solve', 'gram_eig', 'pinv', 'matrix', 'offset'):
        assert not hasattr(op, name)
    assert op.in_shape == image and op.out_shape is None
    assert Compose(Identity(image), f).out_shape == image


# deepinv, where it is not installed
def stand_in(noise='ZeroNoise', kind='LinearPhysics', sensor=lambda y: y, A=lambda x: 2*x,
             **kw):
    "What this package reads of a Physics"
    def init(self):
        nn.Module.__init__(self)
        self.noise_model, self.sensor_model = type(noise, (nn.Module,), {})(), sensor
        for name, value in kw.items(): setattr(self.noise_model, name, value)
        self.img_size = image
    where = dict(__module__='deepinv.physics')
    base = type('Physics', (nn.Module,), where | dict(
        __init__=init, __call__=lambda self, x: 1/0, A=lambda self, x: A(x),
        A_adjoint=lambda self, y: A(y)))
    return type(kind, (base,), where)()


def test_physics_noise_is_read():
    physics = stand_in('GaussianNoise', sigma=torch.tensor(.1))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        op = as_operator(physics)
    bent = stand_in('GaussianNoise', 'Physics', sigma=.1)
    made_of_it = Compose(op, nn.Tanh()), Compose(op, Identity(image))
    for f in (physics, op, *made_of_it, as_operator(bent)): assert noise_of(f) == .1
    assert torch.equal(op(flat+1), flat+2) and adjoint_error(op) < 1e-12
    assert noise_of(stand_in()) is None and noise_of(torch.sin) is None
    assert noise_of(Identity(image)) is None and noise_of(Frozen(nn.Tanh())) is None
    assert noise_of(stand_in('GaussianNoise', sigma=0.)) is None
    with pytest.raises(ValueError, match='has 2 noise levels: take one likelihood for each'):
        noise_of(stand_in('GaussianNoise', sigma=torch.ones(2)))


@pytest.mark.parametrize('kw, lost', [
    (dict(noise='PoissonNoise'), 'its noise, PoissonNoise is left out'),
    (dict(sensor=lambda y: y.clamp(0, 1)), 'its sensor_model is left out'),
    (dict(noise='GammaNoise', sensor=torch.log), 'its noise, GammaNoise and its sensor_model')])
@pytest.mark.parametrize('kind', ['LinearPhysics', 'Physics'])
def test_what_a_physics_does_beside_is_not_dropped_without_a_word(kw, lost, kind):
    with pytest.warns(UserWarning, match=lost): as_operator(stand_in(kind=kind, **kw))


@pytest.mark.parametrize('A, message', [
    (lambda x: 0*x, 'it sees nothing'), (lambda x: x+0j, 'gives torch.complex64'),
    (lambda x: (x,), 'gives tuple'), (lambda x: x @ torch.ones(3, 3), 'cannot see an image')])
def test_physics_that_cannot_be_used(A, message):
    with pytest.raises((ValueError, TypeError), match=message): as_operator(stand_in(A=A))


def test_without_deepinv(monkeypatch):
    monkeypatch.setitem(sys.modules, 'deepinv', None)
    for offer, ours in ((to_deepinv, Identity(image)), (denoiser_to_deepinv, prior().denoiser)):
        with pytest.raises(ImportError, match=r"pip install 'rtb_nb\[peers\]'"): offer(ours)


# deepinv, where it is
@pytest.fixture(scope='module')
def physics(): return pytest.importorskip('deepinv').physics


def kernel():
    k = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return k/k.sum()


theirs = dict(
    inpainting=lambda P: as_operator(P.Inpainting(image, mask=.5)),
    down=lambda P: as_operator(P.Downsampling(image, filter='bicubic', factor=2)),
    blur=lambda P: as_operator(P.Blur(kernel(), padding='reflect'), image),
    fft=lambda P: as_operator(P.BlurFFT(image, kernel())))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', theirs)
def test_physics_taken(physics, name):
    torch.manual_seed(0)
    op, x = theirs[name](physics), torch.randn(2, *image)
    assert adjoint_error(op) < 1e-12 and adjoint_error(op, torch.float32) < 1e-5
    assert torch.equal(op(x), op.physics.A(x))
    assert torch.allclose(op(op.pinv(op(x))), op(x), atol=.05) # deepinv's own solver
    A, v = op.matrix(), torch.randn(1, *op.out_shape, dtype=f64)
    exact = torch.linalg.solve(A @ A.T + .1*torch.eye(len(A), dtype=f64), v.flatten())
    assert torch.allclose(op.gram_solve(v, 1., .1).flatten(), exact, atol=1e-9)
    y = op(x)
    assert torch.equal(op.to(torch.bfloat16)(x), y) # the physics keeps its own precision, too
    likelihood = Likelihood(op.physics if name != 'blur' else op, .1)
    assert torch.equal(copy.deepcopy(likelihood)(x).mean, y)
    assert likelihood(x).log_prob(y).shape == (2,)


@pytest.mark.filterwarnings('error')
def test_physics_noise(physics):
    noisy = lambda noise: physics.Inpainting(image, mask=.5, noise_model=noise)
    assert noise_of(noisy(physics.GaussianNoise(.1))) == .1
    assert noise_of(as_operator(noisy(physics.GaussianNoise(.1)))) == .1
    assert noise_of(as_operator(noisy(None))) is None
    for noise in (physics.PoissonNoise(.1), physics.UniformNoise(.1), physics.LaplaceNoise(.1)):
        with pytest.warns(UserWarning, match=f'its noise, {type(noise).__name__} is left out'):
            assert noise_of(as_operator(noisy(noise))) is None
    assert noise_of(to_deepinv(Identity(image), .2)) == .2


@pytest.mark.filterwarnings('ignore')
def test_physics_beyond_linear(physics):
    theirs = physics.Physics(lambda x, **_: x.square(), physics.GaussianNoise(.3))
    op, x = as_operator(theirs), torch.randn(2, *image)
    assert torch.equal(op(x), x.square()) and not hasattr(op, 'adjoint') and noise_of(op) == .3


def test_physics_refused(physics):
    with pytest.raises(ValueError, match="deepinv's Blur does not know its image's shape"):
        Likelihood(physics.Blur(kernel()), .1)
    with pytest.raises(TypeError, match='adds noise when it is called: wrap it in as_operator'):
        Compose(Identity(image), physics.Denoising())


def test_offered_to_deepinv(physics):
    u = torch.rand(3, *image)
    small = Compose(block_average(image), Blur(kernel()[0, 0], image))
    for op in (random_mask(image), small, Identity(image)):
        ours, y = to_deepinv(op, .1), op(2*u-1)
        y = y - ours.dark
        assert torch.allclose(ours.A(u), y, atol=1e-5)
        assert torch.allclose(ours.A(ours.A_dagger(y)), y, atol=1e-4)
        v = torch.randn_like(y)
        products = (ours.A(u)*v).sum(), (u*ours.A_adjoint(v)).sum()
        assert torch.allclose(*products, rtol=1e-4, atol=1e-4)
        assert ours(u).shape == y.shape
    magnitude = FourierMagnitude(image)
    assert torch.equal(to_deepinv(magnitude).A(u), magnitude(2*u-1))


def test_denoiser_offered_to_deepinv(physics):
    C, u = torch.eye(4)*.2 + .1, torch.randn(3, 1, 2, 2)
    guess = denoiser_to_deepinv(GaussianDenoiser(torch.zeros(1, 2, 2), C, Cosine(.5)))
    exact = (2*u-1).flatten(1) @ torch.linalg.solve(C + .6**2*torch.eye(4), C)
    assert torch.allclose(2*guess(u, .3) - 1, exact.reshape(u.shape), atol=1e-5)
    for sigma in (torch.full((3,), .3), np.float32(.3), torch.tensor(.3)):
        assert torch.allclose(guess(u, sigma), guess(u, .3), atol=1e-6)
    for sigma in (-.1, torch.ones(2), torch.nan):
        with pytest.raises(ValueError, match='sigma must be a noise level or one per image'):
            guess(u, sigma)
    narrow = denoiser_to_deepinv(GaussianDenoiser(torch.zeros(1, 2, 2), C, Linear()))
    with pytest.raises(ValueError, match="lies beyond the denoiser's noisiest level"):
        narrow(u, 1e4)

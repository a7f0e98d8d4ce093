"Bad input, adjoints and caustics of operators and lenses"
import copy, math, pickle, warnings
import numpy as np
import pytest
import scipy.sparse
import torch
from rtb_nb.data import load_source
from rtb_nb.exposures import even_noise
from rtb_nb.lensing import (Lens, critical_curves, load_observation, magnification, show_sky,
                            simulate_caustics)
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.nonlinear import Compose
from rtb_nb.operators import Identity, Mask, Matrix, SparseMatrix, adjoint_error
from rtb_nb.priors import load_prior

f64 = torch.float64


@pytest.fixture(scope='module')
def lens(): return Lens()


def saved(folder, image):
    np.save(folder/'image.npy', image)
    return folder/'image.npy'


def ring(n=48, noise=2., sky=100., bright=50., seed=0):
    "A ring of light on a noisy sky"
    r = np.hypot(*(np.indices((n, n)) - (n-1)/2))
    image = bright*np.exp(-((r - n/4)/(n/16))**2/2)
    return sky + image + noise*np.random.default_rng(seed).normal(size=(n, n))


def observe(folder, image=None, pixel_scale=.1, **kw):
    path = saved(folder, ring() if image is None else image)
    return load_observation(path, pixel_scale, **kw)


one = Matrix([[1., 1.]])
bad_input = {
    'nan matrix': (lambda d: Matrix([[1., float('nan')]]), '1 entries that are not finite'),
    'vector': (lambda d: Matrix([1., 2.]), 'got shape (2,)'),
    'misfit': (lambda d: Matrix(torch.ones(2, 3), (1, 2, 2)), '(1, 2, 2)'),
    'offset': (lambda d: Matrix(torch.ones(2, 3), offset=torch.ones(3)),
               'offset has shape (3,), expected (2,)'),
    'no batch': (lambda d: one(torch.ones(2)),
                 'x has shape (2,), expected (B, 2): add a batch dimension'),
    'adjoint shape': (lambda d: one.adjoint(torch.ones(2, 3)),
                      'y has shape (2, 3), expected (B, 1)'),
    'array': (lambda d: one(np.ones((1, 2))), 'got ndarray'),
    'negative noise': (lambda d: one.gram_solve(torch.ones(1, 1), 1., -1.),
                       'b must not be negative, got -1'),
    'one a sample': (lambda d: one.gram_solve(torch.ones(3, 1), torch.ones(2), 1.),
                     '(2,), expected a number or (3,)'),
    'singular': (lambda d: one.gram_solve(torch.ones(1, 1), 0., 0.), 'singular: give b > 0'),
    'dense': (lambda d: SparseMatrix(np.ones((2, 2))), 'got ndarray'),
    'grey mask': (lambda d: Mask(torch.tensor([.5, 1.])), 'got 0.5'),
    'blind mask': (lambda d: Mask(torch.zeros(4)), 'observes none'),
    'mismatch': (lambda d: Compose(one, Identity(3)), 'inner gives (3,) but outer takes (2,)'),
    'size': (lambda d: Lens(size=7), 'size must be a whole number of at least 8, got 7'),
    'upsample': (lambda d: Lens(upsample=0), 'upsample must be a positive whole number, got 0'),
    'leaves by radius': (lambda d: Lens(einstein_radius=3.5),
                         'einstein_radius 3.5 reach 3.9 arcsec, half of fov is 3: enlarge fov'),
    'leaves by centre': (lambda d: Lens(centre=(0., 2.)), 'centre (0.0, 2.0)'),
    'zero radius': (lambda d: Lens(einstein_radius=0.),
                    'einstein_radius must be a positive number, got 0.0: it is in arcsec'),
    'axis ratio': (lambda d: Lens(q=0.), 'q must lie in (0, 1], got 0.0'),
    'blur': (lambda d: Lens(psf=-.1), 'psf must lie in [0, 1.5], got -0.1'),
    'field': (lambda d: Lens(fov=-6.), 'fov must be a positive number, got -6.0'),
    'endless field': (lambda d: Lens(fov=float('inf')),
                      'fov must be a positive number, got inf'),
    'text': (lambda d: Lens(fov='6'), "fov must be a positive number, got '6'"),
    'source field': (lambda d: Lens(source_fov=0.),
                     'source_fov must be a positive number, got 0.0'),
    'shear': (lambda d: Lens(shear=(.8, .7)), '(0.8, 0.7) of size 1.06'),
    'one shear': (lambda d: Lens(shear=.1), 'shear must be two numbers, got 0.1'),
    'nan centre': (lambda d: Lens(centre=(0., float('nan'))), 'centre must be a finite number'),
    'nan angle': (lambda d: Lens(phi=float('nan')), 'phi must be a finite number, got nan'),
    'sees nothing': (lambda d: Lens(16, fov=600),
                     'no ray meets the source: rays are 9.375 arcsec'),
    'curve grid': (lambda d: critical_curves(Lens(size=8), 1),
                   'n must be a whole number of at'),
    'image size': (lambda d: Lens(image_size=4),
                   'image_size must be a whole number of at least 8, got 4'),
    'pixel scale': (lambda d: observe(d, pixel_scale=0),
                    'pixel_scale must be a positive number'),
    'more pixels': (lambda d: observe(d, size=64), 'size 64 is more than the 48 pixels'),
    'map shape': (lambda d: observe(d, noise=np.ones((4, 4))),
                  'the noise map has shape (4, 4)'),
    'no noise': (lambda d: observe(d, noise=0.), 'noise must be positive'),
    'nan noise': (lambda d: observe(d, noise=np.full((48, 48), np.nan)), '2304 are neither'),
    'nan pixel': (lambda d: observe(d, np.where(np.eye(48), np.nan, 1.)),
                  '48 pixels are not finite: repair them, or give noise inf there'),
    'nothing there': (lambda d: observe(d, ring(bright=0.)), 'five noises'),
    'peak': (lambda d: observe(d, peak=2.), 'peak must lie in (0, 1], got 2.0'),
    'unit': (lambda d: observe(d, unit=-1.), 'unit must be a positive number'),
    'plane': (lambda d: show_sky(Lens(size=8), torch.zeros(1, 1, 8, 8), planes='sky'),
              "a plane is 'source' or 'image', got 'sky'"),
    'even noise': (lambda d: even_noise(Lens(size=8), torch.zeros(1, 1, 8, 8),
                                        torch.ones(8, 8)), 'noise_map[None] adds the batch'),
    'even nothing': (lambda d: even_noise(Lens(size=8), torch.zeros(1, 1, 8, 8),
                                          torch.zeros(1, 1, 8, 8)), 'a pixel to be left out'),
    'nothing seen': (lambda d: even_noise(Lens(size=8), torch.zeros(1, 1, 8, 8),
                     torch.full((1, 1, 8, 8), math.inf)), 'leaves every pixel out'),
    'lens shape': (lambda d: Lens(size=8)(torch.zeros(2, 1, 9, 9)),
                   'x has shape (2, 1, 9, 9), expected (B, 1, 8, 8)'),
}


@pytest.mark.parametrize('name', bad_input)
def test_bad_input(name, tmp_path):
    call, message = bad_input[name]
    with pytest.raises((ValueError, TypeError)) as e: call(tmp_path)
    assert message in str(e.value) and '\n' not in str(e.value)


lenses = [{}, dict(image_size=20), dict(size=12, image_size=31, upsample=2),
          dict(psf=0., upsample=1), dict(size=15, upsample=3, q=1., phi=0.),
          dict(size=64, fov=8., psf=.2)]


@pytest.mark.parametrize('kw', lenses, ids=str)
def test_lens_equals_caustics(kw):
    lens = Lens(**kw)
    x = 2*torch.rand(1, 1, lens.size, lens.size, dtype=f64) - 1
    ours, theirs = lens(x)[0, 0], simulate_caustics(lens, (x[0, 0]+1)/2)
    seen = theirs.isfinite() # a ray through the very centre is nan there
    assert ours.isfinite().all() and seen.double().mean() > .8
    assert (ours-theirs)[seen].abs().max() < 1e-10


def test_lens_equals_caustics_as_shipped(lens):
    x = load_source(0).double()
    theirs = simulate_caustics(lens, (x[0, 0]+1)/2, double=False)
    assert (lens(x)[0, 0] - theirs).abs().max() < 1e-6


def operators():
    chain = Compose(Identity(25), Matrix(torch.randn(25, 4)))
    return dict(
        matrix=Matrix(torch.randn(6, 8), (2, 4), offset=1.),
        sparse=SparseMatrix(scipy.sparse.random(9, 7, .4, random_state=1)),
        torch_sparse=SparseMatrix(torch.eye(4).to_sparse_csr()),
        mask=Mask(torch.eye(5), (3, 5, 5)), identity=Identity((2, 3)),
        compose=Compose(Matrix(torch.randn(3, 25)), chain), lens=Lens(size=8))


@pytest.mark.parametrize('name', operators())
def test_linear_algebra(name):
    torch.manual_seed(0)
    op = operators()[name]
    assert adjoint_error(op) < 1e-12 and adjoint_error(op, torch.float32) < 1e-5
    A, I = op.matrix(), torch.eye(op.sizes[0], dtype=f64)
    v, a = torch.randn(3, *op.out_shape, dtype=f64), torch.tensor([0., 1., 3.], dtype=f64)
    b = torch.tensor([1., .1, 1e-2], dtype=f64)
    for i in range(3):
        exact = torch.linalg.solve(a[i]*A @ A.T + b[i]*I, v[i].flatten())
        near = dict(rtol=1e-9, atol=1e-9*exact.abs().max())
        assert torch.allclose(op.gram_solve(v, a, b)[i].flatten(), exact, **near)
        alone = op.gram_solve(v[i:i+1], a[i].item(), b[i].item())
        assert torch.allclose(alone[0].flatten(), exact, **near)
    x = torch.randn(2, *op.in_shape, dtype=f64)
    assert torch.allclose(op(op.pinv(op(x))), op(x), atol=1e-5) # rcond is 1e-6
    again = pickle.loads(pickle.dumps(op))
    for other in (copy.deepcopy(op), again, copy.deepcopy(op).double()):
        assert torch.equal(other(x), op(x))
    assert op(x.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(op, x.requires_grad_(), check_forward_ad=name == 'sparse')


def test_used_first_in_inference_mode():
    op = SparseMatrix(torch.eye(3).to_sparse())
    with torch.inference_mode(): op(torch.ones(1, 3)), op.gram_solve(torch.ones(1, 3), 1., 1.)
    x = torch.ones(1, 3, requires_grad=True)
    op.gram_solve(op(x), 1., 1.).sum().backward()
    assert torch.allclose(x.grad, torch.full((1, 3), .5))


def test_nonlinear_composition_has_no_adjoint():
    f = Compose(one, torch.nn.Tanh())
    assert not hasattr(f, 'adjoint') and not hasattr(f, 'gram_solve')
    with pytest.raises(AttributeError, match='no pinv: Tanh is not a linear operator'): f.pinv
    assert torch.equal(f(torch.ones(1, 2)), one(torch.ones(1, 2).tanh()))
    assert torch.equal(copy.deepcopy(f)(torch.ones(1, 2)), f(torch.ones(1, 2)))


def test_light_is_kept(lens):
    ones = torch.ones(1, 1, 32, 32, dtype=f64)
    assert lens(-ones).abs().max() < 1e-12
    inside = lens(ones)
    assert inside.max() <= 1 + 1e-12 and magnification(lens).min() > 1


def test_numbers_of_any_type_make_one_lens(lens):
    other = Lens(np.int64(32), torch.tensor(1.5, dtype=f64), np.float64(.75), fov=np.int32(6),
                 centre=np.array([.4, .2]), shear=torch.tensor([.05, .03], dtype=f64),
                 upsample=torch.tensor(4))
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(other(x), lens(x)) and other.model == lens.model


def test_curves_in_inference_mode(lens):
    with torch.inference_mode(): curves = critical_curves(lens, 50)
    assert torch.equal(curves[0][1], critical_curves(lens, 50)[0][1])


def test_an_observation_in_any_unit_is_the_same(tmp_path):
    image = ring()
    plain, noise = observe(tmp_path, image), 2.
    other = observe(tmp_path, 7*image + 300)
    assert torch.allclose(plain.y, other.y, atol=1e-5) and np.isclose(other.unit, 7*plain.unit)
    assert plain.fov == 48*.1 and abs(plain.sky - 100) < 1 and plain.y.shape == (1, 1, 48, 48)
    assert abs(plain.noise_std*plain.unit - noise) < .2*noise # it was measured
    assert observe(tmp_path, image, noise=3.).noise_std == 3/plain.unit
    assert .7 < plain.y.max() < .95


def test_blocks_are_averaged_and_so_is_their_noise(tmp_path):
    image = ring()
    small = observe(tmp_path, image, size=20, noise=3., sky=100., unit=10.) # 40 of 48 pixels
    wanted = (image[4:44, 4:44].reshape(20, 2, 20, 2).mean((1, 3)) - 100)/10
    assert np.allclose(small.y[0, 0], wanted, atol=1e-5)
    assert small.noise_std == 3/2/10 and small.fov == 40*.1
    wide = np.pad(image, ((0, 0), (5, 9)), constant_values=np.nan)
    assert torch.equal(observe(tmp_path, wide[:, 5:-9], sky=100., unit=10.).y,
                       observe(tmp_path, image, sky=100., unit=10.).y)


def test_a_noise_map_and_what_it_leaves_out(tmp_path):
    image, noise = ring(), np.full((48, 48), 2.)
    image[20:24, 20:24], noise[20:24, 20:24] = np.nan, np.inf # a saturated star
    noise[:, :12] = 4.
    seen = observe(tmp_path, image, size=24, noise=noise, sky=100., unit=10.)
    std = seen.noise_std
    assert std.shape == seen.y.shape and torch.isinf(std).sum() == 4
    assert std[0, 0, 0, 0] == pytest.approx(.2) and std[0, 0, 0, 20] == pytest.approx(.1)
    lens = Lens(16, fov=seen.fov, image_size=24)
    operator, y, level = even_noise(lens, seen.y, std)
    x = torch.rand(1, 1, 16, 16)*2 - 1
    weight = (level/std).to(x)
    assert level == pytest.approx(.1) and y.isfinite().all()
    assert torch.allclose(operator(x), lens(x)*weight, atol=1e-6)
    assert not operator(x)[0, 0, 10:12, 10:12].any() and adjoint_error(operator) < 1e-12


def test_what_is_left_out_is_no_measurement():
    torch.manual_seed(0)
    lens, x = Lens(16), torch.rand(1, 1, 16, 16)*2 - 1
    y, noise = Likelihood(lens, .05)(x).sample(), torch.full((1, 1, 16, 16), .05)
    noise[..., :8] = math.inf
    operator, weighed, std = even_noise(lens, y, noise)
    likelihood = Likelihood(operator, std)
    problem = InverseProblem(load_prior('mnist-32', 2), likelihood)
    left = (y - lens(x))[..., 8:]
    chi2 = left.square().mean().item()/.05**2
    assert problem.chi2(x, weighed).item() == pytest.approx(chi2, rel=1e-4)
    exact = torch.distributions.Normal(0., .05).log_prob(left).sum()
    assert likelihood.log_prob(x, weighed).item() == pytest.approx(exact.item(), rel=1e-5)
    assert not likelihood(x).sample()[..., :8].any()
    with pytest.raises(ValueError, match='where nothing is seen'):
        likelihood.take(y, (1, 16, 16), y)
    everywhere = even_noise(lens, y, torch.full((1, 1, 16, 16), .05))[0]
    assert Likelihood(everywhere, .05).seen(y) is None


@pytest.mark.parametrize('side, warns', [(48, False), (50, False), (47, True), (63, True)])
def test_a_cut_that_loses_field_says_so(tmp_path, side, warns):
    image = np.pad(ring(), ((0, max(0, side-48)),)*2, mode='edge')[:side, :side]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        observe(tmp_path, image, size=24, unit=10.)
    assert any('pixels a side' in str(w.message) for w in said) == warns


def test_degrees_are_no_arcseconds(tmp_path):
    with pytest.warns(UserWarning, match='a FITS header has degrees'):
        observe(tmp_path, pixel_scale=.05/3600)


def test_arcseconds_on_the_axes():
    lens = Lens(size=8)
    axes = show_sky(lens, [torch.zeros(8, 8)]*3, planes=['source', 'image', 'image'],
                    curves=[True, True, False])
    assert [ax.get_xlim()[1] for ax in axes.flat] == [1.25, 3., 3.]
    assert [len(ax.lines) for ax in axes.flat] == [1, 1, 0]

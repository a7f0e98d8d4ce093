"Bad input, adjoints and caustics of operators and lenses"
import copy, pickle
import numpy as np
import pytest
import scipy.sparse
import torch
from rtb_nb.data import load_source
from rtb_nb.lensing import Lens, critical_curves, magnification, simulate_caustics
from rtb_nb.nonlinear import Compose
from rtb_nb.operators import Identity, Mask, Matrix, SparseMatrix, adjoint_error

f64 = torch.float64


@pytest.fixture(scope='module')
def lens(): return Lens()


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
    'lens shape': (lambda d: Lens(size=8)(torch.zeros(2, 1, 9, 9)),
                   'x has shape (2, 1, 9, 9), expected (B, 1, 8, 8)'),
}


@pytest.mark.parametrize('name', bad_input)
def test_bad_input(name, tmp_path):
    call, message = bad_input[name]
    with pytest.raises((ValueError, TypeError)) as e: call(tmp_path)
    assert message in str(e.value) and '\n' not in str(e.value)


lenses = [{}, dict(psf=0., upsample=1), dict(size=15, upsample=3, q=1., phi=0.),
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

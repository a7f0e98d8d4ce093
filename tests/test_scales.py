"Correlations of the data with an error per pixel: the dense formula, whatever it is asked"
import gc, math, weakref
import pytest, torch
from rtb_nb.amortise import (Bank, Family, MaximumLikelihood, joint_paths,
                             paired_log_weights)
from rtb_nb.behaviours import OnPolicy
from rtb_nb.components import load_covariance
from rtb_nb.correlated import CovarianceMatching
from rtb_nb.covariance import Covariance
from rtb_nb.denoise import gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.errors import PixelError, load_error
from rtb_nb.gradient import GapTrainer, path_form
from rtb_nb.guidance import Gate
from rtb_nb.imaging import block_average, box_mask, gaussian_blur, random_mask
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.narrowed import Narrowed
from rtb_nb.per_sample import random_boxes
from rtb_nb.priors import load_prior
from rtb_nb.scales import ScaledMatching
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import family_drifts, load_posterior, save_posterior

SHAPE = 1, 8, 8
FIELD = gaussian_field(8, .5, 1.5, Cosine(.5))
WHOLE = Covariance(FIELD.vectors[:, 1:], FIELD.values[1:], FIELD.values[0], SHAPE)
BLUR = gaussian_blur(SHAPE, 1., 5)

def prior(steps=6, covariance=None):
    return Diffusion(FIELD, SHAPE, steps, covariance=covariance)

def problem(steps=6, operator=BLUR, covariance=None):
    return InverseProblem(prior(steps, covariance), Likelihood(operator, .2))

class Uneven(PixelError): # an error that differs from pixel to pixel and from image to image
    def log_ratio(self, x, x0_hat, t): return 2*torch.tanh(x.roll(1, 2) + x0_hat)

def guide(**dials): return ScaledMatching(WHOLE, Uneven(prior()), **dials)

def dense(guide, step):
    "The move, by matrices of every sample, in double precision"
    op, C = step.likelihood.operator, guide.error(step)
    s = guide.scales(step, C).flatten(1).double()
    V, out = C.vectors.double(), []
    A = op.matrix().double()
    residual = (step.y - op(step.guess_of_end())).flatten(1).double()
    for i in range(len(s)):
        inner = C.rest[0]*torch.eye(64) + V*(C.along - C.rest)[0] @ V.T
        S = s[i][:, None]*inner.double()*s[i]
        M = A @ S @ A.T + step.likelihood.noise_std**2*torch.eye(len(A)).double()
        out.append(S @ A.T @ torch.linalg.solve(M, residual[i]))
    return torch.stack(out).reshape(step.x.shape)

def at(p, tau, k): return p.posterior([]).step(tau.x[k], k, tau.y, p.prior.denoise(tau.x[k], k))

@pytest.mark.parametrize('operator', [BLUR, box_mask(SHAPE, 4), block_average(SHAPE, 2)])
@pytest.mark.parametrize('k', [0, 3, 5])
def test_the_move_is_that_of_dense_matrices(operator, k):
    torch.manual_seed(0)
    p = problem(operator=operator)
    step, own = at(p, joint_paths(p, 4), k), guide(sweeps=200, tolerance=1e-7)
    assert own.scales(step, own.error(step)).std() > .2 # they do differ
    torch.testing.assert_close(own.move(step).double(), dense(own, step), rtol=1e-3, atol=2e-4)
    off = guide().move(step) - own.move(step)
    assert off.norm() < .02*own.move(step).norm() # the default tolerance is enough

def test_the_error_it_believes_is_that_of_every_pixel_above_the_floor():
    torch.manual_seed(0)
    p = problem()
    step, own = at(p, joint_paths(p, 4), 3), guide(floor=.5)
    C = own.error(step)
    variance = own.scales(step, C)**2*C.diagonal(step.x).reshape(-1, *SHAPE)
    torch.testing.assert_close(variance, step.pixel_error_of_end(own.pixel, .5))
    mean = own.pixel.mean.error(step.t)
    assert variance.min() > .49*mean and variance.max() > 1.2*mean

def test_a_sample_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    p, own = problem(), guide()
    tau = joint_paths(p, 5)
    whole = own.move(at(p, tau, 2))
    for i in range(5):
        alone = own.move(at(p, tau[i:i+1], 2))
        torch.testing.assert_close(alone, whole[i:i+1], rtol=1e-4, atol=1e-5)

def test_a_batch_of_holes_is_each_hole_by_itself():
    torch.manual_seed(0)
    p, own, boxes = problem(), guide(), random_boxes(3, SHAPE)
    many = InverseProblem(p.prior, Likelihood(boxes, .2))
    tau = p.prior.simulate(6)
    y = many.likelihood(tau.x0).sample()
    move = own.move(many.posterior([]).step(tau.x[2], 2, y, tau.x0_hat[2]))
    for i in range(6):
        one = Likelihood(boxes[i//2:i//2+1], .2)
        alone = InverseProblem(p.prior, one).posterior([]).step(
            tau.x[2, i:i+1], 2, y[i:i+1], tau.x0_hat[2, i:i+1])
        torch.testing.assert_close(own.move(alone), move[i:i+1], rtol=1e-3, atol=1e-4)

def test_its_gradient_in_the_state_is_that_of_differences():
    torch.manual_seed(0)
    p, own = problem(operator=box_mask(SHAPE, 4)), guide(sweeps=300, tolerance=1e-9)
    tau = joint_paths(p, 2)
    x, v = tau.x[3].double(), torch.randn(2, *SHAPE).double()
    def value(x):
        x0_hat = p.prior.denoiser(x, p.prior.chain.t[3].double())
        return (own.move(p.posterior([]).step(x, 3, tau.y.double(), x0_hat))*v).sum()
    x.requires_grad_()
    slope = torch.autograd.grad(value(x), x)[0]
    direction = torch.randn_like(x)
    with torch.no_grad(): change = value(x + 1e-4*direction) - value(x - 1e-4*direction)
    torch.testing.assert_close((slope*direction).sum(), change/2e-4, rtol=1e-3, atol=1e-3)

def test_levels_that_differ_in_a_batch_have_the_gradient_of_each_alone():
    torch.manual_seed(0)
    p, own = problem(), guide()
    tau, k = joint_paths(p, 4), torch.tensor([0, 3, 5, 3])
    x = tau.x[k, torch.arange(4)].clone().requires_grad_()
    def slope(x, k, y):
        step = p.posterior([]).step(x, k, y, p.prior.guess(x, k))
        return torch.autograd.grad(own.move(step).sin().sum(), x)[0]
    together = slope(x, k, tau.y)
    for i in range(4):
        part = slice(i, i+1)
        alone = slope(x[part].detach().requires_grad_(), k[part], tau.y[part])
        torch.testing.assert_close(together[part], alone, rtol=1e-3, atol=1e-4)

def differentiable_step():
    "A step whose state wants a gradient"
    torch.manual_seed(0)
    p = problem()
    tau = joint_paths(p, 2)
    x = tau.x[3].clone().requires_grad_()
    return p.posterior([]).step(x, 3, tau.y, p.prior.guess(x, 3))

def test_a_step_is_freed_once_it_was_differentiated():
    own = guide()
    step = differentiable_step()
    torch.autograd.grad(step.of(own).sum(), step.x)
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None

def test_a_second_derivative_is_refused_not_wrong():
    own = guide()
    step = differentiable_step()
    first, = torch.autograd.grad(own.move(step).sin().sum(), step.x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): first.sum().backward()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', [guide, lambda: CovarianceMatching(WHOLE)])
def test_half_precision_moves_as_far(dtype, kind):
    torch.manual_seed(0)
    p, own = problem(), kind()
    tau = joint_paths(p, 4)
    exact = own.move(at(p, tau, 3))
    step = p.posterior([]).step(tau.x[3].to(dtype), 3, tau.y.to(dtype),
                                p.prior.denoise(tau.x[3], 3).to(dtype))
    assert (own.move(step).float() - exact).norm() < .1*exact.norm()

@pytest.mark.parametrize('kind', [guide, lambda: CovarianceMatching(WHOLE)])
def test_autocast_does_not_round_it(kind):
    torch.manual_seed(0)
    p, own = problem(), kind()
    step = at(p, joint_paths(p, 4), 3)
    exact = own.move(step)
    with torch.autocast('cpu', torch.bfloat16): off = own.move(step) - exact
    assert off.norm() < 1e-4*exact.norm()

def test_what_is_no_number_stays_none_and_leaves_the_others_alone():
    torch.manual_seed(0)
    p, own = problem(), guide()
    tau = joint_paths(p, 3)
    clean = own.move(at(p, tau, 2))
    tau.y[1, 0, 0, 0] = math.nan
    for i, odd in enumerate(own.move(at(p, tau, 2))):
        if i == 1: assert odd.isnan().any()
        else: torch.testing.assert_close(odd, clean[i], rtol=1e-4, atol=1e-5)
    assert own.move(at(p, tau[1:2], 2)).isnan().any()

def test_the_path_form_trains_a_gate_in_front_of_it():
    torch.manual_seed(0)
    p = problem(4)
    posterior = p.posterior([Gate(guide(), knots=2, value=.5)])
    y = p.simulate(1)[1]
    path_form(posterior, OnPolicy(posterior, 32)(y))
    grad = posterior.drifts[0].value.grad
    assert grad.isfinite().all() and grad.abs().max() > 0

@pytest.mark.parametrize('covariance', [None, WHOLE])
def test_log_ratios_are_those_of_the_kernels(covariance):
    torch.manual_seed(0)
    p, own = problem(covariance=covariance), guide()
    posterior = p.posterior([own] + [Narrowed(own)]*(covariance is not None))
    y = p.simulate(1)[1]
    tau = posterior.simulate(y, 6)
    ratio = posterior.log_prob(tau) - p.prior.log_prob(tau)
    torch.testing.assert_close(posterior.log_ratio(tau), ratio, rtol=1e-3, atol=2e-2)

def test_pixels_that_err_by_different_amounts_are_better_told():
    "Digits with lost pixels: both leave a smaller gap than the covariance alone, y by y"
    digits = load_prior('mnist-32', steps=10, spacing=Cosine(.2))
    covariance, error = load_covariance('mnist-32'), load_error('mnist-32', digits)
    p = InverseProblem(digits, Likelihood(random_mask(digits.shape, .7), .05))
    torch.manual_seed(0)
    tau, gaps = joint_paths(p, 16), []
    for drift in (CovarianceMatching(covariance), ScaledMatching(covariance, error)):
        torch.manual_seed(1)
        joint, own = paired_log_weights(p.posterior([drift]), tau, 2)
        gaps.append(joint - own.mean(1))
    less = gaps[0] - gaps[1]
    assert less.mean() > 2.5*less.std()/4

def test_a_recipe_that_is_trained_written_and_read(tmp_path):
    torch.manual_seed(0)
    digits = load_prior('mnist-32', steps=3)
    def hole(): return Likelihood(random_boxes(2, digits.shape), .05)
    family = InverseProblem(digits, Family(hole))
    recipe = dict(width=16, depth=1, guide=dict(name='ScaledMatching', error='mnist-32',
                                                covariance='mnist-32'))
    q = family.posterior(family_drifts(family, **recipe))
    bank = Bank.of(digits, 4)
    MaximumLikelihood(q, bank, pairs=4).fit(None, 2, log=str)
    GapTrainer(q, bank, 2, measurements=2, pairs=4).fit(None, 1, log=str)
    path = tmp_path/'a.posterior.safetensors'
    save_posterior(q, path, recipe, {})
    assert path.stat().st_size < 2**21
    one = InverseProblem(digits, Likelihood(box_mask(digits.shape, 16), .05))
    y = one.simulate(1)[1]
    def drawn(q):
        torch.manual_seed(2)
        return q.sample(y, 2)
    assert torch.equal(drawn(load_posterior(path, one)), drawn(q.under(one)))

@pytest.mark.parametrize('wrong, words', [
    (dict(floor=0.), 'pixels of no error are never moved'), (dict(floor=-1), 'floor'),
    (dict(sweeps=0), 'sweeps'), (dict(tolerance=0.), 'tolerance'),
    (dict(tolerance=1.), 'tolerance')])
def test_dials_that_make_no_sense(wrong, words):
    with pytest.raises(ValueError, match=words): guide(**wrong)

def test_what_it_cannot_serve():
    bent = InverseProblem(prior(2), Likelihood(torch.sin, .1))
    with pytest.raises(ValueError, match='ScaledMatching needs a linear operator'):
        bent.posterior([guide()]).sample(torch.zeros(1, *SHAPE), 1)
    other = ScaledMatching(Covariance.of(torch.randn(40, 1, 16, 16), 8), Uneven(prior()))
    with pytest.raises(ValueError, match='this covariance is of events'):
        problem().posterior([other]).sample(problem().simulate(1)[1], 1)
    given = problem().posterior([guide()]).given(problem().simulate(1)[1])
    again = InverseProblem(given, Likelihood(BLUR, .2))
    with pytest.raises(ValueError, match='ScaledMatching needs the denoiser of the prior'):
        again.posterior([guide()]).sample(again.simulate(1)[1], 1)

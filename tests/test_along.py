"Gates along components: what they are made of, what they start as, what they learn"
import pytest, torch
from rtb_nb.along import Along, PriorNoise, gates_along
from rtb_nb.amortise import Bank, joint_paths
from rtb_nb.components import load_covariance, save_covariance
from rtb_nb.correlated import CovarianceMatching
from rtb_nb.covariance import Covariance
from rtb_nb.denoise import gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.gradient import path_form
from rtb_nb.guidance import Gate, MomentMatching
from rtb_nb.imaging import box_mask
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.narrowed import Narrowed
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import family_drifts, fit_gates, load_posterior, save_posterior

SHAPE = 1, 8, 8
FIELD = gaussian_field(8, .5, 2.5, Cosine(.5))
WHOLE = Covariance(FIELD.vectors[:, 1:], FIELD.values[1:], FIELD.values[0], SHAPE)

def problem(steps=5, std=.4, covariance=WHOLE):
    prior = Diffusion(FIELD, SHAPE, steps, covariance=covariance)
    return InverseProblem(prior, Likelihood(box_mask(SHAPE, 4), std))

def stepped(p, tau, k): return p.posterior([]).step(tau.x[k], torch.full((len(tau),), k),
                                                    tau.y, tau.x0_hat[k])

def test_a_part_is_the_projection_on_its_components_and_parts_do_not_overlap():
    torch.manual_seed(0)
    p = problem()
    step = stepped(p, joint_paths(p, 5), 2)
    guide = CovarianceMatching(WHOLE)
    broad, fine = Along(guide, WHOLE, 0, 7), Along(guide, WHOLE, 7, 63)
    V = WHOLE.vectors.float().flip(1) # the broadest first
    u, c = step.of(guide).flatten(1), step.of(guide).flatten(1) @ V
    torch.testing.assert_close(step.of(broad).flatten(1), c[:, :7] @ V[:, :7].T)
    assert (step.of(broad)*step.of(fine)).flatten(1).sum(1).abs().max() < 1e-4
    torch.testing.assert_close(c @ V.T, (step.of(broad) + step.of(fine)).flatten(1))
    noise = step.of(PriorNoise())
    torch.testing.assert_close(step.alpha*step.x0_hat + step.sigma*noise, step.x)

def test_gates_start_as_nothing_and_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    p = problem()
    tau, guide = joint_paths(p, 6), CovarianceMatching(WHOLE)
    plain = p.posterior([guide, Narrowed(guide)])
    gates = gates_along(guide, WHOLE, (3, 20)) + gates_along(PriorNoise(), WHOLE, (8,))
    q = p.posterior([guide, *gates, Narrowed(guide)])
    torch.testing.assert_close(q.log_ratio(tau), plain.log_ratio(tau), rtol=0, atol=0)
    for gate in gates: gate.value.data += .2
    assert (q.log_ratio(tau) - plain.log_ratio(tau)).abs().min() > 1e-3
    torch.testing.assert_close(q.log_ratio(tau)[2:3], q.log_ratio(tau[2:3]),
                               rtol=1e-4, atol=1e-3)

def test_what_goes_too_far_along_some_components_is_called_back_there():
    torch.manual_seed(0)
    p, guide = problem(), CovarianceMatching(WHOLE)
    far = Gate(Along(guide, WHOLE, 0, 4), knots=2, value=1.).requires_grad_(False)
    mends = gates_along(guide, WHOLE, (4, 30), 2)
    q = p.posterior([guide, far, *mends, Narrowed(guide)])
    fit_gates(q, Bank.of(p.prior, 500), batches=64)
    beyond = q.drifts[1].value + q.drifts[2].value # they share what is fitted
    assert beyond.abs().max() < .15 and q.drifts[3].value.abs().max() < .15

def test_both_forms_of_the_gradient_reach_them():
    torch.manual_seed(0)
    p, guide = problem(), CovarianceMatching(WHOLE)
    gates = gates_along(guide, WHOLE, (4, 30)) + gates_along(PriorNoise(), WHOLE, (8,))
    q = p.posterior([guide, *gates, Narrowed(guide)])
    y = p.simulate(1)[1]
    for form in (lambda tau: path_form(q, tau), lambda tau: q.log_ratio(tau).sum().backward()):
        q.zero_grad()
        form(q.simulate(y, 4))
        assert all(g.value.grad.abs().sum() > 0 for g in gates)

def test_a_recipe_with_gates_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    file = tmp_path/'field.covariance.safetensors'
    save_covariance(WHOLE, file)
    p = problem(covariance=load_covariance(file))
    recipe = dict(guide=dict(name='CovarianceMatching', covariance=str(file)), width=16,
                  depth=1, narrowed=True, second=.06, along=[4, 20])
    q = p.posterior(family_drifts(p, **recipe))
    assert sum(isinstance(d, Gate) for d in q.drifts) == 2 + 3*2
    for d in q.drifts:
        if isinstance(d, Gate): d.value.data += .1*torch.randn_like(d.value)
    path = tmp_path/'own.posterior.safetensors'
    save_posterior(q, path, recipe)
    again, tau = load_posterior(path, p), joint_paths(p, 3)
    torch.testing.assert_close(again.log_ratio(tau), q.log_ratio(tau), rtol=1e-2, atol=.2)

@pytest.mark.parametrize('make, error, words', [
    (lambda: Along(PriorNoise(), WHOLE, 0, 64), ValueError, 'from 1 to 63'),
    (lambda: Along(PriorNoise(), WHOLE, 5, 5), ValueError, 'it comes before `last`'),
    (lambda: Along(PriorNoise(), WHOLE, -1, 5), ValueError, 'whole number from 0'),
    (lambda: gates_along(PriorNoise(), WHOLE, (20, 10)), ValueError, 'it comes before `last`'),
    (lambda: gates_along(PriorNoise(), WHOLE, (4,), knots=1), ValueError, 'at least two'),
    (lambda: family_drifts(problem(), dict(name='MomentMatching'), along=(4,)), ValueError,
     'MomentMatching has no components')])
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words): make()

def test_images_of_another_size_are_refused():
    p = InverseProblem(Diffusion(gaussian_field(4, .5, 1., Cosine(.5)), (1, 4, 4), 3),
                       Likelihood(box_mask((1, 4, 4), 2), .4))
    q = p.posterior([Along(MomentMatching(), WHOLE, 0, 4)])
    with pytest.raises(ValueError, match='this covariance is of events'):
        q.sample(p.simulate(1)[1], 2)

"Steps narrower than the prior's: densities, gradients, and nothing left to learn for Gaussians"
import copy
import pytest, torch
from rtb_nb.amortise import (Bank, Family, MaximumLikelihood, bridge_log_ratio, gap,
                             joint_paths, pair_log_ratio, paired_log_weights)
from rtb_nb.behaviours import OnPolicy
from rtb_nb.calibration import step_residuals
from rtb_nb.components import save_covariance
from rtb_nb.correlated import CovarianceMatching
from rtb_nb.covariance import Covariance, Spread, scaled, whitened
from rtb_nb.denoise import gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.exact import ExactChain
from rtb_nb.families import LensBank, LensBatches, LensFamily
from rtb_nb.gradient import GapTrainer, PathTrainer, path_form
from rtb_nb.guidance import Gate, MomentMatching
from rtb_nb.imaging import box_mask, gaussian_blur
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.narrowed import Narrowed
from rtb_nb.operators import Mask
from rtb_nb.per_sample import Masks
from rtb_nb.posterior import Narrowing, Posterior, gaussian_log_ratio
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import family_drifts, load_posterior, prior_of, save_posterior
from rtb_nb.train import Trainer

SHAPE = 1, 8, 8
FIELD = gaussian_field(8, .5, 2.5, Cosine(.5))
WHOLE = Covariance(FIELD.vectors[:, 1:], FIELD.values[1:], FIELD.values[0], SHAPE)
EVERY = Mask(torch.ones(SHAPE, dtype=torch.bool))

def problem(operator=EVERY, steps=5, std=.2, covariance=WHOLE):
    prior = Diffusion(FIELD, SHAPE, steps, covariance=covariance)
    return InverseProblem(prior, Likelihood(operator, std))

def drifts(gate=None):
    guide = CovarianceMatching(WHOLE)
    return [Gate(guide, **gate) if gate else guide, Narrowed(guide)]

@pytest.mark.parametrize('operator', [EVERY, box_mask(SHAPE, 4), gaussian_blur(SHAPE, 1., 5)])
@pytest.mark.parametrize('steps, std', [(1, .2), (4, .2), (12, .2), (5, .6), (5, .1)])
def test_a_gaussian_posterior_is_exact_in_any_number_of_steps(steps, std, operator):
    torch.manual_seed(0)
    p = problem(operator, steps, std)
    tau = joint_paths(p, 16)
    joint, own = paired_log_weights(p.posterior(drifts()), tau, 4)
    some = 1 if operator is EVERY else 3 # one direction is no component, and a hole needs it
    assert own.std(1).max() < .15*some and (joint[:, None] - own).abs().max() < .3*some
    wide = paired_log_weights(p.posterior(drifts()[:1]), tau, 4)
    assert gap(*wide)[0] > 300*abs(gap(joint, own)[0])

def test_residuals_of_joint_paths_are_white_where_steps_are_exact():
    "Step by step and summed; a drift that pulls too far shows in the sum, a width in each step"
    torch.manual_seed(0)
    p = problem(box_mask(SHAPE, 4), 6)
    tau = joint_paths(p, 400)
    def spread(posterior):
        r = step_residuals(posterior, tau)
        assert r.shape == (6, 400, *SHAPE)
        return r.square().mean().item(), r.sum(0).square().mean().item()/6
    assert spread(p.posterior(drifts())) == pytest.approx((1, 1), abs=.03)
    wide = spread(p.posterior(drifts()[:1]))
    assert wide[0] < .93 and wide[1] == pytest.approx(wide[0], abs=.03)
    far = spread(p.posterior(drifts(dict(value=1.5))))
    assert far[1] > far[0] + .1

def test_residuals_do_not_depend_on_the_batch_and_need_measurements():
    torch.manual_seed(0)
    p = problem(box_mask(SHAPE, 4))
    tau, posterior = joint_paths(p, 6), p.posterior(drifts())
    whole, alone = step_residuals(posterior, tau), step_residuals(posterior, tau[2:3])
    torch.testing.assert_close(whole[:, 2:3], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='carry no measurement'):
        step_residuals(posterior, p.prior.simulate(2))

def test_steps_have_the_width_that_is_said():
    torch.manual_seed(0)
    p = problem(box_mask(SHAPE, 4))
    y, posterior = p.simulate(1)[1], p.posterior(drifts())
    x = posterior.simulate(y, 1).x[2].expand(4000, -1, -1, -1)
    kernel = posterior.kernel(x, 2, y.expand(4000, -1))
    w = posterior.bend(x[:1], 2, y)[1]
    own = w.widths.along[0]
    assert (own < 1).all() and own.min() < .9 and w.rest == 1
    apart = w.root - w.root.diagonal(dim1=1, dim2=2).diag_embed()
    assert apart.abs().max() > .01 # a hole couples components
    z = whitened(p.prior.chain.width(2, x), kernel.sample() - kernel.mean).flatten(1)
    found = (z.double() @ WHOLE.vectors).std(0)
    residuals = posterior.squared_residuals(posterior.simulate(y, 400))[1]
    torch.testing.assert_close(residuals, torch.ones(5).to(residuals), atol=.03, rtol=0)
    torch.testing.assert_close(found, own, rtol=.06, atol=0)

def test_a_batch_that_does_not_go_round_its_operators_is_refused():
    p = problem(Masks(torch.rand(3, *SHAPE) < .5))
    posterior, x = p.posterior(drifts()), torch.randn(4, *SHAPE)
    with pytest.raises(ValueError, match='a batch of 4 does not go round 3 operators'):
        posterior.bend(x, 2, x, x)

def test_weights_average_to_one_over_the_prior():
    torch.manual_seed(0)
    p = problem(steps=2, std=3.)
    tau = joint_paths(p, 8000)
    tau.y = tau.y.roll(1, 0)
    weights = p.posterior(drifts()).log_ratio(tau).exp()
    assert abs(weights.mean() - 1) < 5*weights.std()/8000**.5

def test_the_path_form_is_the_gradient_of_the_mean_log_weight():
    torch.manual_seed(0)
    p = problem(box_mask(SHAPE, 4), steps=3)
    posterior = p.posterior(drifts(dict(knots=2, value=.6)))
    value, y = posterior.drifts[0].value, p.simulate(1)[1].expand(8, -1)
    tau = posterior.simulate(y, 8)
    path_form(posterior, tau)
    x, total = tau.xT, 0.
    for k in range(3):
        x0_hat = p.prior.guess(x, k)
        s, mu = p.prior.chain.width(k, x), posterior.mean(x, k, x0_hat)
        u, w = posterior.bend(x, k, y, x0_hat)
        eps = w.solve(whitened(s, tau.x[k+1] - mu) - u).detach()
        z = u + w.times(eps)
        total, x = total + gaussian_log_ratio(z, u, w), mu + scaled(s, z)
    (-(p.log_likelihood(x, y) - total).mean()).backward()
    halves = value.grad/2 # the same gradient was added twice
    value.grad = None
    path_form(posterior, tau)
    torch.testing.assert_close(value.grad, halves, rtol=1e-3, atol=1e-3)

def test_pairs_and_bridges_agree_in_mean():
    torch.manual_seed(0)
    p = problem(steps=8)
    posterior, bank = p.posterior(drifts(dict(value=.7))), Bank.of(p.prior, 512)
    pairs = bank.pairs(p.likelihood, 4096)
    plain, bridged = pair_log_ratio(posterior, pairs), bridge_log_ratio(posterior, pairs)
    assert abs((plain - bridged).mean()) < 4*(plain - bridged).std()/64 + .01
    assert bridged.std() < plain.std()

@pytest.mark.parametrize('operator', [EVERY, box_mask(SHAPE, 4), gaussian_blur(SHAPE, 1., 5)])
def test_what_is_left_of_components_is_what_dense_matrices_leave(operator):
    p = problem(operator, 4)
    posterior, x = p.posterior(drifts()), torch.randn(1, *SHAPE)
    step = posterior.step(x, 2, p.simulate(1)[1], torch.zeros_like(x))
    guide, A = posterior.drifts[0], operator.matrix().double()
    C, V = guide.error(step), WHOLE.vectors
    full = C.rest[0, 0]*torch.eye(64) + V @ (C.along[0] - C.rest[0, 0]).diag() @ V.T
    gone = full @ A.T @ torch.linalg.solve(A @ full @ A.T + .04*torch.eye(len(A)), A @ full)
    told = guide.of_each(step, C, lambda i, left, told: told)[0]
    found = C.along[0][:, None]*told*C.along[0]
    torch.testing.assert_close(found, V.T @ gone @ V, rtol=1e-3, atol=1e-4)

def lenses():
    torch.manual_seed(0)
    covariance = Covariance.of(torch.randn(60, 1, 16, 16) + torch.randn(60, 1, 1, 1), 8)
    prior = Diffusion(gaussian_field(16, .5, 1.5, Cosine(.5)), (1, 16, 16), 3,
                      covariance=covariance)
    return covariance, prior, LensBank(LensFamily(16), 3)

def test_lenses_of_one_batch_are_each_seen_by_themselves():
    covariance, prior, bank = lenses()
    together = LensBatches(bank, 3)()
    guide = CovarianceMatching(covariance)
    many = InverseProblem(prior, together)
    tau = joint_paths(many, 6)
    ratio = many.posterior([guide, Narrowed(guide)]).log_ratio(tau)
    matrices = together.operator
    for i in range(3):
        alone = InverseProblem(prior, Likelihood(matrices[torch.tensor([i])], 1.))
        own = alone.posterior([guide, Narrowed(guide)]).log_ratio(tau[2*i:2*i+2])
        torch.testing.assert_close(own, ratio[2*i:2*i+2], rtol=1e-3, atol=2e-2)

def test_recipes_trainers_and_files(tmp_path):
    covariance, prior, bank = lenses()
    save_covariance(covariance, tmp_path/'a.covariance.safetensors')
    recipe = dict(width=16, depth=1, narrowed=True, guide=dict(
        name='CovarianceMatching', covariance=str(tmp_path/'a.covariance.safetensors')))
    rough = family_drifts(InverseProblem(prior, bank()), **recipe)[2].guide.covariance
    prior = Diffusion(prior.denoiser, prior.shape, 3, covariance=rough) # rounded in its file
    family = InverseProblem(prior, Family(LensBatches(bank, 2)))
    q = family.posterior(family_drifts(family, **recipe))
    joint = Bank.of(prior, 8)
    trainer = MaximumLikelihood(q, joint, pairs=4).fit(None, 2, log=str)
    trainer = GapTrainer(trainer.averaged, joint, 2, measurements=2, pairs=4)
    trainer.fit(None, 2, log=str)
    one = InverseProblem(prior, Likelihood(Lens(16), .05))
    q = trainer.averaged.under(one)
    y = one.simulate(1)[1]
    for kind in (Trainer, PathTrainer):
        own = copy.deepcopy(q)
        kind(own, OnPolicy(own, 2)).fit(y, 1, log=str)
    with pytest.raises(ValueError, match="'narrowed' is not True"):
        save_posterior(q, tmp_path/'b.posterior.safetensors', recipe | dict(narrowed=False), {})
    save_posterior(q, tmp_path/'a.posterior.safetensors', recipe, {})
    again, tau = load_posterior(tmp_path/'a.posterior.safetensors', one), q.simulate(y, 3)
    assert again.narrows
    torch.testing.assert_close(again.log_ratio(tau), q.log_ratio(tau), rtol=1e-3, atol=1e-2)

class Half(Narrowing):
    def relative_width(self, step):
        one = torch.ones(1, 1).double()
        return Spread(WHOLE.vectors, .5*one.expand(1, 63), .5*one)

def test_a_narrowing_is_a_drift_like_any_other():
    torch.manual_seed(0)
    p = problem(covariance=None) # white steps have a width, too
    posterior = Posterior(p.prior, [Half()])
    tau = posterior.simulate(None, 400)
    lost = 5*64*((.25 - 1)/2 + torch.tensor(2.).log())
    assert abs(posterior.log_ratio(tau).mean() - lost) < 4*posterior.log_ratio(tau).std()/20
    assert 'Half' in repr(posterior) and posterior.narrows and not p.posterior([]).narrows
    with torch.inference_mode(): posterior.sample(None, 2)

def shortfall():
    p = problem(covariance=None)
    ExactChain(p, p.simulate(1)[1]).shortfall(p.posterior([Half()]), 2)

@pytest.mark.parametrize('wrong, says', [
    (lambda: Narrowed(MomentMatching()), 'give the CovarianceMatching beside it, got Moment'),
    (lambda: problem().posterior([Half(), Half()]), 'give one Narrowing, by itself, got 2'),
    (lambda: problem().posterior([Gate(Half())]), 'give one Narrowing, by itself, got 1'),
    (lambda: family_drifts(problem(covariance=None), guide=dict(name='MomentMatching'),
                           narrowed=True), 'white steps are not narrowed'),
    (lambda: shortfall(), 'leave the Narrowing out'),
    (lambda: problem().posterior([Half()]).given(torch.zeros(1, 64)), 'is no prior for the'),
    (lambda: problem(covariance=None).posterior(drifts()).sample(torch.zeros(1, 64), 1),
     'the steps of this chain are of white noise'),
    (lambda: problem(torch.sin).posterior([drifts()[1]]).sample(torch.zeros(1, *SHAPE), 1),
     'needs a linear operator'),
    (lambda: problem(covariance=Covariance.of(torch.randn(99, *SHAPE), 63)).posterior(drifts()
        ).sample(torch.zeros(1, 64), 1), 'do not have the same components'),
    (lambda: prior_of('a.posterior.safetensors'), None)])
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError if says else FileNotFoundError, match=says): wrong()

@pytest.mark.parametrize('name', ['lensed-sources-32', 'holed-mnist-32'])
def test_the_prior_of_a_posterior_is_the_one_it_asks_for(name):
    prior = prior_of(name)
    like = Likelihood(Lens(32) if 'lens' in name else box_mask((1, 32, 32), 16), .05)
    posterior = load_posterior(name, InverseProblem(prior, like))
    assert posterior.card['chain']['steps'] == prior.steps

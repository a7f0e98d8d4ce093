"Correlated steps: a density like any other, and exact where data are Gaussian"
from dataclasses import replace
import pytest, torch
from torch.distributions import MultivariateNormal
from rtb_nb.amortise import Bank, bridge_log_ratio, joint_paths, pair_log_ratio
from rtb_nb.behaviours import OnPolicy
from rtb_nb.checkpoints import fingerprint, save_tensors
from rtb_nb.components import load_covariance, save_covariance
from rtb_nb.correlated import CovarianceMatching
from rtb_nb.covariance import Correlated, Coupled, Covariance, Spread, scaled, whitened
from rtb_nb.denoise import gaussian_field
from rtb_nb.diffusion import Diffusion
from rtb_nb.exact import ExactChain
from rtb_nb.families import LensBank, LensBatches, LensFamily, Matrices
from rtb_nb.gradient import path_form
from rtb_nb.guidance import CLA, DPS, Gate, GaussianMatching, GuideShift, MomentMatching
from rtb_nb.hybrids import DPSScore
from rtb_nb.imaging import box_mask, gaussian_blur
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.narrowed import Narrowed
from rtb_nb.objective import RTB
from rtb_nb.operators import Mask
from rtb_nb.particles import twisted
from rtb_nb.priors import load_prior
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import family_drifts, load_posterior, save_posterior
from rtb_nb.train import path_gradient

SHAPE = 1, 8, 8
FIELD = gaussian_field(8, .5, 1.5, Cosine(.5))
WHOLE = Covariance(FIELD.vectors[:, 1:], FIELD.values[1:], FIELD.values[0], SHAPE)

def prior(steps=6, covariance=WHOLE):
    return Diffusion(FIELD, SHAPE, steps, covariance=covariance)

BLUR, EVERY = gaussian_blur(SHAPE, 1., 5), Mask(torch.ones(SHAPE, dtype=torch.bool))

def problem(steps=6, covariance=WHOLE, operator=BLUR):
    return InverseProblem(prior(steps, covariance), Likelihood(operator, .2))

@pytest.mark.parametrize('steps', [1, 3, 12])
def test_the_end_of_a_gaussian_chain_is_exact_in_any_number_of_steps(steps):
    torch.manual_seed(0)
    p = prior(steps)
    found = torch.cov(p.sample(20000).flatten(1).T)
    wanted = FIELD.cov.float() + p.last_noise**2*torch.eye(64)
    assert (found - wanted).abs().max() < .02
    white = torch.cov(prior(steps, None).sample(4000).flatten(1).T)
    assert white.sum() < .8*wanted.sum() # of the mean's variance

def test_noised_data_look_like_the_chain_in_few_steps():
    torch.manual_seed(0)
    p, x = prior(4), FIELD.mean + prior().sample(3000)
    for residuals in p.squared_residuals(p.noised(x)):
        torch.testing.assert_close(residuals, torch.ones(4).to(residuals), atol=.05, rtol=0)

def test_paths_have_the_density_that_dense_matrices_give():
    torch.manual_seed(0)
    p, V = prior(3), WHOLE.vectors.double()
    tau = p.simulate(5)
    wanted = p.start(tau.xT.shape).log_prob(tau.xT).double()
    for k in range(3):
        along, rest = p.chain.along[k], p.chain.rest[k]
        root = rest*torch.eye(64) + V @ (along - rest).diag() @ V.T
        mean = p.mean(tau.x[k], k, tau.x0_hat[k]).flatten(1).double()
        wanted += MultivariateNormal(mean, root @ root).log_prob(tau.x[k+1].flatten(1).double())
    torch.testing.assert_close(p.log_prob(tau).double(), wanted, rtol=1e-4, atol=1e-2)

def test_the_mean_variance_of_a_step_is_the_white_one():
    p, white = prior(7), prior(7, None)
    mean = WHOLE.mean(p.chain.along**2, p.chain.rest**2)[:, 0]
    torch.testing.assert_close(mean, white.chain.std**2, rtol=1e-4, atol=0)

def narrowed():
    guide = CovarianceMatching(WHOLE)
    return [guide, Narrowed(guide)]

@pytest.mark.parametrize('drifts, operator', [
    *(([drift], BLUR) for drift in (MomentMatching(), CovarianceMatching(WHOLE), CLA(), DPS(.3),
                                    DPSScore())),
    *((narrowed(), operator) for operator in (BLUR, EVERY, box_mask(SHAPE, 4)))])
def test_log_ratios_are_those_of_the_kernels(drifts, operator):
    torch.manual_seed(0)
    p = problem(operator=operator)
    y, posterior = p.simulate(1)[1], p.posterior(drifts)
    tau = posterior.simulate(y, 6)
    ratio = posterior.log_prob(tau) - p.prior.log_prob(tau)
    torch.testing.assert_close(posterior.log_ratio(tau), ratio, rtol=1e-3, atol=2e-2)
    torch.manual_seed(1)
    _, total = posterior.rollout(y, 6)
    torch.manual_seed(1)
    again = posterior.log_ratio(posterior.simulate(y, 6))
    torch.testing.assert_close(total, again, rtol=1e-3, atol=2e-2)

def test_the_weights_of_a_drift_average_to_one_over_the_prior():
    torch.manual_seed(0)
    p = problem(4)
    posterior = p.posterior([Gate(MomentMatching(), value=.03)])
    tau = joint_paths(p, 4000)
    tau = replace(tau, y=tau.y.roll(1, 0)) # of another path: over the prior the mean is one
    weights = posterior.log_ratio(tau).exp()
    assert abs(weights.mean() - 1) < 5*weights.std()/4000**.5

def test_the_best_drift_of_a_gaussian_is_better_told_than_any_other():
    torch.manual_seed(0)
    p = problem(10)
    tau = joint_paths(p, 64)
    joint = {}
    for name, guide in dict(exact=GaussianMatching(), told=CovarianceMatching(WHOLE),
                            white=MomentMatching()).items():
        posterior = p.posterior([guide])
        own = posterior.draw(tau.y, 64)[2]
        joint[name] = (posterior.log_weight(tau) - own).mean().item()
    assert abs(joint['exact'] - joint['told']) < .05*joint['exact'] + .1
    assert joint['white'] > joint['told']

@pytest.mark.parametrize('narrowed', [False, True])
def test_both_forms_of_the_gradient_agree_in_mean(narrowed):
    torch.manual_seed(0)
    p, guide = problem(3), CovarianceMatching(WHOLE)
    drifts = [Gate(guide, knots=2, value=.6)] + [Narrowed(guide)]*narrowed
    posterior = p.posterior(drifts)
    value = posterior.drifts[0].value
    y = p.simulate(1)[1]
    def gradient(form, n):
        value.grad = None
        tau = OnPolicy(posterior, n)(y)
        if form == 'path': path_form(posterior, tau)
        else: path_gradient(posterior, RTB(), tau, p.log_likelihood(tau.x0, tau.y).detach())
        return value.grad.clone()
    path = torch.stack([gradient('path', 64) for _ in range(12)])
    score = torch.stack([gradient('score', 256) for _ in range(24)])
    score = score*(path.mean(0).norm()/score.mean(0).norm()) # VarGrad is a multiple of it
    off = path.mean(0) - score.mean(0)
    error = (path.var(0)/12 + score.var(0)/24).sqrt()
    assert (off.abs() < 5*error + .02*path.mean(0).abs()).all()

def test_pairs_and_bridges_of_a_bank_agree_in_mean():
    torch.manual_seed(0)
    p = problem(8)
    posterior, bank = p.posterior([CovarianceMatching(WHOLE)]), Bank.of(p.prior, 512)
    pairs = bank.pairs(p.likelihood, 4096)
    plain, bridged = pair_log_ratio(posterior, pairs), bridge_log_ratio(posterior, pairs)
    assert abs((plain - bridged).mean()) < 4*(plain - bridged).std()/64 + .01

def test_features_particles_and_posteriors_as_priors_take_them():
    torch.manual_seed(0)
    p = problem(5)
    y = p.simulate(1)[1]
    posterior = p.posterior([CovarianceMatching(WHOLE)])
    x = torch.randn(2, *SHAPE)
    step = posterior.step(x, 2, y.expand(2, -1, -1, -1), torch.zeros_like(x))
    guide = CovarianceMatching(WHOLE)
    torch.testing.assert_close(GuideShift(guide)(step), guide.move(step), rtol=1e-3, atol=1e-4)
    x = posterior.given(y).sample(3)
    assert x.shape == (3, *SHAPE) and x.isfinite().all()
    assert twisted(p, y, 3, particles=8).x.isfinite().all()

def test_white_chains_are_what_they_were_and_correlated_ones_another():
    known = fingerprint(chain=prior(6, None).chain)
    assert known != fingerprint(chain=prior().chain)
    assert not prior(6, None).chain.correlated and prior().chain.correlated
    assert 'correlated' in repr(prior()) and 'correlated' not in repr(prior(6, None))
    with pytest.raises(ValueError, match='ExactChain is for steps of white noise'):
        ExactChain(problem(), problem().simulate(1)[1])
    with pytest.raises(ValueError, match='this covariance is of events'):
        load_prior('mnist-32', covariance=WHOLE)

def second(): # a problem whose prior is the posterior of another
    first = problem()
    prior = first.posterior([]).given(first.simulate(1)[1])
    return InverseProblem(prior, first.likelihood)

@pytest.mark.parametrize('wrong, says', [
    (lambda: Covariance.of(torch.randn(20, 1, 16, 16)), '128 components need more finite'),
    (lambda: Covariance.of(torch.full((9, 2), torch.nan)), '1 components need more finite'),
    (lambda: Covariance.of(torch.randn(9, 4), 4), 'rank must be a whole number from 1 to 3'),
    (lambda: Covariance(torch.eye(4)[:, :2], -torch.ones(2), 1., (4,)), 'must be positive'),
    (lambda: Covariance(torch.eye(4)[:, :2], torch.ones(2), 0., (4,)), 'must be positive'),
    (lambda: Covariance(torch.randn(4, 2), torch.ones(2), 1., (4,)), 'must be orthonormal'),
    (lambda: Covariance(torch.eye(4)[:, :2], torch.ones(3), 1., (4,)), r'must be \(4, 3\)'),
    (lambda: load_prior('mnist-32', covariance='mnist-32'), "covariance must be a Covariance"),
    (lambda: prior().chain.at('std', 0, torch.zeros(1, *SHAPE)), 'use chain.width'),
    (lambda: second().posterior([CovarianceMatching(WHOLE)]).sample(torch.zeros(1, *SHAPE), 1),
     'needs the denoiser of the prior')])
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says): wrong()

def test_precision_and_whole_numbers():
    along, rest = WHOLE.unknown(1, .04)
    assert along.min() > 0 and rest > 0
    half = problem().posterior([CovarianceMatching(WHOLE)]).half()
    assert half.drifts[0].covariance.vectors.dtype == torch.float64
    spread = Spread(WHOLE.vectors, torch.full((1, 63), 2.), torch.ones(1, 1))
    x = torch.ones(2, 8, 8)
    exact = spread.times(x)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(spread.times(x), exact)
    variance = Correlated(x, spread).variance
    assert variance.shape == x.shape and (variance > 1).all() and (variance <= 4.001).all()

def test_made_in_inference_mode_they_can_be_trained_through(tmp_path):
    save_covariance(WHOLE, tmp_path/'a.covariance.safetensors')
    with torch.inference_mode():
        loaded = load_covariance(tmp_path/'a.covariance.safetensors')
        made = Covariance.of(torch.randn(99, 8)), loaded
    assert not any(c.vectors.is_inference() for c in made)

@pytest.mark.parametrize('name', ['sources-32', 'mnist-32', 'cifar10-32'])
def test_shipped_covariances_are_of_their_priors_data(name):
    covariance = load_covariance(name)
    p = load_prior(name, steps=8, covariance=covariance)
    torch.manual_seed(0)
    assert p.sample(2).isfinite().all()
    variance = p.denoiser.data_variance.item()
    assert .8 < covariance.variance/variance < 1.25
    V = covariance.vectors
    unit = torch.eye(len(covariance.values)).double()
    torch.testing.assert_close(V.T @ V, unit, atol=1e-10, rtol=0)

def test_a_posterior_is_written_without_the_covariance_and_leaves_the_chain_as_it_is(tmp_path):
    torch.manual_seed(0)
    save_covariance(WHOLE, tmp_path/'a.covariance.safetensors')
    covariance = load_covariance(tmp_path/'a.covariance.safetensors')
    p = InverseProblem(prior(3, covariance), problem().likelihood)
    y, before = p.simulate(1)[1], p.prior.chain.vectors.clone()
    recipe = dict(width=16, depth=1, guide=dict(
        name='CovarianceMatching', covariance=str(tmp_path/'a.covariance.safetensors')))
    q = p.posterior(family_drifts(p, **recipe))
    q.drifts[0].drift.covariance = covariance # the chain's own
    save_posterior(q, tmp_path/'a.posterior.safetensors', recipe, {})
    assert torch.equal(p.prior.chain.vectors, before)
    assert torch.equal(covariance.vectors, before)
    assert not any('covariance' in name for name in q.drifts.state_dict())
    again = load_posterior(tmp_path/'a.posterior.safetensors', p)
    tau = q.simulate(y, 3)
    torch.testing.assert_close(again.log_ratio(tau), q.log_ratio(tau), rtol=1e-3, atol=1e-2)

def test_files_come_back(tmp_path):
    path = tmp_path/'field.covariance.safetensors'
    save_covariance(WHOLE, path, dict(data='a torus'))
    again = load_covariance(path)
    torch.testing.assert_close(again.values, WHOLE.values, rtol=1e-3, atol=1e-4)
    assert again.card['data'] == 'a torus' and again.shape == SHAPE
    with pytest.raises(ValueError, match='must end in .covariance.safetensors'):
        save_covariance(WHOLE, tmp_path/'field.safetensors')
    other = tmp_path/'other.covariance.safetensors'
    save_tensors(other, dict(a=torch.zeros(1)), {})
    with pytest.raises(ValueError, match='holds no covariance'): load_covariance(other)

def test_a_correlated_normal_samples_what_it_scores():
    spread = Spread(WHOLE.vectors, torch.full((1, 63), 2.), torch.ones(1, 1))
    x = torch.randn(4, *SHAPE)
    torch.testing.assert_close(whitened(spread, scaled(spread, x)), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled(spread, x, 2.), scaled(spread, x)/2)
    torch.testing.assert_close(whitened(spread, x, 3.), whitened(spread, 3*x))
    with pytest.raises(ValueError, match='draws one event of each sample'):
        Correlated(x, spread).rsample((2,))

def coupled(n): # roots, one for all or one for each
    torch.manual_seed(0)
    root = torch.randn(n, 63, 63).double().tril()/9
    root.diagonal(dim1=1, dim2=2).abs_().add_(.5)
    return Coupled(WHOLE.vectors, root, torch.linspace(.5, .8, n).double()[:, None])

def test_coupled_noise_is_solved_scored_and_scaled_as_dense_matrices_are():
    roots, x = coupled(3), torch.randn(3, *SHAPE).double()
    V = WHOLE.vectors
    outside = roots.rest[..., None]*(torch.eye(64) - V @ V.T)
    dense = V @ roots.root @ V.T + outside
    q = Correlated(torch.zeros_like(x), roots)
    exact = MultivariateNormal(torch.zeros(64).double(), dense @ dense.mT)
    torch.testing.assert_close(q.log_prob(x), exact.log_prob(x.flatten(1)))
    torch.testing.assert_close(q.variance.flatten(1), exact.variance)
    precise = torch.linalg.inv(roots.root @ roots.root.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(roots.precisions.along, precise)
    wide = Spread(V, torch.rand(1, 63).double() + .5, torch.full((1, 1), 2.).double())
    after = roots.map(torch.mul, wide)
    torch.testing.assert_close(after.times(x), wide.times(roots.times(x)))
    torch.testing.assert_close(after.map(torch.div, wide).times(x), roots.times(x))
    thrice = roots.map(torch.mul, torch.tensor(3.))
    torch.testing.assert_close(thrice.times(x), 3*roots.times(x))
    with pytest.raises(ValueError, match='do not have the same components'):
        roots.map(torch.mul, Spread(torch.eye(64).double()[:, :63], wide.along, wide.rest))

def test_one_root_for_all_is_the_same_root_for_each():
    one, x = coupled(1), torch.randn(4, *SHAPE)
    each = Coupled(one.vectors, one.root.expand(4, -1, -1), one.rest.expand(4, -1))
    for do in ('times', 'solve'):
        a, b = (getattr(roots, do)(x) for roots in (one, each))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whitened(one, scaled(one, x)), x, rtol=1e-4, atol=1e-4)
    v, w = x.clone().requires_grad_(), torch.randn_like(x)
    slope, = torch.autograd.grad((one.solve(v)*w).sum(), v)
    V, L = one.vectors.float(), one.root[0].float()
    dense = V @ torch.linalg.inv(L) @ V.T + (torch.eye(64) - V @ V.T)/one.rest.float()
    torch.testing.assert_close(slope.flatten(1), w.flatten(1) @ dense, rtol=1e-4, atol=1e-4)

def test_coupled_noise_in_low_precision():
    roots, x = coupled(1), torch.randn(2, *SHAPE)
    exact = roots.solve(x)
    for kind in (torch.bfloat16, torch.float16):
        assert roots.solve(x.to(kind)).dtype == kind
        torch.testing.assert_close(roots.solve(x.to(kind)).float(), exact, rtol=.1, atol=.1)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(roots.solve(x), exact)
    assert repr(roots) == 'Coupled, 63 components'

def test_lenses_in_a_batch_are_each_by_itself():
    torch.manual_seed(0)
    bank = LensBank(LensFamily(16), 3)
    noise = torch.tensor([.02, .05, .1])
    stacked = Likelihood(Matrices.of(bank.lenses).times(1/noise), 1.)
    x, k = torch.randn(6, 1, 16, 16), 2
    field = Diffusion(gaussian_field(16, .3, 3., Cosine(.5)), (1, 16, 16), 4)
    y = torch.cat([lens(x[2*i:2*i+2]) for i, lens in enumerate(bank.lenses)])
    y = y + .05*torch.randn_like(y)
    offset = torch.stack([lens.offset.float() for lens in bank.lenses])
    twice = lambda v: v.repeat_interleave(2, 0)
    scaled_y = (y - twice(offset))/twice(noise)[:, None, None, None]
    at = field.noised(x).x[k]
    guides = MomentMatching(), CovarianceMatching(Covariance.of(torch.randn(99, 1, 16, 16), 8))
    together = InverseProblem(field, stacked).posterior([])
    step = together.step(at, k, scaled_y, field.denoise(at, k))
    for i, lens in enumerate(bank.lenses):
        part = slice(2*i, 2*i + 2)
        alone = InverseProblem(field, Likelihood(lens, noise[i].item())).posterior([])
        own = alone.step(at[part], k, y[part], field.denoise(at[part], k))
        for guide in guides:
            moved = guide.move(step)[part]
            torch.testing.assert_close(moved, guide.move(own), rtol=1e-2, atol=1e-3)
        power = (lens.column_power(at[part])/noise[i]**2).expand(2, -1, -1, -1)
        found = stacked.operator.column_power(at)[part]
        torch.testing.assert_close(found, power, rtol=1e-4, atol=1e-4)
    v = torch.randn(6, 1, 16, 16)
    i = torch.tensor([2, 0])
    torch.testing.assert_close(stacked.operator[i](v[:2]), torch.cat(
        [(bank.lenses[j](v[n:n+1]) - bank.lenses[j].offset.float())/noise[j]
         for n, j in enumerate(i)]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='does not go round 3 operators'):
        stacked.operator(v[:4])
    with pytest.raises(ValueError, match='equal'):
        Matrices.of([gaussian_blur((3, 8, 8), 1., 5)])

def test_batches_of_lenses_are_drawn_anew_and_name_their_bank():
    torch.manual_seed(0)
    bank = LensBank(LensFamily(16), 4)
    batches = LensBatches(bank, 2)
    one, other = batches(), batches()
    assert one.n_operators == 2 and not torch.equal(one.operator.factor, other.operator.factor)
    low, high = bank.family.noise_std
    assert (1/one.operator.factor >= low).all() and (1/one.operator.factor <= high).all()
    assert fingerprint(m=batches) == fingerprint(m=LensBatches(bank, 2))
    assert fingerprint(m=batches) != fingerprint(m=LensBatches(bank, 4))

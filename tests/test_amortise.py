"Joint paths, banks of them, families of likelihoods, and maximum likelihood without the prior"
import pytest, torch

from rtb_nb.amortise import (Bank, Family, Fresh, Joint, MaximumLikelihood, another,
    bridge_log_ratio, bridge_step, gap, joint_paths, load_bank, pair_log_ratio,
    paired_log_weights, save_bank)
from rtb_nb.beds import plane
from rtb_nb.behaviours import OnPolicy
from rtb_nb.drifts import NetDrift
from rtb_nb.exact import ExactChain, ExactPosterior
from rtb_nb.guidance import GaussianMatching, MomentMatching
from rtb_nb.likelihood import Likelihood
from rtb_nb.networks import VectorNet
from rtb_nb.operators import Matrix
from rtb_nb.train import Trainer

@pytest.fixture
def problem(): torch.manual_seed(0); return plane(steps=6)

def learned(problem):
    return problem.posterior([NetDrift(VectorNet(5, 2, width=16), lambda step: step.y)])

def test_exact_posterior_has_the_evidence_on_joint_paths(problem):
    tau = joint_paths(problem, 4)
    for i in range(4):
        exact = ExactChain(problem, tau.y[i:i+1])
        log_w = ExactPosterior(exact).log_weight(tau[i:i+1])
        assert log_w.item() == pytest.approx(exact.log_evidence, abs=1e-4)

def test_gap_is_paired_and_positive(problem):
    tau = joint_paths(problem, 200)
    joint, own = paired_log_weights(problem.posterior([]), tau, n=3, chunk=64)
    assert joint.shape == (200,) and own.shape == (200, 3)
    mean, error = gap(joint, own)
    assert mean == pytest.approx((joint.double()-own.double().mean(1)).mean().item())
    assert mean > 3*error > 0 and gap(joint[:1], own[:1])[1] is None

def test_bank_on_disk_knows_its_prior(problem, tmp_path):
    bank = Bank.of(problem.prior, 20, chunk=8)
    save_bank(bank, tmp_path/'bank.safetensors')
    again = load_bank(tmp_path/'bank.safetensors', problem.prior)
    assert torch.equal(again.tau.x, bank.tau.x)
    assert torch.equal(again.tau.x0_hat, bank.tau.x0_hat)
    assert len(again) == 20 and bank.nbytes == 20*(7 + 6)*2*4
    with pytest.raises(ValueError, match='chain'):
        load_bank(tmp_path/'bank.safetensors', plane(steps=6, last_noise=.1).prior)
    with pytest.raises(ValueError, match='prior'):
        load_bank(tmp_path/'bank.safetensors', plane(steps=6, std=.4).prior)

def test_training_from_a_bank_never_asks_the_prior(problem):
    bank, posterior = Bank.of(problem.prior, 20), learned(problem)
    asked = []
    problem.prior.denoiser.register_forward_hook(lambda *_: asked.append(1))
    pair_log_ratio(posterior, bank.pairs(problem.likelihood, 16)).mean().backward()
    assert not asked

def test_pairs_are_steps_of_paths(problem):
    bank, posterior = Bank.of(problem.prior, 20), problem.posterior([MomentMatching()])
    pairs = bank.pairs(problem.likelihood, 50)
    found = pair_log_ratio(posterior, pairs)
    for j in range(50):
        k = int(pairs.k[j])
        i = (bank.tau.x[k] == pairs.x[j]).all(1).nonzero().item()
        tau = bank.tau[i:i+1]
        tau.y = pairs.y[j:j+1]
        wanted = posterior.step_log_ratio(tau, [k]).item()
        assert found[j].item() == pytest.approx(wanted, abs=1e-5)

def test_same_seed_same_bits(problem):
    bank = Bank.of(problem.prior, 20)
    def draw():
        torch.manual_seed(3)
        pairs = bank.pairs(problem.likelihood, 8)
        return torch.cat([pairs.x, pairs.following, pairs.x0_hat, pairs.y], 1)
    assert torch.equal(draw(), draw())

def test_joint_shares_a_measurement_among_own_paths_and_the_joint_one(problem):
    bank, posterior = Bank.of(problem.prior, 20), learned(problem)
    tau = Joint(posterior, bank, n=3, measurements=5)()
    assert len(tau) == 5*(3 + 1) and len(tau.y.unique()) == 5
    for y in tau.y[-5:]: assert (tau.y == y).sum() == 4
    assert (bank.tau.x0[:, None] == tau.x0[-5:]).all(-1).any(0).all()
    with pytest.raises(ValueError, match='another prior'):
        Joint(posterior, Bank.of(plane(steps=6).prior, 4), 2)

def test_a_family_is_one_member_at_a_time(problem):
    torch.manual_seed(0)
    A, B = Matrix([[1., 0.]]), Matrix([[0., 1.]])
    family = Family([Likelihood(A, .1), Likelihood(B, .2)])
    seen = {another(family).noise_std for _ in range(20)}
    assert seen == {.1, .2} and another(problem.likelihood) is problem.likelihood
    while family.noise_std != .2: family.draw()
    assert family.operator is B
    x = torch.tensor([[.3, -.4]])
    assert family(x).mean.item() == pytest.approx(-.4)
    made = Family(lambda: Likelihood(A, .5))
    assert made.noise_std == .5 and made.y_shape((2,)) == (1,)
    with pytest.raises(ValueError, match='at least one member'): Family([])

def test_a_drift_follows_its_family(problem):
    "One posterior, whose guide reads the present member's operator and noise"
    family = Family([Likelihood(Matrix([[1., 0.]]), .1), Likelihood(Matrix([[0., 1.]]), .1)])
    posterior = type(problem)(problem.prior, family).posterior([MomentMatching()])
    for member in family.members:
        family.member = member
        torch.manual_seed(0)
        x = posterior.sample(torch.tensor([[.9]]), 200)
        torch.manual_seed(0)
        alone = type(problem)(problem.prior, member).posterior([MomentMatching()])
        assert torch.equal(x, alone.sample(torch.tensor([[.9]]), 200))

def trainers(problem, path):
    "Both that bring their own measurements, from the same seed"
    torch.manual_seed(1)
    bank, posterior = Bank.of(problem.prior, 30), learned(problem)
    torch.manual_seed(2)
    yield MaximumLikelihood(posterior, bank, pairs=16, path=path/'likelihood.safetensors')
    torch.manual_seed(2)
    posterior = learned(problem)
    yield Trainer(posterior, Joint(posterior, bank, 3, 2), path=path/'joint.safetensors')

@pytest.mark.parametrize('which', [0, 1], ids=['maximum likelihood', 'joint'])
def test_killed_and_resumed_to_the_bit(which, problem, tmp_path):
    def one(name): return list(trainers(problem, tmp_path/name))[which]
    whole = one('whole')
    torch.manual_seed(3)
    whole.fit(None, 4, every=2, log=str)
    first = one('parts')
    torch.manual_seed(3)
    first.fit(None, 2, every=2, log=str)
    second = one('parts').resume().fit(None, 4, every=2, log=str)
    assert second.history == whole.history and len(whole.history) == 4
    for p, q in zip(second.learned, whole.learned): assert torch.equal(p, q)
    for p, q in zip(second.average.parameters(), whole.average.parameters()):
        assert torch.equal(p, q)

def test_maximum_likelihood_closes_the_gap(problem):
    torch.manual_seed(0)
    bank, posterior = Bank.of(problem.prior, 400), learned(problem)
    held_out = joint_paths(problem, 200)
    before = gap(*paired_log_weights(posterior, held_out, 2))[0]
    trained = MaximumLikelihood(posterior, bank, pairs=128).fit(None, 100, log=str).averaged
    after = gap(*paired_log_weights(trained, held_out, 2))[0]
    assert 0 < after < before/4
    with pytest.raises(ValueError, match='another prior'):
        MaximumLikelihood(posterior, Bank.of(plane(steps=6).prior, 4))

def test_fresh_measurements_of_given_images(problem):
    posterior = learned(problem)
    tau = Fresh(OnPolicy(posterior, 2), torch.randn(5, 2), measurements=3)()
    assert len(tau) == 6 and len(tau.y.unique()) == 3
    with pytest.raises(ValueError, match=r'images must be \(N, 2\)'):
        Fresh(OnPolicy(posterior, 2), torch.randn(5, 3))

def test_the_mean_of_a_step_stands_in_for_the_step():
    "Same mean of the loss, a fraction of its variance; nothing else of the path is used"
    torch.manual_seed(0)
    problem = plane(steps=20)
    bank, posterior = Bank.of(problem.prior, 4000), problem.posterior([GaussianMatching()])
    pairs = bank.pairs(problem.likelihood, 40_000)
    noisy, quiet = pair_log_ratio(posterior, pairs), bridge_log_ratio(posterior, pairs)
    apart = noisy - quiet
    assert abs(apart.mean()) < 4*apart.std()/len(apart)**.5
    assert quiet.var() < noisy.var()
    pairs.following = pairs.following + 1
    assert torch.equal(bridge_log_ratio(posterior, pairs), quiet)

def test_the_last_step_is_its_own_mean(problem):
    torch.manual_seed(0)
    bank, posterior = Bank.of(problem.prior, 20), problem.posterior([])
    pairs = bank.pairs(problem.likelihood, 200)
    last = pairs.k == bank.tau.steps - 1
    mean, std = (posterior.mean(pairs.x, pairs.k, pairs.x0_hat),
                 posterior.chain.at('std', pairs.k, pairs.x))
    z, found = (pairs.following - mean)/std, bridge_step(posterior, pairs)
    assert last.any() and torch.allclose(found[last], z[last], atol=1e-3)
    assert not torch.allclose(found[~last], z[~last], atol=1e-1)

def test_the_gap_of_the_best_drift_needs_its_matrices():
    chain = ExactChain(plane(steps=6), torch.tensor([[.9]]))
    assert chain.gap < chain.gap_of_both < 4*chain.gap
    bare = ExactChain(plane(steps=6), torch.tensor([[.9]]), keep=False)
    with pytest.raises(ValueError, match='keep=True'): bare.gap_of_both
    with pytest.raises(ValueError, match='keep=True'): bare.mean_shift(torch.zeros(1, 2), 0)

def test_a_family_resumes_at_whatever_member(tmp_path):
    "The present member is no part of what a run is; the members are"
    flat = plane(steps=6)
    def one(*noises, seed):
        torch.manual_seed(seed)
        family = Family([Likelihood(Matrix([[1., 0.]]), s) for s in noises])
        posterior = learned(type(flat)(flat.prior, family))
        return MaximumLikelihood(posterior, bank, pairs=8, path=tmp_path/'family'), family
    bank = Bank.of(flat.prior, 10)
    first, family = one(.1, .2, seed=0)
    first.fit(None, 2, log=str)
    for seed in range(8):
        again, other = one(.1, .2, seed=seed)
        if other.noise_std != family.noise_std: break
    assert other.noise_std != family.noise_std
    again.resume().fit(None, 3, log=str)
    assert again.step == 3
    with pytest.raises(ValueError, match='another operator'):
        one(.1, .3, seed=0)[0].resume().fit(None, 5, log=str)

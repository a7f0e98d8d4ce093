"Behaviours and the replay buffer: refusals, state, priorities against theory, rings, and no device of their own"
import copy, math
import pytest, torch
from torch.distributions import MultivariateNormal
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion, Drifted, Trajectories
from rtb_nb.explore import (Anneal, Backtrack, Buffer, ByRank, ByReward, FromPrior, LocalSearch, Mixture, Noised, OnPolicy, Replay, Uniform,
    mala, resimulate, shares)
from rtb_nb.guidance import MomentMatching
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.networks import NetDrift, VectorNet
from rtb_nb.operators import Matrix
from rtb_nb.schedule import Cosine
from rtb_nb.train import Trainer

Y = torch.tensor([[.9], [-.4]])
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])

def plane(steps=8):
    denoiser = GaussianDenoiser(torch.tensor([.3, -.2]), torch.tensor([[1., .8], [.8, 1.]])/4, Cosine(.5))
    return InverseProblem(Diffusion(denoiser, (2,), steps, last_noise=.05), Likelihood(Matrix(torch.tensor([[1., 0.]])), .1))

def guided(problem): return Drifted(problem.prior, [MomentMatching(problem.likelihood, .25)])
def drifted(): return guided(plane())
def room(capacity=8, shape=(2,), y_shape=(1,), **kw): return Buffer(capacity, shape, y_shape, **kw)

def everything(problem, posterior, device=None):
    "Every behaviour that has a state, and those that have none"
    buffer = room(32, measurements=3, priority=ByRank(), log_reward=problem.log_reward, device=device)
    ends = MultivariateNormal(problem.prior.denoiser.mean.float(), problem.prior.denoiser.cov.float() + .05**2*torch.eye(2, device=device))
    log_posterior = lambda x, y: ends.log_prob(x) + problem.log_reward(x, y)
    return Mixture(OnPolicy(posterior, 6, buffer, noise=Anneal(.5, 5)), FromPrior(posterior, 2), Replay(posterior, buffer, 2),
        Noised(posterior, lambda y: torch.cat([y, y], 1), 2, d=3), Backtrack(posterior, buffer.draw, 4, d=3, pairs=True),
        LocalSearch(posterior, buffer, 2, log_posterior, every=2, steps=10))

refusals = {
    'no paths': (lambda: OnPolicy(drifted(), 0), ValueError, 'at least one path of each measurement, got n = 0'),
    'negative noise': (lambda: OnPolicy(drifted(), 2, noise=-.1), ValueError, 'noise must be a finite number >= 0, got -0.1'),
    'anneal from below': (lambda: Anneal(-1., 10), ValueError, 'start must be a non-negative finite number, got -1'),
    'anneal over nothing': (lambda: Anneal(1., 0), ValueError, 'iterations must be positive, got 0'),
    'points for a function': (lambda: Noised(drifted(), torch.zeros(2, 2), 2), TypeError, 'a function y -> x0 or a Buffer, got Tensor'),
    'too deep': (lambda: Noised(drifted(), lambda y: y, 2, d=9), ValueError, 'cannot walk the last 9 steps of a path of 8'),
    'wrong guesses': (lambda: Noised(drifted(), lambda y: torch.zeros(4, 3), 2)(Y), ValueError, 'events of shape (2,), got (3,)'),
    'too few guesses': (lambda: Noised(drifted(), lambda y: torch.zeros(3, 2), 2)(Y), ValueError, 'each of the 3 paths'),
    'no turn': (lambda: Backtrack(drifted(), room(), 2, d=0), ValueError, 'at least one step again, got d = 0'),
    'odd pairs': (lambda: Backtrack(drifted(), room(), 3, d=2, pairs=True), ValueError, 'an even number of paths, got n = 3'),
    'no room': (lambda: room(0), ValueError, 'room for at least one point, got capacity 0'),
    'no measurement': (lambda: room(measurements=0), ValueError, 'room for at least one measurement, got 0'),
    'point shape': (lambda: room().add(torch.zeros(2, 3), Y), ValueError, 'holds points of shape (2,), got (3,)'),
    'measurement shape': (lambda: room().add(torch.zeros(2, 2), torch.zeros(2, 2)), ValueError, 'measurements of shape (1,), got (2,)'),
    'too many measurements': (lambda: room().add(torch.zeros(2, 2), Y), ValueError, 'pass measurements=2 or more'),
    'measurement not finite': (lambda: room().add(torch.zeros(2, 2), Y*math.nan), ValueError, '2 non-finite values'),
    'no reward': (lambda: room(priority=ByReward()).add(torch.zeros(1, 2), Y[:1]), ValueError, 'ByReward needs rewards: pass log_r'),
    'no weight': (lambda: filled(priority=lambda log_r: 0*log_r.exp()), ValueError, 'do not sum to a positive number'),
    'empty': (lambda: Replay(drifted(), room(), 2)(Y), ValueError, 'replay buffer is empty'),
    'unknown measurement': (lambda: filled().draw(Y[1:]), ValueError, 'holds no point of this measurement'),
    'b': (lambda: ByReward(b=0), ValueError, 'b must be a positive number, got 0'),
    'share': (lambda: ByReward(share=1.5), ValueError, 'share must lie in (0, 1], got 1.5'),
    'k': (lambda: ByRank(k=0), ValueError, 'k must be a positive number, got 0'),
    'empty mixture': (lambda: Mixture(), ValueError, 'a mixture needs at least one behaviour'),
    'negative share': (lambda: shares(8, 1., -.1), ValueError, 'non-negative numbers, not all zero; got (1.0, -0.1)'),
    'no shares': (lambda: shares(8, 0., 0.), ValueError, 'not all zero'),
    'nan share': (lambda: shares(8, math.nan, 1.), ValueError, 'not all zero'),
    'nothing to share': (lambda: shares(0, 1.), ValueError, 'at least one path to share out, got 0'),
    'mala steps': (lambda: mala(lambda x: -x.square().sum(1), torch.zeros(2, 2), steps=0), ValueError, 'steps must be positive, got 0'),
    'mala step size': (lambda: mala(lambda x: -x.square().sum(1), torch.zeros(2, 2), step_size=0), ValueError, 'step_size must be pos'),
    'mala total': (lambda: mala(lambda x: -x.square().sum(), torch.zeros(2, 2)), ValueError, 'one value a point, (2,), got ()'),
    'mala start': (lambda: mala(lambda x: x.log().sum(1), -torch.ones(3, 2)), ValueError, '3 chains start where log_prob is not finite'),
    'search never': (lambda: LocalSearch(drifted(), room(), 2, None, every=0), ValueError, 'every must be a positive number'),
    'search without reward': (lambda: LocalSearch(drifted(), room(priority=ByRank()), 2, None), ValueError, 'give the buffer a log_reward'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name):
    call, error, message = refusals[name]
    with pytest.raises(error) as caught: call()
    assert message in str(caught.value), str(caught.value)
    assert '\n' not in str(caught.value)

def filled(n=6, priority=Uniform(), capacity=None):
    "A buffer of the points 0 to n-1 with reward -point/2"
    buffer = room(capacity or n, (1,), priority=priority)
    points = torch.arange(n).float()
    buffer.add(points[:, None], Y[:1], -points/2)
    return buffer

theory = {
    'uniform': (Uniform(), lambda i: torch.ones_like(i)),
    'reward': (ByReward(b=.8), lambda i: (-.4*i).exp()),
    'a quarter by reward': (ByReward(b=2., share=.25), lambda i: .75/len(i) + .25*(-i).softmax(0)),
    'rank': (ByRank(k=.1), lambda i: 1/(.1*len(i) + i)),
    'a function': (lambda log_r: (log_r == -1.).double() + (log_r == 0.), lambda i: (i == 2).double() + (i == 0)),
}

@pytest.mark.parametrize('capacity', [6, 10])
@pytest.mark.parametrize('name', theory)
def test_draws_follow_their_priority(name, capacity):
    priority, weight = theory[name]
    torch.manual_seed(0)
    n, p = 20000, weight(torch.arange(6).double())
    drawn = filled(priority=priority, capacity=capacity).draw(Y[:1].expand(n, 1))[:, 0].long()
    p = p/p.sum()
    error = (torch.bincount(drawn, minlength=6)/n - p).abs()
    assert (error <= 4*(p*(1-p)/n).sqrt()).all(), error

def test_ties_share_a_rank():
    weights = ByRank(k=1.)(torch.tensor([[2., 1., 2., 0., -math.inf]]).double())
    torch.testing.assert_close(weights[0], torch.tensor([1/4, 1/6, 1/4, 1/7, 0.]).double())

def test_each_measurement_draws_its_own():
    buffer = room(50, measurements=2)
    y = Y[[0, 1, 1, 0, 1]].repeat(10, 1)
    buffer.add(torch.cat([y, torch.randn(50, 1)], 1), y)
    wanted = Y[torch.randint(2, (200,))]
    assert torch.equal(buffer.draw(wanted)[:, :1], wanted) and len(buffer) == 50
    assert len(buffer.draw(Y[:1].expand(2000, 1))[:, 1].unique()) == 20

def test_rings_overwrite_their_oldest():
    buffer = room(4, (1,), measurements=2)
    for i in range(0, 12, 3): buffer.add(torch.arange(i, i+3).float()[:, None], Y[:1])
    buffer.add(torch.arange(100, 107).float()[:, None], Y[1:])
    held = lambda y: buffer.draw(y.expand(400, 1)).unique().tolist()
    assert held(Y[:1]) == [8, 9, 10, 11] and held(Y[1:]) == [103, 104, 105, 106] and len(buffer) == 8
    buffer.add(torch.tensor([[12.], [math.inf], [13.]]), Y[:1])
    assert held(Y[:1]) == [10, 11, 12, 13]
    buffer.add(torch.tensor([[7.], [8.]]), torch.tensor([[5.], [.9]]))
    assert held(torch.tensor([[5.]])) == [7] and held(Y[:1]) == [8, 11, 12, 13]
    with pytest.raises(ValueError, match='no point of this measurement'): buffer.draw(Y)

def test_state_round_trip():
    problem = plane()
    torch.manual_seed(0)
    one = everything(problem, guided(problem))
    for _ in range(3): one(Y)
    other = everything(problem, guided(problem))
    state = {k: v.clone() for k, v in one.state_dict().items()}
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    other.load_state_dict(state)
    assert other.behaviours[0].noise() == one.behaviours[0].noise() == .5*(1 - 3/5)
    for _ in range(2):
        torch.manual_seed(1)
        a = one(Y)
        torch.manual_seed(1)
        b = other(Y)
        assert torch.equal(a.x, b.x) and torch.equal(a.x0_hat, b.x0_hat) and torch.equal(a.branch, b.branch)

def test_resumed_training_with_every_behaviour(tmp_path):
    def trainer(seed, **kw):
        torch.manual_seed(seed)
        problem = plane()
        posterior = Drifted(problem.prior, [NetDrift(VectorNet(4, 2, width=16))])
        return Trainer(problem, posterior, everything(problem, posterior), **kw)
    def stop(line): raise KeyboardInterrupt
    whole, path = trainer(0).fit(Y, 6, log=str), tmp_path/'run.safetensors'
    with pytest.raises(KeyboardInterrupt): trainer(0, path=path).fit(Y, 6, every=3, log=stop)
    resumed = trainer(7)
    resumed.load(path)
    resumed.fit(Y, 6, log=str)
    assert all(torch.equal(a, b) for a, b in zip(whole.posterior.drifts.parameters(), resumed.posterior.drifts.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(whole.behaviour.state_dict().values(), resumed.behaviour.state_dict().values()))

def test_guesses_come_with_the_paths_and_are_the_priors():
    problem = plane()
    tau = everything(problem, guided(problem))(Y)
    again = problem.prior.with_guesses(Trajectories(tau.x, tau.y))
    torch.testing.assert_close(tau.x0_hat, again.x0_hat, rtol=1e-5, atol=1e-5)
    assert len(tau) == 2*(6+2+2+2+4+2)

def test_pairs_share_their_beginning_to_the_bit():
    problem = plane()
    tau = Backtrack(guided(problem), lambda y: torch.cat([y, y], 1), 6, d=3, pairs=True)(Y)
    a, b = tau[0::2], tau[1::2]
    assert torch.equal(a.branch, torch.arange(6)) and torch.equal(a.branch, b.branch) and torch.equal(a.y, b.y)
    assert torch.equal(a.x[:6], b.x[:6]) and torch.equal(a.x0_hat[:6], b.x0_hat[:6]) and (a.x[6:] != b.x[6:]).all()
    both = Trajectories.cat([tau, Trajectories(tau.x, tau.y), tau])
    labels = both.branch.reshape(3, 12)
    assert (labels[1] == -1).all() and len(torch.cat([labels[0], labels[2]]).unique()) == 12
    assert torch.equal(both[12:].branch, both.branch[12:])

@pytest.mark.parametrize('d', [0, 3, 8])
def test_rewalked_paths_keep_their_beginning(d):
    problem = plane()
    tau = problem.prior.simulate(4, Y.repeat_interleave(2, 0))
    again = resimulate(guided(problem), tau, d)
    assert torch.equal(again.x[:9-d], tau.x[:9-d]) and (d == 0 or (again.x[9-d:] != tau.x[9-d:]).all()) and again.x.shape == tau.x.shape

def test_noise_none_and_zero_are_the_same_bits():
    paths = []
    for noise in (None, 0., Anneal(0., 3)):
        torch.manual_seed(0)
        paths.append(OnPolicy(drifted(), 3, noise=noise)(Y).x)
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])

def test_a_copied_behaviour_has_its_own_buffer():
    buffer = filled()
    copied = copy.deepcopy(Replay(Drifted(Diffusion(GaussianDenoiser(torch.zeros(1), torch.eye(1), Cosine()), (1,), 4), []), buffer, 2))
    buffer.add(torch.full((6, 1), 9.), Y[:1])
    assert (copied(Y[:1]).x0 < 9).all() and copied.x0.__self__ is copied.buffer

def test_shares_sum_up():
    assert shares(16, .6, .2, .2) == [10, 3, 3] and shares(7, 1, 1) in ([4, 3], [3, 4]) and shares(1, 0, 3) == [0, 1]
    for n in range(1, 60): assert sum(shares(n, .1, .7, .2)) == n

def test_mala_on_a_correlated_gaussian():
    torch.manual_seed(0)
    target = MultivariateNormal(torch.tensor([1., -2., 0.]), torch.tensor([[1., .8, 0.], [.8, 1., .3], [0., .3, .5]]))
    x, acceptance, size = mala(target.log_prob, torch.zeros(3000, 3), step_size=5.)
    white = torch.linalg.solve_triangular(target.scale_tril, (x - target.mean).T, upper=False)
    assert (white.mean(1).abs() < 4/3000**.5).all() and ((white.cov() - torch.eye(3)).abs() < 4*(2/3000)**.5).all()
    assert abs(acceptance.mean() - .574) < .05 and x.shape == (3000, 3) and size.shape == (3000,)

def test_mala_stays_where_the_density_ends():
    torch.manual_seed(0)
    x, *_ = mala(lambda x: torch.where(x > 0, x.clamp(min=1e-9).log() - x, -math.inf)[:, 0], torch.ones(2000, 1))
    assert (x > 0).all() and abs(x.mean() - 2) < 4*(2/2000)**.5

@pytest.mark.parametrize('device', DEVICES)
def test_every_tensor_follows_its_arguments(device):
    "With another default device, whatever is made without naming one would not mix with the arguments"
    with torch.device(device):
        problem = plane()
        posterior, y = guided(problem), Y.to(device)
        behaviour = everything(problem, posterior, device).to(device)
    with torch.device('meta'):
        for _ in range(2): tau = behaviour(y)
    assert tau.x.device.type == tau.branch.device.type == device and torch.isfinite(tau.x).all()

"Behaviours and the replay buffer: refusals, state, priorities against theory, rings, devices"
import copy, math
import numpy as np, pytest, torch
from torch.distributions import MultivariateNormal
from rtb_nb.beds import plane
from rtb_nb.behaviours import (Anneal, Backtrack, FromPrior, Mixture, Noised, OnPolicy,
                               _resimulate, shares)
from rtb_nb.diffusion import Trajectories
from rtb_nb.drifts import NetDrift
from rtb_nb.guidance import MomentMatching
from rtb_nb.likelihood import InverseProblem, Likelihood, Tilted
from rtb_nb.networks import VectorNet
from rtb_nb.operators import Matrix
from rtb_nb.replay import (Buffer, ByLikelihood, ByRank, LocalSearch, Replay, Uniform, mala,
                           off_policy)
from rtb_nb.train import Trainer

Y = torch.tensor([[.9], [-.4]])
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])

def guided(problem=None): return (problem or plane(8)).posterior([MomentMatching(.25)])
def twice(y): return torch.cat([y, y], 1)
def room(capacity=8, shape=(2,), y_shape=(1,), **kw):
    return Buffer(capacity, shape, y_shape, **kw)

def everything(problem, posterior, device=None):
    "Every behaviour that has a state, and those that have none"
    buffer = room(32, measurements=3, priority=ByRank(), log_likelihood=problem.log_likelihood,
                  device=device)
    prior = problem.prior.denoiser
    cov = prior.cov.float() + .05**2*torch.eye(2, device=device)
    ends = MultivariateNormal(prior.mean.float(), cov)
    def log_posterior(x, y): return ends.log_prob(x) + problem.log_likelihood(x, y)
    search = LocalSearch(posterior, buffer, 2, log_posterior, every=2, steps=10)
    return Mixture(OnPolicy(posterior, 6, buffer, noise=Anneal(.5, 5)), FromPrior(posterior, 2),
                   Replay(posterior, buffer, 2), Noised(posterior, twice, 2, d=3),
                   Backtrack(posterior, buffer.draw, 4, d=3, pairs=True), search)

def filled(n=6, priority=Uniform(), capacity=None):
    "A buffer of the points 0 to n-1 with log-likelihood -point/2"
    buffer = room(capacity or n, (1,), priority=priority)
    points = torch.arange(n).float()
    buffer.add(points[:, None], Y[:1], -points/2)
    return buffer

def add(x0=torch.zeros(2, 2), y=Y, log_r=None, **kw): return room(**kw).add(x0, y, log_r)
def walk(**kw): return mala(lambda x: -x.square().sum(1), torch.zeros(2, 2), **kw)
def search(**kw): return LocalSearch(guided(), room(), 2, None, **kw)
def uneven(): return Mixture(FromPrior(guided(), 2), FromPrior(guided(plane(5)), 2))
def longer(): return plane(8).prior.simulate(2)

refusals = { # ValueErrors
    'no paths': (lambda: OnPolicy(guided(), 0), 'n must be a positive whole number, got 0'),
    'half a path': (lambda: FromPrior(guided(), 2.5), 'whole number, got 2.5'),
    'negative noise': (lambda: OnPolicy(guided(), 2, noise=-.1), 'noise must be zero or a'),
    'noise in words': (lambda: OnPolicy(guided(), 2, noise='much'), "got 'much'"),
    'anneal from below': (lambda: Anneal(-1., 10), 'start must be zero or a positive'),
    'anneal over nothing': (lambda: Anneal(1., 0), 'iterations must be a positive whole'),
    'too deep': (lambda: Noised(guided(), twice, 2, d=9), 'd must be a whole number from 0'),
    'wrong guesses': (
        lambda: Noised(guided(), lambda y: torch.zeros(4, 3), 2)(Y),
        'events of shape (2,), got (3,)'),
    'too few guesses': (
        lambda: Noised(guided(), lambda y: torch.zeros(3, 2), 2)(Y), 'each of the 3 paths'),
    'no turn': (lambda: Backtrack(guided(), room(), 2, d=0), 'number from 1 to 8, got 0'),
    'odd pairs': (
        lambda: Backtrack(guided(), room(), 3, d=2, pairs=True),
        'an even number of paths, got n = 3'),
    'another chain': (
        lambda: _resimulate(guided(plane(5)), longer(), 2),
        'have 8 steps and the posterior has 5'),
    'chains mixed': (lambda: uneven()(Y), 'gave paths of [5, 8] steps'),
    'a row of y': (lambda: OnPolicy(guided(), 2)(Y[0]), 'y has shape (1,), expected (M, 1)'),
    'y too wide': (lambda: FromPrior(guided(), 2)(twice(Y)), 'expected (M, 1)'),
    'nan in y': (lambda: Noised(guided(), twice, 2)(Y*math.nan), '2 non-finite values'),
    'no room': (lambda: room(0), 'capacity must be a positive whole number, got 0'),
    'half a room': (lambda: room(1.5), 'got 1.5'),
    'no measurement': (lambda: room(measurements=0), 'measurements must be a positive'),
    'point shape': (lambda: add(torch.zeros(2, 3)), 'points of shape (2,), got (3,)'),
    'measurement shape': (lambda: add(y=torch.zeros(2, 2)), 'of shape (1,) each, got (2, 2)'),
    'measurement row': (lambda: filled().draw(Y[0]), 'of shape (1,) each, got (1,)'),
    'other count': (lambda: add(torch.zeros(3, 2)), '3 points need one measurement or as'),
    'too many measurements': (lambda: add(), 'pass measurements=2 or more'),
    'measurement not finite': (lambda: add(y=Y*math.nan), '2 non-finite values'),
    'no log r': (lambda: add(priority=ByLikelihood()), 'ByLikelihood needs log-likelihoods'),
    'log r of one': (lambda: add(y=Y[:1], log_r=torch.zeros(1)), 'log_r must be (2,), one per'),
    'no weight': (lambda: filled(priority=lambda log_r: 0*log_r.exp()), 'do not sum to a'),
    'empty': (lambda: Replay(guided(), room(), 2)(Y), 'replay buffer is empty'),
    'points of another prior': (
        lambda: Replay(guided(), room(shape=(3,)), 2),
        'points of shape (3,), the posterior makes (2,)'),
    'unknown measurement': (lambda: filled().draw(Y[1:]), 'no point of this measurement'),
    'b': (lambda: ByLikelihood(b=0), 'b must be a positive number, got 0'),
    'share': (lambda: ByLikelihood(share=1.5), 'share must lie in (0, 1], got 1.5'),
    'k': (lambda: ByRank(k=0), 'k must be a positive number, got 0'),
    'empty mixture': (lambda: Mixture(), 'a mixture needs at least one behaviour'),
    'negative share': (lambda: shares(8, 1., -.1), 'not all zero; got (1.0, -0.1)'),
    'no shares': (lambda: shares(8, 0., 0.), 'not all zero'),
    'nan share': (lambda: shares(8, math.nan, 1.), 'not all zero'),
    'nothing to share': (lambda: shares(0, 1.), 'n must be a positive whole number, got 0'),
    'mala steps': (lambda: walk(steps=0), 'steps must be a positive whole number, got 0'),
    'mala step size': (lambda: walk(step_size=0), 'step_size must be a positive number'),
    'mala nan': (lambda: walk(step_size=math.nan), 'step_size must be a positive number'),
    'mala target': (lambda: walk(target=1.), 'target must lie in (0, 1), got 1.0'),
    'mala total': (
        lambda: mala(lambda x: -x.square().sum(), torch.zeros(2, 2)),
        'one value per point, (2,), got ()'),
    'mala start': (
        lambda: mala(lambda x: x.log().sum(1), -torch.ones(3, 2)),
        '3 chains start where log_prob is not finite'),
    'search never': (lambda: search(every=0), 'every must be a positive whole number'),
    'search nothing': (lambda: search(points=0), 'points must be a positive whole number'),
    'search without log r': (
        lambda: LocalSearch(guided(), room(priority=ByRank()), 2, None),
        'give the buffer a log_likelihood'),
    'all on-policy': (lambda: off_policy(guided(), Y, 1), 'one path of either kind'),
    'share of all': (lambda: off_policy(guided(), Y, 16, share=1.), 'share must lie in (0, 1)'),
    'no samples': (lambda: off_policy(guided(), Y, 16, samples=0), 'samples must be a pos'),
    'off-policy row of y': (lambda: off_policy(guided(), Y[0], 16), 'expected (M, 1)'),
}
wrong_types = { # TypeErrors
    'points for a function': (
        lambda: Noised(guided(), torch.zeros(2, 2), 2),
        'a function y -> x0 or a Buffer, got Tensor'),
    'y in words': (lambda: OnPolicy(guided(), 2)('left'), 'list of real numbers'),
    'a function to replay': (lambda: Replay(guided(), twice, 2), 'use Noised for a function'),
    'function in a mixture': (lambda: Mixture(twice), 'made of behaviours, got function'),
}

@pytest.mark.parametrize('name', [*refusals, *wrong_types])
def test_refusals_are_one_clear_line(name):
    call, message = (refusals | wrong_types)[name]
    with pytest.raises(TypeError if name in wrong_types else ValueError) as caught: call()
    assert message in str(caught.value), str(caught.value)
    assert '\n' not in str(caught.value)

@pytest.mark.parametrize('same', [Y.double(), Y.numpy(), Y.double().numpy().astype('>f8'),
                                  Y.tolist(), Y.T.contiguous().T])
def test_measurements_are_taken_as_they_come(same):
    def paths(y):
        torch.manual_seed(0)
        problem = plane(8)
        return everything(problem, guided(problem))(y)
    a, b = paths(Y), paths(same)
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and b.y.dtype == torch.float32

def test_buffers_take_numbers_of_any_kind():
    buffer = room(4, measurements=2)
    buffer.add(np.arange(4.).reshape(2, 2), Y.double().numpy(), np.zeros(2))
    assert torch.equal(buffer.draw(Y.tolist()), torch.tensor([[0., 1.], [2., 3.]]))

def test_numbers_of_numpy_and_torch_are_numbers():
    three, half = np.int64(3), torch.tensor(.5)
    mixture = Mixture(OnPolicy(guided(), three, noise=np.float32(.5)),
                      Noised(guided(), twice, torch.tensor(4), d=three))
    assert len(mixture(Y)) == 14 and shares(np.int64(16), .5, .5) == [8, 8]
    assert Buffer(three, (2,), (1,), torch.tensor(2)).capacity == 3
    assert ByLikelihood(half, np.float64(.25)) and len(walk(steps=three, target=half)) == 3

theory = {
    'uniform': (Uniform(), lambda i: torch.ones_like(i)),
    'likelihood': (ByLikelihood(b=.8), lambda i: (-.4*i).exp()),
    'a quarter': (ByLikelihood(b=2., share=.25), lambda i: .75/len(i) + .25*(-i).softmax(0)),
    'rank': (ByRank(k=.1), lambda i: 1/(.1*len(i) + i)),
    'a function': (lambda log_r: (log_r == -1.).double() + (log_r == 0.),
                   lambda i: (i == 2).double() + (i == 0)),
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
    def points(*values): return torch.tensor(values).float()[:, None]
    def held(y): return buffer.draw(y.expand(400, 1)).unique().tolist()
    for i in range(0, 12, 3): buffer.add(points(i, i+1, i+2), Y[:1])
    buffer.add(points(*range(100, 107)), Y[1:])
    assert held(Y[:1]) == [8, 9, 10, 11] and held(Y[1:]) == [103, 104, 105, 106]
    assert len(buffer) == 8
    buffer.add(points(12, math.inf, 13), Y[:1])
    assert held(Y[:1]) == [10, 11, 12, 13]
    buffer.add(points(7, 8), points(5, .9))
    assert held(points(5)) == [7] and held(Y[:1]) == [8, 11, 12, 13]
    with pytest.raises(ValueError, match='no point of this measurement'): buffer.draw(Y)

def test_state_round_trip():
    problem = plane(8)
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
        assert torch.equal(a.x, b.x) and torch.equal(a.x0_hat, b.x0_hat)
        assert torch.equal(a.branch, b.branch)

def test_resumed_training_with_every_behaviour(tmp_path):
    def trainer(seed, **kw):
        torch.manual_seed(seed)
        problem = plane(8)
        posterior = problem.posterior([NetDrift(VectorNet(4, 2, width=16))])
        return Trainer(posterior, everything(problem, posterior), **kw)
    def stop(line): raise KeyboardInterrupt
    def same(a, b): return all(torch.equal(v, w) for v, w in zip(a, b))
    whole, path = trainer(0).fit(Y, 6, log=str), tmp_path/'run.safetensors'
    with pytest.raises(KeyboardInterrupt): trainer(0, path=path).fit(Y, 6, every=3, log=stop)
    resumed = trainer(7)
    resumed.load(path)
    resumed.fit(Y, 6, log=str)
    assert same(whole.posterior.drifts.parameters(), resumed.posterior.drifts.parameters())
    assert same(whole.behaviour.state_dict().values(), resumed.behaviour.state_dict().values())

def test_guesses_come_with_the_paths_and_are_the_priors():
    problem = plane(8)
    tau = everything(problem, guided(problem))(Y)
    again = problem.prior.with_guesses(Trajectories(tau.x, tau.y))
    torch.testing.assert_close(tau.x0_hat, again.x0_hat, rtol=1e-5, atol=1e-5)
    assert len(tau) == 2*(6+2+2+2+4+2) and tau.guessed_by is problem.prior

def test_pairs_share_their_beginning_to_the_bit():
    tau = Backtrack(guided(), twice, 6, d=3, pairs=True)(Y)
    a, b = tau[0::2], tau[1::2]
    assert torch.equal(a.branch, torch.arange(6)) and torch.equal(a.branch, b.branch)
    assert torch.equal(a.y, b.y) and (a.x[6:] != b.x[6:]).all()
    assert torch.equal(a.x[:6], b.x[:6]) and torch.equal(a.x0_hat[:6], b.x0_hat[:6])
    both = Trajectories.cat([tau, Trajectories(tau.x, tau.y), tau])
    labels = both.branch.reshape(3, 12)
    assert (labels[1] == -1).all() and len(torch.cat([labels[0], labels[2]]).unique()) == 12
    assert torch.equal(both[12:].branch, both.branch[12:])

@pytest.mark.parametrize('d', [0, 3, 8])
def test_rewalked_paths_keep_their_beginning(d):
    problem = plane(8)
    tau = guided(problem).simulate(Y.repeat_interleave(2, 0), 4)
    again = _resimulate(guided(problem), tau, d)
    assert torch.equal(again.x[:9-d], tau.x[:9-d]) and again.x.shape == tau.x.shape
    assert d == 0 or (again.x[9-d:] != tau.x[9-d:]).all()

def test_a_posterior_as_the_prior_gives_paths_of_its_own():
    "After a first measurement, behaviours draw from, and guess by, the posterior of it"
    torch.manual_seed(0)
    first = plane(20).posterior([MomentMatching(.25)]).given(Y[:1])
    other = Likelihood(Matrix(torch.tensor([[0., 1.]])), .1)
    posterior = InverseProblem(first, other).posterior([])
    buffer = room(500)
    parts = [OnPolicy(posterior, 500, buffer), FromPrior(posterior, 500),
             Replay(posterior, buffer, 500, d=3)]
    tau = Mixture(*parts)(Y[1:])
    assert tau.guessed_by is first and torch.isfinite(posterior.log_weight(tau)).all()
    for part in tau.x0.split(500): assert abs(part[:, 0].mean() - .87) < .1 # where Y[0] put it
    assert len(off_policy(posterior, Y[1:], 10, samples=64)(Y[1:])) == 10

def test_noise_none_and_zero_are_the_same_bits():
    paths = []
    for noise in (None, 0., Anneal(0., 3)):
        torch.manual_seed(0)
        paths.append(OnPolicy(guided(), 3, noise=noise)(Y).x)
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])

def test_a_copied_behaviour_has_its_own_buffer():
    buffer = room(6)
    buffer.add(torch.zeros(6, 2), Y[:1])
    copied = copy.deepcopy(Replay(guided(), buffer, 2))
    buffer.add(torch.full((6, 2), 9.), Y[:1])
    assert (copied(Y[:1]).x0 < 9).all() and copied.ends.__self__ is copied.buffer

def test_off_policy_serves_tilted_priors():
    problem = Tilted(plane(8).prior, lambda x0: -x0.square().sum(1))
    y = problem.no_measurement
    tau = off_policy(problem.posterior([]), y, 10, samples=64)(y)
    assert len(tau) == 10 and torch.isfinite(problem.posterior([]).log_weight(tau)).all()

def test_off_policy_replays_what_the_likelihood_likes():
    torch.manual_seed(0)
    problem = plane(8)
    replayed = off_policy(guided(problem), Y, 1000, share=.5)(Y)[1000:] # after those on-policy
    assert len(replayed) == 1000 and (replayed.x0[:, :1] - replayed.y).std() < .2

def test_shares_sum_up():
    assert shares(16, .6, .2, .2) == [10, 3, 3] and shares(7, 1, 1) in ([4, 3], [3, 4])
    assert shares(1, 0, 3) == [0, 1]
    for n in range(1, 60): assert sum(shares(n, .1, .7, .2)) == n

def test_mala_on_a_correlated_gaussian():
    torch.manual_seed(0)
    cov = torch.tensor([[1., .8, 0.], [.8, 1., .3], [0., .3, .5]])
    target = MultivariateNormal(torch.tensor([1., -2., 0.]), cov)
    x, acceptance, size = mala(target.log_prob, torch.zeros(3000, 3), step_size=5.)
    white = torch.linalg.solve_triangular(target.scale_tril, (x - target.mean).T, upper=False)
    assert (white.mean(1).abs() < 4/3000**.5).all()
    assert ((white.cov() - torch.eye(3)).abs() < 4*(2/3000)**.5).all()
    assert abs(acceptance.mean() - .574) < .05
    assert x.shape == (3000, 3) and size.shape == (3000,)

def test_mala_stays_where_the_density_ends():
    torch.manual_seed(0)
    def gamma(x): return torch.where(x > 0, x.clamp(min=1e-9).log() - x, -math.inf)[:, 0]
    x, *_ = mala(gamma, torch.ones(2000, 1))
    assert (x > 0).all() and abs(x.mean() - 2) < 4*(2/2000)**.5

@pytest.mark.parametrize('device', DEVICES)
def test_every_tensor_follows_its_arguments(device):
    "Under another default device, what is made without naming one would not mix with the rest"
    with torch.device(device):
        problem = plane(8)
        posterior, y = guided(problem), Y.to(device)
        behaviour = everything(problem, posterior, device).to(device)
    with torch.device('meta'):
        for _ in range(2): tau = behaviour(y)
    assert tau.x.device.type == tau.branch.device.type == device and torch.isfinite(tau.x).all()

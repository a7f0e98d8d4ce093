"The rule of exp_consistency: the exact posterior passes, one that is too narrow does not"
import pytest, torch
from fastcore.basics import AttrDict
from rtb_nb.beds import small_lens
from rtb_nb.exact import ExactChain
from test_parameters import cells

def source(c): return ''.join(c['source'])

def cell(text): return next(s for s in map(source, cells('exp_consistency')) if text in s)

class Exact:
    "Samples of a Gaussian prior's exact posterior, whose mean is affine in y, made narrower"
    def __init__(self, problem, zero, slopes, scale):
        self.problem, self.zero, self.slopes, self.scale = problem, zero, slopes, scale
    def draw(self, y, n):
        spread = self.scale*(self.zero.sample((n,)) - self.zero.mean)
        x = self.zero.mean + self.slopes@y.flatten().to(self.slopes) + spread
        x = x.reshape(n, *self.problem.prior.shape).to(y)
        log_r = self.problem.log_likelihood(x, y)
        return x, log_r, log_r
    def log_weight(self, tau): return torch.zeros(len(tau))

@pytest.fixture(scope='module')
def exact():
    "Problem, posterior of y = 0, and how its mean moves with each pixel of y"
    problem = small_lens(steps=20, size=8, noise_std=.05)
    def posterior(y): return ExactChain(problem, y.reshape(1, 1, 8, 8), keep=False).posterior()
    zero = posterior(torch.zeros(64))
    return problem, zero, torch.stack([posterior(y).mean - zero.mean for y in torch.eye(64)], 1)

@pytest.mark.parametrize('scale, rejected', [(1., False), (.9, True), (1.1, True)])
def test_exact_passes_and_a_tenth_is_seen(exact, scale, rejected):
    problem, *rest = exact
    torch.manual_seed(1)
    tau = problem.prior.simulate(200)
    names = dict(tau=tau, xs=tau.x0, ys=problem.likelihood(tau.x0).sample(), found={})
    exec(source(cells('exp_consistency')[0]), names)
    rows = {'row': lambda p, y: Exact(p, *rest, scale)}
    names |= dict(problem_of=lambda i: problem, rows=rows,
                  settings=AttrDict(draws=200, n_samples=9))
    exec(cell('def judge(row)'), names)
    metrics = names['judge']('row')
    exec(cell('def verdict(rec)'), names)
    verdict = names['verdict'](dict(params=dict(row='row'), metrics=metrics))
    assert (verdict[-1] != 'nothing') == rejected, verdict
    assert len(metrics['each']['chi2']) == 200

"A diffusion model trained on pairs, where the posterior is known; its training and its files"
import json
import pytest, torch
from torch import nn

from rtb_nb.beds import plane, scalar
from rtb_nb.denoise import GaussianDenoiser, VDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.networks import PatchTransformer, VectorNet
from rtb_nb.operators import Mask, Matrix
from rtb_nb.priors import load_prior, save_prior
from rtb_nb.samplers import chance, law
from rtb_nb.schedule import VE, Cosine, Tabulated, levels
from rtb_nb.supervised import *

def as_it_is(operator, y): return y
def undone(operator, y): return operator.pinv(y)
def silent(line): pass

class Known(nn.Module):
    "E[x0 given x_t] of a Gaussian posterior, in the place of a trained network"
    def __init__(self, mean, cov, schedule):
        super().__init__()
        self.guess, self.schedule = GaussianDenoiser(mean, cov, schedule), schedule
    def forward(self, x, seen, t): return self.guess(x, t)

def number(schedule=Cosine(.5)): # the posterior of y = 1 in `scalar`
    return Known(torch.tensor([16/17]), torch.tensor([[4/17]]), schedule)

ONE = torch.tensor([[1.]])

# ---- the denoiser

@pytest.mark.parametrize('schedule', [Cosine(.5), VE(.01, 20.)])
@pytest.mark.parametrize('variance', [.3, 4.])
def test_the_target_gives_back_the_image(schedule, variance):
    torch.manual_seed(0)
    denoiser = ConditionalDenoiser(VectorNet(5, 2), schedule, variance)
    x0, eps, t = torch.randn(20, 2), torch.randn(20, 2), torch.linspace(.05, 1, 20)
    a, s = (c[:, None] for c in schedule(t))
    denoiser.answer = lambda x, seen, t: denoiser.target(x0, eps, t)
    guess = denoiser(a*x0 + s*eps, torch.zeros(20, 3), t)
    assert torch.allclose(guess, x0, atol=1e-4)

def test_an_answer_of_nought_is_the_best_linear_guess_and_costs_one():
    torch.manual_seed(0)
    denoiser = ConditionalDenoiser(VectorNet(3, 2), Cosine(.5), 4.) # zero at the start
    field, x = GaussianDenoiser(torch.zeros(2), 4*torch.eye(2), Cosine(.5)), torch.randn(9, 2)
    t = torch.linspace(.1, 1, 9)
    assert torch.allclose(denoiser(x, torch.ones(9, 1), t), field(x, t), atol=1e-6)
    x0 = 2*torch.randn(100_000, 2)
    loss = supervised_loss(denoiser, x0, torch.zeros(len(x0), 1))
    assert loss.shape == (len(x0),) and loss.mean().item() == pytest.approx(1, abs=.01)

def test_precisions_and_times():
    torch.manual_seed(0)
    denoiser = moved(ConditionalDenoiser(VectorNet(3, 2), Cosine(.5)))
    x, seen = torch.randn(4, 2), torch.randn(4, 1)
    one = denoiser(x, seen, torch.tensor(.4))
    assert torch.equal(one, denoiser(x, seen, torch.full((4,), .4)))
    double = denoiser(x.double(), seen, torch.tensor(.4))
    assert double.dtype == torch.float64 and torch.allclose(double.float(), one, atol=1e-5)

def moved(denoiser):
    "Weights that are not where they started: the last layer is no longer zero"
    for p in denoiser.parameters(): p.data += .1*torch.randn_like(p)
    return denoiser

# ---- known answers

def test_ddim_on_the_exact_guess_draws_the_posterior():
    rows = [law(ddim, scalar(), ONE, 1, denoiser=number(), picture=as_it_is, steps=k)
            for k in (20, 100, 1000)]
    assert all(m == pytest.approx(16/17, abs=1e-4) for m, _ in rows)
    short = [1 - v/(4/17) for _, v in rows] # the discretisation, of first order
    assert short[0] > 3*short[1] > 9*short[2] > 0 and short[1] < .03 and short[2] < .005

def test_eta_one_is_ddpm():
    "Each step's law by hand: the bridge of DDPM between the guess and the noisier level"
    denoiser, K = number(), 30
    m, v = law(ddim, scalar(), ONE, K, denoiser=denoiser, picture=as_it_is, steps=K, eta=1.)
    t = levels(denoiser.schedule, K-1)[0]
    a, s = denoiser.schedule(t)
    gain = (lambda i: a[i]*(4/17)/(a[i]**2*(4/17) + s[i]**2))
    guess = (lambda i, x: 16/17 + gain(i)*(x - a[i]*16/17))
    mean, var = 0., s[0]**2
    for i in range(K-1):
        step = s[i]**2 - (a[i]/a[i+1]*s[i+1])**2 # variance that noising adds
        c1, c0 = a[i]/a[i+1]*s[i+1]**2/s[i]**2, a[i+1]*step/s[i]**2
        mean = c1*mean + c0*guess(i, mean)
        var = (c1 + c0*gain(i))**2*var + step*s[i+1]**2/s[i]**2
    assert m == pytest.approx(guess(K-1, mean).item(), abs=1e-5)
    assert v == pytest.approx((gain(K-1)**2*var).item(), rel=1e-4)

def trained(sign, picture=as_it_is, steps=700, **options):
    "On pairs of N(0, 4) and its measurement by `sign` with a noise of .5"
    torch.manual_seed(0)
    data, likelihood = 2*torch.randn(100_000, 1), Likelihood(Matrix([[sign]]), .5)
    net = VectorNet(2, 1, width=32, depth=0)
    options = dict(batch=256, lr=5e-3, decay=.98, every=350, log=silent) | options
    return train_supervised(ConditionalDenoiser(net, Cosine(.5), 4.), data[2000:], data[:2000],
        lambda n: likelihood, picture, steps=steps, **options)

@pytest.mark.parametrize('sign, picture, mean', [(1., as_it_is, 16/17), (-1., as_it_is, -16/17),
    (-1., undone, 16/17)], ids=['its operator', 'another', 'another, undone'])
def test_one_number(sign, picture, mean):
    "Asked about A = 1: what it was trained on decides, unless the picture carries the operator"
    denoiser, history = trained(sign, picture)
    assert history[-1][2] < .6 < held_out_supervised(denoiser, 2*torch.randn(500, 1),
        lambda n: Likelihood(Matrix([[sign]]), .5), picture, shift=1)
    torch.manual_seed(1)
    x = ddim(scalar(), ONE, 2000, denoiser, picture=picture, steps=200).x
    m, dm, v, dv = chance(x.double())
    assert abs(m - mean) < 3*dm and abs(v - 4/17) < 3*dv

def test_a_family_is_measured_afresh():
    "Two noise levels, of which the picture tells: each gets its own posterior"
    torch.manual_seed(0)
    data = 2*torch.randn(20000, 1)
    class Scaled(nn.Module):
        def __init__(self, scale): super().__init__(); self.scale = scale
        def forward(self, x): return self.scale*x
    def draw(n): return Likelihood(Scaled(torch.where(torch.rand(n, 1) < .5, .2, 2.)), .5)
    def both(operator, y): return torch.cat([y, operator.scale.expand(len(y), 1)], 1)
    denoiser = ConditionalDenoiser(VectorNet(3, 1, width=64), Cosine(.5), 4.)
    denoiser, _ = train_supervised(denoiser, data[2000:], data[:2000], draw, both, steps=800,
        batch=256, lr=3e-3, decay=.98, every=400, log=silent)
    for scale in (.2, 2.):
        likelihood = Likelihood(Scaled(torch.full((1, 1), scale)), .5)
        problem = InverseProblem(scalar().prior, likelihood)
        x = ddim(problem, ONE, 1500, denoiser, picture=both, steps=60).x
        var = 1/(1/4 + scale**2/.25)
        assert x.mean().item() == pytest.approx(var*scale/.25, abs=.2*var**.5)
        assert x.var().item() == pytest.approx(var, rel=.2)

def test_plane():
    torch.manual_seed(0)
    bed = plane(noise_std=.2)
    d, A = bed.prior.denoiser, bed.operator.matrix().double()
    data = torch.distributions.MultivariateNormal(d.mean, d.cov).sample((20000,)).float()
    net = ConditionalDenoiser(VectorNet(3, 2, width=32, depth=0), Cosine(.5), .4)
    denoiser, _ = train_supervised(net, data[1000:], data[:1000], lambda n: bed.likelihood,
        as_it_is, steps=800, batch=256, lr=5e-3, decay=.98, every=400, log=silent)
    y = torch.tensor([[.9]])
    cov = torch.linalg.inv(torch.linalg.inv(d.cov) + A.T @ A/.04)
    mean = cov @ (torch.linalg.solve(d.cov, d.mean) + A.T @ y[0].double()/.04)
    x = ddim(bed, y, 4000, denoiser, picture=as_it_is, steps=100, spacing=Cosine(.2)).x.double()
    z = torch.linalg.solve(torch.linalg.cholesky(cov), (x - mean).T).T
    assert z.mean(0).abs().max() < .1 and (z.T.cov() - torch.eye(2)).abs().max() < .12

# ---- sampling

def test_counts_and_never_calls_prior_or_likelihood():
    problem, denoiser = scalar(), number()
    def refuse(*_): raise AssertionError('called')
    problem.prior.denoiser.register_forward_pre_hook(refuse)
    problem.likelihood.register_forward_pre_hook(refuse)
    problem.operator.register_forward_pre_hook(refuse)
    found = ddim(problem, ONE, 7, denoiser, picture=as_it_is, steps=9)
    assert found.calls == 7*9 and found.gradients == 0 and found.x.shape == (7, 1)
    assert not found.x.requires_grad

@pytest.mark.parametrize('eta', [0., .7])
def test_same_seed_same_bits(eta):
    def draw(seed, **options):
        torch.manual_seed(seed)
        found = ddim(scalar(), ONE, 6, number(), picture=as_it_is, steps=12, eta=eta, **options)
        return found.x
    assert torch.equal(draw(0), draw(0, progress=True)) and not torch.equal(draw(0), draw(1))

@pytest.mark.parametrize('eta', [0., 1.])
def test_batch_independence(eta):
    torch.manual_seed(0)
    shape = 1, 8, 8
    field = GaussianDenoiser(torch.zeros(shape), torch.eye(64), Cosine(.5))
    problem = InverseProblem(Diffusion(field, shape), Likelihood(Mask(torch.eye(8)[None]), .1))
    net = PatchTransformer(8, 2, 1, width=16, depth=1)
    denoiser, y = moved(ConditionalDenoiser(net, Cosine(.5))), torch.randn(5, 8)
    z = torch.randn(10, 5, *shape)
    def draw(rows):
        k = iter(range(10))
        return ddim(problem, y[rows], len(y[rows]), denoiser, picture=undone, steps=6, eta=eta,
            noise=lambda x: z[next(k)][rows]).x
    whole = draw(slice(None))
    for i in range(5): assert torch.allclose(draw(slice(i, i+1)), whole[i:i+1], atol=1e-5)

# ---- training

def resumable(path, steps):
    torch.manual_seed(0)
    data, likelihood = torch.randn(64, 2), Likelihood(Matrix([[1., 0.]]), .5)
    denoiser = ConditionalDenoiser(VectorNet(3, 2, width=8), Cosine(.5))
    def draw(n): return Likelihood(likelihood.operator, .1 + torch.rand(()).item())
    return train_supervised(denoiser, data[8:], data[:8], draw, as_it_is, steps=steps, batch=8,
        every=2, path=path, log=silent)

def test_killed_and_resumed_to_the_bit(tmp_path):
    "The rate follows the number of steps, so the run is cut by its log, not by `steps`"
    whole, history = resumable(tmp_path/'whole.safetensors', 6)
    class Killed(Exception): pass
    def die(line):
        if line.startswith('step 6'): raise Killed
    path = tmp_path/'parts.safetensors'
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), 'silent', die)
        with pytest.raises(Killed): resumable(path, 6)
    again, history_too = resumable(path, 6)
    assert history_too == history and [h[0] for h in history] == [2, 4, 6]
    for p, q in zip(again.parameters(), whole.parameters()): assert torch.equal(p, q)

def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path/'a.safetensors'
    trained(1., steps=2, path=path)
    with pytest.raises(ValueError, match='another family'): trained(-1., steps=4, path=path)
    with pytest.raises(ValueError, match='another picture'):
        trained(1., undone, steps=4, path=path)
    with pytest.raises(ValueError, match='another settings'):
        trained(1., steps=4, path=path, batch=32)

def test_held_out_loss_leaves_the_callers_draws_alone():
    torch.manual_seed(0)
    denoiser = moved(ConditionalDenoiser(VectorNet(2, 1, width=8), Cosine(.5)))
    likelihood = Likelihood(Matrix([[1.]]), .5)
    x0, before = torch.randn(10, 1), torch.get_rng_state()
    found = [held_out_supervised(denoiser, x0, lambda n: likelihood, as_it_is)
             for _ in range(2)]
    assert found[0] == found[1] and torch.equal(torch.get_rng_state(), before)

# ---- files

NET = dict(name='VectorNet', in_dim=3, out_dim=2, width=8)

@pytest.mark.parametrize('schedule', [Cosine(.3), Tabulated(torch.linspace(.99, .01, 50))])
def test_round_trip(schedule, tmp_path):
    torch.manual_seed(0)
    denoiser = moved(ConditionalDenoiser(VectorNet(3, 2, width=8), schedule, .7))
    path = tmp_path/'a.supervised.safetensors'
    card = save_supervised(denoiser, path, NET, as_it_is, dict(data='none'))
    again = load_supervised(path, as_it_is)
    x, seen, t = torch.randn(4, 2), torch.randn(4, 1), torch.rand(4)
    assert torch.equal(again(x, seen, t), denoiser(x, seen, t)) and again.variance == .7
    assert again.card == card == json.loads(path.with_suffix('.json').read_text())
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match='another picture'): load_supervised(path, undone)
    with pytest.raises(ValueError, match='holds no prior'): load_prior(path)

def test_foreign_files_are_refused(tmp_path):
    torch.manual_seed(0)
    prior = tmp_path/'prior.safetensors'
    save_prior(VDenoiser(VectorNet(2, 2, width=8), Cosine(.3)), prior, (2,),
        dict(name='VectorNet', in_dim=2, out_dim=2, width=8), {}, torch.randn(50, 2))
    with pytest.raises(ValueError, match='no conditional denoiser'):
        load_supervised(prior, as_it_is)
    (tmp_path/'junk.safetensors').write_bytes(b'junk')
    with pytest.raises(ValueError, match='not a safetensors file'):
        load_supervised(tmp_path/'junk.safetensors', as_it_is)
    with pytest.raises(FileNotFoundError):
        load_supervised(tmp_path/'none.safetensors', as_it_is)

def test_what_a_file_cannot_hold(tmp_path):
    denoiser, path = ConditionalDenoiser(VectorNet(3, 2, width=8), Cosine(.3)), tmp_path/'a.pt'
    with pytest.raises(ValueError, match='must end in .supervised.safetensors'):
        save_supervised(denoiser, path, NET, as_it_is, {})
    path = tmp_path/'a.supervised.safetensors'
    with pytest.raises(ValueError, match='does not fit'):
        save_supervised(denoiser, path, NET | dict(width=16), as_it_is, {})
    with pytest.raises(ValueError, match='cannot hold the network Linear'):
        save_supervised(denoiser, path, dict(name='Linear'), as_it_is, {})
    next(denoiser.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match='non-finite'):
        save_supervised(denoiser, path, NET, as_it_is, {})
    assert not list(tmp_path.iterdir())

# ---- bad inputs

def test_bad_denoisers():
    with pytest.raises(ValueError, match='needs a schedule'):
        ConditionalDenoiser(VectorNet(2, 1), None)
    with pytest.raises(ValueError, match='variance must be a positive number'):
        ConditionalDenoiser(VectorNet(2, 1), Cosine(), 0.)
    denoiser, t = ConditionalDenoiser(VectorNet(3, 2), Cosine()), torch.tensor(.5)
    with pytest.raises(ValueError, match=r'must be \(4, channels\)'):
        denoiser(torch.randn(4, 2), torch.randn(1, 1), t)
    image = ConditionalDenoiser(PatchTransformer(8, 2), Cosine())
    with pytest.raises(ValueError, match=r'\(4, channels, 8, 8\).*got \(4, 64\)'):
        image(torch.randn(4, 1, 8, 8), torch.randn(4, 64), t)
    both = ConditionalDenoiser(VectorNet(3, 3), Cosine()) # it answers the picture, too
    with pytest.raises(ValueError, match=r'shaped like x, \(4, 2\), got shape \(4, 3\)'):
        both(torch.randn(4, 2), torch.randn(4, 1), t)

def test_bad_sampling():
    draw = lambda **change: ddim(**dict(problem=scalar(), y=ONE, n=2, denoiser=number(),
        picture=as_it_is, steps=4) | change)
    with pytest.raises(TypeError, match='shown the measurement.*GaussianDenoiser'):
        draw(denoiser=scalar().prior.denoiser)
    with pytest.raises(TypeError, match='picture must be a function'): draw(picture=ONE)
    with pytest.raises(ValueError, match='eta must lie in'): draw(eta=1.5)
    with pytest.raises(ValueError, match='steps must be .* at least 2'): draw(steps=1)
    with pytest.raises(ValueError, match='y has shape'): draw(y=torch.ones(1, 3))
    with pytest.raises(ValueError, match='a picture of the measurement'):
        draw(picture=lambda op, y: y[:1])
    with pytest.raises(ValueError, match='n must be'): draw(n=0)

def test_bad_training():
    x, likelihood = torch.randn(8, 1), Likelihood(Matrix([[1.]]), .5)
    def train(**change):
        return train_supervised(**dict(denoiser=ConditionalDenoiser(VectorNet(2, 1), Cosine()),
            data=x, held_out=x, draw=lambda n: likelihood, picture=as_it_is, steps=1, batch=2,
            log=silent) | change)
    with pytest.raises(TypeError, match='trains a ConditionalDenoiser'):
        train(denoiser=VDenoiser(VectorNet(2, 1), Cosine()))
    with pytest.raises(TypeError, match='draw must be a function'): train(draw=likelihood)
    with pytest.raises(TypeError, match='one fixed likelihood is lambda'):
        train(draw=lambda n: likelihood.operator)
    with pytest.raises(TypeError, match='picture must be a function'): train(picture=None)
    with pytest.raises(ValueError, match='picture of the measurement'):
        train(picture=lambda op, y: y[..., None])
    with pytest.raises(ValueError, match='non-finite'): train(data=x*torch.nan)
    with pytest.raises(FloatingPointError, match='lower lr'):
        train(picture=lambda op, y: y*torch.nan)

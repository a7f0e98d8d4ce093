"The error of a prior's guess per pixel: learned, against closed forms, in files"
import json

import pytest, torch

from project import LIB
from rtb_nb.denoise import GaussianDenoiser, MixtureDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.errors import (PixelError, error_loss, load_error, mean_error, noised_guesses,
    save_error, train_error)
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.operators import Matrix
from rtb_nb.priors import load_prior, shipped_priors
from rtb_nb.schedule import Cosine, VE

MEANS = torch.tensor([[-1., 0.], [1., .5]])

def plane(std=(.1, .3), schedule=None):
    denoiser = MixtureDenoiser(MEANS, torch.tensor(std), schedule=schedule or Cosine(.5))
    torch.manual_seed(0)
    points = denoiser.distribution().sample((4500,)).float()
    return Diffusion(denoiser.calibrate(points[4000:]), (2,)), points[:4000], points[4000:]

PRIOR, POINTS, HELD_OUT = plane()

def train(path=None, prior=PRIOR, **kw):
    "A training of seconds"
    kw = dict(steps=4, batch=8, every=2, log=str) | kw
    return train_error(prior, POINTS, HELD_OUT, path=path, **kw)

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def wobbly(prior, scale=.1):
    "An error with random weights"
    torch.manual_seed(1)
    error = PixelError(prior)
    for p in error.net.parameters(): p.data += scale*torch.randn_like(p)
    return error.requires_grad_(False)

# ---- what it is

@pytest.mark.parametrize('schedule', [Cosine(.5), VE(.01, 20.)], ids=['VP', 'VE'])
def test_mean_error_is_the_denoisers(schedule):
    gauss = GaussianDenoiser(torch.zeros(2), torch.diag(torch.tensor([1., .01])), schedule)
    mixture = plane(schedule=schedule)[0].denoiser
    t = torch.linspace(.01, .99, 50)
    for denoiser, close in ((mixture, 1e-5), (gauss, 2e-3)):
        torch.testing.assert_close(mean_error(denoiser).error(t), denoiser.error(t),
                                   rtol=close, atol=0.)

def test_untrained_is_the_mean_error_of_every_pixel():
    prior, t = load_prior('mnist-32'), torch.tensor([.1, .7])
    x = torch.randn(2, 1, 32, 32)
    wanted = prior.denoiser.error(t).reshape(2, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(PixelError(prior)(x, x, t), wanted)
    with pytest.raises(ValueError, match='vectors .* or images'):
        PixelError(Diffusion(GaussianDenoiser(torch.zeros(2, 2), torch.eye(4), Cosine()),
                             (2, 2)))

def test_each_sample_is_for_itself_at_its_own_time_and_in_double():
    prior = load_prior('galaxies-32')
    error, t = wobbly(prior), torch.tensor([.1, .4, .8])
    x, x0_hat = torch.randn(2, 3, 1, 32, 32)
    together = error(x, x0_hat, t)
    apart = torch.cat([error(x[i:i+1], x0_hat[i:i+1], t[i]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=0.)
    double = error(x.double(), x0_hat.double(), t.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), together, rtol=1e-4, atol=0.)
    assert not torch.allclose(together[0], together[0].mean().expand(1, 32, 32), rtol=.01)

def test_a_posterior_has_no_guess_to_err():
    problem = InverseProblem(PRIOR, Likelihood(Matrix([[1., 0.]]), .1))
    with pytest.raises(ValueError, match='the guess of a posterior has none'):
        PixelError(problem.posterior([]).given(torch.zeros(1, 1)))

def test_a_denoiser_that_does_not_know_its_error_has_none_per_pixel():
    bare = MixtureDenoiser(MEANS, torch.tensor([.1, .3]), schedule=Cosine(.5))
    with pytest.raises(ValueError, match='MixtureDenoiser does not know its error'):
        mean_error(bare)

# ---- training

def exact(x, t): # of PRIOR: each component's variance, and the spread of their guesses
    denoiser = PRIOR.denoiser
    a, s = (c.reshape(-1, 1, 1) for c in denoiser.schedule(t.double()))
    v, r = denoiser.stds[:, None]**2, x[:, None].double() - a*denoiser.means
    total = a**2*v + s**2
    w = (denoiser.log_weights - (r**2/total + total.log()).sum(-1)/2).softmax(-1)[..., None]
    guess = denoiser.means + a*v/total*r
    return (w*(v*s**2/total + guess**2)).sum(1) - ((w*guess).sum(1))**2

def test_it_learns_the_variance_of_a_mixture():
    error, history = train(steps=800, batch=256, every=400, lr=5e-3)
    torch.manual_seed(2)
    x0, x, x0_hat, t = noised_guesses(PRIOR.denoiser, HELD_OUT.repeat(4, 1))
    part = (t > .02) & (t < .95)
    off = lambda r2: (r2/exact(x, t))[part].log().abs().mean().item()
    mean = PRIOR.denoiser.error(t)[:, None].expand_as(x)
    assert off(error(x, x0_hat, t)) < .15 < .6 < off(mean)
    best = ((exact(x, t)/mean).log() + 1).mean()/2 # the loss of the exact variance
    found = error_loss(error, x0, x, x0_hat, t).mean()
    assert abs(found - best) < .05 and history[-1][2] < .5

def test_it_resumes_to_the_same_bits_and_knows_its_training(tmp_path):
    whole, history = train(tmp_path/'whole')
    train(tmp_path/'parts', steps=2)
    again, _ = train(tmp_path/'parts')
    said = []
    kept, same_history = train(tmp_path/'whole', log=said.append)
    assert same(whole, kept) and history == same_history and 'is finished' in said[0]
    # the learning rate follows the planned length, so the halves differ from the whole
    assert not same(again, whole)
    for part, change in dict(settings=dict(batch=9), prior=dict(prior=plane((.1, .4))[0]),
                             network=dict(net=dict(name='VectorNet', width=8))).items():
        with pytest.raises(ValueError, match=f'whole was trained with another {part}'):
            train(tmp_path/'whole', **change)

def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    whole, _ = train(tmp_path/'whole', steps=6)
    class Stop(Exception): pass
    def stop(line):
        if line.startswith('step 4'): raise Stop
    with pytest.raises(Stop): train(tmp_path/'a', steps=6, log=stop)
    again, _ = train(tmp_path/'a', steps=6)
    assert same(whole, again)

# ---- files

def test_file_gives_it_back_and_belongs_to_its_prior(tmp_path):
    error, path = wobbly(PRIOR), tmp_path/'plane.error.safetensors'
    card = save_error(error, path, dict(data='points'))
    assert json.loads(path.with_suffix('.json').read_text()) == card
    for name in (path, tmp_path/'plane.safetensors'): # its own path, or its prior's
        again = load_error(name, PRIOR)
        assert same(error, again) and again.card == card and card['data'] == 'points'
        assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match='trained with another prior'):
        load_error(path, plane((.1, .31))[0])
    with pytest.raises(ValueError, match=r'events of shape \(2,\)'):
        load_error(path, load_prior('mnist-32'))

def test_what_is_no_error_is_refused(tmp_path):
    with pytest.raises(ValueError, match='must end in .error.safetensors'):
        save_error(wobbly(PRIOR), tmp_path/'plane.safetensors')
    broken = wobbly(PRIOR)
    broken.net.last.weight[0] = torch.nan
    with pytest.raises(ValueError, match='non-finite'):
        save_error(broken, tmp_path/'a.error.safetensors')
    with pytest.raises(FileNotFoundError, match='no error per pixel of the prior'):
        load_error('nebulae', PRIOR)

SHIPPED = sorted(p.name.removesuffix('.error.safetensors')
                 for p in (LIB/'assets').glob('*.error.safetensors'))

def test_every_shipped_error_has_its_prior():
    assert {'mnist-32', 'galaxies-32', 'cifar10-32'} <= set(SHIPPED) <= set(shipped_priors())

@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_errors_are_calibrated_on_their_priors_own_images(name):
    prior = load_prior(name, steps=12)
    error = load_error(name, prior)
    torch.manual_seed(0)
    x0, x, x0_hat, t = noised_guesses(prior.denoiser, prior.sample(24))
    found, last = (x0-x0_hat).square(), prior.last_noise**2 # which is in the samples
    r2, mean = error(x, x0_hat, t) + last, error.mean.error(t).reshape(-1, 1, 1, 1) + last
    assert .5 < found.mean()/r2.mean() < 1.7
    score = lambda r2: (found/r2 + r2.log()).mean()/2
    assert score(r2) < score(mean) - .01 # nats per pixel, and there are a thousand pixels

def test_mixed_precision_is_the_same_prior_and_lists_hold_priors_alone():
    half = load_prior('mnist-32', dtype=torch.bfloat16)
    error = load_error('mnist-32', half)
    assert error.belongs == load_error('mnist-32', load_prior('mnist-32')).belongs
    assert 'mnist-32' in shipped_priors() and not any('.' in name for name in shipped_priors())

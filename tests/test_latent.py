"Autoencoders, their training and their files; mixtures that are fitted to codes"
import json, math
import pytest, torch
from torch.distributions import Normal, kl_divergence
from rtb_nb.checkpoints import shipped_file
from rtb_nb.denoise import MixtureDenoiser
from rtb_nb.latent import *
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.nonlinear import Compose
from rtb_nb.operators import Mask
from rtb_nb.priors import load_prior
from rtb_nb.schedule import Cosine

def silent(line): pass

def small(code=(16,), seed=0):
    torch.manual_seed(seed)
    return Autoencoder((1, 16, 16), code, width=8)

def bars(n):
    "Images of one bright column: all that there is to know is where"
    torch.manual_seed(1)
    at = torch.randint(16, (n,))
    return (2.*torch.nn.functional.one_hot(at, 16) - 1)[:, None, None].expand(-1, 1, 16, 16)

def trained(steps, path=None, **options):
    x = bars(240)
    return train_autoencoder(small((4,)), x[40:], x[:40], **dict(steps=steps, batch=16,
        every=5, path=path, log=silent) | options)

# ---- the networks

@pytest.mark.parametrize('code', [(16,), (4, 2, 2)])
def test_shapes_and_independence_of_the_batch(code):
    model, x = small(code), torch.randn(5, 1, 16, 16)
    mean, log_std = model.encode(x)
    assert mean.shape == log_std.shape == (5, *code) and model(x).shape == x.shape
    assert torch.allclose(model(x[2:3]), model(x)[2:3], atol=1e-5)
    assert torch.allclose(model.encode(x[:1])[1], log_std[:1], atol=1e-5)
    assert model.decode(mean.double()).dtype == torch.float64
    assert not any('BatchNorm' in type(m).__name__ for m in model.modules())

def test_a_decoder_is_an_operator():
    model = small().eval().requires_grad_(False)
    op = Compose(Mask(torch.eye(16)[None]), model.decoder)
    assert op.in_shape == (16,) and not hasattr(op, 'adjoint')
    with pytest.raises(ValueError, match='do not fit'):
        Compose(Mask(torch.eye(8)[None]), model.decoder)
    z = torch.randn(3, 16, requires_grad=True)
    op(z).sum().backward()
    assert z.grad.abs().sum() > 0

def test_the_loss_is_a_bound():
    "KL by torch's own formula, and a decoded image by hand"
    model, x, eps = small(), torch.rand(3, 1, 16, 16), torch.randn(3, 16)
    mean, log_std = model.encode(x)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0., 1.)).sum(1)
    image = model.decode(mean + log_std.exp()*eps)
    log_p = Normal(image, .3).log_prob(x).flatten(1).sum(1)
    constant = 256*math.log(2*math.pi*.3**2)/2
    assert torch.allclose(autoencoder_loss(model, x, .3, eps), kl - log_p - constant, rtol=1e-4)

@pytest.mark.parametrize('make, said', [
    (lambda: Autoencoder((1, 28, 28)), 'divisible by 8'), (lambda: Autoencoder((32, 32)), '32'),
    (lambda: Autoencoder(code=(4, 8, 8)), 'code must be'),
    (lambda: Autoencoder(code=0), 'code'),
    (lambda: Autoencoder(width=0), 'width'),
    (lambda: small().encode(torch.zeros(2, 1, 32, 32)), 'images of shape'),
    (lambda: small().decode(torch.zeros(2, 4)), 'takes codes'),
    (lambda: trained(5, lr=-1.), 'lr'), (lambda: trained(5, noise=0.), 'noise'),
    (lambda: trained(2.5), 'steps'), (lambda: trained(5, decay=1.), 'decay')])
def test_what_networks_and_training_refuse(make, said):
    with pytest.raises(ValueError, match=said): make()

def test_training_needs_an_autoencoder_and_sound_images():
    x = bars(20)
    with pytest.raises(TypeError, match='trains an Autoencoder'):
        train_autoencoder(torch.nn.Linear(2, 2), x, x)
    with pytest.raises(ValueError, match='non-finite'):
        train_autoencoder(small(), x*math.nan, x, steps=1)

# ---- training

def test_it_learns_and_a_seed_gives_the_same_bits():
    model, history = trained(60, decay=.9, every=20)
    again, _ = trained(60, decay=.9, every=20)
    assert history[-1][2] < .99*history[0][2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    other, _ = trained(60, decay=.9, every=20, seed=1)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))

def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    def kill(line):
        if line.startswith('step 10:'): raise KeyboardInterrupt
    path, whole = tmp_path/'run.safetensors', trained(20)
    with pytest.raises(KeyboardInterrupt): trained(20, path, log=kill)
    parts = trained(20, path)
    assert parts[1] == whole[1]
    for a, b in zip(parts[0].parameters(), whole[0].parameters()): assert torch.equal(a, b)
    with pytest.raises(ValueError, match='another settings'): trained(20, path, lr=1e-2)

# ---- its files

def test_round_trip(tmp_path):
    path, model = tmp_path/'a.autoencoder.safetensors', small((4, 2, 2))
    card = save_autoencoder(model, path, dict(data='none'))
    again, x = load_autoencoder(path), torch.randn(3, 1, 16, 16)
    assert again.card == card == json.loads(path.with_suffix('.json').read_text())
    assert torch.equal(again(x), model(x)) and not any(p.requires_grad for p in
                                                       again.parameters())
    with pytest.raises(ValueError, match='must end in'): save_autoencoder(model, 'a.st', {})

def test_files_of_another_kind(tmp_path):
    path = tmp_path/'a.mixture.safetensors'
    save_mixture(known(), path, {})
    with pytest.raises(ValueError, match='holds no autoencoder'): load_autoencoder(path)
    other = tmp_path/'a.autoencoder.safetensors'
    save_autoencoder(small(), other, {})
    with pytest.raises(ValueError, match='holds no mixture'): load_mixture(other)
    with pytest.raises(ValueError, match='unknown autoencoder'): load_autoencoder('mnist-17')

def test_what_is_shipped():
    model, prior = load_autoencoder('mnist-16'), load_mixture('mnist-16', steps=8)
    assert model.code == prior.shape == (16,) and model.card['held_out_loss'] < 560
    assert prior.shares.shape == (len(prior.denoiser.means), 10)
    problem = InverseProblem(prior, Likelihood(Compose(Mask(torch.ones(1, 32, 32)),
                                                       model.decoder), .5))
    torch.manual_seed(0)
    z, y = problem.simulate(2)
    assert y.shape == (2, 1, 32, 32) or y.shape == (2, 1024)
    assert problem.log_likelihood(z, y).isfinite().all()
    x = model.decode(z)
    again = model.encode(x)[0] # the encoder undoes the decoder, roughly
    assert (again - z).square().mean() < .5*z.square().mean()

# ---- the mixture

def known():
    mixture = MixtureDenoiser(torch.tensor([[-2., 0., 1.], [0., 1., 0.], [2., 0., -1.]]),
        torch.tensor([.3, .5, .2]), torch.tensor([.2, .5, .3]), Cosine(.5))
    torch.manual_seed(0)
    return mixture.calibrate(mixture.distribution().sample((500,)).float())

def test_draws_give_the_mixture_back():
    torch.manual_seed(0)
    q = known()
    z = q.distribution().sample((20000,))
    found, history = fit_mixture(z, 3, steps=60)
    order = found.means[:, 0].argsort()
    assert torch.allclose(found.means[order], q.means, atol=.04)
    assert torch.allclose(found.stds[order], q.stds, atol=.01)
    assert torch.allclose(found.log_weights[order].exp(), q.log_weights.exp(), atol=.015)
    assert len(history) == 61 and all(b >= a - 1e-12 for a, b in zip(history, history[1:]))
    best = q.distribution().log_prob(z).mean().item()
    assert best - 1e-3 < history[-1] < best + .005 # nine numbers and more fit the draws better
    mean = found.distribution().log_prob(z).mean().item()
    assert history[-1] == pytest.approx(mean, abs=1e-6)

def test_a_floor_that_binds_still_rises_and_a_seed_gives_the_same_bits():
    torch.manual_seed(0)
    z = known().distribution().sample((2000,))
    found, history = fit_mixture(z, 20, floor=.35)
    assert found.stds.min().item() == pytest.approx(.35)
    assert all(b >= a - 1e-12 for a, b in zip(history, history[1:]))
    again, _ = fit_mixture(z, 20, floor=.35)
    assert torch.equal(again.means, found.means)
    state = torch.get_rng_state()
    fit_mixture(z, 3, steps=2)
    assert torch.equal(torch.get_rng_state(), state)

def test_components_are_named():
    torch.manual_seed(0)
    q = known()
    z = q.distribution().sample((4000,))
    names = torch.cdist(z, q.means).argmin(1)
    shares = class_shares(q, z, names, 3)
    assert torch.allclose(shares.sum(1), torch.ones(3).double())
    assert shares.diagonal().min() > .9
    assert (classify(q, shares, z) == names).double().mean() > .97

@pytest.mark.parametrize('codes, options, said', [
    (torch.randn(9, 2, 2), {}, 'flatten'), ([1., 2.], {}, 'codes must be'),
    (torch.randint(9, (9, 2)), {}, 'floats'), (torch.full((9, 2), math.inf), {}, 'non-finite'),
    (torch.randn(3, 2), {}, '3 components'), (torch.ones(9, 2), {}, 'differ by less'),
    (torch.randn(9, 2), dict(components=0), 'components'),
    (torch.randn(9, 2), dict(steps=0), 'steps'), (torch.randn(9, 2), dict(floor=0), 'floor')])
def test_what_no_mixture_can_be_fitted_to(codes, options, said):
    with pytest.raises(ValueError, match=said):
        fit_mixture(codes, **dict(components=3) | options)

def test_the_file_gives_back_the_same_prior(tmp_path):
    path, q = tmp_path/'a.mixture.safetensors', known()
    shares = torch.eye(3)
    card = save_mixture(q, path, dict(data='none'), shares)
    prior = load_mixture(path, steps=10)
    t = torch.tensor([.1, .5])
    assert prior.card == card and torch.equal(prior.shares, shares)
    assert torch.equal(prior.denoiser.error(t), q.error(t))
    x = torch.randn(2, 3)
    assert torch.equal(prior.denoiser(x, t), q(x, t))

def test_the_shipped_space_of_galaxies():
    model = load_autoencoder('galaxies-4x4x4')
    assert model.code == (4, 4, 4) and model.shape == (1, 32, 32)
    file = shipped_file('galaxies-4x4x4', 'prior over codes', '.codes.safetensors')
    prior = load_prior(file, steps=20)
    torch.manual_seed(0)
    z = prior.sample(64)
    assert z.shape == (64, 4, 4, 4) and .8 < z.std() < 1.1 # the codes' own is 1.00
    x = model.decode(z)
    assert x.isfinite().all() and -1.1 < x.mean() < -.6 # galaxies are mostly sky
    assert (model(x) - x).square().mean() < .1*x.var() # an image is what its code says

"Files are read and written without a draw from torch's generator: the next sample is the same"
import warnings
from importlib.resources import files
import pytest, torch
from rtb_nb.checkpoints import load_tensors, without_draws
from rtb_nb.components import load_covariance
from rtb_nb.denoise import VDenoiser
from rtb_nb.errors import load_error
from rtb_nb.imaging import motion_kernel
from rtb_nb.latent import load_autoencoder, load_mixture
from rtb_nb.lavps import load_amortiser, save_amortiser
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.networks import VectorNet
from rtb_nb.nonlinear import NonlinearBlur
from rtb_nb.operators import Mask
from rtb_nb.per_sample import as_picture
from rtb_nb.priors import load_prior, save_prior
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import load_posterior, prior_of, save_posterior
from rtb_nb.supervised import load_supervised, save_supervised

def posterior_of(path):
    prior, name = prior_of(path), path.name
    if name.startswith('bent'): op = NonlinearBlur(motion_kernel(5), prior.shape)
    elif name.startswith('lensed'): op = Lens(prior.shape[-1], psf_std=.08)
    else: op = Mask(torch.ones(prior.shape))
    with warnings.catch_warnings(action='ignore'):
        return load_posterior(path, InverseProblem(prior, Likelihood(op, .05)))

def prior_beside(path): return load_prior(path.name.split('-')[0] + '-32')

READERS = {'': load_prior, 'codes': load_prior, 'covariance': load_covariance,
    'error': lambda path: load_error(path, prior_beside(path)),
    'autoencoder': load_autoencoder, 'mixture': load_mixture, 'posterior': posterior_of,
    'amortiser': lambda path: load_amortiser(path, prior_beside(path)),
    'supervised': lambda path: load_supervised(path, as_picture)}

def kind_of(path): return path.name.removesuffix('.safetensors').partition('.')[2]
SHIPPED = sorted((files('rtb_nb')/'assets').glob('*.safetensors'))
FIRST = {kind_of(path): path for path in reversed(SHIPPED)}

def draws_nothing(fn):
    before = torch.get_rng_state()
    found = fn()
    assert torch.equal(torch.get_rng_state(), before)
    return found

@pytest.mark.parametrize('path', FIRST.values(), ids=lambda path: path.name)
def test_reading_draws_nothing(path): draws_nothing(lambda: READERS[kind_of(path)](path))

def test_a_network_made_without_it_would(): # so the test above can fail
    with pytest.raises(AssertionError): draws_nothing(lambda: VectorNet(2, 2))
    draws_nothing(lambda: without_draws(VectorNet)(2, 2))

def test_an_error_puts_the_generator_back_too():
    def fails():
        torch.rand(3)
        raise ValueError('no')
    def asked():
        with pytest.raises(ValueError, match='^no$'): without_draws(fails)()
    draws_nothing(asked)

def own_prior(path):
    net = dict(name='VectorNet', in_dim=2, out_dim=2)
    denoiser, x = VDenoiser(VectorNet(2, 2), Cosine()), torch.randn(50, 2)
    return lambda: save_prior(denoiser, path, (2,), net, {}, x)

def kept(path, ending):
    "The card of what is shipped, and where to write it again"
    return load_tensors(FIRST[ending])[1], path/f'a.{ending}.safetensors'

def own_posterior(path):
    card, file = kept(path, 'posterior')
    posterior = posterior_of(FIRST['posterior'])
    return lambda: save_posterior(posterior, file, card['recipe'])

def own_amortiser(path):
    card, file = kept(path, 'amortiser')
    prior = prior_beside(FIRST['amortiser'])
    made = load_amortiser(FIRST['amortiser'], prior)
    return lambda: save_amortiser(made, file, prior, card['recipe'], {})

def own_supervised(path):
    card, file = kept(path, 'supervised')
    made = load_supervised(FIRST['supervised'], as_picture)
    return lambda: save_supervised(made, file, card['net'], as_picture, {})

WRITERS = dict(prior=lambda path: own_prior(path/'a.safetensors'), posterior=own_posterior,
    amortiser=own_amortiser, supervised=own_supervised)

@pytest.mark.parametrize('kind', WRITERS)
def test_writing_draws_nothing(kind, tmp_path):
    write = WRITERS[kind](tmp_path)
    draws_nothing(write)
    assert list(tmp_path.glob('*.safetensors'))

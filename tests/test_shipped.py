"A posterior written and read again is the same posterior"
import copy, json, warnings
import pytest, torch
from rtb_nb.amortise import Bank, Family, MaximumLikelihood
from rtb_nb.beds import small_lens
from rtb_nb.checkpoints import load_tensors, shipped_file
from rtb_nb.families import LensBank, LensFamily
from rtb_nb.guidance import MomentMatching
from rtb_nb.imaging import block_average, motion_kernel
from rtb_nb.lensing import Lens
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.nonlinear import NonlinearBlur
from rtb_nb.operators import Identity, Mask, Matrix
from rtb_nb.priors import load_prior
from rtb_nb.schedule import Cosine
from rtb_nb.shipped import *
from rtb_nb.train import image_drifts

recipe = dict(guide=dict(name='MomentMatching', variance=.1), width=16, depth=1)

@pytest.fixture(scope='module')
def problem(): return small_lens(steps=6)

@pytest.fixture
def posterior(problem):
    torch.manual_seed(0)
    drifts = family_drifts(problem, **recipe)
    for p in drifts[1].parameters(): p.data += .05*torch.randn_like(p)
    return problem.posterior(drifts)

def drawn(posterior, problem):
    torch.manual_seed(5)
    return posterior.sample(problem.likelihood(problem.prior.sample(1)).sample(), 3)

def test_round_trip(posterior, problem, tmp_path):
    path = tmp_path/'a.posterior.safetensors'
    card = save_posterior(posterior, path, recipe, dict(remarks='none'))
    again = load_posterior(path, problem)
    assert torch.equal(drawn(again, problem), drawn(posterior, problem))
    assert again.card == card == json.loads(path.with_suffix('.json').read_text())

def test_another_operator_is_taken_and_another_prior_refused(posterior, problem, tmp_path):
    path = tmp_path/'a.posterior.safetensors'
    save_posterior(posterior, path, recipe, dict(family=dict(size=16)))
    other = InverseProblem(problem.prior, Likelihood(Lens(16, einstein_radius=.7), .05))
    with pytest.warns(UserWarning, match='einstein_radius 0.7') as said:
        load_posterior(path, other)
    assert said[0].filename == __file__ # it points at who asked
    inside = InverseProblem(problem.prior, Likelihood(Lens(16), .05))
    assert drawn(load_posterior(path, inside), inside).isfinite().all()
    moved = copy.deepcopy(problem)
    moved.prior.denoiser.mean += .1
    with pytest.raises(ValueError, match='another prior'): load_posterior(path, moved)
    with pytest.raises(ValueError, match='another chain'): load_posterior(path, small_lens(7))

def test_operators_that_are_not_linear_have_a_recipe_too(tmp_path):
    prior = load_prior('mnist-32', steps=3)
    bent = InverseProblem(prior, Likelihood(NonlinearBlur(motion_kernel(5), prior.shape), .05))
    own = recipe | dict(guide=dict(name='PixelProximal', error='mnist-32', sweeps=3))
    path = tmp_path/'b.posterior.safetensors'
    posterior = bent.posterior(family_drifts(bent, **own))
    save_posterior(posterior, path, own, dict(remarks='none'))
    assert torch.equal(drawn(load_posterior(path, bent), bent), drawn(posterior, bent))
    with pytest.raises(ValueError, match='ScaledMatching, PixelMatching and PixelProximal'):
        family_drifts(bent, guide=dict(name='DPS'))

@pytest.mark.parametrize('name', shipped_posteriors())
def test_a_shipped_posterior_says_which_prior_it_goes_with(name):
    card = load_tensors(shipped_file(name, 'posterior', '.posterior.safetensors'))[1]
    prior, bent = load_prior(card['prior'], steps=3), 'PixelProximal' in str(card['recipe'])
    op = (NonlinearBlur(motion_kernel(5), prior.shape) if bent else Identity(prior.shape))
    like = Likelihood(op, .05)
    wrong = InverseProblem(prior, like)
    with pytest.raises(ValueError) as e: load_posterior(name, wrong)
    assert str(e.value).endswith(f'another chain: it goes with prior_of({name!r})')
    right = InverseProblem(prior_of(name), like)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # that the identity is no lens
        posterior = load_posterior(name, right)
    assert drawn(posterior, right).isfinite().all()

def test_a_posterior_of_bent_blurs_is_none_of_linear_operators():
    prior = load_prior('mnist-32', steps=20, spacing=Cosine(.2))
    problem = InverseProblem(prior, Likelihood(Identity(prior.shape), .05))
    with pytest.raises(ValueError, match='is Identity of the kind'):
        load_posterior('bent-mnist-32', problem)

def test_family_is_trained_and_kept(problem, tmp_path):
    torch.manual_seed(1)
    family = InverseProblem(problem.prior, Family(LensBank(LensFamily(16), 2)))
    q = family.posterior(family_drifts(family, **recipe))
    trainer = MaximumLikelihood(q, Bank.of(problem.prior, 8), pairs=8)
    trainer.fit(None, 3, log=lambda line: None)
    path = tmp_path/'b.posterior.safetensors'
    save_posterior(trainer.averaged, path, recipe, {})
    assert torch.equal(drawn(load_posterior(path, problem), problem),
                       drawn(problem.posterior(list(trainer.averaged.drifts)), problem))

@pytest.mark.parametrize('op', [Mask(torch.rand(1, 8, 8) < .5), block_average((1, 8, 8), 2),
    Matrix(torch.randn(5, 64), (1, 8, 8)), Lens(8)], ids=lambda op: type(op).__name__)
def test_column_power(op):
    x = torch.zeros(1, *op.in_shape, dtype=torch.float64)
    A = op.matrix()
    assert torch.allclose(op.column_power(x).flatten(), (A.T @ A).diagonal(), atol=1e-10)
    assert op.column_power(x) is op.column_power(x)

def test_bad_inputs(posterior, problem, tmp_path):
    save = lambda name, **change: save_posterior(posterior, tmp_path/name, recipe | change, {})
    with pytest.raises(ValueError, match='must end in .posterior.safetensors'): save('a.pt')
    with pytest.raises(ValueError, match='does not fit'):
        save('a.posterior.safetensors', width=32)
    with pytest.raises(ValueError, match="got 'CLA'"):
        save('a.posterior.safetensors', guide=dict(name='CLA'))
    broken = copy.deepcopy(posterior)
    next(broken.drifts[1].parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match='non-finite'):
        save_posterior(broken, tmp_path/'a.posterior.safetensors', recipe, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match='there is no posterior file'):
        load_posterior(tmp_path/'none.posterior.safetensors', problem)
    with pytest.raises(ValueError, match="unknown posterior 'rings'"):
        load_posterior('rings', problem)

def own_drifts(problem, *, width=16, guide=None):
    return image_drifts(problem, guide or MomentMatching(.1), width=width, depth=1)

def test_drifts_of_ones_own_need_no_recipe(problem, tmp_path):
    torch.manual_seed(2)
    q, path = problem.posterior(own_drifts(problem)), tmp_path/'c.posterior.safetensors'
    for p in q.drifts.parameters(): p.data += .05*torch.randn_like(p)
    card = save_posterior(q, path)
    assert card == dict(drifts=list(map(repr, q.drifts)))
    again = load_posterior(path, problem, own_drifts(problem))
    assert torch.equal(drawn(again, problem), drawn(q, problem)) and again.card == card
    taken = own_drifts(problem)
    assert load_posterior(path, problem, taken).drifts[1] is taken[1]

@pytest.mark.parametrize('drifts, says', [
    (None, r'make them again, as before training, and give drifts=\[Gate\(MomentMatching'),
    (dict(guide=MomentMatching(.2)), 'variance=0.2.*'),
    (dict(width=8), 'and was given')])
def test_drifts_of_ones_own_are_those_of_the_file(problem, tmp_path, drifts, says):
    path = tmp_path/'c.posterior.safetensors'
    save_posterior(problem.posterior(own_drifts(problem)), path)
    with pytest.raises(ValueError, match=says):
        load_posterior(path, problem, drifts and own_drifts(problem, **drifts))

def test_one_drift_is_no_list_of_drifts(problem, tmp_path):
    path = tmp_path/'c.posterior.safetensors'
    save_posterior(problem.posterior([MomentMatching()]), path)
    assert not list(load_posterior(path, problem, [MomentMatching()]).parameters())
    with pytest.raises(TypeError, match='drifts are a list of drifts'):
        load_posterior(path, problem, MomentMatching())

def test_a_recipe_makes_its_drifts_itself(posterior, problem, tmp_path):
    path = tmp_path/'a.posterior.safetensors'
    save_posterior(posterior, path, recipe)
    with pytest.raises(ValueError, match='leave `drifts` out'):
        load_posterior(path, problem, own_drifts(problem))

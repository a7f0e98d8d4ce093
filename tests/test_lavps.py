"Amortised inner fits: bits, files, what is refused, and independence of the batch"
import math
import pytest, torch
from options import linear_problem, small_prior
from rtb_nb.checkpoints import load_tensors, shipped_file
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.imaging import block_average
from rtb_nb.inner import adam_fit, just_below, mgdm, zero_shot
from rtb_nb.lavps import (Amortiser, amortised, amortised_loss, draw_inner, gain,
                          image_amortiser, lavps, load_amortiser, narrowing_rate,
                          random_levels, save_amortiser, shipped_amortisers, train_amortiser)
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.networks import VectorNet
from rtb_nb.per_sample import Blurs, random_boxes, random_kernels
from rtb_nb.priors import load_prior
from rtb_nb.samplers import CLEAN, bridge, levels_at
from rtb_nb.schedule import Cosine

SMALL = dict(width=16, depth=1, patch=2)

def blurred_prior(n=4):
    "Smooth images of n x n pixels"
    at = torch.arange(n*n)
    row, col = at//n, at % n
    far = (row[:, None] - row).abs() + (col[:, None] - col).abs()
    cov = .5*torch.exp(-far/2.)
    return Diffusion(GaussianDenoiser(torch.zeros(1, n, n), cov, Cosine(.5)), (1, n, n), 12)

def family(n): return Likelihood(random_boxes(n, (1, 4, 4)), .1)

def images(n=40, seed=3):
    torch.manual_seed(seed)
    return blurred_prior().sample(n)

def stirred(net):
    "An amortiser whose last layer is not zero"
    torch.manual_seed(7)
    with torch.no_grad():
        for p in net.parameters(): p.add_(.05*torch.randn_like(p))
    return net

def trained(path=None, steps=6, **options):
    x = images()
    torch.manual_seed(0)
    net = image_amortiser(blurred_prior(), **SMALL)
    return train_amortiser(net, blurred_prior(), x[:30], x[30:], family, steps=steps, batch=4,
                           every=3, path=path, log=str, **options)

# ---- the inner problem

def test_the_prior_of_a_fit_is_the_bridge():
    prior = blurred_prior()
    t, tau = levels_at(prior, [.6, .5])
    inner = draw_inner(prior, family(3), images(3), (t, tau))
    up, clean, std = bridge(t, tau, CLEAN)
    torch.testing.assert_close(inner.mean, up*inner.x + clean*inner.x0)
    m, log_s = zero_shot(inner)
    assert torch.equal(m, inner.mean) and log_s.unique().item() == pytest.approx(math.log(std))

def test_the_loss_is_a_bound_on_the_evidence_of_the_inner_problem():
    "With the zero-shot Gaussian it is minus E log r, up to the Gaussian's own entropy"
    prior, x = blurred_prior(), images(2)
    inner = draw_inner(prior, family(2), x, levels_at(prior, [.6, .5]))
    z = torch.randn_like(x)
    m, log_s = zero_shot(inner)
    log_r = inner.problem.likelihood.log_prob(inner.D(m + inner.std*z, inner.tau), inner.y)
    kept = z.square().flatten(1).sum(1)/2 - log_s.flatten(1).sum(1)
    torch.testing.assert_close(inner.loss(m, log_s, z), kept - log_r)

def test_no_step_is_the_start_itself():
    prior = blurred_prior()
    inner = draw_inner(prior, family(2), images(2), levels_at(prior, [.6, .5]))
    assert all(torch.equal(a, b) for a, b in zip(adam_fit(0)(inner), zero_shot(inner)))

def test_an_untrained_amortiser_is_zero_shot():
    prior = blurred_prior()
    inner = draw_inner(prior, family(2), images(2), levels_at(prior, [.6, .5]))
    for views in (('picture',), ('residual',), ('picture', 'residual'), ()):
        m, log_s = image_amortiser(prior, views, **SMALL)(inner)
        assert torch.equal(m, inner.mean) and (log_s == math.log(inner.std)).all()
        assert gain(image_amortiser(prior, views, **SMALL), inner).abs().max() < 1e-4

def test_the_correction_is_the_least_change_that_fits():
    "For a hole it is the residual; over tiles each pixel takes what its average lacks"
    prior, x = blurred_prior(), images(2)
    names = 'residual', 'correction'
    views = dict(zip(names, image_amortiser(prior, names, **SMALL).features))
    pair = levels_at(prior, [.6, .5])
    hole = draw_inner(prior, family(2), x, pair)
    assert torch.allclose(views['correction'](hole), views['residual'](hole), atol=1e-5)
    tiles = draw_inner(prior, Likelihood(block_average((1, 4, 4), 2), .1), x, pair)
    move, op = views['correction'](tiles), tiles.problem.operator
    assert torch.allclose(op(tiles.x0 + move), tiles.y, atol=1e-5)
    lacking = (tiles.y - op(tiles.x0)).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(move, lacking, atol=1e-5)
    assert torch.allclose(4*views['residual'](tiles), move, atol=1e-5)
    assert image_amortiser(prior, ('picture', 'correction'), **SMALL)(tiles)[0].shape == x.shape

def test_best_of_keeps_for_each_sample_the_better():
    prior, x = blurred_prior(), images(6)
    inner = draw_inner(prior, family(6), x, levels_at(prior, [.6, .5]))
    bad = torch.tensor([1., 0, 1, 0, 0, 1])[:, None, None, None]
    good = adam_fit(60, .03)(inner)
    def net(inner): return good[0] + 9*bad, good[1]
    with torch.no_grad(): m, log_s = amortised(net, window=1e9)(inner)
    kept = (m == inner.mean).flatten(1).all(1)
    assert kept[bad.flatten() == 1].all() and (~kept)[bad.flatten() == 0].float().mean() > .6

def test_outside_the_window_the_network_is_not_asked():
    def never(inner): raise AssertionError('asked')
    problem = InverseProblem(blurred_prior(), Likelihood(random_boxes(1, (1, 4, 4)), .1))
    y = problem.simulate(1)[1]
    assert lavps(problem, y, 2, never, window=1e-3, outside=1, steps=4).x.isfinite().all()
    with pytest.raises(AssertionError, match='asked'):
        lavps(problem, y, 2, never, window=5., outside=1, steps=4)

def test_without_a_window_it_is_mgdm():
    problem = linear_problem()
    y = torch.tensor([[.9, .2, .3]])
    torch.manual_seed(0)
    a = mgdm(problem, y, 3, fit=adam_fit(2, narrowing_rate), middle=just_below, down=1, steps=5)
    torch.manual_seed(0)
    b = lavps(problem, y, 3, zero_shot, window=0., outside=2, steps=5)
    assert torch.equal(a.x, b.x) and (a.calls, a.gradients) == (b.calls, b.gradients)

# ---- training

def test_same_seed_same_bits():
    (a, ha), (b, hb) = trained(), trained()
    assert ha == hb and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def test_killed_and_resumed_has_the_same_bits(tmp_path):
    whole, history = trained()
    trained(tmp_path/'run.safetensors', steps=6)
    (tmp_path/'run.safetensors').unlink()
    class Killed(Exception): pass
    def kill(line):
        if 'step 6' in line: raise Killed
    x = images()
    torch.manual_seed(0)
    net = image_amortiser(blurred_prior(), **SMALL)
    with pytest.raises(Killed):
        train_amortiser(net, blurred_prior(), x[:30], x[30:], family, steps=6, batch=4, every=3,
                        path=tmp_path/'run.safetensors', log=kill)
    again, resumed = trained(tmp_path/'run.safetensors')
    assert resumed == history
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))

def test_another_run_is_refused(tmp_path):
    trained(tmp_path/'run.safetensors')
    with pytest.raises(ValueError, match='settings'):
        trained(tmp_path/'run.safetensors', lr=2e-3)

def test_training_gains():
    "Held-out gain per pixel, larger after training than the first report, and above zero"
    _, history = trained(steps=90, lr=3e-3)
    assert history[-1][2] < min(0, history[0][2])

def test_mirrored_draws_leave_no_chance_in_the_gradient_of_a_linear_mean():
    torch.manual_seed(0)
    prior = blurred_prior()
    inner = draw_inner(prior, family(2), images(2), levels_at(prior, [.6, .5]))
    net = image_amortiser(prior, **SMALL)
    def slope(mirrored):
        loss = amortised_loss(net, inner, mirrored).mean()
        return torch.autograd.grad(loss, net.net.head[-1].bias)[0][0] # of the mean
    many = torch.stack([slope(True) for _ in range(4)])
    assert many.std() < 1e-4*many.abs().mean() < .1*torch.stack(
        [slope(False) for _ in range(4)]).std()

# ---- sampling

def test_a_sample_does_not_depend_on_its_batch():
    prior, x = blurred_prior(), images(4)
    net = stirred(image_amortiser(prior, **SMALL))
    torch.manual_seed(5)
    op = random_boxes(4, (1, 4, 4))
    y = Likelihood(op, .1)(x).sample()
    draws = [torch.randn(4, 1, 4, 4) for _ in range(400)]
    def walk(index):
        left = iter(draws)
        problem = InverseProblem(prior, Likelihood(op[index], .1))
        return lavps(problem, y[index], len(index), net, window=3., inside=1, steps=6,
                     noise=lambda v: next(left)[index] if v.ndim else next(left)[0, 0, 0, 0]).x
    together = walk([0, 1, 2, 3])
    for i in range(4):
        torch.testing.assert_close(walk([i])[0], together[i], rtol=1e-5, atol=1e-5)

def test_same_seed_same_samples_and_a_full_bill():
    prior = blurred_prior()
    problem = InverseProblem(prior, Likelihood(random_boxes(1, (1, 4, 4)), .1))
    y, net = problem.simulate(1)[1], stirred(image_amortiser(prior, **SMALL))
    def walk():
        torch.manual_seed(1)
        return lavps(problem, y, 3, net, window=1e9, inside=0, steps=6, best=False)
    a, b = walk(), walk()
    assert torch.equal(a.x, b.x)
    assert a.amortised == 3*4 and a.gradients == 0 and a.calls == 3*(1 + 4)
    assert a.units(.5) == 5 + .5*4

# ---- files

def test_a_file_gives_back_the_same_fit(tmp_path):
    prior = blurred_prior()
    net = stirred(image_amortiser(prior, **SMALL))
    save_amortiser(net, tmp_path/'a.amortiser.safetensors', prior, SMALL, dict(task='boxes'))
    again = load_amortiser(tmp_path/'a.amortiser.safetensors', prior)
    inner = draw_inner(prior, family(2), images(2), levels_at(prior, [.6, .5]))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net(inner), again(inner)))
    assert again.card['task'] == 'boxes'

def test_another_prior_is_refused(tmp_path):
    prior = blurred_prior()
    save_amortiser(image_amortiser(prior, **SMALL), tmp_path/'a.amortiser.safetensors', prior,
                   SMALL, {})
    with pytest.raises(ValueError, match='prior'):
        load_amortiser(tmp_path/'a.amortiser.safetensors', small_prior())

@pytest.mark.parametrize('name', shipped_amortisers())
def test_what_is_shipped_gains_on_images_it_was_not_trained_on(name):
    card = load_tensors(shipped_file(name, 'amortiser', '.amortiser.safetensors'))[1]
    prior = load_prior(card['prior'])
    net = load_amortiser(name, prior)
    assert sum(p.numel() for p in net.parameters()) < 1.5e6
    torch.manual_seed(0)
    x, blurred = prior.sample(4), card['task'] == 'blur'
    if card['task'] not in ('box', 'blur'): return
    operator = Blurs(random_kernels(4, 9, .9), prior.shape) if blurred else (
        random_boxes(4, prior.shape))
    inner = draw_inner(prior, Likelihood(operator, .05), x, levels_at(prior, [.6, .5]))
    assert (gain(net, inner)/x[0].numel() > .1).all()

# ---- what is refused

def inner_of(): return draw_inner(blurred_prior(), family(2), images(2),
                                  levels_at(blurred_prior(), [.6, .5]))
def train_with(**options):
    x = images()
    return train_amortiser(image_amortiser(blurred_prior(), **SMALL), blurred_prior(),
                           options.pop('data', x[:30]), options.pop('held_out', x[30:]), family,
                           **dict(steps=1, batch=2, log=str) | options)
def walk(**options):
    problem = InverseProblem(blurred_prior(), Likelihood(random_boxes(1, (1, 4, 4)), .1))
    return lavps(problem, problem.simulate(1)[1], 2, zero_shot, **options)

refused = {
    'window': (lambda: amortised(zero_shot, -1.), ValueError, 'window'),
    'window text': (lambda: amortised(zero_shot, 'late'), ValueError, "'late'"),
    'inside': (lambda: walk(inside=-1), ValueError, 'got -1'),
    'outside': (lambda: walk(outside=2.5), ValueError, '2.5'),
    'levels': (lambda: walk(steps=2), ValueError, 'got 2'),
    'option': (lambda: walk(colour=2), TypeError, 'colour'),
    'feature': (lambda: Amortiser(VectorNet(3, 2), 'residual'), TypeError, "'residual'"),
    'views': (lambda: image_amortiser(blurred_prior(), ('slope',)), ValueError, "'slope'"),
    'vectors': (lambda: image_amortiser(Diffusion(GaussianDenoiser(torch.zeros(3), torch.eye(3),
        Cosine(.5)), (3,), 12)), ValueError, 'VectorNet'),
    'draws': (lambda: gain(zero_shot, inner_of(), 0), ValueError, 'got 0'),
    'steps': (lambda: train_with(steps=0), ValueError, 'got 0'),
    'batch': (lambda: train_with(batch=-2), ValueError, 'got -2'),
    'rate': (lambda: train_with(lr=0.), ValueError, 'got 0'),
    'decay': (lambda: train_with(decay=1.), ValueError, 'got 1.0'),
    'no images': (lambda: train_with(data=images()[:0]), ValueError, 'got 0'),
    'nan images': (lambda: train_with(data=images()*math.nan), ValueError, 'non-finite'),
    'sampler steps': (lambda: random_levels(blurred_prior(), steps=(0, 9)), ValueError,
                      'got 0'),
    'name': (lambda: save_amortiser(image_amortiser(blurred_prior(), **SMALL), 'a.pt',
        blurred_prior(), SMALL, {}), ValueError, 'a.pt'),
    'no such': (lambda: load_amortiser('mnist-99', blurred_prior()), ValueError, 'mnist-99'),
    'units': (lambda: walk(steps=4).units(-1.), ValueError, 'got -1'),
}

@pytest.mark.parametrize('case', refused)
def test_what_cannot_be_is_refused(case):
    call, error, words = refused[case]
    with pytest.raises(error) as caught: call()
    assert words in str(caught.value)

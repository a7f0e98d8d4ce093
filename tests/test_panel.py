"The panel, driven by its widgets' own values, against closed forms"
import math, subprocess, sys

import pytest
import torch

from rtb_nb.beds import two_modes
from rtb_nb.guidance import MomentMatching
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.operators import Matrix
from rtb_nb.panel import Panel

# `two_modes` in numbers of its own: weights, means and slopes of the measured coordinate
WEIGHTS, MEANS, STD, SLOPES, LAST = (.25, .75), ((-1., 0.), (1., .5)), .3, (.5, 1.), .02

def seen():
    "Mean of the measured coordinate in each mode, and its variance"
    at = [sum(a*m for a, m in zip(SLOPES, mean)) for mean in MEANS]
    return at, sum(a*a for a in SLOPES)*(STD**2 + LAST**2)

def log_evidence(y, noise):
    at, var = seen()
    var = var + noise**2
    parts = [w*math.exp(-(y-m)**2/2/var)/math.sqrt(2*math.pi*var) for w, m in zip(WEIGHTS, at)]
    return math.log(sum(parts))

def prior_elbo(y, noise):
    "Mean log-likelihood of the prior's own points"
    at, var = seen()
    square = sum(w*((y-m)**2 + var) for w, m in zip(WEIGHTS, at))
    return -square/2/noise**2 - math.log(2*math.pi*noise**2)/2

@pytest.fixture(scope='module')
def bed(): return two_modes()

@pytest.fixture
def panel(bed):
    rows = {0: [], 100: [MomentMatching()]}
    return Panel({k: bed.problem.posterior(v) for k, v in rows.items()}, bed.y, n=2000)

def set_to(panel, y=None, noise=None, play=None):
    if y is not None: panel.measurement.value = y
    if noise is not None: panel.noise.value = noise
    if play is not None: panel.play.value = play
    return panel.view.numbers

def test_it_opens_where_training_ended(panel):
    assert panel.iteration.value == 100 and panel.play.value == 1
    assert panel.measurement.value == pytest.approx(.2) and panel.noise.value == .4
    assert panel.view.numbers['log_z'] == pytest.approx(log_evidence(.2, .4), abs=1e-5)

@pytest.mark.parametrize('y, noise', [(.2, .4), (-.5, .4), (1.5, .4), (.2, .9), (1., .25)])
def test_evidence_and_bound_follow_measurement_and_noise(panel, y, noise):
    v = set_to(panel, y, noise, play=0)
    assert v['log_z'] == pytest.approx(log_evidence(y, noise), abs=1e-5)
    error = v['std']/2000**.5 # the chain of 25 steps adds a little
    assert v['elbo'] == pytest.approx(prior_elbo(y, noise), abs=4*error + .02)
    assert v['elbo'] < v['log_z']

def test_the_samples_are_held_against_the_posterior_of_that_measurement(panel):
    set_to(panel, y=1.)
    weights = panel.view.exact.weights
    at, var = seen()
    odds = WEIGHTS[1]/WEIGHTS[0]*math.exp(((1-at[0])**2 - (1-at[1])**2)/2/(var + .4**2))
    assert (weights[1]/weights[0]).item() == pytest.approx(odds, rel=1e-4)

def test_the_histogram_widens_away_from_the_measurement(panel):
    "The prior's log-weights spread further the further off the measurement is"
    found = [set_to(panel, y=y, play=0) for y in (.5, 1., 1.5, 2.)]
    spreads = [v['std'] for v in found]
    assert spreads == sorted(spreads) and found[-1]['ess'] < found[0]['ess']/2

def test_play_walks_through_the_iterations(panel):
    last = set_to(panel)
    first = set_to(panel, play=0)
    assert panel.iteration.value == 0
    assert first['elbo'] < last['elbo'] and first['std'] > last['std']
    assert first['log_z'] == last['log_z'] # the problem is the same
    panel.iteration.value = 100
    assert panel.play.value == 1 and panel.view.numbers == last

def test_what_is_shown_is_what_was_computed(panel):
    before = panel.picture.value
    set_to(panel, y=1.)
    assert panel.numbers.value == str(panel.view)
    assert f'log Z {log_evidence(1., .4):.2f}, ' in panel.numbers.value
    assert panel.picture.value != before and panel.picture.value[:4] == b'\x89PNG'

def test_the_caller_s_draws_and_figures_are_left_alone(panel):
    import matplotlib.pyplot as plt
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    open_figures = plt.get_fignums()
    set_to(panel, y=1.)
    assert torch.equal(torch.rand(1), expected) and plt.get_fignums() == open_figures

def test_a_measurement_of_two_numbers_is_refused(bed):
    problem = InverseProblem(bed.problem.prior, Likelihood(Matrix(torch.eye(2)), .4))
    with pytest.raises(ValueError, match='one slider for a measurement of one number'):
        Panel({0: problem.posterior([])}, torch.zeros(1, 2))

def test_the_chapter_imports_without_widgets():
    code = ('import sys\nsys.modules["ipywidgets"] = None\n'
            'from rtb_nb.panel import Panel, look')
    subprocess.run([sys.executable, '-c', code], check=True)

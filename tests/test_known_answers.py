"The known answers of chapters 11, 11a and 11b are what tests/known_answers.py computes"
import ast, json, re
import numpy as np
import pytest
import known_answers as known
from project import NBS

CHAPTERS = '11_samplers', '11a_particles', '11b_inner'

def stored(name):
    "The dict `name` as the chapters' cells have it, all chapters together"
    found = {}
    for chapter in CHAPTERS:
        for cell in json.loads((NBS/f'{chapter}.ipynb').read_text())['cells']:
            start, _, value = ''.join(cell['source']).partition(' = ')
            if start == name: found |= ast.literal_eval(value.strip())
    return found


def test_every_deterministic_answer_is_the_scripts():
    computed, quoted = known.deterministic(), stored('known') | stored('limits')
    slow = {'CLA on the VE SDE, N=20000'}  # run by hand
    assert len(quoted) > 25 and quoted.keys() <= computed.keys() | slow
    for name in quoted.keys() - slow:
        assert quoted[name] == pytest.approx(computed[name], abs=1e-6), name

def test_the_exact_rows_are_the_posterior():
    "Fine steps reach the posterior of the formula"
    mean, var = known.EXACT
    assert (mean, var) == pytest.approx((.941176, .235294), abs=1e-6)
    assert known.euler(known.exact_score, 4000) == pytest.approx((mean, var), rel=1e-3)
    m, v = known.ancestral(known.exact_guess, 1000)
    assert m == pytest.approx(mean, rel=1e-3) and v == pytest.approx(var, rel=.02)

def test_ddpm_keeps_the_variance_of_its_prior():
    laws = [known.ancestral(known.prior_guess, K) for K in (1000, 100)]
    assert [v for _, v in laws] == pytest.approx([3.9748, 3.7623], abs=1e-4)

@pytest.mark.parametrize('name,row', [
    ('DPS, scale 0.2, K=1000', lambda rng: known.dps_scaled(.2, 2000, rng)),
    ('FPS-SMC, M=5', lambda rng: known.plane_filters(1000, 5, rng)),
    ('MGDM, Adam 3 and 10 steps', lambda rng: known.mgdm_line(1000, rng))])
def test_rows_by_chance_come_out_again(name, row):
    m, m_se, v, v_se = known.with_errors(row(np.random.default_rng(1)))
    km, km_se, kv, kv_se = stored('known_by_chance')[name]
    assert abs(m - km) < 4*np.hypot(m_se, km_se) and abs(v - kv) < 4*np.hypot(v_se, kv_se)

def test_the_distances_of_the_modes_come_out_again():
    quoted = stored('known_modes')
    for name in ('exact', 'prior', 'FPS, c=.3'):
        again = known.modes_table(2, 2, [name])[name]
        assert again == pytest.approx(quoted[2, name][:2], abs=2e-3)

@pytest.mark.parametrize('d', [2, 20])
def test_the_gradient_of_the_modes_is_the_differences(d):
    p, e = known.Modes(d), 1e-5
    x = 3*np.random.default_rng(0).standard_normal((4, d))
    _, g = p.pull(x, .6, .8, np.ones_like)
    guess = lambda step: p.denoise(x + step, .6, .8) @ p.A
    moved = [(guess(step) - guess(-step))/(2*e) for step in e*np.eye(d)]
    assert np.allclose(np.stack(moved, 1), g, atol=1e-8)

@pytest.mark.parametrize('d', [2, 20])
def test_the_posterior_of_the_modes_is_the_prior_weighed(d):
    p, rng = known.Modes(d), np.random.default_rng(0)
    x = p.means[:, None] + rng.standard_normal((25, 20000, d))
    w = np.exp(p.log_w[:, None] - (p.y - x @ p.A)**2/(2*known.VAR))
    assert p.weights == pytest.approx(w.mean(1)/w.mean(1).sum(), abs=.01)
    assert p.exact(40000, rng).mean(0) == pytest.approx(p.weights @ p.centres, abs=.1)

def test_nine_modes_of_the_tilted_bed():
    prior, misplaced, _ = known.nine_modes(2000, sets=20)
    assert prior == pytest.approx(.64) and .01 < misplaced < .05

def test_the_script_knows_neither_this_library_nor_torch():
    text = open(known.__file__).read()
    assert not re.search(r'^\s*(import|from)\s+(torch|rtb_nb|scipy)', text, re.M)

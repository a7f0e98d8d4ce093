"An experiment's parameters are checked before anything runs; a command line's are taken"
import json
import pytest
from project import NBS
from rtb_nb.experiment import read_records, table

def cells(notebook):
    found = json.loads((NBS/f'{notebook}.ipynb').read_text())['cells']
    return [c for c in found if c['cell_type'] == 'code']

def opening(notebook):
    "The first cells, up to the last that checks a parameter"
    found = cells(notebook)
    checks = [i for i, c in enumerate(found)
              if any(f in ''.join(c['source']) for f in ('settings_of(', 'choices('))]
    return found[:checks[-1]+1]

def execute(cells, folder, **values):
    "The names that the cells leave, with `values` in place of the notebook's parameters"
    names = {}
    for c in cells:
        exec(''.join(c['source']), names)
        if 'parameters' in c['metadata'].get('tags', []):
            assert set(values) <= set(names), f'no parameters {set(values) - set(names)}'
            names |= dict(out=str(folder/'results')) | values
    return names

everywhere = [dict(budget='nope'), dict(device='abacus')]
batches = dict(batch=2.5)
noise = [dict(noise_std=-1), dict(noise_std='loud')]
rows = [dict(methods='XYZ'), dict(methods=[3]), dict(seeds=-1), dict(seeds=[.5]),
        dict(seeds='one'), dict(n_samples=4.5), dict(n_samples=-4)]
own = dict(
    exp_lensing=[batches, *noise, *rows, dict(alone='many'), dict(refinements=32.5)],
    exp_forms=[batches, *noise, *rows, dict(iterations='many')],
    exp_unconditional=[batches, *noise, *rows, dict(iterations='many'),
                       dict(datasets='imagenet'),
                       dict(tasks=['box', 'hole']), dict(measurements='first'),
                       dict(workers=-2)],
    exp_latent=[*noise, *rows],
    exp_codes=[*noise, dict(methods='XYZ'), dict(draws=.5), dict(n_samples=-4),
               dict(seed=-1)],
    exp_ablation=[dict(methods='XYZ'), dict(seeds=-1), dict(seconds='long')],
    exp_posteriors=[dict(family='moons'), dict(lenses=.5)],
    exp_lavps=[*noise, dict(methods='XYZ'), dict(tasks=['box', 'hole']), dict(train='long'),
               dict(validation=.5), dict(test=-3), dict(workers=-2), dict(seed=.5)],
    exp_ood=[*noise, dict(methods='XYZ'), dict(shifts='noise'), dict(tasks='tiles'),
             dict(measured=2.5), dict(workers='two')],
    exp_consistency=[batches, dict(methods='XYZ'), dict(draws=.5), dict(n_samples=-4),
                     dict(refined='all'), dict(seed=-1)])
bad = [(notebook, values) for notebook, more in own.items() for values in everywhere + more]

@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize('notebook, values', bad, ids=[f'{n} {v}' for n, v in bad])
def test_what_no_parameter_can_be_is_refused_in_one_line(notebook, values, tmp_path):
    with pytest.raises(ValueError) as caught: execute(opening(notebook), tmp_path, **values)
    (name, value), said = *values.items(), str(caught.value)
    worst = value[-1] if isinstance(value, list) else value
    assert '\n' not in said and repr(worst) in said and (name in said or name == 'device')
    assert not list(tmp_path.rglob('*.jsonl'))

def test_one_value_is_taken_for_a_list(tmp_path):
    given = dict(methods='CLA', seeds=3, n_samples=4.0, budget='smoke')
    names = execute(opening('exp_lensing'), tmp_path, **given)
    assert (names['methods'], names['seeds'], names['n_samples']) == (['CLA'], [3], 4)
    given = dict(tasks='deblur', measurements=2, methods='RTB')
    names = execute(opening('exp_unconditional'), tmp_path, **given)
    assert [names[k] for k in given] == [['deblur'], [2], ['RTB']]
    assert names['datasets'] == ['mnist'] and names['seeds'] == [0]

def test_one_sample_has_not_diverged(tmp_path):
    "What one sample leaves undefined, such as an error, is shown as a dash"
    rows = ['prior', 'moment matching']
    given = dict(budget='smoke', methods=rows, n_samples=1)
    names = execute(cells('exp_lensing'), tmp_path, **given)
    found = read_records(names['records'])
    assert [r['params']['row'] for r in found] == rows and not any(r['diverged'] for r in found)
    assert all(r['metrics']['elbo'] > -1e5 and r['metrics']['elbo_se'] is None for r in found)
    name, std, chi2, diverged = table(found, columns={'spread': 'std', 'chi2': 'chi2'}).cells[1]
    assert (name, std, diverged) == ('moment matching', '-', '0/1') and float(chi2) < 10

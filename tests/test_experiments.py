"Every experiment runs through papermill at its smallest budget, outside the repository, and stores no error"
import json

import numpy as np, papermill, pytest

from project import experiments, name

# Parameters of the smallest run of each experiment, by name; one that is not named gets budget='smoke'.
SMALLEST = {'exp_priors': dict(budget='smoke', dataset='galaxies')}

def smallest(notebook, out):
    "The parameters to run `notebook` with: those above that it declares, and a folder of its own for its results"
    declared = set(papermill.inspect_notebook(notebook))
    values = SMALLEST.get(name(notebook), dict(budget='smoke'))
    unknown = set(values) - declared
    assert not unknown, f'{notebook.name} has no parameter {sorted(unknown)}: its parameters cell declares {sorted(declared)}, one `name = value` a line'
    return values | ({'out': str(out)} if 'out' in declared else {}) | ({'data': str(stamps(out))} if 'data' in declared else {})

def stamps(folder):
    "A small stack of round blobs in place of the galaxies, which a fresh clone does not have"
    y, x = np.mgrid[:64, :64]
    width = np.random.default_rng(0).uniform(3, 9, 24)[:, None, None]
    blobs = (255*np.exp(-((x-32)**2 + (y-32)**2)/2/width**2)).astype(np.uint8)
    np.savez(folder/'stamps.npz', train=blobs[:16], test=blobs[16:])
    return folder/'stamps.npz'

@pytest.mark.parametrize('notebook', experiments(), ids=name)
def test_experiment(notebook, tmp_path):
    out, results = tmp_path/'out.ipynb', tmp_path/'results'
    results.mkdir()
    papermill.execute_notebook(notebook, out, parameters=smallest(notebook, results), cwd=tmp_path, progress_bar=False)
    cells = [c for c in json.loads(out.read_text())['cells'] if c['cell_type'] == 'code']
    assert any(c['outputs'] for c in cells), f'{notebook.name} showed nothing'

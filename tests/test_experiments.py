"Every experiment runs through papermill at its smallest budget, outside the repository, and stores no error"
import json

import numpy as np, papermill, pytest

from project import benchmarks, experiments, name

def stamps(folder):
    "A small stack of round blobs in place of the galaxies, which a fresh clone does not have"
    y, x = np.mgrid[:64, :64]
    width = np.random.default_rng(0).uniform(3, 9, 24)[:, None, None]
    blobs = (255*np.exp(-((x-32)**2 + (y-32)**2)/2/width**2)).astype(np.uint8)
    np.savez(folder/'stamps.npz', train=blobs[:16], test=blobs[16:])
    return folder/'stamps.npz'

def digits(folder):
    "Blobs in place of digits: the wide ones are called 1"
    y, x = np.mgrid[:28, :28]
    width = np.random.default_rng(0).uniform(2, 6, 610)
    blobs = (255*np.exp(-((x-14)**2 + (y-14)**2)/2/width[:, None, None]**2)).astype(np.uint8)
    np.savez(folder/'mnist.npz', train=blobs[:64], test=blobs, train_labels=(width[:64] > 4).astype(int), test_labels=(width > 4).astype(int))
    return folder/'mnist.npz'

# The smallest runs of each experiment; one that is not named has one, budget='smoke'. A function makes the value from a folder.
SMALLEST = {'exp_priors': [dict(dataset='galaxies', data=stamps), dict(dataset='mnist', data=digits)],
            'exp_unconditional': [dict(data=lambda folder: digits(folder).parent)]}
RUNS = [(notebook, values) for notebook in experiments() for values in SMALLEST.get(name(notebook), [{}])]

def parameters(notebook, values, out):
    "The parameters to run `notebook` with: those above, which it must declare, and a folder of its own for its results"
    declared = set(papermill.inspect_notebook(notebook))
    values = dict(budget='smoke') | {k: str(v(out)) if callable(v) else v for k, v in values.items()}
    unknown = set(values) - declared
    assert not unknown, f'{notebook.name} has no parameter {sorted(unknown)}: its parameters cell declares {sorted(declared)}, one `name = value` a line'
    return values | ({'out': str(out)} if 'out' in declared else {})

@pytest.mark.parametrize('notebook, values', RUNS, ids=[f'{name(n)}-{v.get("dataset", "smoke")}' for n, v in RUNS])
def test_experiment(notebook, values, tmp_path):
    out, results = tmp_path/'out.ipynb', tmp_path/'results'
    results.mkdir()
    papermill.execute_notebook(notebook, out, parameters=parameters(notebook, values, results), cwd=tmp_path, progress_bar=False)
    cells = [c for c in json.loads(out.read_text())['cells'] if c['cell_type'] == 'code']
    assert any(c['outputs'] for c in cells), f'{notebook.name} showed nothing'

def test_comparison_with_peers(tmp_path):
    for library in ('deepinv', 'azula'): pytest.importorskip(library)
    papermill.execute_notebook(next(p for p in benchmarks() if name(p) == 'bench_peers'), tmp_path/'out.ipynb', parameters=dict(budget='smoke'), cwd=tmp_path, progress_bar=False)

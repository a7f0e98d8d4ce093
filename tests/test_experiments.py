"Every experiment runs through papermill at its smallest budget, outside the repository, and stores no error"
import json

import papermill, pytest

from project import experiments, name

# Parameters of the smallest run of each experiment; one that is not named here gets budget='smoke'.
SMALLEST = {}

def smallest(notebook, out):
    "The parameters to run `notebook` with: those above that it declares, and a folder of its own for its results"
    declared = set(papermill.inspect_notebook(notebook))
    values = SMALLEST.get(name(notebook), dict(budget='smoke'))
    unknown = set(values) - declared
    assert not unknown, f'{notebook.name} has no parameter {sorted(unknown)}: its parameters cell declares {sorted(declared)}'
    return values | ({'out': str(out)} if 'out' in declared else {})

@pytest.mark.parametrize('notebook', experiments(), ids=name)
def test_experiment(notebook, tmp_path):
    out, results = tmp_path/'out.ipynb', tmp_path/'results'
    results.mkdir()
    papermill.execute_notebook(notebook, out, parameters=smallest(notebook, results), cwd=tmp_path, progress_bar=False)
    cells = [c for c in json.loads(out.read_text())['cells'] if c['cell_type'] == 'code']
    assert any(c['outputs'] for c in cells), f'{notebook.name} showed nothing'

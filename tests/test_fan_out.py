"Runs in processes or jobs of their own, of which one failing stops no other"
import sys

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

from rtb_nb.experiment import fan_out, read_records

@pytest.fixture
def notebook(tmp_path):
    cell = new_code_cell('n = 1\nout = ""')
    cell.metadata.tags = ['parameters']
    body = new_code_cell('from rtb_nb.experiment import run_record\n'
                         'run_record(out, dict(n=n), 0, lambda: dict(x=1/n));')
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(new_notebook(cells=[cell, body], metadata=kernel), tmp_path/'small.ipynb')
    return tmp_path/'small.ipynb'

def test_jobs_of_a_cluster(notebook, tmp_path):
    pytest.importorskip('submitit')
    runs = [dict(n=n, out=tmp_path/'r.jsonl') for n in (1, 0)]
    slurm = dict(cluster='local', timeout_min=2)
    outcomes = fan_out(notebook, runs, tmp_path/'fan', slurm=slurm)
    assert outcomes == [None, 'ZeroDivisionError: division by zero']
    assert [r['metrics'] for r in read_records(tmp_path/'r.jsonl', n=1)] == [dict(x=1.)]
    assert (tmp_path/'fan'/'small-1.ipynb').is_file()

def test_without_submitit(notebook, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    remedy = r"pip install 'rtb_nb\[slurm\]', or leave slurm=None"
    with pytest.raises(ImportError, match=remedy):
        fan_out(notebook, [{}], tmp_path, slurm=dict(timeout_min=1))

def test_a_parameter_that_no_json_holds(notebook, tmp_path):
    with pytest.raises(TypeError, match='parameters.n is a set, which no record can hold'):
        fan_out(notebook, [dict(n={1})], tmp_path/'fan')
    assert not (tmp_path/'fan').exists()

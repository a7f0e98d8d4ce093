"exp_conditional: a killed row goes on from its checkpoint, and rows share what they can"
import json

import pytest

from project import NBS
from rtb_nb.amortise import MaximumLikelihood
from rtb_nb.records import read_records
from rtb_nb.train import Trainer
from test_experiments import digits

SKIPPED = '#| slow', '#| gpu', '#| eval: false'

def run(out, data, **parameters):
    "The cells of the notebook, as papermill would run them"
    given = dict(budget='smoke', out=str(out), data=str(data), device='cpu') | parameters
    names = dict(__name__='__main__', display=lambda *shown, **options: None)
    for cell in json.loads((NBS/'exp_conditional.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or source.startswith(SKIPPED): continue
        exec(compile(source, 'exp_conditional', 'exec'), names)
        if 'parameters' in cell['metadata'].get('tags', []): names.update(given)

def found(out, **match): return read_records(out/'conditional.jsonl', **match)

def numbers(record):
    "Metrics without what the clock says"
    timed = 'train_cpu', 'seconds_each'
    return {k: v for k, v in record['metrics'].items() if k not in timed}

def halt_at(step, kind, monkeypatch):
    "Let training of a kind stop, once, when a checkpoint of that step has been written"
    checkpoint = kind.checkpoint
    def stop(self, iterations, log):
        checkpoint(self, iterations, log)
        if self.step == step and type(self) is kind: raise KeyboardInterrupt
    monkeypatch.setattr(kind, 'checkpoint', stop)

@pytest.mark.parametrize('kind, step', [(MaximumLikelihood, 4), (Trainer, 1)])
def test_a_killed_row_goes_on_to_the_same_record(kind, step, tmp_path, monkeypatch):
    digits(tmp_path)
    row = dict(methods='RTB, log Z(y)', iterations=2)
    run(tmp_path/'whole', tmp_path, **row)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        halt_at(step, kind, m)
        run(tmp_path/'parts', tmp_path, **row)
    assert not found(tmp_path/'parts', experiment='conditional')
    run(tmp_path/'parts', tmp_path, **row)
    whole, = found(tmp_path/'whole', experiment='conditional')
    again, = found(tmp_path/'parts', experiment='conditional')
    assert numbers(again) == numbers(whole) and again['metrics']['train_rtb_batches'] == 2
    assert len(again['metrics']['log_z_each']) == 3

def test_rows_share_a_first_half_and_finished_ones_stay(tmp_path):
    digits(tmp_path)
    run(tmp_path, tmp_path, methods=['RTB', 'RTB, log Z(y)'])
    halves = [(r['params']['stage'], r['params']['row'])
              for r in found(tmp_path, experiment='stage')]
    assert halves == [('maximum likelihood', 'RTB'), ('RTB', 'RTB'), ('RTB', 'RTB, log Z(y)')]
    before = (tmp_path/'conditional.jsonl').read_text()
    run(tmp_path, tmp_path, methods=['RTB', 'RTB, log Z(y)'])
    assert (tmp_path/'conditional.jsonl').read_text() == before

def test_maximum_likelihood_asks_the_prior_nothing(tmp_path):
    digits(tmp_path)
    run(tmp_path, tmp_path, methods='maximum likelihood')
    bill, = found(tmp_path, experiment='stage')
    assert bill['metrics']['calls'] == 0 and bill['metrics']['batches'] == 10

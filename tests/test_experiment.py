"Record files against crashes and crowds, an experiment's parameters, tables, and bad inputs"
import json, math, os, subprocess, sys, warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pytest, torch

from rtb_nb import experiment
from rtb_nb.experiment import *
from rtb_nb.experiment import _number
from rtb_nb.records import *
from rtb_nb.records import _commit

# ---- parameters

BUDGETS = dict(smoke=dict(steps=3, lr=.1, tasks=['box'], images=[0], note='a', fast=True),
               cpu=dict(steps=20, lr=.01, tasks=['box', 'blur'], images=[0, 1], note='b'))

@pytest.mark.parametrize('given, expected', [
    (dict(steps=0, tasks=[], note='', images=None), {}),
    (dict(steps=4), dict(steps=4)),
    (dict(steps=4.), dict(steps=4)),
    (dict(steps=np.int64(4)), dict(steps=4)),
    (dict(steps=torch.tensor(4)), dict(steps=4)),
    (dict(tasks='blur'), dict(tasks=['blur'])),
    (dict(tasks=('blur', 'box')), dict(tasks=['blur', 'box'])),
    (dict(images=[5., 0]), dict(images=[5, 0])),
    (dict(images=7), dict(images=[7])),
    (dict(lr=1), dict(lr=1.)),
    (dict(noise_std=.05), dict(noise_std=.05)),
    (dict(fast=True), dict(fast=True)),
])
def test_what_is_given_replaces_the_setting_of_a_budget(given, expected):
    settings = settings_of('smoke', BUDGETS, **given)
    assert settings == BUDGETS['smoke'] | expected
    assert settings.steps == settings['steps'] and type(settings.steps) is int
    assert 'noise_std' not in BUDGETS['smoke']

ROWS = {'prior': 1, 'CLA': 2, 'drift, longer': 3}

@pytest.mark.parametrize('given, known, expected', [
    ([], ROWS, list(ROWS)), ('', ROWS, list(ROWS)), (None, ROWS, list(ROWS)),
    ('CLA', ROWS, ['CLA']), ('drift, longer', ROWS, ['drift, longer']),
    (('CLA', 'prior'), ROWS, ['CLA', 'prior']),
    (3, None, [3]), (3., None, [3]), ([0, 1.], None, [0, 1]), (range(2), None, [0, 1]),
    ([], None, []), (np.int64(3), None, [3]), (4., range(10), [4]),
])
def test_a_parameter_that_is_a_list(given, known, expected):
    found = choices('methods', given, known)
    assert found == expected and [type(v) for v in found] == [type(v) for v in expected]

def test_devices(monkeypatch):
    for cuda, mps, found in (2, True, 'cuda'), (0, True, 'mps'), (0, False, 'cpu'):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        assert device_of() == device_of('auto') == device_of(torch.device(found))
        assert device_of().type == found and device_of('meta').type == 'meta'
    with pytest.raises(ValueError, match="'mps' is not there, torch sees 0 mps devices"):
        device_of('mps')

@pytest.mark.parametrize('seed', [7, np.int64(7), np.uint8(7), torch.tensor(7)])
def test_a_seed_of_any_whole_type(seed):
    assert type(seed_everything(seed)) is int
    drawn = torch.rand(())
    seed_everything(7)
    assert torch.rand(()) == drawn

# ---- records

def write_fifty(path, worker):
    for i in range(50):
        append_record(path, record(dict(worker=worker), dict(i=i), seed=i, note='x'*2000))

def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path/'deep'/'er'/'r.jsonl'
    start = get_context('fork').Process
    processes = [start(target=write_fifty, args=(path, w)) for w in range(4)]
    for p in processes: p.start()
    for p in processes: p.join()
    assert path.read_bytes().count(b'\n') == 200 and path.read_bytes().endswith(b'\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for w in range(4):
            assert [r['seed'] for r in read_records(path, worker=w)] == list(range(50))

@pytest.mark.parametrize('cut', [1, 2, 40, 10_000])
def test_torn_last_line_is_healed(tmp_path, cut):
    path = tmp_path/'r.jsonl'
    for i in range(2): append_record(path, record(dict(i=i), dict(a=1.5)))
    whole, lines = path.stat().st_size, path.read_bytes().splitlines(True)
    os.truncate(path, max(whole-cut, len(lines[0])))
    append_record(path, record(dict(i=2), dict(a=2.5)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = [r['params']['i'] for r in read_records(path)]
    assert found == ([0, 1, 2] if cut == 1 else [0, 2])
    assert len(caught) == (1 < cut < 10_000) and all('line 2' in str(w.message) for w in caught)

def test_killed_writer_leaves_a_readable_file(tmp_path):
    path = tmp_path/'r.jsonl'
    code = ("import sys, os; from rtb_nb.records import *\n"
            "append_record(sys.argv[1], record(dict(i=0), {})); print('one', flush=True)\n"
            "while True: append_record(sys.argv[1], record(dict(i=1), dict(x='y'*100_000)))")
    command = [sys.executable, '-c', code, str(path)]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'one\n'
    p.kill(); p.wait()
    append_record(path, record(dict(i=2), {}))
    found = [r['params']['i'] for r in read_records(path)]
    assert found[0] == 0 and found[-1] == 2

def test_json_is_strict_and_floats_come_back(tmp_path):
    path = tmp_path/'r.jsonl'
    values = dict(a=math.nan, b=-math.inf, c=1e-300, d=0.1+0.2, e=torch.tensor(3),
                  f=np.float32(.5), g=[math.inf, None], h=None)
    rec = append_record(path, record(dict(source=tmp_path, lr=1e-3), values, seed=np.int64(7)))
    def refuse(c): raise AssertionError(f'{c} is no JSON')
    json.loads(path.read_text(), parse_constant=refuse)
    back, = read_records(path)
    m = back['metrics']
    assert math.isnan(m.pop('a')) and m == dict(
        b=-math.inf, c=1e-300, d=.1+.2, e=3, f=.5, g=[math.inf, None], h=None)
    assert back['seed'] == 7 and back['diverged']
    assert back['params'] == rec['params'] == dict(source=str(tmp_path), lr=1e-3)
    assert {'commit', 'versions', 'device', 'date'} <= back.keys()
    assert back['versions']['torch'] == str(torch.__version__)
    assert len(read_records([path, str(path)], lr=1e-3, seed=7)) == 2
    assert read_records(path, lr=1e-4) == [] and read_records(path, nothing=None) == []

def test_commit_without_git(tmp_path):
    code = 'from rtb_nb.records import _commit; print(_commit())'
    env = {**os.environ, 'PATH': str(tmp_path)}
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert run.stdout == 'None\n', run.stderr

def test_run_record_and_finished(tmp_path):
    path, p = tmp_path/'r.jsonl', dict(row='a', lr=.1)
    draw = lambda: dict(x=torch.rand(()), y=np.random.rand())
    assert not finished(path, p)
    first, again = run_record(path, p, 3, draw, calls=12), run_record(path, p, 3, draw)
    assert first['metrics'] == again['metrics']
    assert first['calls'] == 12 and first['seconds'] >= 0
    assert len(finished(path, p)) == len(finished(path, p, 3)) == 2
    assert not finished(path, p, 4) and not finished(path, dict(row='a'))
    def fails(error):
        def fn(): raise error
        return fn
    gave_up = run_record(path, dict(row='b'), 0, fails(FloatingPointError('no')))
    assert gave_up['diverged'] and finished(path, dict(row='b'), 0)
    with pytest.raises(KeyError): run_record(path, dict(row='c'), 0, fails(KeyError('z')))
    assert not finished(path, dict(row='c'))
    assert read_records(path, row='c')[0]['error'] == "KeyError: 'z'"
    with pytest.raises(TypeError, match='a run returns its metrics by name'):
        run_record(path, dict(row='d'), 0, lambda: None)
    assert len(latest(read_records(path))) == 4

def test_once_runs_what_has_no_result(tmp_path):
    path, calls = tmp_path/'r.jsonl', []
    def fn():
        calls.append(1)
        if len(calls) == 1: raise KeyError('mended later')
        return dict(x=len(calls), broken=math.nan)
    with pytest.raises(KeyError): run_record(path, dict(row='a'), 0, fn, once=True)
    found = [run_record(path, dict(row='a'), 0, fn, once=True) for _ in range(3)]
    assert [r['metrics']['x'] for r in found] == [2, 2, 2] and found[2]['diverged']
    assert run_record(path, dict(row='a'), 1, fn, once=True)['metrics']['x'] == 3
    assert run_record(path, dict(row='a'), 0, fn)['metrics']['x'] == 4

def test_what_cannot_be_recorded_is_refused_before_it_runs(tmp_path):
    with pytest.raises(TypeError, match='params.net is a Linear'):
        run_record(tmp_path/'r.jsonl', dict(net=torch.nn.Linear(1, 1)), 0, pytest.fail)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('metrics, verdict, diverged', [
    (dict(a=1., b=None), None, False), # undefined, as the standard error of one sample is
    (dict(a=math.nan), None, True), (dict(a=-math.inf), None, True),
    (dict(a=torch.tensor(math.nan)), None, True), (dict(a=np.float32(math.inf)), None, True),
    (dict(a=math.nan, diverged=False), None, False), (dict(a=1., diverged=True), None, True),
    (dict(a=1., diverged=None), None, False), (dict(a=1., diverged=True), False, False),
    (dict(a=1.), True, True), ({}, None, False),
])
def test_only_a_broken_number_is_a_divergence(metrics, verdict, diverged):
    rec = record({}, metrics, diverged=verdict)
    assert rec['diverged'] is diverged and 'diverged' not in rec['metrics']

def test_paths_of_the_users_own_folder(tmp_path, monkeypatch):
    home, here = tmp_path/'home', tmp_path/'here'
    home.mkdir(); here.mkdir()
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.chdir(here)
    path = '~/results/r.jsonl'
    run_record(path, dict(row='a'), 0, lambda: dict(x=1.))
    append_record(Path(path), record(dict(row='b'), {}))
    assert len(read_records(path)) == 2 and finished(path, dict(row='a'))
    assert project_folder('~/out') == home/'out'
    (home/'small.ipynb').write_text('{}')
    assert fan_out('~/small.ipynb', [], '~/fan') == []
    assert sorted(p.name for p in home.iterdir()) == ['fan', 'out', 'results', 'small.ipynb']
    assert not list(here.iterdir())

# ---- tables

def make(row, seed, diverged=None, **metrics):
    "A record of no commit, whose tables have no footnotes"
    return record(dict(row=row), metrics, seed, diverged) | dict(commit=None)

def test_table_counts_and_means():
    records = [make('RTB', s, a=v, b=1000.+v) for s, v in enumerate([1., 2., 3.])]
    records += [make('RTB', 3, a=math.nan), make('a|b', 0, a=5.)]
    columns = {'A': 'a', 'B': 'b', '2A': lambda r: 2*r['metrics']['a']}
    t = table(records, columns=columns, fmt={'2A': '.1f'})
    assert t.header == ['row', 'A', 'B', '2A', 'diverged']
    assert t.cells == [['RTB', '2.00 ± 0.58', '1,002.00 ± 0.58', '4.0 ± 1.2', '1/4'],
                       ['a|b', '5.000', '-', '10.0', '0/1']]
    text, md = repr(t).splitlines(), t._repr_markdown_().splitlines()
    assert len(text) == len(md) == 4 and 'a\\|b' in md[3] and md[1].endswith(': |')
    assert len({len(line) for line in md}) == 1 and text[3].split()[-1] == '0/1'
    lost = table([make('x', 0, diverged=True)], columns={'A': 'a'})
    assert lost.cells == [['x', '-', '1/1']]
    broken = record(dict(row='x'), {}, 1, False, error='KeyError: 1')
    with pytest.warns(UserWarning, match='1 failed runs left out'):
        assert table(records+[broken]).cells[0][0] == 'RTB'

def test_one_sample_has_dashes_and_is_not_diverged():
    "At n = 1 a standard error is undefined: None, in every row"
    records = [make(row, 0, elbo=1., elbo_se=None) for row in ('prior', 'CLA')]
    t = table(records)
    assert t.header == ['row', 'elbo', 'elbo_se', 'diverged']
    assert t.cells == [['prior', '1.000', '-', '0/1'], ['CLA', '1.000', '-', '0/1']]
    assert table(records, columns={'error': 'elbo_se'}).cells[0] == ['prior', '-', '0/1']
    assert table(records + [make('CLA', 1, elbo=1., elbo_se=2.)]).cells[1][2] == '2.000'

def test_numbers():
    assert _number([1e-9]) == '1e-09' and _number([math.inf]) == 'nan'
    assert _number([2., 2.], '.2f') == '2.00 ± 0.00'

def test_a_table_says_where_its_records_come_from(monkeypatch):
    commits = ['aaaaaaa', 'aaaaaaa+', 'bbbbbbb', 'bbbbbbb+', 'ccccccc', None, 'no commit']
    records = [make('a', i, x=1.) | dict(commit=c) for i, c in enumerate(commits)]
    later = {'aaaaaaa': '3', 'bbbbbbb': '0'} # commits since then that touched the package
    said = lambda *args: later.get(args[2].partition('.')[0])
    monkeypatch.setattr(experiment, 'ask_git', said)
    t = table(records)
    assert t.notes == ['2 of 7 records come from a modified checkout (a commit with +)',
                       '2 of 7 records were made by earlier versions of the package']
    assert repr(t).splitlines()[-2:] == t.notes
    assert t._repr_markdown_().endswith(f'\n\n*{t.notes[0]}*\n\n*{t.notes[1]}*')
    assert table([r for r in records if r['commit'] == 'bbbbbbb']).notes == []

def test_a_commit_of_this_checkout():
    if _commit() is None: pytest.skip('no git checkout')
    head = experiment.ask_git('rev-parse', 'HEAD')
    first = experiment.ask_git('rev-list', '--max-parents=0', 'HEAD').split()[-1]
    assert not experiment._outdated(head) and not experiment._outdated(head[:7] + '+')
    assert experiment._outdated(first) or first == head

# ---- dials

def test_a_dial_is_set_between_the_values_that_bracket_one():
    found, tried = tune([.1, 1., 10., 100.], lambda v: 2/v, halvings=10)
    assert found == pytest.approx(2, rel=5e-3) and 100. not in tried
    scores = {1.: math.nan, 2.: .5, 3.: 1.2}
    assert tune(scores, scores.get) == (3., scores)
    assert tune(scores, scores.get, badness=lambda s: s)[0] == 2.

# ---- bad input: one line that names the value

sets = lambda budget='cpu', **given: (lambda: settings_of(budget, BUDGETS, **given))
one = [record(dict(row=1, a=1), dict(b=2.))]
bad = [
    (sets('nope'), ValueError, "budget must be one of smoke, cpu, got 'nope'"),
    (sets(['cpu']), ValueError, r"got \['cpu'\]"),
    (sets(steps=4.5), ValueError, 'steps must be a positive whole number, got 4.5'),
    (sets(steps=-1), ValueError, 'got -1'),
    (sets(steps=True), ValueError, 'got True'),
    (sets(steps='many'), ValueError, "got 'many'"),
    (sets(lr=math.nan), ValueError, 'lr must be a positive number'),
    (sets(images='x'), ValueError, "images must be a whole number of at least 0, got 'x'"),
    (sets(tasks=3), ValueError, "tasks must be a str such as 'box', got 3"),
    (sets(note=3), ValueError, 'note must be a str'),
    (sets(noise_std=0), ValueError, 'noise_std must be a positive number, got 0'),
    (sets(noise_std=None), ValueError, 'got None'),
    (lambda: choices('methods', 'XYZ', ROWS), ValueError, "drift, longer: got 'XYZ'"),
    (lambda: choices('methods', [3], ROWS), ValueError, 'methods must be among .* got 3'),
    (lambda: choices('seeds', 'one'), ValueError, "seeds must be a whole number .* got 'one'"),
    (lambda: choices('seeds', [0, -1]), ValueError, 'got -1'),
    (lambda: choices('seeds', .5), ValueError, 'got 0.5'),
    (lambda: seed_everything(-1), ValueError, 'got -1'),
    (lambda: seed_everything(2**32), ValueError, 'from 0 to 4294967295'),
    (lambda: seed_everything(1.5), ValueError, 'got 1.5'),
    (lambda: seed_everything(True), ValueError, 'got True'),
    (lambda: device_of('gpu'), ValueError, "'gpu' is no device"),
    (lambda: device_of(None), ValueError, 'None is no device'),
    (lambda: device_of('cuda:99'), ValueError, 'is not there'),
    (lambda: device_of('mps:1'), ValueError, "'mps:1' is not there"),
    (lambda: record(dict(net=torch.nn.Linear(1, 1)), {}), TypeError, 'params.net is a Linear'),
    (lambda: record({1: 2}, {}), TypeError, 'keys of params'),
    (lambda: record(dict(a='NaN'), {}), ValueError, "params.a is 'NaN'"),
    (lambda: record({}, [1.]), TypeError, 'metrics must be a dict'),
    (lambda: run_record('unused', ['row'], 0, dict), TypeError, 'params must be a dict'),
    (lambda: run_record('unused', {}, -1, dict), ValueError, 'seed must be'),
    (lambda: read_records('no/such.jsonl'), FileNotFoundError, 'no/such.jsonl'),
    (lambda: fan_out('no.ipynb', [{}], 'unused'), FileNotFoundError, 'no notebook no.ipynb'),
    (lambda: fan_out(__file__, [], 'unused', workers=0), ValueError, 'workers must be'),
    (lambda: fan_out(__file__, [], 'unused', workers=1.5), ValueError, 'got 1.5'),
    (lambda: tune([], len), ValueError, 'at least one value'),
    (lambda: tune([1.], abs, halvings=-1), ValueError, 'halvings must be'),
    (lambda: table([]), ValueError, 'no records'),
    (lambda: table(one, rows='name'), ValueError, "no parameter 'name'"),
    (lambda: table(one, columns=dict(C='c')), ValueError, 'there are b'),
]

@pytest.mark.parametrize('call, error, text', bad)
def test_bad_input_gets_one_clear_line(call, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path) # where nothing is left behind
    with pytest.raises(error, match=text) as e: call()
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

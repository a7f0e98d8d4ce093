"The committed modules are what the notebooks export, and the notebooks are as nbdev_clean leaves them"
import json, shutil
from collections import Counter

import pytest

from project import LIB, NBS, ROOT, chapters, experiments, name, notebooks, python

def code_cells(notebook): return [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A copy of the sources, exported and cleaned"
    copy = tmp_path_factory.mktemp('project')
    shutil.copy(ROOT/'settings.ini', copy)
    shutil.copytree(NBS, copy/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (copy/'rtb_nb').mkdir()
    shutil.copy(LIB/'__init__.py', copy/'rtb_nb')
    python('-c', 'from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()', cwd=copy)
    return copy

def modules(folder): return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob('*.py')}

def test_modules_are_what_the_notebooks_export(made):
    committed, exported = modules(LIB), modules(made/'rtb_nb')
    assert not committed.keys() - exported.keys(), 'modules that no notebook exports: delete them'
    assert not exported.keys() - committed.keys(), 'modules that are not in rtb_nb: run nbdev_export'
    drifted = [n for n in exported if exported[n] != committed[n]]
    assert not drifted, 'these differ from what their notebooks export: edit the notebook, then run nbdev_export'

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_is_clean(notebook, made):
    cleaned = made/'nbs'/notebook.relative_to(NBS)
    assert json.loads(notebook.read_text()) == json.loads(cleaned.read_text()), f'run nbdev_clean on {notebook.name}'

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_can_be_read_and_run(notebook):
    kernel = json.loads(notebook.read_text())['metadata'].get('kernelspec', {})
    assert kernel.get('name') == 'python3' and kernel.get('language') == 'python', 'papermill refuses a notebook without a kernel'
    failed = [o['ename'] for c in code_cells(notebook) for o in c['outputs'] if o['output_type'] == 'error']
    assert not failed, f'{notebook.name} stores errors'

@pytest.mark.parametrize('notebook', experiments(), ids=name)
def test_experiment_has_one_parameters_cell(notebook):
    assert sum('parameters' in c['metadata'].get('tags', []) for c in code_cells(notebook)) == 1

def test_each_chapter_exports_the_module_of_its_name():
    targets = {p.stem: [line.split()[2] for c in code_cells(p) for line in ''.join(c['source']).splitlines()
                        if line.startswith('#| default_exp ')] for p in chapters()}
    assert targets == {stem: [stem.partition('_')[2]] for stem in targets}
    numbers = Counter(stem.partition('_')[0] for stem in targets)
    assert max(numbers.values()) == 1, f'two chapters have one number: {numbers.most_common(1)}'

"The committed modules are what the notebooks export, and these are as nbdev_clean leaves them"
import json, shutil
from collections import Counter

import pytest

from project import LIB, NBS, ROOT, chapters, experiments, name, notebooks, python

def code_cells(notebook):
    cells = json.loads(notebook.read_text())['cells']
    return [c for c in cells if c['cell_type'] == 'code']

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A copy of the sources, exported and cleaned"
    copy = tmp_path_factory.mktemp('project')
    shutil.copy(ROOT/'settings.ini', copy)
    unwanted = shutil.ignore_patterns('.ipynb_checkpoints')
    shutil.copytree(NBS, copy/'nbs', symlinks=True, ignore=unwanted)
    (copy/'rtb_nb').mkdir()
    shutil.copy(LIB/'__init__.py', copy/'rtb_nb')
    python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    python('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=copy)
    return copy

def modules(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob('*.py')}

def test_modules_are_what_the_notebooks_export(made):
    committed, exported = modules(LIB), modules(made/'rtb_nb')
    strays, missing = committed.keys() - exported.keys(), exported.keys() - committed.keys()
    assert not strays, 'modules that no notebook exports: delete them'
    assert not missing, 'modules that are not in rtb_nb: run nbdev_export'
    drifted = [n for n in exported if exported[n] != committed[n]]
    assert not drifted, 'not what their notebooks export: edit these, run nbdev_export'

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_is_clean(notebook, made):
    cleaned = made/'nbs'/notebook.relative_to(NBS)
    same = json.loads(notebook.read_text()) == json.loads(cleaned.read_text())
    assert same, f'run nbdev_clean on {notebook.name}'

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_can_be_read_and_run(notebook):
    kernel = json.loads(notebook.read_text())['metadata'].get('kernelspec', {})
    found = kernel.get('name'), kernel.get('language')
    assert found == ('python3', 'python'), 'papermill refuses a notebook without a kernel'
    outputs = [o for c in code_cells(notebook) for o in c['outputs']]
    failed = [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert not failed, f'{notebook.name} stores errors'

@pytest.mark.parametrize('notebook', experiments(), ids=name)
def test_experiment_has_one_parameters_cell(notebook):
    assert sum('parameters' in c['metadata'].get('tags', []) for c in code_cells(notebook)) == 1

def test_each_chapter_exports_the_module_of_its_name():
    def modules_of(chapter):
        lines = [s for c in code_cells(chapter) for s in ''.join(c['source']).splitlines()]
        return [line.split()[2] for line in lines if line.startswith('#| default_exp ')]
    targets = {p.stem: modules_of(p) for p in chapters()}
    assert targets == {stem: [stem.partition('_')[2]] for stem in targets}
    for i, what in (0, 'number'), (2, 'module'):
        most = Counter(stem.partition('_')[i] for stem in targets).most_common(1)[0]
        assert most[1] == 1, f'{most[1]} chapters have the {what} {most[0]}'

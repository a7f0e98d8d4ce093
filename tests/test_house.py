"The house rules: how long a chapter is, how wide a line, what is public, and what imports what"
import ast, json

import pytest

from project import LIB, ROOT, chapters, name, notebooks

WIDTH, LINES, NAMES = 96, 330, 15
MODULES = {p.stem.partition('_')[2]: p for p in chapters()} # in reading order
TESTS = sorted((ROOT/'tests').glob('*.py'))

def code(notebook):
    cells = json.loads(notebook.read_text())['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']

def tree(module): return ast.parse((LIB/f'{module}.py').read_text())

def public(module):
    "What a module offers, in its own words: the literal of `__all__`"
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '__all__':
            return ast.literal_eval(node.value)

def too_wide(lines): return [line for line in lines if len(line) > WIDTH]

def test_letters_sort_after_their_number():
    numbers = [p.name.partition('_')[0] for p in chapters()]
    assert numbers == sorted(set(numbers), key=lambda s: (int(s[:2]), s[2:]))

@pytest.mark.parametrize('module', MODULES)
def test_a_chapter_is_short(module):
    "The lines of its exported cells that are not empty, and its public names"
    exported = [s for s in code(MODULES[module]) if s.startswith('#| export')]
    lines = [line for s in exported for line in s.splitlines()[1:] if line.strip()]
    assert len(lines) <= LINES, f'{module} exports {len(lines)} lines'
    assert len(public(module)) <= NAMES, f'{module} has {len(public(module))} public names'

def test_a_public_name_has_one_home():
    homes = {}
    for module in MODULES:
        for word in public(module): homes.setdefault(word, []).append(module)
    twice = {word: found for word, found in homes.items() if len(found) > 1}
    assert not twice, f'{twice}: two things of one name are taken for each other'

@pytest.mark.parametrize('file', TESTS, ids=lambda f: f.stem)
def test_no_case_is_lost(file):
    "Two keys or two tests of one name: the first would never run"
    found = ast.parse(file.read_text())
    for node in ast.walk(found):
        keys = [k.value for k in node.keys if isinstance(k, ast.Constant)] if isinstance(
            node, ast.Dict) else []
        assert len(keys) == len(set(keys)), f'{file.name}, line {node.lineno}: {keys}'
    tests = [n.name for n in found.body if getattr(n, 'name', '').startswith('test_')]
    assert len(tests) == len(set(tests)), sorted(t for t in tests if tests.count(t) > 1)

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_code_fits_the_page(notebook):
    wide = too_wide(line for s in code(notebook) for line in s.splitlines())
    assert not wide, f'{len(wide)} lines of {notebook.name} are wider than {WIDTH}: {wide[:3]}'

@pytest.mark.parametrize('path', TESTS, ids=lambda p: p.name)
def test_tests_fit_the_page(path):
    wide = too_wide(path.read_text().splitlines())
    assert not wide, f'{len(wide)} lines of {path.name} are wider than {WIDTH}: {wide[:3]}'

@pytest.mark.parametrize('module', MODULES)
def test_a_chapter_imports_from_those_above_it(module):
    nodes = [n for n in ast.walk(tree(module)) if isinstance(n, ast.ImportFrom) and n.level]
    used = {n.module for n in nodes if n.module and not n.module.startswith('_')}
    above = list(MODULES)[:list(MODULES).index(module)]
    assert used <= set(above), f'{module} imports from {used - set(above)}, which come later'

def undocumented(module):
    "Public functions, classes and their public methods without a docstring"
    for node in tree(module).body:
        if getattr(node, 'name', None) in public(module) and not ast.get_docstring(node):
            yield node.name

@pytest.mark.parametrize('module', MODULES)
def test_the_package_calls_itself_by_no_name(module):
    "nbdev makes `from rtb_nb.x` into `from .x`, but for some of two lines: break those anew"
    own = [n.module for n in ast.walk(tree(module)) if isinstance(n, ast.ImportFrom)
           and n.level == 0 and n.module.partition('.')[0] == 'rtb_nb']
    assert not own

@pytest.mark.parametrize('module', MODULES)
def test_what_is_public_is_explained(module):
    assert not list(undocumented(module))
    private = [n for n in public(module) if n.startswith('_')]
    assert not private, f'{private} are private and in __all__'

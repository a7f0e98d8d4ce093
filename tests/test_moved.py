"Old names: an import says where they are now, what it says is true, and the page lists them"
import importlib, re

import pytest

from project import NBS
from rtb_nb._moved import _moved, _parted

GONE = [(module, old, new) for module, names in _moved.items() for old, new in names.items()]

def homes(text):
    "Modules and names that a message sends its reader to"
    return re.findall(r'rtb_nb\.(\w+)(?:\.(\w+))?', text)

@pytest.mark.parametrize('module, old, new', GONE, ids=[f'{m}.{old}' for m, old, _ in GONE])
def test_a_name_that_moved(module, old, new):
    words = re.escape(f'{old} is not in rtb_nb.{module} any more: use rtb_nb.')
    with pytest.raises(ImportError, match=words) as e:
        exec(f'from rtb_nb.{module} import {old}')
    assert '\n' not in str(e.value)
    for home, name in homes(new):
        assert hasattr(importlib.import_module(f'rtb_nb.{home}'), name)

@pytest.mark.parametrize('module', _parted)
def test_a_module_that_was_parted(module):
    with pytest.raises(ModuleNotFoundError, match=f'rtb_nb.{module} was parted') as e:
        importlib.import_module(f'rtb_nb.{module}')
    for home, _ in homes(_parted[module]): importlib.import_module(f'rtb_nb.{home}')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('code, words', [
    ('from rtb_nb.diffusion import Drifted', r'problem\.posterior\(drifts\)'),
    ('from rtb_nb.metrics import assess', 'assess is evaluate'),
    ('from rtb_nb.metrics import judge', 'judge is score_samples'),
    ('import rtb_nb.explore', r'rtb_nb\.behaviours and rtb_nb\.replay'),
    ('from rtb_nb.explore import OnPolicy', r'rtb_nb\.behaviours'),
    ('from rtb_nb.schedule import Table', r'rtb_nb\.schedule\.Tabulated'),
    ('from rtb_nb.guidance import see_y', 'measurement_feature'),
    ('from rtb_nb.likelihood import ExactChain', r'rtb_nb\.exact\.ExactChain'),
    ('from rtb_nb.networks import save_tensors', r'rtb_nb\.checkpoints\.save_tensors'),
    ('from rtb_nb.networks import NetDrift', r'rtb_nb\.drifts\.NetDrift'),
    ('from rtb_nb.samplers import fps', r'rtb_nb\.particles\.fps'),
    ('from rtb_nb.priors import from_diffusers', r'rtb_nb\.pretrained\.from_diffusers'),
])
def test_the_most_used_old_names(code, words):
    with pytest.raises(ImportError, match=words): exec(code)

def test_what_was_never_there_is_missing_as_ever():
    with pytest.raises(ImportError, match='cannot import name'):
        exec('from rtb_nb.diffusion import nonsense')
    with pytest.raises(ModuleNotFoundError, match='No module named'):
        exec('import rtb_nb.nonsense')
    assert not hasattr(importlib.import_module('rtb_nb.diffusion'), 'nonsense')

def test_the_page_lists_them_all():
    page = (NBS/'what_moved.ipynb').read_text()
    assert not [old for _, old, _ in GONE if old not in page]

"The wheel holds library, weights and licence, and works with little more than torch"
import email, json, os, shutil, subprocess, sys, zipfile
from configparser import ConfigParser

import pytest

from project import LIB, ROOT, python
from rtb_nb.checkpoints import load_tensors

ABSENT = ['nbdev', 'execnb', 'lpips', 'papermill', 'caustics', 'skimage', 'matplotlib',
          'diffusers']
MODULES = sorted(p.relative_to(ROOT).as_posix() for p in LIB.rglob('*.py'))
ASSETS = sorted(p.relative_to(ROOT).as_posix() for p in (LIB/'assets').glob('*'))

@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini')
    return config['DEFAULT']

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built as a release is, through a source archive, so that a file missing there shows"
    tree, dist = tmp_path_factory.mktemp('tree'), tmp_path_factory.mktemp('dist')
    files = 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'
    for n in files: shutil.copy(ROOT/n, tree)
    unwanted = shutil.ignore_patterns('__pycache__')
    for n in ('rtb_nb', 'nbs', 'tests', 'tools'):
        shutil.copytree(ROOT/n, tree/n, symlinks=True, ignore=unwanted)
    python('-m', 'build', '--no-isolation', '--outdir', dist, cwd=tree)
    return next(dist.glob('*.whl'))

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "A folder with the wheel alone, installed without what it requires"
    target = tmp_path_factory.mktemp('site')
    uv = os.environ.get('UV') or shutil.which('uv')
    command = [uv, 'pip', 'install', '--python', sys.executable] if uv \
        else [sys.executable, '-m', 'pip', 'install']
    command += ['--no-deps', '--target', target, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target

def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if '.dist-info/' not in n) == sorted(MODULES + ASSETS)

def test_wheel_says_what_settings_say(wheel, settings):
    z = zipfile.ZipFile(wheel)
    info = next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))
    meta = email.message_from_bytes(z.read(info))
    assert meta['License-Expression'] == settings['license'] == 'Apache-2.0'
    assert meta.get_all('License-File') == ['LICENSE']
    assert z.read(info.replace('METADATA', 'licenses/LICENSE')) == (ROOT/'LICENSE').read_bytes()
    assert [meta[k] for k in ('Name', 'Version', 'Summary')] == \
        [settings[k] for k in ('lib_name', 'version', 'description')]
    assert meta['Requires-Python'] == f">={settings['min_python']}"
    assert meta.get_payload(decode=True).decode() == (ROOT/'README.md').read_text()
    core = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert len(core) == len(settings['requirements'].split())
    tools = 'nbdev', 'execnb', 'pytest', 'jupytext', 'smalldocs'
    assert not [r for r in core if r.startswith(tools)], 'tools belong in the dev extra'

def test_weights_have_cards_and_stay_small():
    for path in sorted((LIB/'assets').glob('*.safetensors')):
        card = load_tensors(path)[1]
        assert json.loads(path.with_suffix('.json').read_text()).items() <= card.items()
        size = path.stat().st_size/2**20
        assert size <= 4, f'{path.name} has {size:.1f} MiB: at most 4 are shipped'
        assert card.get('licence') or card.get('license'), f'{path.name} names no licence'

PROBE = '''
import importlib, pkgutil, sys
from importlib.metadata import version
from pathlib import Path
target, absent = sys.argv[1], set(sys.argv[2].split())

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in absent:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, target)
import rtb_nb
assert rtb_nb.__version__ == version('rtb_nb')
for m in pkgutil.iter_modules(rtb_nb.__path__):
    print(importlib.import_module(f'rtb_nb.{m.name}').__name__)
from rtb_nb.errors import load_error
from rtb_nb.priors import load_prior, shipped_priors
for name in shipped_priors():
    load_error(name, load_prior(name))
    print('prior', name)
# an editable install of the tree must not stand in for what the wheel lacks
ours = [m for n, m in sys.modules.items() if n.partition('.')[0] == 'rtb_nb']
strangers = [m for m in ours if not Path(m.__file__).is_relative_to(target)]
assert not strangers, strangers
'''

def test_wheel_imports_without_optional_packages(installed):
    said = python('-I', '-c', PROBE, installed, ' '.join(ABSENT), cwd=installed).splitlines()
    modules = {f'rtb_nb.{p.stem}' for p in LIB.glob('*.py') if p.stem != '__init__'}
    assert {s for s in said if s.startswith('rtb_nb.')} == modules
    priors = {p.stem for p in (LIB/'assets').glob('*.safetensors') if '.' not in p.stem}
    assert {s.split()[1] for s in said if s.startswith('prior ')} == priors

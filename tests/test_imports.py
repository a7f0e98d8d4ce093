"Importing the library costs little more than importing torch, and imports no package that only one function needs"
import json

from project import LIB, python

OPTIONAL = {'nbdev', 'papermill', 'diffusers', 'accelerate', 'peft', 'deepinv', 'caustics', 'skimage'}
HEAVY = {'lpips', 'matplotlib', 'torchvision'}
CHAPTERS = sorted(p.stem for p in LIB.glob('*.py') if not p.stem.startswith('_'))

def seconds(code): return float(python('-c', f'import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter()-start)'))

def test_import_costs_half_a_second_more_than_torch():
    every = 'import rtb_nb\n' + '\n'.join(f'import rtb_nb.{m}' for m in CHAPTERS)
    runs = [[seconds(code) for code in ('import torch', 'import rtb_nb', every)] for _ in range(3)]
    torch, library, chapters = map(min, zip(*runs))
    assert library <= torch+.5, f'import rtb_nb takes {library:.2f} s, import torch {torch:.2f} s'
    assert chapters <= torch+.5, f'importing every chapter takes {chapters:.2f} s, import torch {torch:.2f} s'

PROBE = '''
import importlib, json, sys
found = {}
for module in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(module)
    found[module] = sorted({m.partition('.')[0] for m in set(sys.modules)-before})
print(json.dumps(found))
'''

def test_imports_no_optional_package():
    found = json.loads(python('-c', PROBE, 'rtb_nb', *(f'rtb_nb.{m}' for m in CHAPTERS)))
    assert not set(found.pop('rtb_nb')) & (OPTIONAL | HEAVY)
    assert {m: sorted(set(tops) & OPTIONAL) for m, tops in found.items()} == {m: [] for m in found}

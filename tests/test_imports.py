"Importing the library costs little more than torch, and no package that one function needs"
import json

from project import LIB, python

OPTIONAL = {'nbdev', 'papermill', 'diffusers', 'accelerate', 'peft', 'deepinv', 'caustics',
            'skimage'}
HEAVY = {'lpips', 'matplotlib', 'torchvision'}
CHAPTERS = sorted(p.stem for p in LIB.glob('*.py') if not p.stem.startswith('_'))

def seconds(code):
    clock = 'import time; start = time.perf_counter()', 'print(time.perf_counter()-start)'
    return float(python('-c', f'{clock[0]}\n{code}\n{clock[1]}'))

def test_import_costs_half_a_second_more_than_torch():
    every = 'import rtb_nb\n' + '\n'.join(f'import rtb_nb.{m}' for m in CHAPTERS)
    programs = 'import torch', 'import rtb_nb', every
    runs = [[seconds(code) for code in programs] for _ in range(3)]
    torch, library, chapters = map(min, zip(*runs))
    assert library <= torch+.5, f'rtb_nb takes {library:.2f} s, torch {torch:.2f} s'
    assert chapters <= torch+.5, f'every chapter takes {chapters:.2f} s, torch {torch:.2f} s'

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
    assert not {m: tops for m, tops in found.items() if set(tops) & OPTIONAL}

TRAINS = '''
import sys
for absent in sys.argv[1:]: sys.modules[absent] = None # importing it fails
import torch
from rtb_nb.beds import plane
from rtb_nb.behaviours import OnPolicy
from rtb_nb.experiment import record, table
from rtb_nb.train import Trainer, vector_drifts
problem = plane(steps=3)
posterior = problem.posterior(vector_drifts(problem))
trainer = Trainer(posterior, OnPolicy(posterior, 4)).fit(torch.tensor([[.9]]), 2, log=str)
print(len(trainer.history), table([record(dict(row='RTB'), dict(elbo=1.))]).cells[0][0])
'''

def test_trains_without_what_only_some_functions_need():
    "Without the notebooks' tools and the metrics' networks: import, two iterations, a table"
    said = python('-c', TRAINS, 'nbdev', 'execnb', 'papermill', 'lpips', 'diffusers', 'deepinv')
    assert said.split() == ['2', 'RTB']

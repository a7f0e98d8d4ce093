"The tree under test: where it is, its notebooks, and how a test starts a process of its own"
import os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB, NBS = ROOT/'rtb_nb', ROOT/'nbs'

def notebooks():
    "Every notebook of nbs/ and its folders, in reading order"
    def hidden(p): return any(s.startswith(('.', '_')) for s in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p))

def chapters(): return [p for p in notebooks() if p.parent == NBS and p.name[0].isdigit()]
def experiments(): return [p for p in notebooks() if p.name.startswith('exp_')]
def benchmarks(): return [p for p in notebooks() if p.name.startswith('bench_')]
def name(p): return p.relative_to(NBS).with_suffix('').as_posix()

def python(*args, cwd=ROOT):
    "This interpreter run on `args`: its standard output, or an assertion with what it said"
    unwanted = 'IN_TEST', 'PYTHONDONTWRITEBYTECODE' # nbdev's tests set the first
    env = {k: v for k, v in os.environ.items() if k not in unwanted}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'exit status {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done.stdout

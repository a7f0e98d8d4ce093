"One thread per process, as in CI: tests must not depend on how many cores a machine has"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

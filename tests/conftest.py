"One thread a process, as in CI: the tests of a shared machine must not depend on how many cores it has"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

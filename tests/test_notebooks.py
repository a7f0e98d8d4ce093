"Chapters, index and tutorials run from top to bottom, their assertions included"
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

from project import benchmarks, chapters, experiments, name, notebooks

LESSONS = sorted(set(notebooks()) - set(experiments()) - set(benchmarks()))

def test_there_are_chapters(): assert chapters() and set(chapters()) <= set(LESSONS)

@pytest.mark.parametrize('notebook', LESSONS, ids=name)
def test_notebook(notebook):
    passed, _ = run_notebook(notebook, skip_flags=get_config().tst_flags.split())
    assert passed, f'{notebook.name} failed: its traceback is in the captured stderr'

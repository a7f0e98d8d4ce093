"The documentation builds: nbdev processes, smalldocs renders; README.md is current"
import html, json, re, shutil
from collections import Counter

import pytest

from project import NBS, ROOT, chapters, name, notebooks, python

BUILD = '''
import json
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build
refresh_quarto_yml()
processed = proc_nbs(n_workers=0)
site = build(processed, quiet=True)
print(json.dumps(dict(site=str(site.out), warnings=site.warnings)))
'''

@pytest.fixture(scope='module')
def docs(tmp_path_factory):
    "A copy of the notebooks, processed and rendered: the folder of the site, and the warnings"
    copy = tmp_path_factory.mktemp('docs')
    for n in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/n, copy)
    unwanted = shutil.ignore_patterns('.ipynb_checkpoints', 'nbdev.yml')
    shutil.copytree(NBS, copy/'nbs', symlinks=True, ignore=unwanted)
    said = python('-c', BUILD, cwd=copy)
    made = json.loads(said.splitlines()[-1])
    return copy/made['site'], made['warnings']

def page(docs, notebook): return (docs[0]/f'{name(notebook)}.html').read_text()

def title(notebook):
    first = ''.join(json.loads(notebook.read_text())['cells'][0]['source'])
    assert re.match(r'# .+\n\n> .+', first), \
        f'{notebook.name} must open with a title, an empty line and a one-line description'
    return first.splitlines()[0][2:].strip()

def text(fragment): return html.unescape(re.sub(r'<[^>]+>', '', fragment)).strip()

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_has_a_page_with_its_title(notebook, docs):
    found = re.search(r'<h1 class="title"[^>]*>(.*?)</h1>', page(docs, notebook), re.S)
    assert found and text(found[1]) == title(notebook).replace('`', '')

def test_chapter_pages_show_what_the_notebooks_stored(docs):
    for notebook in chapters():
        cells = json.loads(notebook.read_text())['cells']
        shown = [c for c in cells if c['cell_type'] == 'code'
                 and not re.search(r'^#\| ?hide\b', ''.join(c['source']), re.M)]
        stored = sum('image/png' in o.get('data', {}) for c in shown for o in c['outputs'])
        found = page(docs, notebook).count('src="data:image/png')
        assert found == stored, f'{notebook.name} stores {stored} figures'

def test_sidebar_lists_every_notebook_once(docs):
    first = page(docs, NBS/'index.ipynb')
    bar = re.search(r'<nav id="quarto-sidebar".*?</nav>', first, re.S)[0]
    links = re.findall(r'href="(?:\./)?([^"#]+)\.html"', bar)
    assert Counter(links) == Counter(name(p) for p in notebooks())

def test_site_renders_without_warnings(docs):
    "Quarto names a page after its module, smalldocs after its notebook: that alone may differ"
    assert not [w for w in docs[1] if 'output-file' not in w]

def test_quarto_reads_the_same_file():
    link = NBS/'_quarto.yml'
    assert link.is_symlink() and link.resolve() == ROOT/'_quarto.yml'

def test_readme_is_current(): python(ROOT/'tools'/'readme.py', '--check')

def test_readme_has_the_two_commands():
    lines = (ROOT/'README.md').read_text().splitlines()
    assert 'pip install uv && uv run papermill nbs/exp_lensing.ipynb out.ipynb' in lines
    assert 'pip install uv && uv run --extra dev pytest' in lines

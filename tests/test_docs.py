"The documentation builds: nbdev processes, smalldocs renders; README.md is current"
import html, json, re, shutil
from collections import Counter
from pathlib import Path

import pytest, yaml

from project import NBS, ROOT, benchmarks, chapters, experiments, name, notebooks, python

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

def sidebar():
    "What _quarto.yml lists: {section: {notebook: text}}, in its order"
    bar = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']
    return {part['section']: {e['href'].removesuffix('.ipynb'): str(e['text'])
                              for e in part['contents']} for part in bar}

def listed(*starts):
    "The entries of the sections that begin so: {notebook: text}"
    return {href: words for section, entries in sidebar().items()
            if section.startswith(starts) for href, words in entries.items()}

def test_sidebar_lists_every_notebook_once(docs):
    links = [href for entries in sidebar().values() for href in entries]
    assert Counter(links) == Counter(name(p) for p in notebooks())
    first = page(docs, NBS/'index.ipynb')
    bar = re.search(r'<nav id="quarto-sidebar".*?</nav>', first, re.S)[0]
    assert re.findall(r'href="(?:\./)?([^"#]+)\.html"', bar) == links

def test_tutorials_come_first_and_chapters_in_their_order():
    assert [s.partition(':')[0] for s in sidebar()][:3] == ['Start', 'Tutorials', 'Chapters']
    assert list(listed('Chapters')) == [name(p) for p in chapters()]

@pytest.mark.parametrize('section', ['Tutorials', 'Chapters', 'Experiments', 'Benchmarks'])
def test_an_entry_is_the_number_and_the_title_of_its_page(section):
    for href, words in listed(section).items():
        number = re.match(r'\d+[a-z]?(?=_)', Path(href).name)
        wanted = [number[0]] if number else []
        assert words == ' '.join([*wanted, title(NBS/f'{href}.ipynb').replace('`', '')])

def test_gallery_shows_every_experiment_and_bench_as_it_is_stored():
    python(ROOT/'tools'/'gallery.py', '--check')
    cells = json.loads((NBS/'gallery.ipynb').read_text())['cells']
    shown = ''.join(''.join(c['source']) for c in cells)
    for notebook in experiments() + benchmarks():
        assert f'](images/gallery/{name(notebook)}-' in shown, f'no picture of {name(notebook)}'

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

"""Take the pictures of the gallery out of the notebooks that drew them.

    python tools/gallery.py           # write nbs/images/gallery/*.png
    python tools/gallery.py --check   # exit 1 where a picture is not the one that a notebook stores

A picture is named in nbs/gallery.ipynb: `images/gallery/exp_exact-2.png` is the second figure that
nbs/exp_exact.ipynb stores, and `images/gallery/tutorials/…` comes from the tutorials.
"""
import base64, json, re, sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
FOLDER, PAGE = 'images/gallery', 'gallery.ipynb'

def cells(notebook): return json.loads((NBS/notebook).read_text(encoding='utf-8'))['cells']

def source(cell): return ''.join(cell['source'])

def figures(notebook):
    "The figures that a notebook stores, in their order"
    data = [o.get('data', {}) for c in cells(notebook) for o in c.get('outputs', [])]
    return [base64.b64decode(''.join(d['image/png'])) for d in data if 'image/png' in d]

def wanted():
    "The pictures that the gallery shows: path under nbs/ -> bytes"
    text, found = '\n'.join(source(c) for c in cells(PAGE)), {}
    for path, stem, number in re.findall(rf'\(({FOLDER}/([\w/]+)-(\d+)\.png)\)', text):
        stored = figures(f'{stem}.ipynb')
        if not 1 <= int(number) <= len(stored):
            sys.exit(f'{PAGE} asks for figure {number} of {stem}.ipynb, which stores {len(stored)}')
        found[path] = stored[int(number)-1]
    return found

def main(check=False):
    want = wanted()
    have = [p.relative_to(NBS).as_posix() for p in sorted((NBS/FOLDER).rglob('*.png'))]
    stale = [p for p, b in want.items() if p not in have or (NBS/p).read_bytes() != b]
    stray = [p for p in have if p not in want]
    if check:
        return [f'nbs/{p} is not the figure stored: run python tools/gallery.py' for p in stale+stray]
    for p in stray: (NBS/p).unlink()
    for p in stale:
        (NBS/p).parent.mkdir(parents=True, exist_ok=True)
        (NBS/p).write_bytes(want[p])
    print('wrote', *stale) if stale else print('the gallery is current')
    return []

if __name__ == '__main__':
    if set(sys.argv[1:]) - {'--check'}: sys.exit(__doc__)
    problems = main(check='--check' in sys.argv)
    if problems: sys.exit('\n'.join(problems))

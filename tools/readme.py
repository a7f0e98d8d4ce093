"""Make README.md from nbs/index.ipynb, without Quarto.

    python tools/readme.py           # write README.md, and the figures of its code cells to README_files/
    python tools/readme.py --check   # exit 1 where they are not what the notebook gives

A code cell shows its stored outputs; cells marked `#| hide` stay out, and `#| echo: false` hides a cell's code.
Relative links are written from the notebook's folder, so they gain `nbs/` here.
"""
import base64, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, README, FIGURES = 'nbs/index.ipynb', 'README.md', 'README_files'

def joined(s): return s if isinstance(s, str) else ''.join(s)

def from_root(text):
    "Links relative to nbs/ become links relative to the repository"
    return re.sub(r'(\]\()(?![a-z][a-z0-9+.-]*:|[#/])', r'\1nbs/', text)

def fenced(text, language=''): return f'```{language}\n{text.rstrip()}\n```'

def shown(output, figures):
    "One stored output as markdown; a picture is added to `figures`"
    kind, data = output['output_type'], output.get('data', {})
    if kind == 'error': raise ValueError(f"{SOURCE} holds the error {output['ename']!r}: run it again, then make the README")
    if kind == 'stream': return fenced(joined(output['text'])) if output['name'] == 'stdout' else ''
    if 'image/png' in data:
        name = f'{FIGURES}/figure-{len(figures)+1}.png'
        figures[name] = base64.b64decode(joined(data['image/png']))
        return f'![]({name})'
    if 'text/markdown' in data: return joined(data['text/markdown']).rstrip()
    return fenced(joined(data['text/plain'])) if 'text/plain' in data else ''

def readme(nb):
    "README.md's text, and its figures as {path: bytes}"
    parts, figures = [], {}
    for cell in nb['cells']:
        lines = joined(cell['source']).splitlines()
        if cell['cell_type'] == 'markdown': parts.append(from_root('\n'.join(lines)))
        if cell['cell_type'] != 'code': continue
        options = {o.removeprefix('#|').strip() for o in lines if o.startswith('#|')}
        if 'hide' in options: continue
        code = '\n'.join(o for o in lines if not o.startswith('#|'))
        if code.strip() and 'echo: false' not in options: parts.append(fenced(code, 'python'))
        parts += [shown(o, figures) for o in cell['outputs']]
    note = f'<!-- Made from {SOURCE} by tools/readme.py: edit that notebook, not this file -->'
    return '\n\n'.join([p.strip() for p in parts if p.strip()] + [note]) + '\n', figures

def main(check=False):
    text, figures = readme(json.loads((ROOT/SOURCE).read_text(encoding='utf-8')))
    want = {README: text.encode(), **figures}
    have = [README, *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT/FIGURES).glob('*')))]
    stale = [n for n, b in want.items() if not (ROOT/n).is_file() or (ROOT/n).read_bytes() != b]
    stray = [n for n in have if n not in want]
    if check: return [f'{n} is not what {SOURCE} gives: run python tools/readme.py' for n in stale+stray]
    for n in stray: (ROOT/n).unlink()
    for n in stale:
        (ROOT/n).parent.mkdir(exist_ok=True)
        (ROOT/n).write_bytes(want[n])
    print('wrote', *stale) if stale else print(README, 'is current')
    return []

if __name__ == '__main__':
    if set(sys.argv[1:]) - {'--check'}: sys.exit(__doc__)
    problems = main(check='--check' in sys.argv)
    if problems: sys.exit('\n'.join(problems))

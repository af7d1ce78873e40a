"""nbs/index.ipynb -> README.md.  python .ci/readme.py [--check]

nbconvert's Markdown exporter does the work; nbdev's own command wants a program that is not on PyPI.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
HEAD = '<!-- Made from nbs/index.ipynb by .ci/readme.py; edit the notebook. -->\n\n'
DIRECTIVE = re.compile(r'(?m)^#\|.*\n?')


def readme(notebook: Path) -> str:
    "The README that a notebook gives."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    for cell in nb.cells:
        cell.source = DIRECTIVE.sub('', cell.source)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources['outputs']:
        sys.exit(f'{notebook} shows pictures; README.md can only link to files that are committed.')
    text = text.replace('](../', '](')  # the notebook lies one folder deeper than the README
    lines = [line.rstrip() for line in text.splitlines()]
    return HEAD + re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip() + '\n'


if __name__ == '__main__':
    want, target = readme(ROOT / 'nbs/index.ipynb'), ROOT / 'README.md'
    if '--check' not in sys.argv:
        target.write_text(want, encoding='utf-8')
    elif not target.exists() or target.read_text(encoding='utf-8') != want:
        sys.exit('README.md is not what nbs/index.ipynb gives. Run `make readme`.')
    else:
        print('README.md is what nbs/index.ipynb gives.')

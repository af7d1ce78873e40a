"""Strip from committed notebooks what differs from run to run: python .ci/scrub.py [--check] [NOTEBOOK ...]

Execution counts, cell metadata and object addresses (nbdev's cleaner), and in outputs: times and
dates, paths of a machine, progress bars, ports, warnings' file and line. Without names it takes
every notebook under nbs/. `--check` changes nothing and fails where something would change, or where
an output is an error. Scrubbing twice is scrubbing once.
"""
import copy
import json
import re
import sys
from pathlib import Path

from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parents[1]

# A picture or a font inlined as base64 is data: none of the rules below may touch it.
DATA_URI = re.compile(r'data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+')
WIDGET = 'application/vnd.jupyter.widget-view+json'
# What starts a path: not the inside of a URL, of a word or of another path.
START = r'(?<![\w./:~\\…-])'
RULES = [(re.compile(pattern, re.MULTILINE), new) for pattern, new in [
    # the report of %time and %%time
    (r'^(CPU times|Wall time):.*\n?', ''),
    # what libraries warn about among themselves; then `/a/b.py:12: SomeWarning: text` and the line of source below it
    (r'^\S*/(?:site|dist)-packages/\S*\.py:\d+: (?!VegcWarning)\w*Warning: .*\n?(?:  .*\n?)?', ''),
    (r'^\S*\.py:\d+: (\w*Warning: .*)\n(?:  .*\n?)?', r'\1\n'),
    # paths: a virtual environment, temporary folders, somebody's home
    (START + r'(?:/[\w.@+-]+)+/(?:site|dist)-packages/', '…/site-packages/'),
    (START + r'(?:/private)?/(?:tmp|var/tmp|var/folders/\w+/\w+/T)/[\w.@+-]+', '…/tmp'),
    (START + r'/(?:home|Users)/[\w.@+-]+', '~'),
    (START + r'/root(?=/)', '~'),
    (r'(?i)\b[A-Z]:\\+Users\\+[\w.@+-]+', '~'),
    # times of day, dates, and moments
    (r'\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)?', '2000-01-01T00:00:00Z'),
    (r'\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT', 'Sat, 01 Jan 2000 00:00:00 GMT'),
    (r'\b\d{4}-\d\d-\d\d\b', '2000-01-01'),
    (r'\b\d?\d:[0-5]\d:[0-5]\d\b(?!Z| GMT)', '0:00:00'),
    (r'\b[0-5]\d:[0-5]\d\b(?!:)', '00:00'),
    # rates and durations; a whole number of seconds is a setting more often than a measurement
    (r'\b\d[\d,.]*(?= ?(?:it|items|img|images|pictures|rows|urls|URLs|requests|[kM]?B)/s\b)', '…'),
    (r'\b(?:\d+ ?min )?\d+\.\d+(?= ?(?:s|sec|secs|seconds|min|minutes)\b)', '…'),
    (r'\b\d+(?:\.\d+)?(?= ?(?:ms|µs|us|ns|milliseconds)\b)', '…'),
    # addresses of objects, ports of loopback servers
    (r'\b0x[0-9a-f]{6,}\b', '0x…'),
    (r'\b(127\.0\.0\.1|localhost):\d{2,5}\b', r'\1:PORT'),
]]


def scrub_text(text: str, root: Path = ROOT) -> str:
    "Text of an output without what differs from run to run."
    parts, last = [], 0
    for found in DATA_URI.finditer(text):
        parts += [_rules(text[last:found.start()], root), found.group()]
        last = found.end()
    return ''.join(parts) + _rules(text[last:], root)


def _rules(text: str, root: Path) -> str:
    for path, new in [(root, ''), (root.parent, '…/')]:
        # a root of one letter or none would match far too much
        if len(path.parts) > 1: text = re.sub(START + re.escape(str(path)) + r'(?:/|\b)', new, text)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    return text


def _bars(text: str) -> str:
    "A stream as a terminal would leave it, without progress bars."
    lines = [line.rsplit('\r', 1)[-1] for line in text.replace('\r\n', '\n').split('\n')]
    return '\n'.join(line for line in lines if not re.search(r'\d%\|', line))


def _text(value: str | list[str], change) -> list[str]:
    "Apply `change` to a notebook's text, which is a string or a list of lines."
    return change(''.join(value)).splitlines(keepends=True)


def scrub_output(output: dict, root: Path = ROOT) -> dict | None:
    "One output, scrubbed, or None where nothing of it should stay."
    output = copy.deepcopy(output)
    if output['output_type'] == 'stream':
        output['text'] = _text(output['text'], lambda t: scrub_text(_bars(t), root))
        return output if ''.join(output['text']).strip() else None
    data = output.get('data', {})
    # a live bar or widget is empty without its kernel; fastprogress leaves its bar as HTML
    if WIDGET in data or re.search(r'<progress\b', ''.join(data.get('text/html', ''))): return None
    for kind in data:
        if kind.startswith('text/') or kind == 'image/svg+xml':
            data[kind] = _text(data[kind], lambda t: scrub_text(t, root))
    return output


def scrub(nb: dict, root: Path = ROOT) -> dict:
    "A notebook as it should be committed."
    nb = copy.deepcopy(nb)
    clean_nb(nb)
    nb['metadata'].pop('widgets', None)
    for cell in nb['cells']:
        if cell['cell_type'] != 'code': continue
        scrubbed = [scrub_output(o, root) for o in cell['outputs']]
        cell['outputs'] = [o for o in scrubbed if o]
    return nb


def problems(path: Path, root: Path = ROOT) -> list[str]:
    "What keeps a notebook from being committed as it is."
    nb = json.loads(path.read_text(encoding='utf-8'))
    found = [f'{path}: cell {i} shows an error' for i, cell in enumerate(nb['cells'])
             for o in cell.get('outputs', []) if o['output_type'] == 'error']
    clean = scrub(nb, root)
    dirty = [i for i, (a, b) in enumerate(zip(nb['cells'], clean['cells'], strict=True)) if _joined(a) != _joined(b)]
    if dirty: found.append(f'{path}: cells {", ".join(map(str, dirty))} hold counts, times, paths or bars')
    if nb['metadata'] != clean['metadata']: found.append(f'{path}: metadata that should not be committed')
    return found


def _joined(value):
    "The same notebook part with lists of lines joined: a notebook may hold either."
    if isinstance(value, dict): return {k: _joined(v) for k, v in value.items()}
    if isinstance(value, list) and all(isinstance(v, str) for v in value): return ''.join(value)
    return [_joined(v) for v in value] if isinstance(value, list) else value


def write(path: Path, root: Path = ROOT) -> None:
    "Scrub a notebook file in place, in the layout that nbdev and Jupyter write."
    text = path.read_text(encoding='utf-8')
    new = json.dumps(scrub(json.loads(text), root), sort_keys=True, indent=1, ensure_ascii=False) + '\n'
    if new != text: path.write_text(new, encoding='utf-8')


def notebooks(root: Path = ROOT) -> list[Path]:
    "Every notebook of the project."
    return sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


if __name__ == '__main__':
    names = [Path(a) for a in sys.argv[1:] if a != '--check'] or notebooks()
    if '--check' in sys.argv:
        wrong = [line for path in names for line in problems(path)]
        if wrong: sys.exit('\n'.join([*wrong, 'Run `make clean-notebooks`; a notebook with an error must run first.']))
        print(f'{len(names)} notebooks are clean.')
    else:
        for path in names: write(path)

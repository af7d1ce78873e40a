""".ci/scrub.py: what differs from run to run goes, what a reader needs stays, and twice is once."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / '.ci/scrub.py'


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f'.ci/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scrub = load('scrub')
HERE = Path('/srv/someone/project')

GONE = [
    ('saved to /srv/someone/project/out/a.txt', 'saved to out/a.txt'),
    ('beside /srv/someone/other', 'beside …/other'),
    ('in /tmp/tmpab12cd/images/x.jpg', 'in …/tmp/images/x.jpg'),
    ('in /var/folders/xy/z123/T/tmpab/x', 'in …/tmp/x'),
    ('File /home/ada/venv/lib/python3.11/site-packages/torch/nn.py', 'File …/site-packages/torch/nn.py'),
    ("open('/Users/ada/data.csv')", "open('~/data.csv')"),
    (r'C:\Users\ada\data.csv', r'~\data.csv'),
    ('fetched 2031-05-06T07:08:09Z', 'fetched 2000-01-01T00:00:00Z'),
    ('on 2031-05-06', 'on 2000-01-01'),
    ('took 12.34 s', 'took … s'),
    ('took 1.5 min', 'took … min'),
    ('12 ms an image', '… ms an image'),
    ('<td>00:13</td>', '<td>00:00</td>'),
    ('153.2 it/s', '… it/s'),
    ('1,204 images/s', '… images/s'),
    ('http://127.0.0.1:43121/images?q=tbn:1', 'http://127.0.0.1:PORT/images?q=tbn:1'),
    ('<obj at 0x7f3a2b1c9d>', '<obj at 0x…>'),
    ('Wall time: 3 s\nkept', 'kept'),
    ('/v/lib/python3.11/site-packages/torch/a.py:1: FutureWarning: old\n  warn(\nkept', 'kept'),
    ('/v/lib/python3.11/site-packages/fastai/a.py:1: VegcWarning: look\n  f()\nkept', 'VegcWarning: look\nkept'),
    ('/tmp/ipykernel_12/34.py:5: UserWarning: careful\n  f(x)\nkept', 'UserWarning: careful\nkept'),
]
STAYS = [
    'accuracy 0.8523 (0.8011–0.8902)', 'size 320x240', '16:9', '--deadline 15 seconds',
    'https://example.org/home/ada/pic.jpg',
    'images/pho/0123456789abcdef.jpg', 'of 7,154 URLs', 'host 192.0.2.1:8080', 'epoch 3', 'ratio 1.5 times',
    'a/b/c 12:1',
    'sha256 0123456789abcdef0123456789abcdef', 'key 0x12',
    '<img src="data:image/png;base64,/home/ada/12ms+0x7f3a2b1c9d==">',
]


@pytest.mark.parametrize('before,after', GONE)
def test_what_differs_goes(before, after): assert scrub.scrub_text(before, HERE) == after


@pytest.mark.parametrize('text', STAYS)
def test_what_a_reader_needs_stays(text): assert scrub.scrub_text(text, HERE) == text


@given(st.lists(st.sampled_from([t for pair in GONE for t in pair] + STAYS + ['\n', ' ', '/', '0', ':']), max_size=6))
def test_twice_is_once(parts):
    once = scrub.scrub_text(''.join(parts), HERE)
    assert scrub.scrub_text(once, HERE) == once


def notebook(*outputs, **cell):
    code = dict(cell_type='code', id='a1', metadata={'scrolled': True}, execution_count=7, source=['f()'],
                outputs=list(outputs)) | cell
    return dict(nbformat=4, nbformat_minor=5, metadata={'language_info': {'version': '3.11.7'}, 'widgets': {}},
                cells=[code])


def test_a_notebook_loses_counts_metadata_and_bars():
    nb = notebook(
        dict(output_type='stream', name='stderr',
             text=['  0%|          | 0/10\r', ' 50%|#####     | 5/10\r', '100%|##########| 10/10\n']),
        dict(output_type='display_data', metadata={}, data={scrub.WIDGET: {'model_id': 'x'}, 'text/plain': ['0%']}),
        dict(output_type='display_data', metadata={}, data={'text/html': ['<progress value="3"></progress>']}),
        dict(output_type='execute_result', execution_count=7, metadata={},
             data={'text/plain': ['0.93'], 'image/png': 'iVBORw0KGgo='}),
    )
    clean = scrub.scrub(nb)
    cell, = clean['cells']
    assert cell['execution_count'] is None and cell['metadata'] == {} and clean['metadata'] == {}
    output, = cell['outputs']
    assert output['data'] == {'text/plain': ['0.93'], 'image/png': 'iVBORw0KGgo='} and output['execution_count'] is None
    assert scrub.scrub(clean) == clean
    assert nb['cells'][0]['execution_count'] == 7, 'the notebook given is left as it was'


def run(*args): return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def test_check_fails_until_scrubbed_and_changes_nothing(tmp_path):
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(notebook(dict(output_type='stream', name='stdout', text=['done in 3.21 s\n']))))
    before = path.read_bytes()
    done = run('--check', path)
    assert done.returncode == 1 and 'cells 0' in done.stderr and path.read_bytes() == before
    assert run(path).returncode == 0
    assert run('--check', path).returncode == 0
    assert 'done in … s' in path.read_text()


def test_check_refuses_an_error_output_even_when_clean(tmp_path):
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(notebook(dict(output_type='error', ename='ValueError', evalue='x', traceback=[]))))
    run(path)
    done = run('--check', path)
    assert done.returncode == 1 and 'shows an error' in done.stderr


def test_a_scrubbed_file_is_what_nbdev_would_write(tmp_path):
    from fastcore.nbio import read_nb, write_nb
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(notebook(dict(output_type='stream', name='stdout', text='é 1\n2\n'))))
    run(path)
    text = path.read_text()
    write_nb(read_nb(path), path)
    assert path.read_text() == text

"The studies run top to bottom in their small mode and come to about the numbers that are written down."
import json
import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

STUDIES = ROOT/'nbs'/'studies'


@pytest.mark.parametrize('name', sorted(p.stem for p in STUDIES.glob('*.ipynb')))
def test_small_mode(tmp_path, monkeypatch, name):
    known = json.loads((STUDIES/f'{name}.json').read_text('utf-8'))
    monkeypatch.setitem(os.environ, 'VEGC_SMALL', '1')
    monkeypatch.setitem(os.environ, 'VEGC_METRICS', str(tmp_path/'metrics.json'))
    notebook = nbformat.read(STUDIES/f'{name}.ipynb', 4)
    where = dict(metadata=dict(path=str(tmp_path)))
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources=where).execute()
    got = json.loads((tmp_path/'metrics.json').read_text('utf-8'))
    assert set(got) == set(known)
    for key, (low, high) in known.items():
        assert low <= got[key] <= high, f'{key} is {got[key]}, expected {low} to {high}'


@pytest.mark.parametrize('name', sorted(p.stem for p in STUDIES.glob('*.ipynb')))
def test_is_committed_with_its_pictures(name):
    path = STUDIES/f'{name}.ipynb'
    outputs = [o for c in nbformat.read(path, 4).cells for o in c.get('outputs', [])]
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 8
    assert path.stat().st_size < 1_500_000

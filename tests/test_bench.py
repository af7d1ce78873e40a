"The tables in the docs are those that the committed results give."
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'nbs'/'bench'))
from ingest_bench import as_markdown, medians


@pytest.mark.parametrize('name, table', [
    ('ingest', lambda found: medians(found['rows'])), ('faults', lambda found: found),
    ('plain', lambda found: found['plain methods']), ('plain', lambda found: found['ways to balance'])])
def test_the_docs_show_the_results_that_are_committed(name, table):
    found = json.loads((ROOT/'nbs'/'bench'/f'{name}.json').read_text('utf-8'))
    assert as_markdown(table(found)) in (ROOT/'docs'/'benchmarks.md').read_text('utf-8')

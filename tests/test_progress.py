"""Long work shows that it goes on: a bar on a terminal, also on one that does not know its size; none elsewhere."""
import os
import re
import subprocess
import sys

import pytest
from tiny import draw

pty = pytest.importorskip('pty')  # not on Windows
WORK = '''
import sys, warnings
warnings.simplefilter('ignore')
from vegc.acquire.add import add
from vegc.cleaning.issues import find_issues
from vegc.evaluation.crossval import cross_validate, linear_predictions
from vegc.evaluation.predictions import predictions
from vegc.splits.split import split
from vegc.training.train import train
add(sys.argv[1], sys.argv[2], subject='characters')
split(sys.argv[2])
train(sys.argv[2], arch='efficientnet_lite0', size=32, epochs=(1, 1))
find_issues(sys.argv[2])
predictions(sys.argv[2], 'raw', 'test')
linear_predictions(sys.argv[2], 'raw')
cross_validate(sys.argv[2], 'raw')
'''


def on_a_terminal(*args):
    "What a program writes on a terminal of no size; its exit code."
    pid, fd = pty.fork()
    if not pid: os.execve(sys.executable, [sys.executable, '-c', *args], dict(os.environ, TERM='xterm'))
    out = b''
    while True:
        try: part = os.read(fd, 65_536)
        except OSError: break
        if not part: break
        out += part
    os.close(fd)
    return out.decode('utf-8', 'replace'), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_each_long_step_has_a_bar_on_a_terminal(tmp_path):
    said, code = on_a_terminal(WORK, str(draw(tmp_path / 'pictures')), str(tmp_path / 'ds'))
    assert code == 0, said[-2000:]
    bars = set(re.findall(r'\r\s*([^\r\n|]*?): +\d+%\|', said))
    want = {'features', 'near-duplicates', 'head', 'unfrozen 1/1', 'folds', 'predictions', 'linear model',
            'cross-validation'}
    assert want <= bars, want - bars


def test_none_is_drawn_where_nobody_looks():
    code = "from vegc.core import progress\nfor i in progress(range(3), desc='counting'): pass"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ''
    said, _ = on_a_terminal(code)
    assert 'counting' in said

"""Shared by the tests: the project's root, and the distributions built from what git would hand out."""
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(sys.executable).with_name('vegc')  # the console script of this environment


def project_files(root):
    "Every file that git tracks, or would after `git add .`: its name and its bytes."
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root,
                            capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split('\0')):
        if (root / name).is_file(): yield name, (root / name).read_bytes()  # not there: deleted and not yet committed


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "Wheel and sdist. The build is not isolated, so that it needs no network."
    folder = tmp_path_factory.mktemp('build')
    source, dist = folder / 'source', folder / 'dist'
    for name, data in project_files(ROOT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    # `build` makes the wheel from the unpacked sdist, as pip does for somebody without the repository
    command = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(dist.glob('*.whl')), next(dist.glob('*.tar.gz'))


def hears_ctrl_c():
    "For preexec_fn: whatever runs in the background is deaf to Ctrl-C, and passes that on to what it starts."
    signal.signal(signal.SIGINT, signal.SIG_DFL)

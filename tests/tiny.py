"""A tiny dataset with stages, made once for the tests that ask much of one: digits of scikit-learn, drawn as files."""
import hashlib
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from vegc.acquire.add import add
from vegc.cleaning.clean import clean
from vegc.cleaning.issues import find_issues
from vegc.data.dataset import ImageDataset
from vegc.splits.split import split
from vegc.training.train import train

NAMES = ('zero', 'one', 'two')


def draw(folder, n=18, px=32, first=0):
    "Digits as PNG files, a folder a class."
    digits = load_digits()
    for c, name in enumerate(NAMES):
        (folder/name).mkdir(parents=True)
        for i, k in enumerate(np.flatnonzero(digits.target == c)[first:first + n]):
            im = Image.fromarray((digits.images[k]*15).astype(np.uint8)).resize((px, px), Image.Resampling.BICUBIC)
            im.save(folder/name/f'{i:03}.png')
    return folder


def make(folder, *, splits=True, stages=True, decisions=True):
    "A dataset of 54 digits; with stages `raw` and `more` of a small network, issues and a decision."
    ds = ImageDataset(folder/'ds', subject='characters')
    add(draw(folder/'pictures'), ds)
    if splits: split(ds)
    if stages:
        for stage, seed in (('raw', 42), ('more', 7)):
            train(ds, arch='small_cnn', size=32, epochs=(0, 2), stage=stage, seed=seed)
    if decisions:
        find_issues(ds)
        path = ds.images.path[ds.images.split == 'train'].iloc[0] if splits else ds.images.path.iloc[0]
        (folder/'decisions.csv').write_text(f'path,action,label,who,why\n{path},exclude,,me,smudged\n')
        clean(ds, decisions=folder/'decisions.csv')
    return ds


def copy(ds, folder):
    "The same dataset at another place."
    return ImageDataset(shutil.copytree(ds.path, Path(folder)/'ds', symlinks=True))


def contents(root):
    "Every file below a folder, and a hash of its bytes; links by where they lead."
    def mark(p): return f'-> {p.readlink()}' if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
    return {p.relative_to(root).as_posix(): mark(p) for p in sorted(Path(root).rglob('*')) if p.is_symlink()
            or p.is_file()}

"""Hands settings.ini, which lies beside this file, to setuptools; everything fixed is in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(interpolation=None)
# Beside this file, not in the working directory: a build may start from anywhere.
with (Path(__file__).resolve().parent / 'settings.ini').open(encoding='utf-8') as file:
    config.read_file(file)
settings = config['DEFAULT']


def lines(key):
    "The non-empty lines of a many-line setting."
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


SUFFIX = '_requirements'
setup(
    version=settings['version'],
    python_requires=f">={settings['min_python']}",
    install_requires=lines('requirements'),
    extras_require={key.removesuffix(SUFFIX): lines(key) for key in settings if key.endswith(SUFFIX)},
    entry_points={'console_scripts': lines('console_scripts')},
)

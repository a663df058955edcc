"""Packaging of rambo_det; the configuration of its tools is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Read the version without importing the package, which would import torch."""
    text = (HERE / 'rambo_det' / 'version.py').read_text(encoding='utf-8')
    found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if found is None:
        raise RuntimeError("rambo_det/version.py has no line __version__ = '...'")
    return found.group(1)


def read_readme() -> str:
    """Read the long description, which a partial checkout may lack."""
    readme = HERE / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


setup(
    name='rambo_det',
    version=read_version(),
    description='A ranking loss for mmdetection that optimises average precision',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='The rambo_det authors',
    license='MIT',
    python_requires='>=3.8',
    packages=find_packages(include=['rambo_det', 'rambo_det.*']),
    # Links there lead to configs/, tools/ and model-index.yml, for mmengine and mim. No
    # '**', which setuptools before 62.3 takes for '*'.
    package_data={
        'rambo_det': ['py.typed']
        + [
            f'.mim/{depth}*.{end}'
            for depth in ('', '*/', '*/*/', '*/*/*/')
            for end in ('py', 'yml')
        ]
    },
    exclude_package_data={
        'rambo_det': ['.mim/tools/dev/*', '.mim/tools/experiments/*']
    },
    zip_safe=False,
    # mmdet is an extra: the maintained fork installs the same import packages, and
    # requiring mmdet here would overwrite the fork's files.
    install_requires=['torch>=2.1'],
    extras_require={
        # The least of each is what the tests run with; mmdet 3.3 refuses mmcv 2.2.
        'mmdet': [
            'mmdet>=3.3.0',
            'mmcv>=2.1.0,<2.2.0',
            'mmengine>=0.10.7',
            'pycocotools',
        ],
        'onedl': [
            'onedl-mmdetection>=3.5.1',
            'onedl-mmcv>=2.3.6',
            'onedl-mmengine>=0.10.12',
            'pycocotools',
        ],
        'dev': ['hypothesis', 'mypy', 'pytest', 'pytest-timeout', 'ruff'],
    },
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)

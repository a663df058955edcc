"""The tables in the docs are what the tool prints of the results files."""

import json

import pytest

from tests import ROOT
from tools.analysis_tools import benchmark_report
from tools.experiments import compare_report

RESULTS = ROOT / 'docs' / 'results'


FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())


@pytest.mark.parametrize('folder', FOLDERS)
def test_docs_show_what_was_compared(folder):
    comparison, groups = compare_report.read_comparison(folder)
    name = comparison['name']
    pages = [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')]
    texts = [page.read_text(encoding='utf-8') for page in pages]
    texts = [text for text in texts if f'<!-- compare {name} -->' in text]
    assert texts, f'no page shows the comparison {name}'
    for text in texts:
        shown = text.split(f'<!-- compare {name} -->')[1].split(f'<!-- end {name} -->')
        assert shown[0].strip() == compare_report.table(comparison, groups)


def test_benchmark_page_shows_what_the_file_holds():
    report = json.loads((RESULTS / 'benchmark.json').read_text(encoding='utf-8'))
    page = (ROOT / 'docs' / 'benchmark.md').read_text(encoding='utf-8')
    start, end = benchmark_report.MARKS
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == benchmark_report.text(report)
    assert report['targets'] == benchmark_report.check_targets(report)
    assert not report['quick']


def test_voc_tiny_shows_the_kinds_of_errors():
    pytest.importorskip('mmdet', reason='the tools need mmdet')
    from tools.analysis_tools import error_kinds

    page = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    content = json.loads((RESULTS / 'voc-tiny-errors.json').read_text(encoding='utf-8'))
    assert error_kinds.table(content) in page

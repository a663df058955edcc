"""The tables in the docs are what the tool prints of the results files."""

import json

import pytest

from tests import ROOT
from tools.analysis_tools import benchmark_report


def test_benchmark_page_shows_what_the_file_holds():
    path = ROOT / 'docs' / 'results' / 'benchmark.json'
    report = json.loads(path.read_text(encoding='utf-8'))
    page = (ROOT / 'docs' / 'benchmark.md').read_text(encoding='utf-8')
    start, end = benchmark_report.MARKS
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == benchmark_report.text(report)
    assert report['targets'] == benchmark_report.check_targets(report)
    assert not report['quick']


def test_calibration_page_shows_what_the_file_holds():
    pytest.importorskip('mmdet', reason='the tool needs mmdet')
    from tools.experiments import calibrations

    page = (ROOT / 'docs' / 'calibration.md').read_text(encoding='utf-8')
    start, end = calibrations.MARKS
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == calibrations.table(json.loads(calibrations.OUT.read_text()))

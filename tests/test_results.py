"""The tables in the docs are what the tool prints of the results files."""

import json
from pathlib import Path

import benchmark_report
import compare_report
import pytest
import results_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'docs' / 'results'


def test_table(tmp_path):
    a, b = tmp_path / 'ce.json', tmp_path / 'rambo.json'
    a.write_text(
        json.dumps({'loss': 1.0, 'step': 20})
        + '\n'
        + json.dumps({'pascal_voc/mAP': 0.1234, 'step': 1})
        + '\n'
    )
    b.write_text(json.dumps({'pascal_voc/mAP': 0.5, 'step': 2}) + '\n')
    assert results_table.table([a, b]).splitlines() == [
        '| AP50 after epoch | 1 | 2 |',
        '| --- | ---: | ---: |',
        '| ce | 12.3 |  |',
        '| rambo |  | 50.0 |',
    ]
    a.write_text(
        '\n'.join(json.dumps({'loss_bbox': x, 'epoch': 1 + x // 3}) for x in range(6))
    )
    with pytest.raises(ValueError, match='holds no'):
        results_table.table([a])
    assert results_table.table([a], 'loss_bbox').splitlines()[2:] == [
        '| ce | 1.000 | 4.000 |'
    ]
    with pytest.raises(ValueError, match="no 'loss_cls'; it has loss_bbox"):
        results_table.table([a], 'loss_cls')


FOLDERS = sorted(p for p in (ROOT / 'docs' / 'results').iterdir() if p.is_dir())
COMPARED = [folder for folder in FOLDERS if (folder / 'comparison.json').exists()]


@pytest.mark.parametrize('folder', COMPARED)
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


@pytest.mark.parametrize('folder', sorted({*FOLDERS} - {*COMPARED}))
def test_docs_show_what_the_files_hold(folder):
    files = sorted(folder.glob('*.json'))
    assert files
    page = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    assert results_table.table(files) in page


def test_benchmark_page_shows_what_the_file_holds():
    report = json.loads((RESULTS / 'benchmark.json').read_text(encoding='utf-8'))
    page = (ROOT / 'docs' / 'benchmark.md').read_text(encoding='utf-8')
    start, end = benchmark_report.MARKS
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == benchmark_report.text(report)
    assert report['targets'] == benchmark_report.check_targets(report)
    assert not report['quick']


def test_voc_subset_shows_what_the_files_hold():
    pytest.importorskip('mmdet', reason='the tools need mmdet')
    import ablate_report
    import error_kinds
    import measure_gradients

    page = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    head = json.loads((RESULTS / 'voc-subset-head.json').read_text(encoding='utf-8'))
    settings = head['settings']
    for name, setting in settings.items():
        for seed, run in setting['runs'].items():
            assert ablate_report.row(name, seed, run, 5) in page
    trials = [RESULTS / 'voc-subset-trials' / f'{name}.json' for name in settings]
    full = ablate_report.read_full([path for path in trials if path.exists()])
    assert len(full) >= 4
    assert ablate_report.agreement(settings, full) in page
    path = RESULTS / 'voc-subset-gradients.json'
    gradients = json.loads(path.read_text(encoding='utf-8'))
    assert measure_gradients.table(gradients['result']) in page
    for name in ('voc-tiny-errors', 'voc-subset-errors'):
        path = RESULTS / f'{name}.json'
        assert error_kinds.table(json.loads(path.read_text(encoding='utf-8'))) in page


def test_detectors_page_shows_the_measured_thresholds():
    pytest.importorskip('mmdet', reason='the tools need mmdet')
    import measure_thresholds

    page = (ROOT / 'docs' / 'detectors.md').read_text(encoding='utf-8')
    for name in ('thresholds', 'thresholds-roi'):
        path = RESULTS / f'{name}.json'
        content = json.loads(path.read_text(encoding='utf-8'))
        assert measure_thresholds.table(content) in page

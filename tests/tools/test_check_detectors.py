"""One detector of each family trains, and the docs show what was found."""

import json

import pytest

from tests import ROOT
from tools.experiments import check_detectors

# Per level, per batch, quality targets, queries; stages of a RoI head, masks.
FAMILIES = (
    'retinanet',
    'pascal_voc/fcos',
    'gfl',
    'deformable-detr',
    'cascade',
    'mask-rcnn',
)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_detector_learns_resumes_and_runs_distributed(family, tmp_path, capsys):
    pytest.importorskip('mmdet', reason='trains detectors of mmdet')
    out = tmp_path / 'results.json'
    arguments = ['--only', family, '--out', str(out), '--work-dir', str(tmp_path)]
    check_detectors.main(arguments)
    (found,) = json.loads(out.read_text())['results'].values()
    assert found['ok'] and found['end'] > found['start']
    assert '| yes | yes | yes |' in capsys.readouterr().out


def test_the_page_shows_the_results():
    results = json.loads(check_detectors.RESULTS.read_text())['results']
    page = (ROOT / 'docs' / 'detectors.md').read_text(encoding='utf-8')
    first, last = check_detectors.MARKS
    shown = page.split(first)[1].split(last)[0].strip()
    assert shown == check_detectors.table(results)
    shipped = {f'{p.parent.name}/{p.stem}' for p in check_detectors.configs()}
    assert set(results) == shipped
    assert all(found['ok'] for found in results.values())


FOUND = dict(
    key='k',
    heads=['RaMBOHead'],
    start=0.2,
    end=0.5,
    finite=True,
    metrics={'mAP': 0.0},
    resumed=True,
    two_processes=True,
    ok=True,
)


@pytest.mark.parametrize(
    'change',
    [
        dict(end=0.39),
        dict(finite=False),
        dict(metrics={}),
        dict(resumed=False),
        dict(two_processes=False),
    ],
)
def test_every_part_has_to_pass(change):
    assert check_detectors.passed(FOUND)
    assert not check_detectors.passed({**FOUND, **change})
    assert not check_detectors.passed(dict(two_processes=True))


def test_table_joins_what_shrinks_to_the_same_and_hides_what_failed():
    other = dict(FOUND, key='other', end=0.75)
    results = {'a/b': FOUND, 'c/d': FOUND, 'e/f': dict(ok=False), 'g/h': other}
    text = check_detectors.table(results)
    assert text.splitlines()[2:] == [
        '| `a/b`<br>`c/d` | `RaMBOHead` | 0.20 → 0.50 | yes | yes | yes |',
        '| `g/h` | `RaMBOHead` | 0.20 → 0.75 | yes | yes | yes |',
    ]


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        check_detectors.main(['--only', 'yolox'])
    assert 'no shipped config' in capsys.readouterr().err

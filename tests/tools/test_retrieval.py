"""Omniglot's archives, the runs of tools/experiments/retrieval.py, and their page."""

import hashlib
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests import ROOT

pytest.importorskip('mmdet', reason='needs mmdet')
from mmdet.evaluation.metrics import ReIDMetrics
from mmdet.models.reid import linear_reid_head

from tools.dataset_tools import omniglot
from tools.experiments import converged, retrieval, runs


def archive(path, alphabets, drawers=4):
    """Two characters of each alphabet, each a shade and noise of its own."""
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, 'w') as file:
        for number, alphabet in enumerate(alphabets):
            for character in range(2):
                for drawer in range(drawers):
                    pixels = generator.integers(0, 90, (105, 105)) + 80 * character
                    folder = f'images/{alphabet}/character{character:02}'
                    with file.open(
                        f'{folder}/{number}{character}_{drawer}.png', 'w'
                    ) as f:
                        Image.fromarray(pixels.astype(np.uint8)).save(f, 'png')
    return path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('omniglot')
    train = archive(folder / '1.zip', 'DCBA')
    test = archive(folder / '2.zip', ['C', 'E', 'F'])
    omniglot.main([str(train), str(test), '--out', str(folder), '--size', '28'])
    return folder


def test_archives_become_lists_that_share_no_alphabet(data):
    def rows(name):
        lines = (data / 'meta' / f'{name}.txt').read_text().splitlines()
        return [line.split(' ') for line in lines]

    found = {}
    for name in ('train', 'test', 'tuning-train', 'tuning-test'):
        names, labels = zip(*rows(name))
        found[name] = ''.join(sorted({path[0] for path in names}))
        characters = [path.split('_')[0] for path in names]
        assert len({*zip(characters, labels)}) == len({*labels}) == len({*characters})
        assert {*labels} == {str(i) for i in range(len({*labels}))}
        for path in names:
            assert Image.open(data / 'imgs' / path).size == (28, 28)
    # C is in both archives, but was to train.
    assert found == {
        'train': 'ABCD', 'test': 'EF', 'tuning-train': 'AB', 'tuning-test': 'CD'
    }  # fmt: skip


def test_other_archives_are_refused(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as file:
        file.writestr('image.png', b'')
    with zipfile.ZipFile(tmp_path / 'above.zip', 'w') as file:
        file.writestr('images/../b/c.png', b'')
    train = archive(tmp_path / '1.zip', 'ABC')
    for pair, said in (
        (('x.zip', '1.zip'), 'must hold FOLDER/ALPHABET/CHARACTER/IMAGE.png'),
        (('1.zip', '1.zip'), r'others than these, got \[\]'),
        (('1.zip', 'none.zip'), 'none.zip, which does not exist'),
        (('1.zip', 'above.zip'), 'must hold FOLDER/ALPHABET/CHARACTER/IMAGE.png'),
    ):
        paths = [str(train.with_name(name)) for name in pair]
        with pytest.raises(SystemExit):
            omniglot.main([*paths, '--out', str(tmp_path / 'out')])
        assert re.search(said, capsys.readouterr().err)
        assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'damage, said', [('eps', 'cannot identify image'), ('bytes', 'Bad CRC-32')]
)
def test_images_of_another_format_or_damaged_are_a_wrong_call(
    damage, said, tmp_path, capsys
):
    paths = archive(tmp_path / '1.zip', 'ABC'), archive(tmp_path / '2.zip', 'D')
    if damage == 'eps':
        with zipfile.ZipFile(paths[1], 'w') as file:
            file.writestr(
                'a/E/c/d.png', '%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9'
            )
    else:
        content = paths[0].read_bytes()
        paths[0].write_bytes(content[:300] + bytes(90) + content[390:])
    with pytest.raises(SystemExit) as stopped:
        omniglot.main([*map(str, paths), '--out', str(tmp_path / 'out')])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_is_measured_is_what_mmdet_measures():
    feats, labels = torch.randn(60, 5), torch.arange(60) % 9
    found = retrieval.measure(feats, labels)
    metrics = ReIDMetrics(
        ['mAP', 'CMC'], dict(rank_list=[*range(1, 21)], max_rank=20)
    ).compute_metrics(
        [dict(pred_feature=f, gt_label=y[None]) for f, y in zip(feats, labels)]
    )
    assert found['mAP'] == pytest.approx(100 * metrics['mAP'], abs=0.06)
    expected = [100 * metrics[f'R{k}'] for k in range(1, 21)]
    assert found['recall'] == pytest.approx(expected, abs=0.06)
    assert (found['R1'], found['R5']) == (found['recall'][0], found['recall'][4])


@pytest.mark.slow
def test_a_real_training_becomes_a_row_and_a_picture(
    data, tmp_path, monkeypatch, capsys
):
    if linear_reid_head.mmpretrain is None:
        pytest.skip('mmdet has models of ReID only with mmpretrain')
    monkeypatch.setenv('RAMBO_OMNIGLOT', f'{data}/')
    options = [
        'train_cfg.max_iters=6',
        'train_cfg.val_interval=3',
        'train_dataloader.dataset.triplet_sampler.num_ids=8',
        'train_dataloader.dataset.triplet_sampler.ins_per_id=2',
    ]
    monkeypatch.setattr(retrieval, 'TUNING', options)
    monkeypatch.setattr(retrieval, 'GRID', {'rambo-recall': {'m': []}})
    (path,) = (p for p in retrieval.CONFIGS if 'rambo-recall_' in p.name)
    arguments = [str(path), '--out', str(tmp_path / 'rows.json'), '--tune']
    retrieval.main([*arguments, '--work-dir', str(tmp_path)])
    (row,) = converged.read_rows(tmp_path / 'rows.json')
    assert [point['step'] for point in row['curve']] == [3, 6] and row['images'] == 16
    assert row['curve'][-1]['R1'] == row['R1'] > 0
    assert '| rambo-recall-m | 1 |' in capsys.readouterr().out
    monkeypatch.setattr(retrieval, 'train', None)
    retrieval.main(arguments)  # has its row

    names = (data / 'meta' / 'test.txt').read_text().split()[::2]
    near = retrieval.nearest(torch.randn(len(names), 3), names)
    assert len(near) == retrieval.QUERIES
    assert all(query not in found for query, found in near.items())
    row.update(data='omniglot', loss='rambo-ap', nearest=near)
    picture = tmp_path / 'picture.png'
    retrieval.draw([row], data / 'imgs', picture)
    assert Image.open(picture).width > 500


def test_the_page_shows_what_the_file_holds():
    page = (ROOT / 'docs' / 'retrieval.md').read_text(encoding='utf-8')
    start, end = retrieval.MARKS
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == retrieval.table(converged.read_rows(retrieval.OUT), False)


def sha(config, options):
    resolved = runs.resolve(ROOT / config, options)
    return hashlib.sha256(json.dumps(resolved).encode()).hexdigest()


def test_configs_are_those_of_the_rows_and_the_best_of_the_tuning():
    rows = converged.read_rows(retrieval.OUT)
    for row in rows:
        assert row['config_sha'] == sha(row['config'], row['options']), row['loss']
    for path in retrieval.CONFIGS:
        name = path.relative_to(ROOT).as_posix()
        tried = [row for row in rows if row['config'] == name and row['options']]
        long = [row for row in tried if row['loss'].endswith('-long')]
        best = max(long or tried, key=lambda row: row['R1'])
        steps = retrieval.LONG if long else []
        assert best['config_sha'] == sha(name, [*retrieval.TUNING, *steps])

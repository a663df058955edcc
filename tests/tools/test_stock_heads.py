"""Every stock head of mmdet with the plain loss does what its row in the docs says."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are in mmdet')
import mmdet
from mmdet.models.dense_heads import SOLOHead
from mmdet.models.reid import linear_reid_head
from mmdet.registry import MODELS

from rambo_det import RaMBODenseHeadMixin, RaMBOLoss
from rambo_det.heads import owners
from rambo_det.losses import rows
from tests import ROOT
from tools.common.markdown_table import markdown_row
from tools.dev import check_stock_heads
from tools.dev.check_stock_heads import (
    BUILD,
    MARKS,
    STEP,
    WORKS,
    main,
    outcome,
    row,
    wrong,
)
from tools.dev.stock_heads import HEADS, NOT_APPLICABLE, stock_heads

PAGE = ROOT / 'docs' / 'detectors.md'
TABLE = PAGE.read_text(encoding='utf-8').split(MARKS[0])[1].split(MARKS[1])[0]
# For each head what its row says after the names of the heads.
ROWS = {
    name: f'| {said}'
    for line in TABLE.splitlines()
    for names, _, said in [line[2:].partition(' | ')]
    for name in re.findall(r'`(\w+)`', names)
}
PER_LEVEL = sorted(name for name, line in ROWS.items() if 'once per pyramid' in line)
PER_BATCH = sorted(n for n, line in ROWS.items() if '`use_sigmoid=True` in' in line)
UNBOUND = sorted(name for name, line in ROWS.items() if 'no head of this' in line)
SOFTMAX = dict(scores='log_softmax', use_sigmoid=False)


def installed(name):
    if name not in stock_heads():
        pytest.skip(f'mmdet {mmdet.__version__} has no {name}')
    return name


def test_the_table_has_every_head():
    found = stock_heads()
    assert set(ROWS) == {*HEADS, *NOT_APPLICABLE}
    assert not found - set(ROWS), 'try them, and add their rows'
    if mmdet.__version__ == '3.3.0':
        assert found == set(ROWS)


@pytest.mark.parametrize('name', sorted(HEADS))
def test_the_row_of_a_head_is_what_happens(name):
    found = outcome(installed(name))
    assert markdown_row(row(name, found)) == ROWS[name]
    assert found.where in (WORKS, BUILD, STEP)


def test_the_kinds_of_rows_are_found():
    assert len(PER_LEVEL) > 10 and len(PER_BATCH) > 3 and len(UNBOUND) > 3


@pytest.mark.parametrize('name', PER_LEVEL)
def test_use_sigmoid_does_not_help_a_head_that_ranks_levels(name):
    found = outcome(installed(name), use_sigmoid=True)
    assert f'RaMBOLoss: {name} called the loss once per pyramid' in str(found.error)
    assert markdown_row(row(name, found)) == ROWS[name]


@pytest.mark.parametrize('name', PER_BATCH)
def test_use_sigmoid_is_a_cure_elsewhere(name):
    assert outcome(installed(name), use_sigmoid=True).where == WORKS


@pytest.mark.parametrize('name', ['DETRHead', 'DoubleConvFCBBoxHead', 'SABLHead'])
def test_a_background_column_is_a_cure_where_the_row_says_so(name):
    assert "`scores='log_softmax'`" in ROWS[name]
    assert outcome(name, **SOFTMAX).where == WORKS


@pytest.mark.parametrize('name', [n for n in UNBOUND if n != 'StageCascadeRPNHead'])
def test_the_mixin_binds_where_the_page_says_so(name):
    stock = MODELS.get(installed(name))
    bound = type(f'Bound{name}', (RaMBODenseHeadMixin, stock), {})
    MODELS.register_module(module=bound)
    try:
        assert outcome(name, bound.__name__).where == WORKS
    finally:
        MODELS.module_dict.pop(bound.__name__)


# The heads that cannot be tried


def test_the_abstract_head_is_abstract():
    assert inspect.isabstract(MODELS.get('AnchorFreeHead'))


def test_the_head_that_needs_mmpretrain_ranks_its_people(monkeypatch):
    """With a stand-in for mmpretrain: its columns are right, its rows all positive."""
    args = dict(num_fcs=0, in_channels=8, fc_channels=8, out_channels=8, num_classes=3)
    loss_cls = dict(type='RaMBOLoss')
    if linear_reid_head.mmpretrain is None:
        with pytest.raises(RuntimeError, match='install mmpretrain'):
            linear_reid_head.LinearReIDHead(**args, loss_cls=loss_cls)
    accuracy = SimpleNamespace(calculate=lambda *_, **__: [])
    monkeypatch.setattr(linear_reid_head, 'mmpretrain', object())
    monkeypatch.setattr(linear_reid_head, 'Accuracy', accuracy, raising=False)
    head = linear_reid_head.LinearReIDHead(**args, loss_cls=loss_cls)
    samples = [
        SimpleNamespace(gt_label=SimpleNamespace(label=torch.tensor([i])))
        for i in (0, 1, 2, 0)
    ]
    loss = head.loss((torch.randn(4, 8),), samples)['ce_loss']
    assert torch.isfinite(loss) and loss > 0


# The recipe for any other head


def test_the_recipe_of_the_docs_binds_a_head(monkeypatch):
    """Every score is the number of its image, so rows tell where they are from."""
    page = PAGE.read_text(encoding='utf-8')
    code = page.split('<!-- recipe -->')[1].split('```python')[1].split('```')[0]
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))
    exec(code, {})
    forward, rank = SOLOHead.forward, RaMBOLoss.forward
    seen = []

    def numbered(self, x):
        masks, scores = forward(self, x)
        number = torch.arange(len(scores[0])).view(-1, 1, 1, 1)
        return masks, [level * 0 + number for level in scores]

    def watch(self, pred, *args, **kwargs):
        seen.append((pred.detach(), kwargs['images']))
        return rank(self, pred, *args, **kwargs)

    monkeypatch.setattr(SOLOHead, 'forward', numbered)
    monkeypatch.setattr(RaMBOLoss, 'forward', watch)
    found = outcome('SOLOHead', 'RaMBOSOLOHead')
    assert found.where == WORKS
    ((pred, (images, num_images)),) = seen
    assert num_images == 2 and torch.equal(pred[:, 0].long(), images)


# The tool


@pytest.mark.parametrize(
    'columns, labels, fault',
    [
        (3, [0, 2, 3, 3], ''),
        (4, [0, 2, 3, 3], 'ranks 4 columns, but there are 3 classes'),
        (3, [0, 2, 2], 'no background'),
        (3, [3, 3], 'for objects [0, 2]'),
        (3, [0, 1, 3], 'takes [0, 1, 3] for objects [0, 2]'),
    ],
)
def test_what_is_ranked_is_judged(columns, labels, fault):
    found = wrong(columns, torch.tensor(labels), 3, {0, 2})
    assert fault in found and bool(found) == bool(fault)


def test_a_background_that_is_ranked_as_a_class_is_no_success(monkeypatch):
    for module in (owners, rows):
        monkeypatch.setattr(module, 'check_columns', lambda *_: None)
    found = outcome('FCOSHead')
    assert found[:2] == ('WRONG', 'ranks 81 columns, but there are 80 classes')


def test_levels_that_are_ranked_on_their_own_are_no_success(monkeypatch):
    monkeypatch.setattr(owners, '_refusal', lambda *_: None)
    found = outcome('RetinaHead', use_sigmoid=True)
    assert found[:2] == ('WRONG', 'calls its loss 5 times in a step')


def test_the_command_writes_the_table(tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text('\n'.join(MARKS))
    main(['--only', 'PAAHead', 'AnchorFreeHead', '--update', str(page)])
    lines = [f'| `{name}` {ROWS[name]}' for name in ('PAAHead', 'AnchorFreeHead')]
    assert page.read_text().splitlines()[-5:-2] == ['| --- | --- | --- | --- |', *lines]
    assert lines[0] in capsys.readouterr().out.splitlines()
    page.write_text('no marks')
    with pytest.raises(SystemExit):
        main(['--only', 'PAAHead', '--update', str(page)])
    assert '<!-- stock heads -->' in capsys.readouterr().err


def test_an_error_that_is_not_ours_is_named_as_such(monkeypatch):
    def fail(*_, **__):
        raise KeyError('some name')

    monkeypatch.setattr(check_stock_heads.MODELS, 'build', fail)
    found = outcome('PAAHead')
    assert found[:2] == (BUILD, "an error of mmdet: KeyError: 'some name'")


def test_a_memory_that_decoder_layers_would_share_is_refused():
    memory = dict(memory=2, class_ap=dict(span='memory'))
    found = outcome('DDQDETRHead', **memory)
    assert (found.where, found.cure) == (STEP, 'set memory=0 in loss_cls')

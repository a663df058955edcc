"""A cross-entropy classifier becomes a start for RaMBO."""

import pytest
import torch

pytest.importorskip('mmdet', reason='reads checkpoints of mmengine')

from tools.model_converters import drop_background


def linear(rows):
    return {'weight': torch.randn(rows, 5), 'bias': torch.randn(rows)}


def checkpoint(classes, **heads):
    state = {
        f'{head}.fc_cls.{name}': value
        for head, parameters in heads.items()
        for name, value in parameters.items()
    }
    meta = dict(dataset_meta=dict(classes=classes))
    return dict(meta=meta, state_dict=state, optimizer=dict(step=3))


def test_scores_keep_their_odds_against_background(tmp_path, capsys):
    old = linear(4)
    content = checkpoint(('a', 'b', 'c'), **{'roi_head.bbox_head': old})
    content['state_dict']['backbone.fc_cls.weight'] = torch.ones(4, 2)
    torch.save(content, tmp_path / 'ce.pth')
    drop_background.main([str(tmp_path / 'ce.pth'), str(tmp_path / 'start.pth')])
    saved = torch.load(tmp_path / 'start.pth', weights_only=True)
    assert 'optimizer' not in saved
    new = saved['state_dict']
    assert torch.equal(new['backbone.fc_cls.weight'], torch.ones(4, 2))
    features = torch.randn(7, 5)
    before = (features @ old['weight'].T + old['bias']).softmax(1)
    name = 'roi_head.bbox_head.fc_cls.'
    after = features @ new[f'{name}weight'].T + new[f'{name}bias']
    assert after.shape == (7, 3)
    expected = (before[:, :-1] / before[:, -1:]).log()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert f'{name}weight, {name}bias' in capsys.readouterr().out


def test_all_stages_of_a_cascade():
    heads = {f'roi_head.bbox_head.{stage}': linear(4) for stage in range(3)}
    state = checkpoint((), **heads)['state_dict']
    assert len(drop_background.drop_background(state, 3)) == 6
    assert {len(value) for value in state.values()} == {3}


def test_what_does_not_fit_is_explained(tmp_path, capsys):
    content = checkpoint(('a', 'b'), **{'roi_head.bbox_head': linear(4)})
    torch.save(content, tmp_path / 'ce.pth')
    arguments = [str(tmp_path / 'ce.pth'), str(tmp_path / 'out.pth')]
    with pytest.raises(SystemExit, match=r'with 3 rows.*--num-classes'):
        drop_background.main(arguments)
    drop_background.main([*arguments, '--num-classes', '3'])
    del content['meta']['dataset_meta']
    torch.save(content, tmp_path / 'ce.pth')
    with pytest.raises(SystemExit):
        drop_background.main(arguments)
    assert 'does not say its classes' in capsys.readouterr().err

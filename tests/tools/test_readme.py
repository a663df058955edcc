"""What README.md and the pages of docs/ promise of themselves."""

from __future__ import annotations

import re

import pytest

from tests import ROOT

README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md'))]


def prose(path):
    """A page without its code."""
    text = path.read_text(encoding='utf-8')
    return re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The names that GitHub gives to the headings of a page."""
    heads = re.findall(r'^#+ (.+)$', prose(path), re.MULTILINE)
    heads = [re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', head) for head in heads]
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


def test_the_readme_is_short():
    text = README.read_text(encoding='utf-8')
    assert len(text.split()) <= 900
    assert [line for line in text.splitlines() if len(line) > 88] == []
    tables = re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE)
    assert all(table.count('\n') <= 2 + 8 for table in tables)
    assert len(re.findall(r'^!\[', text, re.MULTILINE)) >= 2


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', prose(page))
    links += re.findall(r'^\[[^]]+\]: (\S+)$', prose(page), re.MULTILINE)
    broken = []
    for link in links:
        file, _, anchor = link.partition('#')
        target = page.parent / file if file else page
        if '://' in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


# The pictures and the result


@pytest.fixture
def tool():
    pytest.importorskip('mmdet', reason='the results need it')
    from tools.dev import draw_readme

    return draw_readme


def test_the_picture_shows_the_default_loss(tool):
    import torch
    from mmdet.registry import MODELS

    logits = torch.tensor(tool.LOGITS, requires_grad=True)
    loss_cls = MODELS.build(dict(type='RaMBOLoss', margin=0.0))
    loss = loss_cls(logits, torch.tensor(tool.LABELS))
    loss.backward()
    cat, dog, pooled = (tool.rank(classes) for classes in ([0], [1], [0, 1]))
    expected = ((cat.loss + dog.loss) / 2 + pooled.loss) / 4
    assert float(loss.detach()) == pytest.approx(expected)
    for ranked in (cat, dog, pooled):
        found = dict(zip(ranked.names, ranked.gradient))
        assert sum(found.values()) == pytest.approx(0, abs=1e-6)
    for row, box in enumerate(tool.BOXES):
        for column, alone in enumerate((cat, dog)):
            name = f'{box} {tool.CLASSES[column]}'
            terms = (dict(zip(r.names, r.gradient))[name] for r in (alone, pooled))
            in_class, in_all = terms
            expected = (in_class / 2 + in_all) / 4
            assert float(logits.grad[row, column]) == pytest.approx(expected, abs=1e-6)
    assert pooled.precisions() == ['1/1', '', '', '', '2/5', '3/6', '', '', '', '']


def test_the_page_of_the_loss_has_all_arguments(tool):
    import inspect

    from rambo_det import RaMBOLoss

    text = (ROOT / 'docs' / 'loss.md').read_text(encoding='utf-8')
    table = text.split('## Arguments')[1].split('\n\n')[1]
    shown = dict(re.findall(r'^\| `(\w+)` \| `([^`]*)` \|', table, re.MULTILINE))
    found = dict(inspect.signature(RaMBOLoss).parameters)
    assert set(re.findall(r'^\| `(\w+)`', table, re.MULTILINE)) == {*found} - {
        'unknown'
    }
    assert shown.pop('lambd') == "'infinite'" and found['lambd'].default == float('inf')
    assert shown == {name: repr(found[name].default) for name in shown}


def test_the_readme_shows_the_result_of_the_file(tool):
    start, end = tool.MARKS
    shown = README.read_text(encoding='utf-8').split(start)[1].split(end)[0].strip()
    assert shown == tool.result_text(*tool.read_runs())


def rows(**losses):
    """Rows of losses, each with its AP50 for seeds 0, 1 and so on."""
    more = dict(data='voc', AP=20.0, AP75=10.0, best_f1=50.0, best_threshold=0.5)
    more.update(f1_at_half=40.0, split='test', images=9)
    return [
        dict(
            **more,
            detector=loss.partition('__')[2] or 'faster-rcnn',
            loss=loss.partition('__')[0].replace('_', '-'),
            seed=seed,
            AP50=value,
            curve=[dict(epoch=e, AP50=value - 4 + e) for e in (2, 4)],
        )
        for loss, values in losses.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    'losses, ours, said',
    [
        (dict(ce=[40.0, 41.0]), '', 'No lead at the end of a training'),
        (dict(ce=[40.0], rambo=[43.0]), 'rambo', 'difference is +3.0. Such a diff'),
        (dict(ce=[40.0, 41.0], rambo=[43.0, 44.1]), 'rambo', 'RaMBO is ahead.'),
        (dict(ce=[43.0, 44.1], rambo=[40.0, 41.0]), 'rambo', 'RaMBO is behind.'),
        (dict(ce=[40.0, 44.0], rambo=[43.0, 42.0]), 'rambo', 'may be chance.'),
        (dict(ce=[40.0], rambo_before=[41.0]), 'rambo-before', '`rambo-before`'),
    ],
)
def test_the_text_says_what_the_rows_show(losses, ours, said, tool, tmp_path):
    path = tmp_path / 'rows.json'
    tool.converged.add_rows(path, rows(focal=[39.0] * 3, **losses))
    runs, found = tool.read_runs(path)
    assert (next(iter(runs)), list(runs)[-1], found) == ('ce', 'focal', ours)
    assert said in tool.result_text(runs, found).replace('\n', ' ')
    tool.draw_result(runs, tmp_path / 'new' / 'picture.png', dpi=20)
    assert (tmp_path / 'new' / 'picture.png').read_bytes().startswith(b'\x89PNG')


def test_most_seeds_and_the_larger_detector_are_shown(tool, tmp_path):
    tiny, path = '__faster-rcnn-tiny', tmp_path / 'rows.json'
    tool.converged.add_rows(path, rows(ce=[1.0], rambo=[2.0]))
    tool.converged.add_rows(path, rows(**{'ce' + tiny: [3.0], 'rambo' + tiny: [4.0]}))
    assert tool.read_runs(path)[0]['rambo'][0]['AP50'] == 2
    more = rows(**{'ce' + tiny: [3.0, 3.0], 'rambo' + tiny: [4.0, 4.0]})
    tool.converged.add_rows(path, more)
    assert [row['AP50'] for row in tool.read_runs(path)[0]['rambo']] == [4, 4]


def test_the_loss_is_drawn(tool, tmp_path):
    tool.draw_loss(tmp_path / 'loss.png', dpi=20)
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')

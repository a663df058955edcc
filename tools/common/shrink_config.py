"""Make any config small enough to train on the demo data in a minute, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Container

from mmengine.config import Config, ConfigDict

from tools.dataset_tools.make_demo_voc import CLASSES, COCO

WIDTH = 32
# What replaces a larger number under these names, anywhere in the model.
_WIDTHS = dict(
    in_channels=WIDTH,
    out_channels=WIDTH,
    feat_channels=WIDTH,
    conv_out_channels=WIDTH,
    block_mid_channels=WIDTH,
    proposal_feature_channel=WIDTH,
    embed_dims=WIDTH,
    fc_out_channels=2 * WIDTH,
    feedforward_channels=2 * WIDTH,
    num_feats=WIDTH // 2,
    num_groups=8,
    num_proposals=30,
    num_queries=50,
    num_dn_queries=20,
    max_per_img=100,
    nms_pre=300,
)
_ENCODED = ('embed_dims', 'num_feats', 'out_channels')
_SAMPLED = 64
_DEPTHS = dict(num_layers=2, stacked_convs=2)
_BACKBONE = (8, 16, 32, 64)


def _walk(value: Any, change: Callable[[dict], None]) -> None:
    """Call a function on every dictionary."""
    if isinstance(value, dict):
        change(value)
        for child in value.values():
            _walk(child, change)
    elif isinstance(value, (list, tuple)):
        for child in value:
            _walk(child, change)


def _shrink_part(part: dict, keep: Container[str]) -> None:
    for name, most in {**_WIDTHS, **_DEPTHS}.items():
        if name not in keep and isinstance(part.get(name), int) and part[name] > most:
            part[name] = most
    if isinstance(part.get('sampler'), dict) and 'num' in part['sampler']:
        part['sampler']['num'] = min(part['sampler']['num'], _SAMPLED)
    for name in ('dropout', 'ffn_drop'):
        if isinstance(part.get(name), float):
            part[name] = 0.0  # it only hinders learning a few images by heart
    norm = part.get('norm_cfg')
    if isinstance(norm, dict) and norm.get('type') in ('BN', 'SyncBN'):
        # One process has no statistics to share, and random weights none to freeze.
        part['norm_cfg'] = dict(type='BN', requires_grad=True)
    if part.get('type') == 'RaMBOShared4Conv1FCBBoxHead':
        part.setdefault('conv_out_channels', WIDTH)
    if part.get('num_classes', 0) > 1:  # an RPN keeps its one
        part['num_classes'] = len(CLASSES)


def _shrink_backbone(model: ConfigDict) -> None:
    """Put a small ResNet with random weights in the place of any backbone."""
    necks = model.neck if isinstance(model.neck, list) else [model.neck]
    wanted = necks[0].in_channels
    several = isinstance(wanted, (list, tuple))
    stages = len(wanted) if several else 1
    model.backbone = dict(
        type='ResNet',
        depth=18,
        base_channels=_BACKBONE[0],
        stem_channels=_BACKBONE[0],
        out_indices=tuple(range(4 - stages, 4)),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
    )
    channels = list(_BACKBONE[4 - stages :])
    necks[0].in_channels = channels if several else channels[0]


def _shrink_stages(model: ConfigDict, most: int = 3) -> None:
    """Keep the first stages of a RoI head with many."""
    head = model.get('roi_head')
    if head is not None and head.get('num_stages', 0) > most:
        head.num_stages = most
        head.bbox_head = head.bbox_head[:most]
        head.stage_loss_weights = head.stage_loss_weights[:most]
        model.train_cfg.rcnn = model.train_cfg.rcnn[:most]


def _shrink_pyramid(model: ConfigDict, levels: int = 3) -> None:
    """Drop the levels of a dense detector that are as coarse as the image."""
    head, neck = model.get('bbox_head'), model.neck
    if head is None or isinstance(neck, list) or neck.get('num_outs', 0) <= levels:
        return
    if 'anchor_generator' in head:
        part = head.anchor_generator
    elif 'strides' in head:
        part = head
        head.regress_ranges = ((-1, 32), (32, 64), (64, 1e8))
    else:
        return
    part.strides = part.strides[:levels]
    neck.num_outs = levels


def _strengthen_losses(model: ConfigDict) -> list[dict]:
    """Let RaMBO, and it alone, learn features from random weights.

    Returns:
        The hooks that this takes: λ falls where positives are moved together.
    """
    losses: list[dict] = []
    _walk(model, losses.append)
    losses = [part for part in losses if part.get('type') == 'RaMBOLoss']
    for loss in losses:
        loss.pop('auxiliary', None)
    together = [loss for loss in losses if loss.get('perturb') == 'together']
    for loss in together:
        loss.update(lambd=0.3, loss_weight=10.0)
    if not together:
        return []
    schedule = dict(param='lambd', start=333.0, curve='exponential')
    return [dict(type='RaMBOScheduleHook', **schedule)]


def _datasets(cfg: Config, data: Path) -> None:
    """Replace data, pipelines and evaluation; a COCO config keeps COCO's format."""
    masks = 'mask_head' in (cfg.model.get('roi_head') or {})
    coco = any(
        evaluator.get('type') == 'CocoMetric'
        for evaluator in [cfg.val_evaluator]
        if isinstance(evaluator, dict)
    )
    load = dict(type='LoadAnnotations', with_bbox=True, with_mask=masks)
    pack = dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    )
    resize = dict(type='Resize', scale_factor=1.0)  # sets scale_factor of the results
    pipeline = [dict(type='LoadImageFromFile'), resize, load, pack]
    for name, split, test in (
        ('train', 'trainval', False),
        ('val', 'test', True),
        ('test', 'test', True),
    ):
        if coco:
            dataset = dict(
                type='CocoDataset',
                ann_file=f'{COCO}/{split}.json',
                data_prefix=dict(img=''),
            )
        else:
            dataset = dict(
                type='XMLDataset',
                ann_file=f'ImageSets/Main/{split}.txt',
                data_prefix=dict(sub_data_root=''),
            )
        cfg[f'{name}_dataloader'] = dict(
            batch_size=4,
            num_workers=0,
            persistent_workers=False,
            # mmengine's loop sleeps two seconds wherever a finite one begins anew.
            sampler=dict(
                type='DefaultSampler' if test else 'InfiniteSampler', shuffle=not test
            ),
            dataset=dict(
                data_root=f'{data}/',
                metainfo=dict(classes=CLASSES),
                filter_cfg=dict(filter_empty_gt=True),
                test_mode=test,
                pipeline=pipeline,
                **dataset,
            ),
        )
    if coco:
        metric = ['bbox', 'segm'] if masks else ['bbox']
        file = f'{data}/{COCO}/test.json'
        cfg.val_evaluator = dict(type='CocoMetric', ann_file=file, metric=metric)
    else:
        cfg.val_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='area')
    cfg.test_evaluator = cfg.val_evaluator


def shrink(cfg: Config, data: Path, steps: int, lr: float) -> Config:
    """Return a copy of a config that trains a small model on the demo data.

    Heads, assigners, samplers and the keys of the loss stay as they are, but for its
    auxiliary loss, which would learn in its stead, and, where positives are moved
    together, λ and weight, which random weights need larger. Widths, depths and numbers
    of proposals shrink; backbone, pipelines, optimiser and schedule are replaced.

    Args:
        cfg: The config.
        data: Folder of the demo data, with its COCO annotations.
        steps: Iterations of training.
        lr: Learning rate of AdamW.
    """
    cfg = cfg.copy()
    model = cfg.model
    _shrink_stages(model)
    # These encode the reference points of their decoder in 256 numbers, whatever the
    # config says.
    encoded = 'dn_cfg' in model or model.type == 'ConditionalDETR'
    keep = _ENCODED if encoded else ()
    if 'decoder' in model and not encoded:
        model.bbox_head.setdefault('embed_dims', WIDTH)
    _walk(model, lambda part: _shrink_part(part, keep))
    _shrink_backbone(model)
    _shrink_pyramid(model)
    if model.type == 'RTMDet':
        model.use_syncbn = False  # which needs a GPU
    schedules = _strengthen_losses(model)
    model.data_preprocessor.update(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    )
    _datasets(cfg, data)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps)
    cfg.val_cfg = dict(type='ValLoop')
    cfg.test_cfg = dict(type='TestLoop')
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=lr, weight_decay=0.01),
        clip_grad=dict(max_norm=10.0),
    )
    warmup = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10)
    cfg.param_scheduler = [warmup]
    # It exchanges the pipeline of the full data late in training.
    hooks = [
        hook
        for hook in cfg.get('custom_hooks') or []
        if hook['type'] not in ('PipelineSwitchHook', 'RaMBOScheduleHook')
    ]
    cfg.custom_hooks = [*hooks, *schedules]
    cfg.default_hooks = dict(
        timer=dict(type='IterTimerHook'),
        logger=dict(type='LoggerHook', interval=steps),
        param_scheduler=dict(type='ParamSchedulerHook'),
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=steps),
        sampler_seed=dict(type='DistSamplerSeedHook'),
        num_class_check=dict(type='NumClassCheckHook'),
    )
    cfg.log_processor = dict(type='LogProcessor', by_epoch=False)
    cfg.log_level = 'WARNING'
    cfg.randomness = dict(seed=0)
    cfg.auto_scale_lr = None
    cfg.load_from = None
    cfg.resume = False
    return cfg

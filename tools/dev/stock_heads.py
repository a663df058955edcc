"""The heads of mmdet that take a ``loss_cls``, each with a config that mmdet ships."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import mmdet
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

SIZE = 128
# What is larger under these names costs time, and DINO wants a place for each query.
MOST = dict(num_queries=100, num_proposals=100, num_dn_queries=20)
SAMPLED = 32
# Heads that cannot be tried, and why.
NOT_APPLICABLE = dict(
    AnchorFreeHead='is abstract: its subclasses call the loss',
    LinearReIDHead='needs mmpretrain; it tells people apart, and detects none',
)


class Stock(NamedTuple):
    """Where a head is to be found.

    Attributes:
        config: One of mmdet's configs.
        kind: The type in it that the head takes the place of, if it is another.
        without: Arguments of that type which the head does not take.
        given: Arguments that it needs besides.
        size: Height and width of the images.
    """

    config: str
    kind: str | None = None
    without: tuple[str, ...] = ()
    given: dict[str, Any] | None = None
    size: int = SIZE


FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco'
FCOS = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco'
CONDINST = 'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance'
RTMDET, INS = (
    'rtmdet/rtmdet_tiny_8xb32-300e_coco',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
)
GA_RETINA = 'guided_anchoring/ga-retinanet_r50_fpn_1x_coco'
RETINA = 'retinanet/retinanet_r50_fpn_1x_coco'
HEADS = dict(
    ATSSHead=Stock('atss/atss_r50_fpn_1x_coco'),
    ATSSVLFusionHead=Stock(
        'glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco'
    ),
    AnchorHead=Stock(RETINA, 'RetinaHead', ('stacked_convs',)),
    AutoAssignHead=Stock('autoassign/autoassign_r50-caffe_fpn_1x_coco'),
    BBoxHead=Stock('faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco'),
    BoxInstBboxHead=Stock(CONDINST, 'CondInstBboxHead'),
    CenterNetUpdateHead=Stock('centernet/centernet-update_r50-caffe_fpn_ms-1x_coco'),
    CondInstBboxHead=Stock(CONDINST),
    ConditionalDETRHead=Stock('conditional_detr/conditional-detr_r50_8xb2-50e_coco'),
    ConvFCBBoxHead=Stock(FASTER, 'Shared2FCBBoxHead', given=dict(num_shared_fcs=2)),
    DABDETRHead=Stock('dab_detr/dab-detr_r50_8xb2-50e_coco'),
    # Its deformable convolution does not take the coarsest level of a smaller image.
    DDODHead=Stock('ddod/ddod_r50_fpn_1x_coco', size=3 * SIZE),
    DDQDETRHead=Stock('ddq/ddq-detr-4scale_r50_8xb2-12e_coco'),
    DETRHead=Stock('detr/detr_r50_8xb2-150e_coco'),
    DIIHead=Stock('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco'),
    DINOHead=Stock('dino/dino-4scale_r50_8xb2-12e_coco'),
    DecoupledSOLOHead=Stock('solo/decoupled-solo_r50_fpn_1x_coco'),
    DecoupledSOLOLightHead=Stock('solo/decoupled-solo-light_r50_fpn_3x_coco'),
    DeformableDETRHead=Stock('deformable_detr/deformable-detr_r50_16xb2-50e_coco'),
    DoubleConvFCBBoxHead=Stock('double_heads/dh-faster-rcnn_r50_fpn_1x_coco'),
    FCOSHead=Stock(FCOS),
    FSAFHead=Stock('fsaf/fsaf_r50_fpn_1x_coco'),
    FoveaHead=Stock('foveabox/fovea_r50_fpn_4xb4-1x_coco'),
    FreeAnchorRetinaHead=Stock('free_anchor/freeanchor_r50_fpn_1x_coco'),
    GARPNHead=Stock('guided_anchoring/ga-rpn_r50_fpn_1x_coco'),
    GARetinaHead=Stock(GA_RETINA),
    GFLHead=Stock('gfl/gfl_r50_fpn_1x_coco'),
    GroundingDINOHead=Stock('grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco'),
    # Its own initialisation has an argument that mmengine does not know.
    GuidedAnchorHead=Stock(
        GA_RETINA,
        'GARetinaHead',
        ('stacked_convs',),
        dict(init_cfg=dict(type='Normal')),
    ),
    LADHead=Stock('lad/lad_r50-paa-r101_fpn_2xb8_coco_1x'),
    LDHead=Stock('ld/ld_r18-gflv1-r101_fpn_1x_coco'),
    Mask2FormerHead=Stock('mask2former/mask2former_r50_8xb2-lsj-50e_coco'),
    Mask2FormerTrackHead=Stock(
        'mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019'
    ),
    MaskFormerHead=Stock('maskformer/maskformer_r50_ms-16xb1-75e_coco'),
    MultiInstanceBBoxHead=Stock('crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman'),
    NASFCOSHead=Stock('nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco'),
    PAAHead=Stock('paa/paa_r50_fpn_1x_coco'),
    PISARetinaHead=Stock('pisa/retinanet-r50_fpn_pisa_1x_coco'),
    RPNHead=Stock('rpn/rpn_r50_fpn_1x_coco'),
    RTMDetHead=Stock(RTMDET, 'RTMDetSepBNHead', ('share_conv', 'exp_on_reg')),
    RTMDetInsHead=Stock(INS, 'RTMDetInsSepBNHead', ('share_conv',)),
    RTMDetInsSepBNHead=Stock(INS),
    RTMDetSepBNHead=Stock(RTMDET),
    RepPointsHead=Stock('reppoints/reppoints-moment_r50_fpn_1x_coco'),
    RetinaHead=Stock(RETINA),
    RetinaSepBNHead=Stock('nas_fpn/retinanet_r50_fpn_crop640-50e_coco'),
    SABLHead=Stock('sabl/sabl-faster-rcnn_r50_fpn_1x_coco'),
    SABLRetinaHead=Stock('sabl/sabl-retinanet_r50_fpn_1x_coco'),
    SCNetBBoxHead=Stock('scnet/scnet_r50_fpn_1x_coco'),
    SOLOHead=Stock('solo/solo_r50_fpn_1x_coco'),
    SOLOV2Head=Stock('solov2/solov2_r50_fpn_1x_coco'),
    Shared2FCBBoxHead=Stock(FASTER),
    Shared4Conv1FCBBoxHead=Stock('gn/mask-rcnn_r50_fpn_gn-all_2x_coco'),
    # mmdet's own RPN does not build its cascade.
    StageCascadeRPNHead=Stock(
        'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco'
    ),
    TOODHead=Stock('tood/tood_r50_fpn_1x_coco'),
    VFNetHead=Stock('vfnet/vfnet_r50_fpn_1x_coco'),
    YOLACTHead=Stock('yolact/yolact_r50_1xb8-55e_coco'),
    YOLOFHead=Stock('yolof/yolof_r50-c5_8xb8-1x_coco'),
    YOLOV3Head=Stock('yolo/yolov3_d53_8xb8-ms-608-273e_coco'),
    YOLOXHead=Stock('yolox/yolox_s_8xb8-300e_coco'),
)


def _takes_loss_cls(kind: Any) -> bool:
    """Whether a class takes a ``loss_cls``, maybe by handing it on."""
    for parent in inspect.getmro(kind):
        if '__init__' not in vars(parent):
            continue
        names = inspect.signature(vars(parent)['__init__']).parameters
        if 'loss_cls' in names:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in names.values()):
            return False
    return False


def stock_heads() -> set[str]:
    """Return the names of the heads of the installed mmdet that take a ``loss_cls``."""
    register_all_modules()
    return {
        name
        for name, kind in MODELS.module_dict.items()
        if inspect.isclass(kind)
        and kind.__module__.startswith('mmdet.')
        and _takes_loss_cls(kind)
    }


def _parts(value: Any) -> Iterator[Any]:
    """Yield every dictionary of a config."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for child in value:
            yield from _parts(child)


def stock_config(name: str, kind: str | None = None, **loss: Any) -> Config:
    """Return the config of a detector with a stock head and the loss.

    Args:
        name: The head.
        kind: A subclass that takes its place.
        **loss: Arguments of the loss.
    """
    stock = HEADS[name]
    folder = Path(mmdet.__file__).parent / '.mim' / 'configs'
    cfg = Config.fromfile(folder / f'{stock.config}.py')
    found = 0
    for part in _parts(cfg.model):
        part.pop('init_cfg', None)  # pretrained weights
        part.pop('batch_augments', None)  # to the size of large images
        for key, most in MOST.items():
            if isinstance(part.get(key), int):
                part[key] = min(part[key], most)
        if isinstance(part.get('sampler'), dict) and 'num' in part['sampler']:
            part['sampler']['num'] = min(part['sampler']['num'], SAMPLED)
        if part.get('type') == (stock.kind or name):
            for key in stock.without:
                part.pop(key, None)
            part['type'] = kind or name
            part['loss_cls'] = dict(type='RaMBOLoss', **loss)  # update() would merge
            part.update(stock.given or {})
            found += 1
    assert found, f'{stock.config} has no {stock.kind or name}'
    if 'teacher_config' in cfg.model:  # a trained one that is downloaded
        teacher = {k: v for k, v in cfg.model.items() if not k.startswith('teacher')}
        focal = dict(type='QualityFocalLoss', use_sigmoid=True)
        head = dict(cfg.model.bbox_head, type='GFLHead', loss_cls=focal)
        head.pop('loss_ld')
        teacher.update(type='GFL', bbox_head=head)
        cfg.model.update(teacher_config=dict(model=teacher), teacher_ckpt=None)
    return cfg

# Faster R-CNN with RaMBO instead of cross-entropy, otherwise mmdet's VOC baseline.
_base_ = ['mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', './losses/rambo.py']

default_hooks = dict(invalid_loss=dict(type='InvalidLossHook'))

model = dict(
    roi_head=dict(
        bbox_head=dict(type='RaMBOShared2FCBBoxHead', loss_cls=_base_.rambo_loss)
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)

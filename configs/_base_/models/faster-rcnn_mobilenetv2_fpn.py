# A Faster R-CNN that trains on a CPU: MobileNetV2, 128 channels, images of about
# 320 pixels, so anchors of half mmdet's size and a quarter of its proposals.
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$RAMBO_MOBILENETV2:open-mmlab://mmdet/mobilenet_v2}}',
        ),
    ),
    neck=dict(in_channels=[24, 32, 96, 320], out_channels=128),
    rpn_head=dict(
        in_channels=128,
        feat_channels=128,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128, finest_scale=28),
        bbox_head=dict(in_channels=128, fc_out_channels=512, num_classes=20),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=250),
        rcnn=dict(sampler=dict(num=512)),  # more than there are: none is left out
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=250),
        # Average precision asks for all detections, also those of low scores.
        rcnn=dict(score_thr=0.0001),
    ),
)

# For trials: half the channels, fewer proposals, images of about 160 pixels.
_base_ = './faster-rcnn_mobilenetv2_fpn-p3.py'

model = dict(
    neck=dict(out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64), bbox_head=dict(in_channels=64)
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=300, max_per_img=150)),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=150)),
)

# Every image on its own, in both terms.
_base_ = './faster-rcnn_mobilenetv2_fpn_rambo_6e_bccd.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(class_ap=dict(span='image'), pooled_ap=dict(span='image'))
        )
    )
)

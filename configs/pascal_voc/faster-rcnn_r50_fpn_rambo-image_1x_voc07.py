# Every image on its own, in both terms.
_base_ = './faster-rcnn_r50_fpn_rambo_1x_voc07.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(class_ap=dict(span='image'), pooled_ap=dict(span='image'))
        )
    )
)

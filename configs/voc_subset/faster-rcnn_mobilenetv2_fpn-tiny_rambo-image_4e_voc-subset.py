# Every image on its own, in both terms.
_base_ = './faster-rcnn_mobilenetv2_fpn-tiny_rambo_4e_voc-subset.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(class_ap=dict(span='image'), pooled_ap=dict(span='image'))
        )
    )
)

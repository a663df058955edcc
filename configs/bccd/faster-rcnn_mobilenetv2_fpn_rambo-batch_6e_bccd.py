# All rows of the batch together, in both terms.
_base_ = './faster-rcnn_mobilenetv2_fpn_rambo_6e_bccd.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                memory=0, class_ap=dict(span='batch'), pooled_ap=dict(span='batch')
            )
        )
    )
)

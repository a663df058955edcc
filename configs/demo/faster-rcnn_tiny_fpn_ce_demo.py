# The same detector with mmdet's cross-entropy, for comparison.
_base_ = './faster-rcnn_tiny_fpn_rambo_demo.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='CrossEntropyLoss',
                use_sigmoid=False,
                loss_weight=1.0,
            ),
        )
    )
)

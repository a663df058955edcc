# The cheapest one, for comparisons with many seeds on a CPU: half the channels, images
# of about 160 pixels, one sample in each bin of a RoI.
_base_ = './faster-rcnn_mobilenetv2_fpn-small.py'

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(fc_out_channels=256),
    )
)

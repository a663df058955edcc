# PASCAL VOC 2007+2012 in COCO format, for configs that inherit one of mmdet's for COCO:
# they differ from it in paths and classes alone. mmdet's converter writes the
# annotations: .mim/tools/dataset_converters/pascal_voc.py data/VOCdevkit
# --out-dir data/VOCdevkit/annotations --out-format coco
voc_root = 'data/VOCdevkit/'
voc_dataset = dict(
    data_root=voc_root,
    data_prefix=dict(img=''),
    metainfo=dict(
        classes=(
            'aeroplane',
            'bicycle',
            'bird',
            'boat',
            'bottle',
            'bus',
            'car',
            'cat',
            'chair',
            'cow',
            'diningtable',
            'dog',
            'horse',
            'motorbike',
            'person',
            'pottedplant',
            'sheep',
            'sofa',
            'train',
            'tvmonitor',
        ),
    ),
)
voc_train_dataloader = dict(
    dataset=dict(ann_file='annotations/voc0712_trainval.json', **voc_dataset)
)
voc_val_dataloader = dict(
    dataset=dict(ann_file='annotations/voc07_test.json', **voc_dataset)
)
voc_evaluator = dict(ann_file=voc_root + 'annotations/voc07_test.json')

# From a trained cross-entropy detector on: four epochs with a tenth of the rate and a
# schedule of their own. RAMBO_START names the checkpoint, for RaMBO the one that
# tools/model_converters/drop_background.py has written. See docs/deployment.md.
finetune_start = '{{$RAMBO_START:work_dirs/start.pth}}'
finetune_epochs = 4
finetune_train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=finetune_epochs, val_interval=2
)
finetune_rate = 2e-5
finetune_schedule = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        end=finetune_epochs,
        T_max=finetune_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]

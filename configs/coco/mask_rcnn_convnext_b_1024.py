# ConvNeXt-B alone, 1024 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_1024.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="convnext_base",
            pretrained="pretrained/convnext-base-224",
            resolution_px=1024,
            blocks_per_stage=(3, 4, 28, 4),
        ),
    ],
    interaction=dict(num_stages=4),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 2, 3)),
)
optimizer = dict(layer_decay=1.0, decay_all=True)

# A frozen InternViT-6B at 512 px beside a trained ConvNeXt-T at 1024 px: Mask R-CNN, 12 epochs, 16 images a step, on one GPU.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_multi_scale.py",
    "../_base_/training_1x.py",
    "../_base_/models/internvit_6b_ct.py",
]
model = dict(
    branches=dict(
        internvit_6b=dict(frozen_blocks="all", drop_path_rate=0.0, checkpoint_blocks=False),
        tiny=dict(preset="convnext_tiny", pretrained="pretrained/convnext-tiny-224", checkpoint_blocks=False),
    ),
    interaction=dict(direction="to_small", drop_path_rate=0.0),
)
optimizer = dict(lr=2e-4)
train = dict(save_frozen=False)

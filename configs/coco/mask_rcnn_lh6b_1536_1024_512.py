# PIIP-LH6B (DeiT III, MAE, InternViT-6B), 1536/1024/512 px: Mask R-CNN, 12 epochs, 32 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale_1536.py", "../_base_/training_1x.py", "../_base_/models/lh6b.py"]
optimizer = dict(lr=2e-4)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch

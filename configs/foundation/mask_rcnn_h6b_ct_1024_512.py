# PIIP with InternViT-6B and DINOv3's ConvNeXt-T in the ViT-H's place, 1024/512 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_multi_scale.py",
    "../_base_/training_1x.py",
    "../_base_/models/internvit_6b_ct.py",
]

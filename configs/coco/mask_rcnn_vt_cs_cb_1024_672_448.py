# PIIP-VT-CS-CB (C: ConvNeXt, V: DeiT), 1024/672/448 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_convnext.py", "../_base_/training_1x.py", "../_base_/models/convnext_mix_vt.py"]
optimizer = dict(lr=2e-4, layer_decay=0.8)

# C-RADIOv3 B and ConvNeXt-T, 512/256 px: UPerNet, 80,000 steps, 16 images a step, on one GPU of 24 GB.
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/training_80k.py", "../_base_/models/radio_b_ct.py"]
model = dict(branches=dict(large=dict(resolution_px=256), tiny=dict(resolution_px=512)))
optimizer = dict(lr=1e-4, layer_decay=0.9)

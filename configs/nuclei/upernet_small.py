# Nuclei (Data Science Bowl 2018) as two classes of pixels: background and nucleus.
_base_ = ["../_base_/small_piip.py", "../_base_/small_upernet.py", "../_base_/small_training.py"]
task = "segmentation"
data = dict(
    train_shards="shards/nuclei_maps/train",
    val_shards="shards/nuclei_maps/val",
    augment=dict(
        short_edge_px=256, max_edge_px=384, scale_range=(0.8, 1.5), crop_px=(128, 128), max_class_share=0.95
    ),
    micro_batch_size=4,
    num_streams=2,
    workers=1,
)
schedule = dict(kind="poly")
train = dict(steps=300, evaluate_every_steps=100, checkpoint_every_steps=150)

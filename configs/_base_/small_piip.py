# A two-branch PIIP that trains from scratch on a laptop: the wider model reads the smaller image.
model = dict(
    branches=[
        dict(resolution_px=64, embed_dim=128, depth=4, num_heads=4, patch_size_px=8, pretrain_resolution_px=64),
        dict(resolution_px=128, embed_dim=64, depth=4, num_heads=4, patch_size_px=8, pretrain_resolution_px=128),
    ],
    # From scratch the exchange may take part at once; a pretrained model would start it at 0.
    interaction=dict(num_stages=4, num_heads=4, gamma_init=0.1),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)

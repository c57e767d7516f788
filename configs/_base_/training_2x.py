# The same over 24 epochs; the rate falls after the 16th and the 22nd.
_base_ = ["training_1x.py"]
train = dict(epochs=24)

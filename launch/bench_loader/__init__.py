"""`rookery bench loader`: this loader beside others, on a user's own shards.

scene.py       the images in all forms that they read
contender.py   what all of them have in common: settings, and a clock around batches
ours.py        this project's loader, and where its time goes
peers.py       timm, torchvision, webdataset and FFCV, each as its own documentation uses it
rounds.py      processes that measure in turn
waiting.py     how long a training waits for a loader that is as fast as it is
measure.py     all of it
report.py      the table, and what to do about the bottleneck
"""

"""`rookery bench loader`: this loader beside others, on a user's own shards.

contender.py   what all of them have in common: settings, and a clock around batches
ours.py        this project's loader, and where its time goes
peers.py       timm, torchvision, webdataset and FFCV, each as its own documentation uses it
rounds.py      processes that measure in turn
report.py      the table, and what to do about the bottleneck
"""

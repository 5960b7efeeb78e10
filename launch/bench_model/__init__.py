"""`rookery bench model`: throughput of models beside others, on made pictures.

contender.py   a name such as `nest_tiny`, `refiner_vit_s+maps` or `timm:nest_tiny_jx`, and the model behind it
runner.py      one model at work, in training or inference: its steps, its memory, a clock around them
batch.py       the largest batch that fits on a GPU
count.py       floating-point operations and bytes of every operation, without computing anything
peaks.py       what GPUs can do at most
rounds.py      models measured in turn, and the figures of a row
measure.py     one run: all of the above
report.py      the table

All but report.py need torch alone, and timm for names that begin with `timm:`, so that a bare machine can run them.
"""

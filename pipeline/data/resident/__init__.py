"""A split that stays decoded in the memory of the device, where its pictures are augmented: `data.resident`.

What is drawn for a sample, and where, is as with the loader (`plan`); what is done is the same arithmetic on whole
batches (`augment`), to the last bit. So a run may have it or not from one start to the next.
"""

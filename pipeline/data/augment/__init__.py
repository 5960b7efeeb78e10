"""What is done to a sample between decoding and the model: crop, RandAugment, jitter, erasing, mixup and cutmix.

settings.py    the configuration models (no heavy import)
keyed.py       random numbers as a pure function of (seed, epoch, sample)
transforms.py  `build_train_transform`, `build_eval_transform`: PIL image -> float32 tensor
mixing.py      mixup, cutmix, label smoothing and the soft-target loss on batches
"""

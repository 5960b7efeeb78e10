"""Trained models for other programs: safetensors at any image size, ONNX, timm.

Every format is written as a directory that appears as a whole, after what is in it was run and compared with the model.
"""

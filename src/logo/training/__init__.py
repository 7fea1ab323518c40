"""Training of a pool: one PEFT adapter per file of rows, one after the other on one loaded base model.

config (how adapters are trained) -> rows (a file as tokens) -> loop (one adapter) -> pool (`train`: all files)
"""

"""What running the models takes: flags, presets, processes, logs, checkpoints, files.

README.md here says how to train large models, load the released ones and resume runs.
"""

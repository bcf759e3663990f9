"""Data sets of images, and batches of them.

In reading order: dataset.py says what a data set is; images.py, archives.py, files.py
and folder.py read one from disk; world.py, shapes.py, finder.py and scorer.py are the
built-in world; degrade.py makes the conditions of superres and inpaint; tokenizer.py
reads captions; loader.py makes batches; latents.py caches what stage one says of each
image; open.py opens the data set of a run.

README.md here is about your own images.
"""

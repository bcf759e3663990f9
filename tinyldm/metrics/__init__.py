"""How good images are: one by one (images.py), and as sets (sets.py, features.py)."""

"""What `python bench.py` measures on a GPU."""

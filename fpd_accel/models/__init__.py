"""The pose networks; `names.py` lists them and `create.py` builds them."""

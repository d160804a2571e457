"""Convert experiment files of the original repositories to recipes."""

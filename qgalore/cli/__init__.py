"""The programs of the command line: the commands of ``qgalore``, which train.py and tools/*.py open too."""

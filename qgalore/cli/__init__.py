"""The programs of the command line: what ``train.py`` and the tools do behind their arguments."""

"""Reading the records of runs and showing how training and its subspaces converge: table, HTML, CSV, TensorBoard."""

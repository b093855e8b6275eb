"""Taking the rows behind bad answers out of a training set."""

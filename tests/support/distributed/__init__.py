"""Several processes of one run on this machine, forked from one that has imported everything."""

"""The command line: parse, import late, call, print. Click is used nowhere else."""

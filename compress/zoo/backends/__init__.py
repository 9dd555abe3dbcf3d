"""Where models run: processes of this machine, tasks of a Ray cluster, or jobs of Slurm."""

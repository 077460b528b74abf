"""Code that several tests share: jobs, input, hosts, a SLURM cluster, tiny models, reading the package's source."""

"""What runs processes: devices, launching, signals, collectives, Slurm, memory limits. No torch until one starts."""

"""Start and stop processes: devices, launching, signals, collectives, Slurm, memory, shared artifacts.

Only `collectives` imports torch with the module; the others do when a process starts.
"""

"""What a run needs from the machine: processes, checkpoints, signals, precision. Import the modules one by one."""

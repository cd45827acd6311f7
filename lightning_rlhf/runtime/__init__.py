"""Services of a run: processes, checkpoints, signals, precision. Import the modules one by one."""

"""The machine a program runs on: files, seeds, packages, devices, processes, signals, clocks, the Hub."""

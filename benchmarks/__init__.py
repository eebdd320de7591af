"""Measurements that the README and the guides quote; `make bench` runs the timings."""

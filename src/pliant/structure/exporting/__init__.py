"""Writing what is `remaining` as a stock checkpoint, with a proof: in memory by `export`, or from
disk to disk.

`disk_export` does the latter: a `disk_model` is the base, a `disk_plan` says what becomes of each
tensor, `shards` are written one by one, and the adapters are `saved` ones.
"""
